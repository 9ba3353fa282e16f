"""The lock on the directory for policies and defaults. Only one server at a time may use a directory."""

import fcntl
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "routing.lock"

logger = logging.getLogger(__name__)


@contextmanager
def held(directory: Path | None) -> Iterator[None]:
    """Lock the directory for this process while the block runs. Create it if it is missing. None: there is nothing to lock.

    The lock belongs to an open file. The system frees it when the process ends, even after a crash. Raises ValueError if the
    directory cannot be written or another server holds the lock.
    """
    if directory is None:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        file = (directory / LOCK_FILE).open("a")
    except OSError as error:
        reason = "it is a file" if directory.is_file() else error.strerror
        raise ValueError(f"--policies-dir {directory}: cannot be written ({reason})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"--policies-dir {directory}: another server uses it; each server needs a directory of its own"
            raise ValueError(message) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): make sure that no other server uses it", directory, error.strerror)
        yield
