"""The model families that can be read, by the `model_type` of their config.json.

A new family is one module, here or elsewhere, that calls `register`. It registers a `Family` with its own values, or a subclass
that reads the configuration, finds the weights or builds the modules differently.
"""

from collections.abc import Mapping
from typing import Any

from ladimo.model.config import MOE_TYPE, ModelConfig
from ladimo.model.families.converted import CONVERTED
from ladimo.model.families.family import Family, Stacked, Stored
from ladimo.model.families.llama import LLAMA
from ladimo.model.families.mistral import MISTRAL
from ladimo.model.families.mixtral import MIXTRAL
from ladimo.model.families.moe_family import MoeFamily
from ladimo.model.families.olmoe import OLMOE
from ladimo.model.families.phi import PHI
from ladimo.model.families.phi3 import PHI3
from ladimo.model.families.qwen2 import QWEN2
from ladimo.model.families.qwen2_moe import QWEN2_MOE
from ladimo.model.families.qwen3 import QWEN3
from ladimo.model.families.rope import read_rope

__all__ = [
    "Family",
    "MoeFamily",
    "Stacked",
    "Stored",
    "dense_types",
    "find_family",
    "read_model_config",
    "read_rope",
    "register",
    "renames_weights",
]

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its model type. It replaces an earlier family of the same type."""
    _FAMILIES[family.model_type] = family


for _family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, PHI, MIXTRAL, QWEN2_MOE, OLMOE, CONVERTED):
    register(_family)


def dense_types() -> list[str]:
    """The model types of dense models, which can be converted."""
    return [name for name, family in _FAMILIES.items() if name != MOE_TYPE and not isinstance(family, MoeFamily)]


def find_family(model_type: object, field: str = "model_type") -> Family:
    """The family of this model type. Raises ValueError naming `field`, where it was read, and the supported types if it is none
    of them."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(f"{field} is {model_type!r}; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def renames_weights(model_type: object) -> bool:
    """Whether checkpoints of this type store weights under names that differ from our network's. False for an unknown type."""
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family is not None and type(family).locate is not Family.locate


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json, given as a JSON object.

    Raises ValueError naming the wrong field, if the family is not supported or the model cannot be computed exactly.
    """
    config = find_family(raw.get("model_type")).read_config(raw)
    find_family(config.family, "family")
    return config
