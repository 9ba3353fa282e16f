"""Model families: what differs between LLaMA and models that are built like it.

A family with other defaults than LLaMA is a `Family` with its own values. A family that differs more is a subclass that
overrides a method, or a `Family` with its own modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ladimo.model.attention.layer import Attention
from ladimo.model.config import FfnKind, ModelConfig, MoeLayerConfig, NormKind, QkNorm
from ladimo.model.families.rope import read_rope
from ladimo.model.fields import MAX_SIZE, flag, positive_int, positive_number, size

# The activations of each kind of FFN, by their names in `hidden_act`. The first is the default.
ACTIVATIONS: Mapping[FfnKind, tuple[str, ...]] = {"swiglu": ("silu",), "gelu": ("gelu_new", "gelu_pytorch_tanh")}
# More than any LLaMA has. A broken number must not make the loader build a huge model.
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a checkpoint stores a parameter: the name of the stored tensor, and its rows (None: all of them)."""

    name: str
    rows: slice | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors that belong to the parameter."""
        return (self.name,)


@dataclass(frozen=True, slots=True)
class Stacked:
    """A parameter whose parts a checkpoint stores one by one: a stack of matrices, each of which joins the rows of tensors."""

    parts: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors that belong to the parameter."""
        return tuple(name for part in self.parts for name in part)


@dataclass(frozen=True)
class Family:
    """One `model_type`: how to read its configuration, the names of its weights, and its modules.

    The values are the defaults for fields that config.json leaves out. They are those of transformers' configuration classes.

    num_key_value_heads: None means as many as query heads. head_dim: None means hidden_size / num_attention_heads.
    qkv_bias, output_bias: whether the attention projections have biases. None means that the file's `attention_bias` decides.
    sliding_window: in tokens; None means none, unless the file says so.
    use_sliding_window: whether the window is used if the file does not say it.
    qk_norm, norm_kind, ffn_kind, parallel_block, head_bias: see `ModelConfig`. partial_rotary_factor: see `read_rope`.
    attention, ffn: the modules of every layer; None for the FFN that `ffn_kind` says. The compiled CPU step and the exports
    know only our own modules, so a family with other modules runs in torch.
    """

    model_type: str
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = True
    qk_norm: QkNorm = "none"
    norm_kind: NormKind = "rms"
    ffn_kind: FfnKind = "swiglu"
    parallel_block: bool = False
    head_bias: bool = False
    partial_rotary_factor: float | None = None
    attention: type[nn.Module] = Attention
    ffn: type[nn.Module] | None = None

    @property
    def has_own_modules(self) -> bool:
        """Whether its layers have modules that only the family itself knows. If not, the configuration describes them."""
        return self.attention is not Attention or self.ffn is not None

    def locate(self, name: str, config: ModelConfig) -> Stored | Stacked:
        """Where a checkpoint of the family stores the parameter that our network calls `name`."""
        return Stored(name)

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the architecture from a Hugging Face config.json.

        Raises ValueError naming a field that is wrong, or that asks for something we cannot compute exactly.
        """
        activations = ACTIVATIONS[self.ffn_kind]
        if raw.get("hidden_act", activations[0]) not in activations:
            raise ValueError(f"hidden_act is {raw['hidden_act']!r}; supported: {', '.join(activations)}")
        if flag(raw, "mlp_bias"):
            raise ValueError("mlp_bias is true; only FFNs without bias are supported")
        hidden_size = size(raw, "hidden_size")
        num_heads = size(raw, "num_attention_heads")
        num_layers = positive_int(raw, "num_hidden_layers")
        if num_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {num_layers}")
        # A missing field means the family's default. null means as many as query heads, in every family.
        absent = "num_key_value_heads" not in raw
        num_kv_heads = size(raw, "num_key_value_heads", (self.num_key_value_heads if absent else None) or num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        if raw.get("head_dim") is None and self.head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; give head_dim")
        head_dim = size(raw, "head_dim", self.head_dim or hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if num_heads * head_dim > MAX_SIZE:
            raise ValueError(f"num_attention_heads * head_dim must be at most {MAX_SIZE}, got {num_heads} * {head_dim}")
        max_position_embeddings = size(raw, "max_position_embeddings", self.max_position_embeddings)
        self._refuse_sliding_window(raw, max_position_embeddings)
        qkv_bias = flag(raw, "attention_bias") if self.qkv_bias is None else self.qkv_bias
        output_bias = flag(raw, "attention_output_bias", qkv_bias) if self.output_bias is None else self.output_bias
        config = ModelConfig(
            vocab_size=size(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=size(raw, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_number(raw, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            attention_bias=qkv_bias,
            attention_output_bias=output_bias,
            rope=read_rope({**raw, "max_position_embeddings": max_position_embeddings}, self.partial_rotary_factor),
            layers=self.read_layers(raw, num_layers),
            qk_norm=self.qk_norm,
            norm_kind=self.norm_kind,
            ffn_kind=self.ffn_kind,
            parallel_block=self.parallel_block,
            head_bias=self.head_bias,
            family=self.model_type,
        )
        _check_rotary(config)
        if config.head_bias and config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true, but the output head has a bias of its own")
        return config

    def read_layers(self, raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
        """The expert configuration of each layer; None for a dense layer. All layers of a dense model are dense."""
        return (None,) * num_layers

    def _refuse_sliding_window(self, raw: Mapping[str, Any], context: int) -> None:
        """Raises ValueError if the window is shorter than the context. Our attention and KV cache have no sliding window."""
        if not flag(raw, "use_sliding_window", self.use_sliding_window):
            return
        if raw.get("sliding_window", self.sliding_window) is None:
            return
        window = positive_int(raw, "sliding_window", self.sliding_window)
        if window < context:
            raise ValueError(
                f"sliding_window is {window} ({self.model_type}), below max_position_embeddings {context}: attention over a "
                f"window is not supported; lower max_position_embeddings to {window} to use the model within it"
            )


def _check_rotary(config: ModelConfig) -> None:
    """Raises ValueError if the rotary embedding does not fit the heads."""
    rope, dim = config.rope, config.rotary_dim
    if dim < 2 or dim % 2:
        raise ValueError(
            f"partial_rotary_factor {rope.partial_rotary_factor} of head_dim {config.head_dim} is {dim} channels; "
            "it must be an even number above 0"
        )
    for name in ("short_factor", "long_factor"):
        numbers = len(getattr(rope, name))
        if rope.type == "longrope" and numbers != dim // 2:
            raise ValueError(f"{name} must have one number for each of the {dim // 2} frequencies, it has {numbers}")
