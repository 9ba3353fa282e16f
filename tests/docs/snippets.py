"""The fenced code blocks of the documents."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy" / "RUNBOOK.md",
    ROOT / "loadtests" / "README.md",
)
# In a fence's info string: the block cannot run in a test.
NO_TEST = "no-test"


@dataclass(frozen=True)
class Snippet:
    """`info` is the fence's info string: the language, then markers. `line` is the fence's line, counted from 1."""

    document: str
    line: int
    info: tuple[str, ...]
    code: str

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""

    @property
    def is_tested(self) -> bool:
        return NO_TEST not in self.info

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments. A quoted text and a line that ends with a backslash go on."""
        found, open_command = [], ""
        for line in self.code.splitlines():
            open_command += line + "\n"
            if line.endswith("\\") or open_command.count("'") % 2:
                continue
            command = re.sub(r"^\s*#.*$|\s{2,}#\s.*$", "", open_command, flags=re.MULTILINE).strip()
            found += [command] if command else []
            open_command = ""
        assert not open_command, f"{self.place}: the last command is not complete"
        return found


def snippets() -> Iterator[Snippet]:
    """All blocks in the order of the documents."""
    for path in DOCUMENTS:
        document = path.relative_to(ROOT).as_posix()
        start, lines = 0, list[str]()
        info: tuple[str, ...] = ()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.startswith("```"):
                lines.append(line)
            elif start:
                yield Snippet(document, start, info, "\n".join(lines) + "\n")
                start = 0
            else:
                start, info, lines = number, tuple(line.removeprefix("```").split()), []
        assert not start, f"{document}:{start}: the block has no end"
