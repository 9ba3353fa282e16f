"""Where code that was compiled for this machine is kept."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_directories() -> list[Path]:
    """The places to try, best first: the user's cache, then a directory of the user's own among the temporary files.

    A user without a home directory or an entry in the list of users, as containers have them, is left with the last.
    """
    bases = [Path(os.environ.get("XDG_CACHE_HOME", ""))]
    with suppress(RuntimeError):  # there is no home directory
        bases.append(Path.home() / ".cache")
    found = [base / "ladimo" for base in bases if base.is_absolute()]
    with suppress(FileNotFoundError):  # nothing can be written anywhere
        found.append(Path(tempfile.gettempdir()) / f"ladimo-{os.getuid()}")
    return list(dict.fromkeys(found))


def make_private(directory: Path) -> None:
    """Make the directory where it is missing. Raises OSError where it cannot be made, or where another user could put code into
    it that we would run."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "other users can write there", str(directory))
