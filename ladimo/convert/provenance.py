"""provenance.json: how a checkpoint was made. It also names the directory of the dense source."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ladimo
from ladimo.checkpoint import content_hash, read_json
from ladimo.convert.recipe import Recipe

PROVENANCE = "provenance.json"


def conversion_arguments(
    source: str, directory: Path, recipe: Recipe, text: Sequence[Path] | None, device: str
) -> dict[str, Any]:
    """The arguments that must be the same to resume an interrupted conversion."""
    files = [{"path": str(file.resolve()), "sha256": file_hash(file)} for file in text or ()]
    return {
        "source": {"name": source, "path": str(directory.resolve()), "sha256": content_hash(directory)},
        "recipe": recipe.to_dict(),
        "text": files or "the Python standard library",
        "device": device,
    }


def provenance(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        "format": 1,
        "source": arguments["source"],
        "method": arguments["recipe"]["method"],
        "seed": arguments["recipe"]["seed"],
        "arguments": arguments,
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "ladimo": ladimo.__version__,
        },
        "revision": code_revision(),
    }


def find_dense_source(model: Path, dense: Path | None) -> Path | None:
    """The directory of the dense source of a converted checkpoint; None if the source is gone or has changed.

    dense: the directory where it is now, if it has moved. Raises ValueError if another model is there.
    """
    if not (model / PROVENANCE).exists():
        if dense is not None:
            raise ValueError(f"{model}: has no {PROVENANCE} to check {dense} against")
        return None
    source = read_json(model / PROVENANCE)["source"]
    directory = dense or Path(source["path"])
    if directory.is_dir() and (directory / "config.json").exists() and content_hash(directory) == source["sha256"]:
        return directory
    if dense is not None:
        raise ValueError(f"{dense}: is not the dense source of {model} (its SHA-256 is not {source['sha256'][:12]}...)")
    return None


def file_hash(file: Path) -> str:
    """The SHA-256 of a file's content. Raises ValueError if there is no such file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def code_revision() -> str:
    """The git commit of this code ("-dirty" with uncommitted changes); the version, if it does not run from its own clone."""
    root = Path(ladimo.__file__).resolve().parents[1]

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    toplevel = git("rev-parse", "--show-toplevel")
    if toplevel and Path(toplevel).resolve() == root:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    return f"ladimo {ladimo.__version__}"
