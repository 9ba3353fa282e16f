"""Which channels of queries and keys are kept.

Two channels that the rotary embedding turns together are a pair. A pair is kept or dropped as a whole, in a key head and in all
query heads that read it. Every head of the model keeps equally many pairs, so that projections and KV cache have one width.

Legend: L layers, H query heads, G key heads, C head_dim, P = C / 2 pairs, K kept pairs, W embedding width, T tokens,
D hidden_size, B sequences, S positions.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.convert.methods.masks.hypernetwork import TEMPERATURE, WIDTH, gumbel
from ladimo.convert.methods.masks.start import SPREAD, places
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.attention.layer import Attention
from ladimo.model.attention.paged import attend_whole
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs


class PairGate(nn.Module):
    """The kept pairs of one layer. kept: K. start: added to the logits [G, P]. A gate that is not `trained` has no embedding.
    It keeps the pairs with the largest start."""

    start: Tensor

    def __init__(self, config: ModelConfig, kept: int, trained: bool) -> None:
        super().__init__()
        self.kept = kept
        groups, pairs = config.num_key_value_heads, config.head_dim // 2
        self.norm = nn.LayerNorm(WIDTH) if trained else None
        self.decoder = nn.Linear(WIDTH, groups * pairs, bias=False) if trained else None
        self.register_buffer("start", torch.zeros(groups, pairs))

    def logits(self, embedding: Tensor | None) -> Tensor:
        """[G, P], from an embedding [W]."""
        if self.norm is None or self.decoder is None:
            return self.start
        decoded: Tensor = self.decoder(F.gelu(self.norm(embedding)))
        return decoded.view_as(self.start) + self.start

    def sample(self, embedding: Tensor | None, generator: torch.Generator) -> Tensor:
        """The mask [G, P] of a training step."""
        logits = self.logits(embedding)
        if self.decoder is None:
            return torch.zeros_like(logits).scatter(1, self.chosen(None), 1.0)
        return sample_pairs(logits, self.kept, generator)

    def chosen(self, embedding: Tensor | None) -> Tensor:
        """The numbers of the kept pairs, rising: [G, K]."""
        return self.logits(embedding).topk(self.kept, dim=1).indices.sort(dim=1).values


def sample_pairs(logits: Tensor, kept: int, generator: torch.Generator) -> Tensor:
    """Masks of ones and zeros from logits [G, P], with `kept` ones per row. The gradient is that of a sigmoid around the last
    kept logit, so that pairs near the border learn most."""
    noisy = logits + gumbel(logits.shape, generator)
    best = noisy.topk(kept, dim=1)
    soft = ((noisy - best.values[:, -1:].detach()) / TEMPERATURE).sigmoid()
    hard = torch.zeros_like(soft).scatter(1, best.indices, 1.0)
    return soft + (hard - soft).detach()


class GatedAttention(nn.Module):
    """A frozen attention over whole sequences that reads only some pairs. `mask` [G, P] must be set before each pass."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.mask = torch.empty(0)

    def forward(
        self, hidden_states: Tensor, rope: tuple[Tensor, Tensor], inputs: StepInputs, kv_cache: KVCache | None
    ) -> Tensor:
        """[T, D] -> [T, D]. The mask multiplies the queries: a pair that is zero there adds nothing to any score."""
        own = self.attention
        q, k, v = own.project(hidden_states)
        of_heads = self.mask.repeat(1, 2).repeat_interleave(own.num_heads // own.num_kv_heads, dim=0)  # [H, C]
        out = attend_whole(*own.rotate(q * of_heads.to(q.dtype), k, rope), v, inputs.num_sequences)
        projected: Tensor = own.o_proj(out.flatten(1))
        return projected


def kept_pairs(config: ModelConfig, share: float) -> int:
    """How many pairs a head keeps."""
    return max(1, round(share * config.head_dim / 2))


def with_pairs(config: ModelConfig, pairs: Tensor) -> ModelConfig:
    """The configuration with these pairs [L, G, K]."""
    return replace(config, qk_pairs=tuple(tuple(tuple(head) for head in layer) for layer in pairs.tolist()))


def kept_rows(config: ModelConfig, pairs: Tensor, name: str, tensor: Tensor) -> Tensor:
    """The weight or bias of a projection without the rows of dropped channels; any other tensor as it is. pairs [L, G, K]."""
    for projection, heads in (
        (".self_attn.q_proj.", config.num_attention_heads),
        (".self_attn.k_proj.", config.num_key_value_heads),
    ):
        prefix, found, _ = name.partition(projection)
        if found:
            own = pairs[int(prefix.rpartition(".")[2])]
            channels = torch.cat((own, own + config.head_dim // 2), dim=1)  # [G, 2K]
            by_head = channels.repeat_interleave(heads // config.num_key_value_heads, dim=0)
            rows = by_head + torch.arange(heads)[:, None] * config.head_dim
            return tensor[rows.flatten()]
    return tensor


@torch.no_grad()
def find_pairs(dense: StreamedModel, blocks: Tensor) -> list[Tensor]:
    """For each layer, how far the pairs of a head are from being dropped: logits [G, P] before training.

    A pair matters as much as the power of its queries times that of its keys, as a mean over token blocks [B, S]. The rotation
    does not change it.
    """
    hidden_states = dense.embed(blocks)
    found = []
    for index in range(dense.config.num_hidden_layers):
        layer = dense.layer(index)
        attention = layer.self_attn
        assert isinstance(attention, Attention)
        power: list[Tensor] = []
        for rows, attended, ffn_inputs in dense.attend(layer, hidden_states):
            q, k, _ = attention.project(layer.input_layernorm(hidden_states[rows].to(dense.device).flatten(0, 1)))
            power.append(_power(q).unflatten(0, (attention.num_kv_heads, -1)).mean(dim=1) * _power(k))
            hidden_states[rows] = (attended + layer.mlp(ffn_inputs)).view(hidden_states[rows].shape).cpu()
        importance = torch.stack(power).mean(dim=0)
        found.append(SPREAD * torch.stack([places(head) for head in importance]))
    return found


def _power(x: Tensor) -> Tensor:
    """Queries or keys [T, heads, C] -> [heads, P]."""
    halves: Tensor = x.float().unflatten(-1, (2, -1))
    return halves.square().sum(dim=-2).mean(dim=0)
