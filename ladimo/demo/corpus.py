"""The text that every machine has: the sources of Python's standard library, cut into training and held-out files."""

import hashlib
import sysconfig
from pathlib import Path

# Folders and files that are tests, generated tables or other people's packages, not library code.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "ensurepip"}
SKIPPED_FILES = ("_sysconfigdata", "topics.py", "cp", "iso8859", "mac_", "koi8")


def library_sources() -> dict[str, str]:
    """Relative path -> text of every library module worth reading, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped_table = relative.parts[0] == "encodings" and relative.name.startswith(SKIPPED_FILES)
        if SKIPPED_FOLDERS & set(relative.parts) or skipped_table or relative.name.startswith(SKIPPED_FILES[:2]):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            sources[str(relative)] = text
    return sources


def is_held_out(name: str) -> bool:
    """One file in 25, chosen by name so that the choice is the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 25 == 0
