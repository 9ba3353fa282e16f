"""Checkpoint directories in Hugging Face layout: streamed reading of dense sources, streamed writing of converted ones.

Only safetensors are read and no code of a checkpoint is ever run. Writing is atomic per file (`write_text`) and the converter
renames a finished directory into place, so a reader never meets half of anything.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ladimo.model.config import MOE_TYPE, ModelConfig
from ladimo.model.quantization import Quantize
from ladimo.model.quantized_layers import quantize_layers, quantize_model
from ladimo.model.router import weight_dtype
from ladimo.model.transformer import DecoderLayer, MoeTransformer
from ladimo.policy import Frontier, RoutingPolicy

POLICIES = Path("routing/policies")
FRONTIER = Path("routing/frontier.json")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # without effect where supported
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def read_config(directory: Path) -> ModelConfig:
    """Raises ValueError naming file and field when this is no LLaMA we can run."""
    raw = read_json(directory / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{directory / 'config.json'}: not a JSON object")
    try:
        return ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


class TensorReader:
    """The tensors of a checkpoint by name, from one file or shards, each read when asked for.

    Raises ValueError naming the file when one is missing, truncated or no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
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
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        with _open(self._file(name)) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """Raises ValueError when the checkpoint has no such tensor or it cannot be read."""
        file = self._file(name)
        with _open(file) as handle:
            try:
                tensor: Tensor = handle.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{file}: cannot read {name} ({error})") from error
        return tensor

    def load(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device | str) -> None:
        """Fill every parameter of `module` (built on any device) from `prefix` + its name; shapes must match exactly."""
        tensors = {}
        for name, parameter in module.named_parameters():
            if self.shape(prefix + name) != tuple(parameter.shape):
                raise ValueError(
                    f"{self._file(prefix + name)}: {prefix + name} has shape {list(self.shape(prefix + name))}, "
                    f"config.json asks for {list(parameter.shape)}"
                )
            stored = self.get(prefix + name)
            if stored.dtype not in DTYPES.values():  # quantised weights mean nothing without their scales
                raise ValueError(
                    f"{self._file(prefix + name)}: {prefix + name} is {stored.dtype}; supported: {', '.join(DTYPES)}"
                )
            tensors[name] = stored.to(device=device, dtype=weight_dtype(name, dtype))
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    def _file(self, name: str) -> Path:
        try:
            return self.files[name]
        except KeyError:
            raise ValueError(f"{self.directory}: the checkpoint lacks the tensor {name}") from None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from error


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype the weights are stored in. Raises ValueError when it is none of bf16, fp16, fp32."""
    dtype = TensorReader(directory).get("model.norm.weight").dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"{directory}: weights are {dtype}; supported: {', '.join(DTYPES)}")
    return dtype


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: not a device name") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: not available on this machine")
    return chosen


def choose_dtype(dtype: str, directory: Path, device: torch.device) -> torch.dtype:
    """ "auto" is the stored dtype on a GPU and fp32 on CPU, where bf16 rounding would make batches disagree."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored_dtype(directory)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """The whole model, dense or converted, ready to run without gradients."""
    config = read_config(directory)
    reader = TensorReader(directory)
    with torch.device("meta"):
        model = MoeTransformer(config)
    reader.load(model, "", dtype, device)
    model.rotary.materialise(device)
    return model.eval()


def load_quantized_model(directory: Path, dtype: torch.dtype, device: torch.device, format: Quantize) -> MoeTransformer:
    """`load_model` with weights rounded to integers: layer by layer, so that one layer at most is in memory in `dtype`."""
    config = read_config(directory)
    reader = TensorReader(directory)
    model = load_without_layers(reader, config, dtype, device)
    quantize_model(model, format)  # the output head; there are no layers yet
    for index in range(config.num_hidden_layers):
        layer = load_layer(reader, config, index, dtype, device)
        quantize_layers(layer, format)
        model.model.layers.append(layer)
    return model.eval()


def load_layer(reader: TensorReader, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> DecoderLayer:
    """One layer alone, for work that keeps one layer in memory at a time."""
    with torch.device("meta"):
        module = DecoderLayer(config, layer)
    reader.load(module, f"model.layers.{layer}.", dtype, device)
    return module.eval()


def load_without_layers(reader: TensorReader, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """Embedding, final norm, output head and rotary table; the layers are left out (`model.layers` is empty)."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    model.model.layers = nn.ModuleList()
    reader.load(model, "", dtype, device)
    model.rotary.materialise(device)
    return model.eval()


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file. Raises OSError naming it when it cannot be written."""
    file.touch()
    mode = file.stat().st_mode  # safetensors leaves files that only their owner may read
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written ({error})") from error


def write_tensors(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = 4 * 2**30) -> None:
    """Write model.safetensors, or shards with an index, holding at most one shard in memory."""
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


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def content_hash(directory: Path) -> str:
    """SHA-256 over config and weight files, names included: says which dense model a checkpoint was made from."""
    digest = hashlib.sha256()
    for file in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read_policies(directory: Path, config: ModelConfig) -> dict[str, RoutingPolicy]:
    """The checkpoint's named policies, validated. A dense checkpoint has one: "full", a null for every layer.

    Raises ValueError naming the file.
    """
    if not config.moe_layer_indices:
        return {"full": RoutingPolicy("full", "the dense model", (None,) * config.num_hidden_layers)}
    policies = {}
    for file in sorted((directory / POLICIES).glob("*.json")):
        try:
            policy = RoutingPolicy.from_dict(read_json(file))
            policy.validate(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if policy.name != file.stem:
            raise ValueError(f"{file}: holds a policy named {policy.name!r}")
        policies[policy.name] = policy
    if "full" not in policies:
        raise ValueError(f"{directory / POLICIES}: there is no policy full.json")
    return policies


def read_frontier(directory: Path) -> Frontier | None:
    """The measured frontier, or None where the checkpoint has none (a dense model). Raises ValueError naming the file."""
    path = directory / FRONTIER
    if not path.exists():
        return None
    try:
        frontier = Frontier.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not frontier.points:
        raise ValueError(f"{path}: has no points")
    return frontier


def write_policy(directory: Path, policy: RoutingPolicy) -> None:
    write_json(directory / POLICIES / f"{policy.name}.json", policy.to_dict())


def moe_config_json(dense: Mapping[str, Any], layers: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The dense source's config.json turned into the converted checkpoint's, which says what its family left unsaid.

    Raises ValueError when the source is of no supported family.
    """
    config = ModelConfig.from_dict(dense)
    kept = {name: value for name, value in dense.items() if name not in WINDOW_FIELDS}
    resolved = ("num_key_value_heads", "head_dim", "max_position_embeddings", "attention_bias", "attention_output_bias")
    return {
        **kept,
        **{name: getattr(config, name) for name in resolved},
        "model_type": MOE_TYPE,
        "architectures": ["LadimoLlamaForCausalLM"],
        "moe_layers": layers,
    }
