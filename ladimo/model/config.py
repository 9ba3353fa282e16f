"""The configuration of a model: the LLaMA architecture, and for each layer whether its FFN is dense or split into experts.

Field names are those of Hugging Face's config.json, which `ladimo.model.families` reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ladimo.model.fields import positive_int, size

MOE_TYPE = "ladimo_llama"
# The types of rotary embedding, and the fields of `RopeConfig` that only some of them use.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}

ScoreFunction = Literal["softmax", "sigmoid"]
ExpertWeight = Literal["score", "one"]
RouterKind = Literal["linear", "mlp", "table", "glu", "none"]
QkNorm = Literal["none", "head", "all"]
NormKind = Literal["rms", "layer"]
FfnKind = Literal["swiglu", "gelu"]


@dataclass(frozen=True, slots=True)
class MoeLayerConfig:
    """One expert layer. Raises ValueError naming the first wrong field.

    num_experts_per_tok: the number of experts that the layer was distilled for, which policy `full` uses. Other policies may
    choose any number up to num_experts.
    moe_intermediate_size: the neurons of one expert.
    score_norm_top_k: if k, the scores are divided by the sum of the k largest. A layer that was distilled with k renormalised
    experts then keeps the weight of an expert when another one is dropped.
    expert_weight: a chosen expert counts with its score ("score") or with 1 ("one"). The experts of an exact partition count
    with 1.
    router: the network that scores the experts, see `ladimo.model.router`.
    router_hidden_size: the hidden neurons of the router "mlp", or the rows of the router "table"; None for all others.
    selection_bias: the router has a bias that changes the order of the experts, but not their scores.
    substitutes: the last so many experts stand in for skipped ones. Policy `full` never runs them.
    fixed_experts: the first so many experts have no row in the router and always score 1. The mask of a policy keeps all or
    none of them, beside experts that are routed.
    norm_topk_prob: policy `full` divides the weights of the chosen experts by their sum, where experts count with their score.
    shared_expert_intermediate_size: the neurons of a shared expert as in Qwen2-MoE, which runs for every token and is weighted
    by the sigmoid of a gate of its own. No policy concerns it. 0 for none.
    ffn_kind: the experts are parts of an FFN of this kind, see `ModelConfig`.
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
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int = 0
    ffn_kind: FfnKind = "swiglu"

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
        if self.router not in ("linear", "mlp", "table", "glu", "none"):
            raise ValueError(f"router must be linear, mlp, table, glu or none, got {self.router!r}")
        if self.router in ("mlp", "table"):
            positive_int({"router_hidden_size": self.router_hidden_size}, "router_hidden_size")
        elif self.router_hidden_size is not None:
            raise ValueError(f"router_hidden_size must be null unless router is mlp or table, got {self.router_hidden_size!r}")
        if self.fixed_experts and (self.router != "linear" or self.score_function != "sigmoid"):
            raise ValueError(f"fixed_experts need router linear and score_function sigmoid, got {self.fixed_experts}")
        for name in ("selection_bias", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.ffn_kind not in get_args(FfnKind):
            raise ValueError(f"ffn_kind must be one of {', '.join(get_args(FfnKind))}, got {self.ffn_kind!r}")
        if self.shared_expert_intermediate_size != 0:
            size({"shared_expert_intermediate_size": self.shared_expert_intermediate_size}, "shared_expert_intermediate_size")

    def router_parameters(self, hidden_size: int) -> int:
        """The number of parameters of the router. `hidden_size`: the size of the hidden states."""
        hidden = self.router_hidden_size or 0
        weights = {
            "linear": hidden_size * (self.num_experts - self.fixed_experts),
            "mlp": hidden * (hidden_size + self.num_experts),
            "table": hidden * (hidden_size + self.num_experts),
            "glu": 2 * hidden_size * self.num_experts,
            "none": 0,
        }[self.router]
        return weights + self.num_experts * self.selection_bias

    def active_parameters(self, hidden_size: int, experts: float) -> float:
        """The number of parameters of the router, of so many experts and of the shared expert."""
        shared = self.shared_expert_intermediate_size
        neurons, router = experts * self.moe_intermediate_size + shared, self.router_parameters(hidden_size)
        if self.ffn_kind == "gelu":
            return router + (2 * hidden_size + 1) * neurons + hidden_size
        return router + 3 * hidden_size * neurons + hidden_size * (shared > 0)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `ROPE_TYPES` says which type uses which fields.

    partial_rotary_factor: the share of a head's channels that is rotated. They are its first channels.
    short_factor, long_factor: of type "longrope", the numbers that the frequencies are divided by. In texts that are longer
    than original_max_position_embeddings, the long ones count. attention_factor: cosines and sines are multiplied by this.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """The value of `rope_parameters` in config.json. It has only the fields that the type uses."""
        fields: dict[str, Any] = {"rope_type": self.type, "rope_theta": self.theta}
        if self.partial_rotary_factor != 1:
            fields["partial_rotary_factor"] = self.partial_rotary_factor
        for name in ROPE_TYPES[self.type]:
            value = getattr(self, name)
            fields[name] = list(value) if isinstance(value, tuple) else value
        return fields


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture.

    layers: one entry per layer; None for a layer that keeps its dense FFN. attention_bias: whether the query, key and value
    projections have biases. attention_output_bias: the same for the output projection. qk_norm: queries and keys are normed
    before they are rotated, each head by itself ("head") or all heads of a token together ("all"). norm_kind: RMSNorm, or
    LayerNorm with a bias; rms_norm_eps is the epsilon of both. ffn_kind: "swiglu" has a gate and no biases, "gelu" has biases
    and no gate. parallel_block: the FFN reads what the attention reads, so that a layer has one norm. head_bias: the output
    head has a bias. family: the model type of the dense model. nested_bits: the lower precisions that every weight matrix can
    be read at, none or 4 and 8 (`ladimo.model.nested`). nested_top_bits: 8 where these are all that is stored; None where the
    whole weights are. trained_as_moe: the model was not converted from a dense one. It is
    measured against itself under policy `full`. qk_pairs: where queries and keys are pruned, the numbers of the kept pairs of
    channels, rising, for each layer and each key head. Channel i of a head is a pair with channel i + head_dim / 2. All heads
    of the model keep equally many. Empty: nothing is pruned.
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
    qk_norm: QkNorm = "none"
    norm_kind: NormKind = "rms"
    ffn_kind: FfnKind = "swiglu"
    parallel_block: bool = False
    head_bias: bool = False
    family: str = "llama"
    nested_bits: tuple[int, ...] = ()
    nested_top_bits: int | None = None
    trained_as_moe: bool = False
    qk_pairs: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def bits_read(self, bits: int | None) -> int | None:
        """How many bits of a weight are read where a policy asks for so many. None: all that there are, or 16."""
        return self.nested_top_bits if bits is None else bits

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def qk_head_dim(self) -> int:
        """The channels of a query or key."""
        return 2 * len(self.qk_pairs[0][0]) if self.qk_pairs else self.head_dim

    @property
    def pruned_parameters(self) -> int:
        """Weights and biases of queries and keys that were pruned, of one layer."""
        heads = self.num_attention_heads + self.num_key_value_heads
        return (self.head_dim - self.qk_head_dim) * heads * (self.hidden_size + self.attention_bias)

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """The numbers of the expert layers, from 0."""
        return tuple(index for index, layer in enumerate(self.layers) if layer is not None)

    @property
    def max_num_experts(self) -> int:
        """The largest number of experts in any layer. 1 for a dense model, so that tables are never of width 0."""
        return max((layer.num_experts for layer in self.layers if layer is not None), default=1)

    @property
    def dense_parameters(self) -> int:
        """The parameters of the dense model that one token uses, without embeddings and output head. For a model that was
        trained as MoE, those that it uses with its own number of experts."""
        ffns = self.num_hidden_layers * self.ffn_parameters
        if self.trained_as_moe:
            ffns = sum(
                self.ffn_parameters
                if layer is None
                else int(layer.active_parameters(self.hidden_size, layer.num_experts_per_tok))
                for layer in self.layers
            )
        return self.num_hidden_layers * self.attention_parameters + ffns + self.norm_parameters

    def active_parameters_ratio(self, experts_per_token: "tuple[float | None, ...]") -> float:
        """Active parameters per token divided by `dense_parameters`. Layer i runs `experts_per_token[i]` experts.

        Routers count as active; embeddings and the output head do not count. Entries of dense layers are ignored.
        """
        attention = self.attention_parameters - self.pruned_parameters
        active = float(self.num_hidden_layers * attention + self.norm_parameters)
        for layer, experts in zip(self.layers, experts_per_token, strict=True):
            if layer is None:
                active += self.ffn_parameters
            else:
                assert experts is not None
                active += layer.active_parameters(self.hidden_size, experts)
        return active / self.dense_parameters

    def operations_ratio(self, experts_per_token: "tuple[float | None, ...]") -> float:
        """Multiply-adds of a token with weights, divided by those of the dense model. Layer i runs `experts_per_token[i]`
        experts. Every weight is one multiply-add, whatever its bits. The output head counts, embeddings do not."""
        head = self.head_parameters
        operations = self.active_parameters_ratio(experts_per_token) * self.dense_parameters + head
        return operations / (self.dense_parameters + head)

    @property
    def ffn_parameters(self) -> int:
        """Of one dense FFN."""
        if self.ffn_kind == "gelu":
            return 2 * self.hidden_size * self.intermediate_size + self.intermediate_size + self.hidden_size
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def neuron_rows(self) -> int:
        """The rows of `hidden_size` weights that belong to a neuron of an FFN: of gate, if there is one, up and down."""
        return 2 if self.ffn_kind == "gelu" else 3

    @property
    def norm_parameters(self) -> int:
        """Of one norm of hidden states."""
        return self.hidden_size * (2 if self.norm_kind == "layer" else 1)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head, be it the embedding or not."""
        return self.vocab_size * self.hidden_size

    @property
    def key_value_parameters(self) -> int:
        """The weights of the key and value projections of one layer."""
        return 2 * self.hidden_size * self.num_key_value_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """The parameters of the attention and of the norms of one layer, without pruning."""
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = self.attention_bias * (heads + 2 * kv_heads) + self.attention_output_bias * self.hidden_size
        norms = 1 if self.parallel_block else 2
        qk_norms = {"none": 0, "head": 2 * self.head_dim, "all": heads + kv_heads}[self.qk_norm]
        return 2 * self.hidden_size * (heads + kv_heads) + bias + qk_norms + norms * self.norm_parameters


def moe_layers_to_json(layers: tuple[MoeLayerConfig | None, ...]) -> list[dict[str, Any] | None]:
    """The value of `moe_layers` in a converted checkpoint's config.json. `families.converted` reads it back."""
    return [
        None if layer is None else {name: getattr(layer, name) for name in MoeLayerConfig.__dataclass_fields__}
        for layer in layers
    ]
