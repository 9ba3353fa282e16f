"""Reads weights from safetensors files, one tensor at a time, and writes them, one shard at a time. Reads no other format."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ladimo.checkpoint.files import read_json, write_json
from ladimo.model.backends.choose import DTYPES
from ladimo.model.families import Stacked, Stored, find_family, read_model_config, renames_weights
from ladimo.model.router import weight_dtype

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


class TensorReader:
    """Reads the tensors of a checkpoint from one file or several shards, each when it is asked for.

    Methods take the names of our network. The model's family knows under which name, and in which rows, a tensor is stored.
    `files` maps stored names to their files.

    Raises ValueError naming the file if one is missing, truncated or not in safetensors format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locate = _locator(directory)
        if (directory / INDEX).exists():
            index = read_json(directory / INDEX)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(f"{directory / INDEX}: weight_map must name a file for each tensor")
            self.files = {name: directory / Path(file).name for name, file in weight_map.items()}
        elif (directory / "model.safetensors").exists():
            file = directory / "model.safetensors"
            with _open(file) as handle:
                self.files = dict.fromkeys(handle.keys(), file)
        else:
            raise ValueError(f"{directory}: has neither model.safetensors nor {INDEX}")
        for file in sorted(set(self.files.values())):
            with _open(file) as handle:
                present = set(handle.keys())
            missing = sorted(name for name, home in self.files.items() if home == file and name not in present)
            if missing:
                raise ValueError(f"{file}: lacks the tensor {missing[0]}")

    def __contains__(self, name: str) -> bool:
        return all(stored in self.files for stored in self._locate(name).names)

    def unused(self, names: Iterable[str]) -> dict[str, Path]:
        """The stored tensors, with their files, that hold none of the parameters `names`."""
        used = {stored for name in names for stored in self._locate(name).names}
        return {name: file for name, file in self.files.items() if name not in used}

    def file(self, name: str) -> Path:
        """The file of a tensor, or of its first part. Raises ValueError if the checkpoint has no such tensor."""
        names = self._locate(name).names
        for stored in names:
            if stored not in self.files:
                raise ValueError(f"{self.directory}: the checkpoint lacks the tensor {stored}")
        return self.files[names[0]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. Raises ValueError if the checkpoint has no such tensor."""
        stored, file = self._locate(name), self.file(name)
        if isinstance(stored, Stacked):
            with _open(self.files[stored.parts[0][0]]) as handle:
                shapes = [handle.get_slice(part).get_shape() for part in stored.parts[0]]
            return (len(stored.parts), sum(rows for rows, *_ in shapes), *shapes[0][1:])
        with _open(file) as handle:
            rows, *rest = handle.get_slice(stored.name).get_shape()
        if stored.rows is not None:
            rows = len(range(*stored.rows.indices(rows)))
        return (rows, *rest)

    def get(self, name: str) -> Tensor:
        """Read a tensor, in its stored dtype. Raises ValueError if there is no such tensor or it cannot be read."""
        stored = self._locate(name)
        self.file(name)
        if isinstance(stored, Stored):
            return self._read(stored)
        try:
            return torch.stack([torch.cat([self._read(Stored(part)) for part in parts]) for parts in stored.parts])
        except RuntimeError as error:  # shapes or dtypes differ
            raise ValueError(f"{self.directory}: the parts of {name} do not fit each other ({error})") from error

    def stored(self, name: str) -> Tensor:
        """Read a tensor by its stored name. Raises ValueError if it cannot be read."""
        return self._read(Stored(name))

    def _read(self, stored: Stored) -> Tensor:
        file = self.files[stored.name]
        with _open(file) as handle:
            try:
                if stored.rows is None:
                    tensor: Tensor = handle.get_tensor(stored.name)
                else:
                    tensor = handle.get_slice(stored.name)[stored.rows]
            except SafetensorError as error:
                raise ValueError(f"{file}: cannot read {stored.name} ({error})") from error
        return tensor

    def load(
        self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device | str, skipped: Collection[str] = ()
    ) -> None:
        """Read every parameter of `module` but the skipped ones from the tensor `prefix` + its name. The module may be on the
        meta device.

        Raises ValueError naming file and tensor if one is missing, or has another shape or an unsupported dtype.
        """
        tensors = {}
        for name, parameter in module.named_parameters():
            if name in skipped:
                continue
            stored = self.get(prefix + name)
            if stored.shape != parameter.shape:
                raise ValueError(
                    f"{self.file(prefix + name)}: {prefix + name} has shape {list(stored.shape)}, "
                    f"config.json asks for {list(parameter.shape)}"
                )
            if stored.dtype not in DTYPES.values():  # quantized weights are useless without their scales
                raise ValueError(
                    f"{self.file(prefix + name)}: {prefix + name} is {stored.dtype}; supported: {', '.join(DTYPES)}"
                )
            tensors[name] = stored.to(device=device, dtype=weight_dtype(name, dtype))
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)


def _locator(directory: Path) -> Callable[[str], Stored | Stacked]:
    """A function from our name of a tensor to where the checkpoint stores it."""
    raw = read_json(directory / CONFIG) if (directory / CONFIG).exists() else None
    if not isinstance(raw, dict) or not renames_weights(raw.get("model_type")):
        return Stored
    config = read_model_config(raw)
    return lambda name: find_family(raw["model_type"]).locate(name, config)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from error


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of the stored weights. Raises ValueError unless it is bf16, fp16 or fp32."""
    dtype = TensorReader(directory).get("model.norm.weight").dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"{directory}: weights are {dtype}; supported: {', '.join(DTYPES)}")
    return dtype


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file. Raises OSError naming the file if it cannot be written."""
    file.touch()
    mode = file.stat().st_mode  # safetensors makes files readable for their owner only
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written ({error})") from error


def write_tensors(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = 4 * 2**30) -> None:
    """Write model.safetensors, or several shards with an index. At most one shard is in memory at a time.

    A shard has at most `max_shard_bytes`, unless a single tensor is larger. Raises OSError.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            save_tensors(directory / f"shard-{len(shards)}.safetensors", pending)
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
            flush()
        pending[name] = tensor.contiguous().cpu()
        total += size
    flush()
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index}.safetensors").rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def content_hash(directory: Path) -> str:
    """The SHA-256 of config.json and the weight files, with their names. It identifies the dense model of a conversion."""
    digest = hashlib.sha256()
    for file in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
