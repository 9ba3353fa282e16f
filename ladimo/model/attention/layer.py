"""Grouped-query attention over the paged KV cache, or over whole sequences without a cache.

Legend: T tokens, D hidden_size, H query heads, G key/value heads, C head_dim, K qk_head_dim, B sequences, S positions.
"""

import torch
from torch import Tensor, nn

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.attention.paged import apply_rope, attend_prefill, attend_whole, store
from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import Linear, RMSNorm
from ladimo.model.precision import KEY_VALUE_BITS


class Attention(BackendModule):
    """The attention of one layer, with its four projections. `layer` is the number of the layer, from 0.

    Pruned queries and keys have fewer channels than values (`ModelConfig.qk_pairs`).
    """

    channels: Tensor | None  # [G, K]: of the unpruned heads, in the order of a pruned head

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.qk_dim = config.head_dim, config.qk_head_dim
        heads, kv_heads, bias = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.attention_bias
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.qk_dim, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.qk_dim, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = Linear(heads, config.hidden_size, bias=config.attention_output_bias)
        self.joined: tuple[Tensor, Tensor | None] | None = None  # after `join_projections`
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            sizes = (self.head_dim, self.head_dim) if config.qk_norm == "head" else (heads, kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for size in sizes)
        channels = None
        if config.qk_pairs:
            pairs = torch.tensor(config.qk_pairs[layer], device="cpu")  # from config.json, so not on the meta device
            channels = torch.cat((pairs, pairs + self.head_dim // 2), dim=1)
        self.register_buffer("channels", channels, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        inputs: StepInputs,
        kv_cache: KVCache | None,
        bits: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Hidden states [T, D] -> [T, D]. `rope` are cosines and sines, each [T, 1, R], for the first R channels of a head.

        Writes keys and values into the cache. `bits`: where the projections are nested, how many bits [T] each token reads of
        them; of keys and values at least `KEY_VALUE_BITS`.
        """
        q, k, v = self.project(hidden_states, bits)
        if kv_cache is None:
            out = attend_whole(*self.rotate(q, k, rope), v, inputs.num_sequences)
        else:
            assert inputs.slot_mapping is not None
            places = kv_cache.k[self.layer], kv_cache.v[self.layer], inputs.slot_mapping
            if self.channels is None:
                q = self.backend.rotate_and_store(q, k, v, rope, *places)
            else:
                q, k = self.rotate(q, k, rope)
                store(k, v, *places)
            out = self._attend_paged(q, inputs, kv_cache)
        projected: Tensor = self.o_proj(out.reshape(-1, self.num_heads * self.head_dim), *bits)
        return projected

    def join_projections(self) -> None:
        """Lay out queries', keys' and values' weights one after another, so that a single product computes all three.

        For serving only: the three layers become views, which cannot be trained. Integer and nested layers stay apart. A second
        call changes nothing, because a captured graph may read what the first one laid out.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.joined is not None or not all(isinstance(layer, Linear) for layer in layers):
            return
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if self.q_proj.bias is None else torch.cat([layer.bias.detach() for layer in layers])
        for layer, part in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
        self.joined = weight, bias

    def project(self, hidden_states: Tensor, bits: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, D] -> queries [T, H, K], keys [T, G, K] and values [T, G, C], before rotation."""
        if self.joined is None:
            careful = [wanted.clamp(min=KEY_VALUE_BITS) for wanted in bits]
            q, k = self.q_proj(hidden_states, *bits), self.k_proj(hidden_states, *careful)
            v = self.v_proj(hidden_states, *careful)
        else:
            sizes = (self.num_heads * self.qk_dim, self.num_kv_heads * self.qk_dim, self.num_kv_heads * self.head_dim)
            q, k, v = self.backend.linear(hidden_states, *self.joined).split(sizes, dim=-1)
        q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        return (
            q.view(-1, self.num_heads, self.qk_dim),
            k.view(-1, self.num_kv_heads, self.qk_dim),
            v.view(-1, self.num_kv_heads, self.head_dim),
        )

    def rotate(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotate queries [T, H, K] and keys [T, G, K]. In pruned heads, each pair keeps its own frequency.

        Attention divides scores by sqrt(K), as the heads are so wide. The model was trained with sqrt(C). So pruned queries are
        multiplied by sqrt(K / C).
        """
        if self.channels is None:
            return apply_rope(q, *rope), apply_rope(k, *rope)
        cos, sin = (part[:, 0, self.channels] for part in rope)  # [T, G, K]
        group, scale = self.num_heads // self.num_kv_heads, (self.qk_dim / self.head_dim) ** 0.5
        of_queries = [part.repeat_interleave(group, dim=1) * scale for part in (cos, sin)]
        return apply_rope(q, *of_queries), apply_rope(k, cos, sin)

    def _attend_paged(self, q: Tensor, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        """Attention of one step, q [T, H, K] -> [T, H, C]. Decode rows are one batch; prefill segments run one by one."""
        assert inputs.block_table is not None and inputs.context_lens is not None
        parts = []
        if inputs.num_decode:
            rows = inputs.num_decode
            k_cache, v_cache = kv_cache.k[self.layer], kv_cache.v[self.layer]
            tables, lengths = inputs.block_table[:rows], inputs.context_lens[:rows]
            parts.append(self.backend.attend_decode(q[:rows], k_cache, v_cache, tables, lengths))
        for segment in inputs.prefill:
            num_blocks = -(-segment.context_len // kv_cache.k.shape[2])
            k, v = kv_cache.read(self.layer, inputs.block_table[segment.row : segment.row + 1, :num_blocks])
            queries = q[segment.start : segment.start + segment.length]
            parts.append(attend_prefill(queries, k[0, : segment.context_len], v[0, : segment.context_len]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    """The queries or keys of all heads, [T, heads * C], after their norm. It covers each head, or all of them at once."""
    return x if norm is None else norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
