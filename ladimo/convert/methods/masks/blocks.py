"""From trained masks to an expert layer without copies of weights.

The neurons are sorted by which experts hold them, and cut into equal blocks. A block is an expert of the stored layer. A router
of kind "table" ranks the blocks for each choice of a token, and a rule's `top_k` says how many of them run. All blocks together
are the dense FFN.

Legend: N experts of the method (choices of the router), U neurons, B blocks, F neurons of a block, L layers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ladimo.convert.ffn.clustering import as_partition, balanced_kmeans
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.masks.hypernetwork import KEEP_FROM
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer

MAX_BLOCKS, PANEL = 128, 16  # a block is made of whole panels of 16 rows, which the compiled CPU step multiplies together
# Ranks are stored as logits 0, -STEP, -2 STEP, ... They are exact in bf16, and their sigmoids are different in fp32.
STEP = 0.25


def block_size(neurons: int) -> int:
    """A multiple of PANEL that gives at most MAX_BLOCKS blocks, and divides the neurons if such a number is near."""
    least = -(-neurons // MAX_BLOCKS)
    first = -(-least // PANEL) * PANEL
    sizes = range(first, 2 * first + 1, PANEL)
    return next((size for size in sizes if neurons % size == 0), first)


def cut_blocks(logits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Neurons sorted by which experts hold them: logits [N, U] -> numbers [B, F], -1 for none.

    Neurons of a block have similar keep probabilities in all experts. With one expert, they are sorted by it.
    """
    experts, neurons = logits.shape
    if experts == 1:
        partition = contiguous_partition(neurons, -(-neurons // size))
        return torch.where(partition >= 0, logits[0].argsort(descending=True)[partition.clamp(min=0)], -1)
    kept = 1 - (-logits.double().exp()).exp()
    count = -(-neurons // size)
    return as_partition(balanced_kmeans(kept.float().t().contiguous(), count, generator), count)


def ranking(logits: Tensor) -> Tensor:
    """Blocks of each expert, best first: logits [N, B] -> numbers [N, B]."""
    return logits.argsort(dim=1, descending=True, stable=True)


def layer_from_blocks(mlp: Ffn, partition: Tensor, order: Tensor, router: Tensor | None) -> ExpertLayer:
    """The expert layer. partition [B, F], order [N, B] (see `ranking`), router [N, D]; None for one expert, whose order the
    stored blocks then have."""
    count, size = partition.shape
    if router is None:
        fixed = MoeLayerConfig(count, count, size, expert_weight="one", router="none", ffn_kind=mlp.kind)
        return split_ffn(mlp, partition[order[0]], fixed, {})
    config = MoeLayerConfig(
        count,
        count,
        size,
        score_function="sigmoid",
        expert_weight="one",
        router="table",
        router_hidden_size=len(order),
        ffn_kind=mlp.kind,
    )
    ranks = torch.empty(order.shape).scatter_(1, order, torch.arange(count, dtype=torch.float32).expand(order.shape))
    return split_ffn(mlp, partition, config, {"fc1.weight": router, "fc2.weight": -STEP * ranks.t()})


def masks(partition: Tensor, order: Tensor, width: int, neurons: int) -> Tensor:
    """The neurons that each expert holds when it runs `width` blocks: bool [N, U]."""
    held = torch.zeros(len(order), neurons + 1, dtype=torch.bool)
    for expert, blocks in enumerate(order):
        held[expert, partition[blocks[:width]].flatten()] = True
    return held[:, :-1]


def choose_widths(
    logits: Mapping[int, Tensor], target: float, cost: Callable[[Mapping[int, int]], float]
) -> tuple[dict[int, int], dict[int, int]]:
    """How many blocks every expert of a layer runs, by layer: as the masks say, and so that the cost is just below `target`.

    logits: [N, B] by layer, at this budget. cost: the share of active parameters with these widths. A mask keeps the blocks
    whose probability is at least one half. All experts of a layer run as many blocks as the widest of them, the others their
    next best ones. The budget is met by one number that is added to all logits.
    """

    def widths(shift: float) -> dict[int, int]:
        return {index: max(1, int((found + shift > KEEP_FROM).sum(dim=1).max())) for index, found in logits.items()}

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(widths(middle)) <= target else (low, middle)
    return widths(0.0), widths(low)
