"""Finds, reads and writes the files of a checkpoint directory. A reader never sees a file that is half written."""

import json
import os
from pathlib import Path
from typing import Any


def resolve_directory(model: str | Path) -> Path:
    """The directory of a model. A hub id is downloaded first. Raises ValueError if neither works."""
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises many types of errors; all mean the same to the caller
        raise ValueError(f"{name}: not a directory, and not to be had from a model hub ({type(error).__name__})") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file if it is missing, cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also invalid UTF-8, a number that is too long, lists nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all. After the return it survives a crash.

    Raises OSError naming the file if it cannot be written. No partial file is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # the error of flush or fsync on a full disk has no file name
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, as `write_text` does. Raises OSError; ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
