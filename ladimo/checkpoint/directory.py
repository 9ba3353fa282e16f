"""The files of a checkpoint besides its weights: configuration, tokenizer, policies and frontier."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ladimo.checkpoint.files import read_json, write_json
from ladimo.model.config import MOE_TYPE, ModelConfig
from ladimo.model.families import read_model_config
from ladimo.policy import Frontier, RoutingPolicy, unmeasured_policies

POLICIES = Path("routing/policies")
FRONTIER = Path("routing/frontier.json")
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
# Fields of a dense model's config.json that a converted checkpoint does not have. We accept only models in which a sliding
# window has no effect, and we write rotary embeddings in one form, `rope_parameters`.
DROPPED_FIELDS = (
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
)

NOT_STATED = ("rope", "layers", "nested_bits", "nested_top_bits", "trained_as_moe", "qk_pairs")


def read_config(directory: Path) -> ModelConfig:
    """Read config.json. Raises ValueError naming the file and the field if we cannot run the model."""
    raw = read_json(directory / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{directory / 'config.json'}: not a JSON object")
    try:
        return read_model_config(raw)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def read_eos_token_ids(directory: Path) -> frozenset[int]:
    """The end-of-text token ids of generation_config.json, or of config.json where the first names none."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            value = read_json(directory / name).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one directory to another. Raises OSError."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def read_policies(directory: Path, config: ModelConfig) -> dict[str, RoutingPolicy]:
    """The policies of a checkpoint by name, validated. Those of a model without files for them are `unmeasured_policies`.

    Raises ValueError naming the file that is wrong or missing.
    """
    if not config.moe_layer_indices or (config.trained_as_moe and not (directory / POLICIES).is_dir()):
        return unmeasured_policies(config)
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
    """The measured frontier; None if the checkpoint has none, as a dense model. Raises ValueError naming a wrong file."""
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
    """Write a policy into the checkpoint, under its name. Raises OSError."""
    write_json(directory / POLICIES / f"{policy.name}.json", policy.to_dict())


def moe_config_json(dense: Mapping[str, Any], layers: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Make the config.json of a converted checkpoint from that of the dense model, `dense`.

    It states the defaults of the family explicitly. `layers`: see `moe_layers_to_json`. Raises ValueError if the family is not
    supported.
    """
    config = read_model_config(dense)
    kept = {name: value for name, value in dense.items() if name not in DROPPED_FIELDS}
    stated = {name: value for name, value in asdict(config).items() if name not in NOT_STATED}
    return {
        **kept,
        **stated,
        "rope_parameters": config.rope.to_dict(),
        "model_type": MOE_TYPE,
        "architectures": ["LadimoLlamaForCausalLM"],
        "moe_layers": layers,
    }
