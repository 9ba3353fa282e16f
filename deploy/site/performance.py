"""The page of all committed records of the benchmarks: conditions, figures and plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.site.tables import cell, table
from loadtests import conversion_bench

RESULTS = Path(__file__).parents[2] / "loadtests" / "results"
# Where a record's rows are, by the order in which they are looked for.
ROWS = ("results", "points", "policies", "figures")


def plots() -> dict[str, bytes]:
    """The plots that belong to records, by their place on the site."""
    return {f"performance/{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(RESULTS.glob("*/*.svg"))}


def performance_page() -> str:
    """All records, by the hardware that they were measured on."""
    text = (
        "# Records\n\nThe records of the benchmarks that are kept in `loadtests/results`, with their conditions. "
        "[Benchmarks](../benchmarks.md) says what they mean. Times are in seconds unless a name says otherwise.\n"
    )
    for hardware in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        text += f"\n## {hardware.name}\n"
        for path in sorted(hardware.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            text += f"\n### {path.stem}\n\n{_conditions(record)}\n\n{_figures(record)}"
            plot = path.with_suffix(".svg")
            text += f"\n![The figures of {path.stem}]({hardware.name}/{plot.name})\n" if plot.exists() else ""
    return text


def _conditions(record: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in record.items() if isinstance(value, (str, int, float)) and key != "benchmark"}
    return "; ".join(f"{key.replace('_', ' ')}: {cell(_show(value))}" for key, value in plain.items())


def _figures(record: Mapping[str, Any]) -> str:
    """The rows as a table. Lists and objects inside rows are left out. The long records of `conversion_bench` are summed up."""
    if record.get("benchmark") == "conversion_bench":
        head = "Perplexity relative to the dense model, by budget: the median of the seeds, their range, and the active share."
        return f"{head}\n\n{conversion_bench.table(record['results'])}\n"
    rows = list(_rows(record))
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(_is_plain(row.get(key)) for row in rows)]
    return table([key.replace("_", " ") for key in columns], [[cell(_show(row.get(key))) for key in columns] for row in rows])


def _rows(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found: Any = next((record[name] for name in ROWS if name in record), record)
    if isinstance(found, Sequence):
        yield from found
    elif all(isinstance(value, Mapping) for value in found.values()):
        yield from ({"": name, **row} for name, row in found.items())
    else:
        yield from ({"figure": key.replace("_", " "), "value": value} for key, value in found.items() if _is_plain(value))


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _show(value: object) -> str:
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 1000
            else f"{value:.3g}"
            if abs(value) < 0.1
            else f"{value:.3f}".rstrip("0").rstrip(".")
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value) if _is_plain(value) else "-"
