"""Markdown tables."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"-?[\d,.]+%?|-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. Columns of numbers are aligned to the right."""
    rows = list(rows)
    numbers = [all(NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(head))]
    lines = [head, ["---:" if each else "---" for each in numbers], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """A text that is safe in a cell: on one line, and with its brackets and bars shown as they are. Code needs no escapes."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = [part.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    return "".join(escaped[place // 2] if place % 2 == 0 else part for place, part in enumerate(parts))
