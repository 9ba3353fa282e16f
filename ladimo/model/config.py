"""What a checkpoint is: the LLaMA architecture and, per layer, whether its FFN is dense or split into experts.

Field names are those of Hugging Face's config.json; `from_dict` reads both the dense sources (`DENSE_TYPES`) and the converted
checkpoint (model_type "ladimo_llama").
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MOE_TYPE = "ladimo_llama"
ROPE_TYPES = ("default", "linear", "llama3")
MAX_LAYERS = 4096  # far above any LLaMA, as the next; they keep a broken number from being taken for a model to build
MAX_SIZE = 2**24

ScoreFunction = Literal["softmax", "sigmoid"]
ExpertWeight = Literal["score", "one"]
RouterKind = Literal["linear", "mlp", "glu", "none"]


@dataclass(frozen=True, slots=True)
class MoeLayerConfig:
    """One expert layer.

    `num_experts_per_tok` is the number of experts the layer was distilled for (policy `full`); a policy may choose any
    number up to `num_experts`. With `score_norm_top_k` = k the softmax scores are divided by the sum of the k largest, so
    that a layer distilled with k renormalised experts keeps an expert's weight when its neighbour is dropped.
    `expert_weight` says whether a chosen expert counts with its score or with one (an exact partition sums with one).
    `router` is the network that scores the experts (`ladimo.model.router`), "mlp" with a hidden layer of `router_hidden_size`.
    `selection_bias`: the router has a bias that enters the order of the experts, not their scores. The last `substitutes`
    experts stand in for skipped ones, and policy `full` never runs them. The first `fixed_experts` experts have no row in the
    router and score one whatever the token: a policy runs all or none of them by its mask, beside others that are routed.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    score_function: ScoreFunction = "softmax"
    score_norm_top_k: int | None = None
    expert_weight: ExpertWeight = "score"
    router: RouterKind = "linear"
    router_hidden_size: int | None = None
    selection_bias: bool = False
    substitutes: int = 0
    fixed_experts: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            _positive_int({name: getattr(self, name)}, name)
        _positive_int({"score_norm_top_k": self.score_norm_top_k}, "score_norm_top_k", default=1)
        for name in ("substitutes", "fixed_experts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
            if value >= self.num_experts:
                raise ValueError(f"{name} must be below num_experts {self.num_experts}, got {value}")
        most = self.num_experts - self.substitutes
        if self.num_experts_per_tok > most:
            raise ValueError(f"num_experts_per_tok must be in 1..{most}, got {self.num_experts_per_tok}")
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function must be softmax or sigmoid, got {self.score_function!r}")
        if self.expert_weight not in ("score", "one"):
            raise ValueError(f"expert_weight must be score or one, got {self.expert_weight!r}")
        if self.score_norm_top_k is not None and self.score_norm_top_k > self.num_experts:
            raise ValueError(f"score_norm_top_k must be null or in 1..{self.num_experts}, got {self.score_norm_top_k}")
        if self.router not in ("linear", "mlp", "glu", "none"):
            raise ValueError(f"router must be linear, mlp, glu or none, got {self.router!r}")
        if self.router == "mlp":
            _positive_int({"router_hidden_size": self.router_hidden_size}, "router_hidden_size")
        elif self.router_hidden_size is not None:
            raise ValueError(f"router_hidden_size must be null unless router is mlp, got {self.router_hidden_size!r}")
        if self.fixed_experts and (self.router != "linear" or self.score_function != "sigmoid"):
            raise ValueError(f"fixed_experts need router linear and score_function sigmoid, got {self.fixed_experts}")
        if not isinstance(self.selection_bias, bool):
            raise ValueError(f"selection_bias must be true or false, got {self.selection_bias!r}")

    def router_parameters(self, hidden_size: int) -> int:
        """Parameters of the router for hidden states of this size."""
        hidden = self.router_hidden_size or 0
        weights = {
            "linear": hidden_size * (self.num_experts - self.fixed_experts),
            "mlp": hidden * (hidden_size + self.num_experts),
            "glu": 2 * hidden_size * self.num_experts,
            "none": 0,
        }[self.router]
        return weights + self.num_experts * self.selection_bias


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` and the three llama3 fields are used by the types that need them."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type means where its config.json is silent; the values are those of transformers' configuration classes.

    num_key_value_heads: None = as many as query heads. qkv_bias, output_bias: biases of the attention projections, None = the
    file's `attention_bias`. sliding_window: None = the family has no such thing; a window is on unless
    `use_sliding_window` (the file's, else this) is false.
    """

    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = True


DENSE_TYPES = {
    "llama": Family(),
    "mistral": Family(8, max_position_embeddings=131072, qkv_bias=False, output_bias=False, sliding_window=4096),
    "qwen2": Family(
        32,
        max_position_embeddings=32768,
        qkv_bias=True,
        output_bias=False,
        sliding_window=4096,
        use_sliding_window=False,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture. `layers[i]` is None where layer i keeps its dense FFN; `attention_bias` is of the query, key and value
    projections, `attention_output_bias` of the output projection."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    rope: RopeConfig
    layers: tuple[MoeLayerConfig | None, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json.

        Raises ValueError naming the field when this is no model of a supported family or is one we cannot run exactly.
        """
        model_type = raw.get("model_type")
        families = {**DENSE_TYPES, MOE_TYPE: Family()}
        if not isinstance(model_type, str) or model_type not in families:
            raise ValueError(f"model_type is {model_type!r}; supported: {', '.join(families)}")
        family = families[model_type]
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {raw['hidden_act']!r}; supported: silu")
        if _flag(raw, "mlp_bias"):
            raise ValueError("mlp_bias is true; only FFNs without bias are supported")
        hidden_size = _size(raw, "hidden_size")
        num_heads = _size(raw, "num_attention_heads")
        num_layers = _positive_int(raw, "num_hidden_layers")
        if num_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {num_layers}")
        absent = "num_key_value_heads" not in raw  # null is another matter: as many as query heads in every family
        num_kv_heads = _size(raw, "num_key_value_heads", (family.num_key_value_heads if absent else None) or num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; give head_dim")
        head_dim = _size(raw, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if num_heads * head_dim > MAX_SIZE:
            raise ValueError(f"num_attention_heads * head_dim must be at most {MAX_SIZE}, got {num_heads} * {head_dim}")
        max_position_embeddings = _size(raw, "max_position_embeddings", family.max_position_embeddings)
        _refuse_sliding_window(raw, model_type, family, max_position_embeddings)
        qkv_bias = _flag(raw, "attention_bias") if family.qkv_bias is None else family.qkv_bias
        output_bias = _flag(raw, "attention_output_bias", qkv_bias) if family.output_bias is None else family.output_bias
        return cls(
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(raw, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive_number(raw, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=qkv_bias,
            attention_output_bias=output_bias,
            rope=_rope(raw),
            layers=_moe_layers(raw, num_layers) if model_type == MOE_TYPE else (None,) * num_layers,
        )

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        return tuple(index for index, layer in enumerate(self.layers) if layer is not None)

    @property
    def max_num_experts(self) -> int:
        """Largest number of experts in any layer; 1 for a dense model, so that tables never have width zero."""
        return max((layer.num_experts for layer in self.layers if layer is not None), default=1)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense source that one token passes through, embeddings and output head excluded."""
        ffn = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (self._attention_parameters + ffn) + self.hidden_size

    def active_parameters_ratio(self, experts_per_token: "tuple[float | None, ...]") -> float:
        """Active / dense parameters per token, embeddings excluded, when layer i runs `experts_per_token[i]` experts.

        The router counts as active. Entries of dense layers are ignored.
        """
        active = float(self.num_hidden_layers * self._attention_parameters + self.hidden_size)
        for layer, experts in zip(self.layers, experts_per_token, strict=True):
            if layer is None:
                active += 3 * self.hidden_size * self.intermediate_size
            else:
                assert experts is not None
                expert = 3 * self.hidden_size * layer.moe_intermediate_size
                active += layer.router_parameters(self.hidden_size) + experts * expert
        return active / self.dense_parameters

    @property
    def _attention_parameters(self) -> int:
        """Attention and the two norms of one layer."""
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = self.attention_bias * (heads + 2 * kv_heads) + self.attention_output_bias * self.hidden_size
        return 2 * self.hidden_size * (heads + kv_heads) + bias + 2 * self.hidden_size


def moe_layers_to_json(layers: tuple[MoeLayerConfig | None, ...]) -> list[dict[str, Any] | None]:
    """The value of `moe_layers` in a converted checkpoint's config.json; the inverse of what `from_dict` reads."""
    return [
        None if layer is None else {name: getattr(layer, name) for name in MoeLayerConfig.__dataclass_fields__}
        for layer in layers
    ]


def _positive_int(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _positive_number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _positive_int(raw, name, default)
    if value > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, got {value}")
    return value


def _flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _refuse_sliding_window(raw: Mapping[str, Any], model_type: str, family: Family, context: int) -> None:
    """Raises ValueError when a token may not attend to every token before it, which our attention and its cache assume."""
    if family.sliding_window is None or not _flag(raw, "use_sliding_window", family.use_sliding_window):
        return
    if raw.get("sliding_window", family.sliding_window) is None:
        return
    window = _positive_int(raw, "sliding_window", family.sliding_window)
    if window < context:
        raise ValueError(
            f"sliding_window is {window} ({model_type}), below max_position_embeddings {context}: attention over a window is "
            f"not supported; lower max_position_embeddings to {window} to use the model within it"
        )


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; older releases write rope_theta and rope_scaling side by side.
    for name in ("rope_parameters", "rope_scaling"):
        if raw.get(name) is not None and not isinstance(raw[name], Mapping):
            raise ValueError(f"{name} must be null or an object, got {raw[name]!r}")
    parameters = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type is {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    default = RopeConfig()
    theta = _positive_number(parameters, "rope_theta", default.theta)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if parameters.get("factor") is None:
        raise ValueError(f"rope type {rope_type!r} needs a factor")
    factor = _positive_number(parameters, "factor", default.factor)
    if rope_type == "linear":
        return RopeConfig(theta=theta, type=rope_type, factor=factor)
    low = _positive_number(parameters, "low_freq_factor", default.low_freq_factor)
    high = _positive_number(parameters, "high_freq_factor", default.high_freq_factor)
    if low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low} and {high}")
    original = _positive_int(parameters, "original_max_position_embeddings", default.original_max_position_embeddings)
    return RopeConfig(theta, rope_type, factor, low, high, original)


def _moe_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
    entries = raw.get("moe_layers")
    if not isinstance(entries, list) or len(entries) != num_layers:
        raise ValueError(f"moe_layers must be a list with one entry for each of the {num_layers} layers")
    layers = []
    for index, entry in enumerate(entries):
        try:
            layers.append(None if entry is None else MoeLayerConfig(**entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"moe_layers[{index}]: {error}") from error
    return tuple(layers)
