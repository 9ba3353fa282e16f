"""Files of a checkpoint directory: found, read, and written so that a reader never meets half of one."""

import json
import os
from pathlib import Path
from typing import Any


def resolve_directory(model: str | Path) -> Path:
    """A local directory as it is; otherwise a hub id, downloaded. Raises ValueError when neither can be had."""
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises many unrelated types; all mean the same to the caller
        raise ValueError(f"{name}: not a directory, and not to be had from a model hub ({type(error).__name__})") from error


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, an endless number, a bottomless list
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all, and survives a crash once written.

    Raises OSError naming the file when it cannot be written; nothing of it is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk is met in flush or fsync, which know no name
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
