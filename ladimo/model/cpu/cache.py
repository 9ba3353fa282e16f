"""The directories for code that was compiled on this machine."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_directories() -> list[Path]:
    """The directories to try, best first: the user's cache directory, then a directory of this user for temporary files.

    In containers a user may have no home directory and no entry in the list of users. Then only the last one is left.
    """
    bases = [Path(os.environ.get("XDG_CACHE_HOME", ""))]
    with suppress(RuntimeError):  # the user has no home directory
        bases.append(Path.home() / ".cache")
    found = [base / "ladimo" for base in bases if base.is_absolute()]
    with suppress(FileNotFoundError):  # there is no directory for temporary files
        found.append(Path(tempfile.gettempdir()) / f"ladimo-{os.getuid()}")
    return list(dict.fromkeys(found))


def make_private(directory: Path) -> None:
    """Create the directory if it is missing. Raises OSError if this fails, or if other users could write code into it."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "other users can write there", str(directory))
