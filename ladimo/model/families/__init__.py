"""The families of models that can be read, by the `model_type` of their config.json.

A new family is one module here, or anywhere else, that calls `register`: a `Family` with its values, or a subclass that reads
its configuration, finds its weights or builds its modules in its own way.
"""

from collections.abc import Mapping
from typing import Any

from ladimo.model.config import MOE_TYPE, ModelConfig
from ladimo.model.families.converted import CONVERTED
from ladimo.model.families.family import Family, Stored
from ladimo.model.families.llama import LLAMA
from ladimo.model.families.mistral import MISTRAL
from ladimo.model.families.qwen2 import QWEN2

__all__ = ["Family", "Stored", "dense_types", "find_family", "read_model_config", "register", "renames_weights"]

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its model type. A family of the same type is replaced."""
    _FAMILIES[family.model_type] = family


for _family in (LLAMA, MISTRAL, QWEN2, CONVERTED):
    register(_family)


def dense_types() -> list[str]:
    """The model types that can be converted."""
    return [model_type for model_type in _FAMILIES if model_type != MOE_TYPE]


def find_family(model_type: object) -> Family:
    """Raises ValueError naming the supported types when this is none of them."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def renames_weights(model_type: object) -> bool:
    """Whether checkpoints of this type keep weights under other names than our network's. False for an unknown type."""
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family is not None and type(family).locate is not Family.locate


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A Hugging Face config.json as a `ModelConfig`.

    Raises ValueError naming the field when the model is of no supported family, or is one that we cannot run exactly.
    """
    config = find_family(raw.get("model_type")).read_config(raw)
    find_family(config.family)
    return config
