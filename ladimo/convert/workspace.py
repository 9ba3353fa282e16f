"""The work directory of a conversion, OUT.partial. It has the finished stages and layers, so that an interrupted run resumes.

Each stage writes its tensors first and its JSON record last, each in an atomic step. A stage without a record is run again.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ladimo.checkpoint import TensorReader, read_json, save_tensors, write_json
from ladimo.model.config import MoeLayerConfig
from ladimo.model.moe import ExpertLayer
from ladimo.model.router import weight_dtype

ARGUMENTS = "arguments.json"


class Workspace:
    """The directory is made when the first file is saved, so input that is refused leaves no trace.

    Raises ValueError if the directory belongs to a conversion with other arguments. The message names the difference.
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any]) -> None:
        self.out, self.directory, self.arguments = out, work_directory(out), arguments
        if (self.directory / ARGUMENTS).exists():
            difference = describe_difference(read_json(self.directory / ARGUMENTS), arguments)
            if difference:
                raise ValueError(
                    f"{self.directory}: holds an interrupted conversion with other arguments: {difference}; "
                    f"give the same arguments to resume it, or remove the directory"
                )
        elif self.directory.exists() and any(not entry.name.endswith(".partial") for entry in self.directory.iterdir()):
            raise ValueError(f"{self.directory}: exists and is not the work directory of a conversion")

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The JSON record of a stage. If there is none yet, `make` runs the stage and returns it."""
        if not (self.directory / f"{name}.json").exists():
            write_json(self.directory / f"{name}.json", make())
        return self.record(name)

    def record(self, name: str) -> dict[str, Any]:
        """The JSON record of a finished stage."""
        record: dict[str, Any] = read_json(self.directory / f"{name}.json")
        return record

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if not (self.directory / ARGUMENTS).exists():
            write_json(self.directory / ARGUMENTS, self.arguments)
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_tensors(partial, {key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
        partial.replace(path)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.directory / name)
        return tensors

    def save_layer(self, index: int, layer: ExpertLayer, dtype: torch.dtype) -> None:
        """Save a layer in the source's dtype, so that all measurements use the weights as they are stored."""
        weights = {name: tensor.detach().to(weight_dtype(name, dtype)) for name, tensor in layer.state_dict().items()}
        self.save_tensors(f"layers/{index}/model.safetensors", weights)

    def finish_layer(self, index: int, layer: MoeLayerConfig, record: dict[str, Any]) -> None:
        write_json(self.directory / f"layers/{index}/done.json", {"config": asdict(layer), **record})

    def layer_record(self, index: int) -> dict[str, Any] | None:
        """The record that `finish_layer` stored; None if the layer is not finished."""
        marker = self.directory / f"layers/{index}/done.json"
        record: dict[str, Any] | None = read_json(marker) if marker.exists() else None
        return record

    def finished_record(self, index: int) -> dict[str, Any]:
        """The record of a layer, which must be finished."""
        record = self.layer_record(index)
        assert record is not None
        return record

    def layer_config(self, index: int) -> MoeLayerConfig:
        return MoeLayerConfig(**self.finished_record(index)["config"])

    def layer_reader(self, index: int) -> TensorReader:
        return TensorReader(self.directory / f"layers/{index}")

    def publish(self, out: Path, write: Callable[[Path], None]) -> None:
        """Fill a directory with `write`, rename it to OUT in one step, and remove the work directory."""
        directory = self.directory / "checkpoint"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        write(directory)
        directory.rename(out)
        shutil.rmtree(self.directory)


def remove_leftover(out: Path) -> None:
    """Remove the work directory of a conversion that was killed after OUT had been renamed to its place."""
    directory = work_directory(out)
    if (directory / ARGUMENTS).exists():
        shutil.rmtree(directory)


def work_directory(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def describe_difference(stored: object, given: object) -> str:
    """The first three differences between two JSON values, by dotted path; empty if they are equal."""
    before, after = dict(_flatten(stored)), dict(_flatten(given))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:3])


def _flatten(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, (Mapping, list)) and value:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
