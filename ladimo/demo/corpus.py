"""The sources of Python's standard library, which every machine has, split into training files and held-out files."""

import hashlib
import sysconfig
from pathlib import Path

TEST_FOLDERS = {"test", "tests", "idle_test"}
# Other people's packages, and files that are generated tables rather than code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "lib2to3", "__pycache__", "ensurepip"}
LONGEST_LINE = 400


def library_sources(tests: bool = False) -> dict[str, str]:
    """The text of the library's modules by relative path, sorted. With `tests`, that of its tests instead, if installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & SKIPPED_FOLDERS or bool(folders & TEST_FOLDERS) != tests or _is_table(relative):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and max(map(len, text.splitlines())) <= LONGEST_LINE:
            sources[str(relative)] = text
    return sources


def is_held_out(name: str) -> bool:
    """True for one file in 25. The choice depends on the name only, so it is the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 25 == 0


def _is_table(relative: Path) -> bool:
    if relative.parts[0] == "encodings":
        return relative.name.startswith(("cp", "iso8859", "mac_", "koi8"))
    return relative.name.startswith("_sysconfigdata") or relative.name == "topics.py"
