"""Our checkpoint type in transformers' Auto classes, without the time that transformers' modelling code takes to import.

That code takes longer to import than all the rest, and neither a server nor a conversion uses it. So it is imported when a
configuration of our type is read.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ladimo.model.config import MOE_TYPE


class _DeferredConfig(PreTrainedConfig):  # type: ignore[misc]
    """Stands for `LadimoLlamaConfig` in AutoConfig: making one makes the other, and registers the classes themselves."""

    model_type = MOE_TYPE

    def __new__(cls, *arguments: Any, **fields: Any) -> Any:
        from ladimo.hf import LadimoLlamaConfig

        return LadimoLlamaConfig(*arguments, **fields)


def register_type() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know our checkpoint type."""
    AutoConfig.register(MOE_TYPE, _DeferredConfig, exist_ok=True)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a checkpoint directory, a transformers tokenizer. Never runs code from the directory.

    Raises whatever transformers raises.
    """
    config = None  # AutoTokenizer then reads it, with the class of the model's type
    named = get_tokenizer_config(directory, local_files_only=True)
    if "tokenizer_class" in named and "auto_map" not in named:
        # The class is known by its name, so AutoTokenizer needs the model's type only. The type's own configuration class
        # would bring the modelling code with it.
        config = PreTrainedConfig(name_or_path=str(directory))
        config.model_type = PreTrainedConfig.get_config_dict(directory, local_files_only=True)[0].get("model_type", "")
    return AutoTokenizer.from_pretrained(directory, config=config, local_files_only=True, trust_remote_code=False)
