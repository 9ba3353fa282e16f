"""What a checkpoint is: the LLaMA architecture and, per layer, whether its FFN is dense or split into experts.

Field names are those of Hugging Face's config.json, which `ladimo.model.families` reads.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ladimo.model.fields import positive_int

MOE_TYPE = "ladimo_llama"
ROPE_TYPES = ("default", "linear", "llama3")

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
            positive_int({name: getattr(self, name)}, name)
        positive_int({"score_norm_top_k": self.score_norm_top_k}, "score_norm_top_k", default=1)
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
            positive_int({"router_hidden_size": self.router_hidden_size}, "router_hidden_size")
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

    def to_dict(self) -> dict[str, Any]:
        """The value of `rope_parameters` in config.json: the fields that the type needs."""
        fields: dict[str, Any] = {"rope_type": self.type, "rope_theta": self.theta}
        if self.type != "default":
            fields["factor"] = self.factor
        if self.type == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                fields[name] = getattr(self, name)
        return fields


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture.

    `layers[i]` is None where layer i keeps its dense FFN. `attention_bias` is of the query, key and value projections,
    `attention_output_bias` of the output projection. `family` is the dense model's type; it says which modules a layer has.
    """

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
    family: str = "llama"

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
    """The value of `moe_layers` in a converted checkpoint's config.json; the inverse of what `families.converted` reads."""
    return [
        None if layer is None else {name: getattr(layer, name) for name in MoeLayerConfig.__dataclass_fields__}
        for layer in layers
    ]
