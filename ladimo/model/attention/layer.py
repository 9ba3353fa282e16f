"""Grouped-query attention over the paged KV cache, or over whole sequences without a cache.

Legend: T tokens, D hidden_size, H query heads, G key/value heads, C head_dim, B sequences, S positions.
"""

import torch
from torch import Tensor, nn

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.attention.paged import apply_rope, attend_prefill, attend_whole
from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import RMSNorm
from ladimo.model.precision import KEY_VALUE_BITS


class Attention(BackendModule):
    """The attention of one layer, with its four projections. `layer` is the number of the layer, from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        heads, kv_heads, bias = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            sizes = (self.head_dim, self.head_dim) if config.qk_norm == "head" else (heads, kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for size in sizes)

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
        careful = [wanted.clamp(min=KEY_VALUE_BITS) for wanted in bits]
        q = _normed(self.q_proj(hidden_states, *bits), self.q_norm)
        k = _normed(self.k_proj(hidden_states, *careful), self.k_norm)
        q, k = q.view(-1, self.num_heads, self.head_dim), k.view(-1, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden_states, *careful).view(-1, self.num_kv_heads, self.head_dim)
        if kv_cache is None:
            out = attend_whole(apply_rope(q, *rope), apply_rope(k, *rope), v, inputs.num_sequences)
        else:
            assert inputs.slot_mapping is not None
            q = self.backend.rotate_and_store(
                q, k, v, rope, kv_cache.k[self.layer], kv_cache.v[self.layer], inputs.slot_mapping
            )
            out = self._attend_paged(q, inputs, kv_cache)
        projected: Tensor = self.o_proj(out.reshape(-1, self.num_heads * self.head_dim), *bits)
        return projected

    def _attend_paged(self, q: Tensor, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        """Attention of one step, q [T, H, C] -> [T, H, C]. Decode rows are one batch; prefill segments run one by one."""
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
