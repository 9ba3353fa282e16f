"""The one routing rule. A policy is, per layer, a row of numbers (`RuleNumber`) and a mask; `select_experts` reads them and
never branches on them.

With `apply_batch_budget` the decoding tokens of a step share a budget of experts; that, too, is a number of the row.

Legend: T tokens, E experts, K = E places per token (the shape never depends on a policy).
"""

import torch
from torch import Tensor

from ladimo.model.config import MoeLayerConfig
from ladimo.model.rule import RuleNumber


def expert_scores(
    router_logits: Tensor, selection_bias: Tensor | None, allowed: Tensor, layer: MoeLayerConfig
) -> tuple[Tensor, Tensor]:
    """Scores of all experts, best first, and their numbers: both [T, E]. Experts outside `allowed` [T, E] come last, scored 0.

    Softmax runs over the allowed experts; sigmoid scores are independent. `selection_bias` [E] enters the order, not the score.
    Ties go to the lower expert, as in the kernels.
    """
    router_logits = router_logits.float()
    if layer.score_function == "softmax":
        scores = router_logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num()
    else:
        scores = router_logits.sigmoid() * allowed
    order = scores if selection_bias is None else scores + selection_bias
    ids = order.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    scores = scores.gather(-1, ids)
    if layer.score_norm_top_k is not None:
        scores = scores / scores[:, : layer.score_norm_top_k].sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return scores, ids


def select_experts(
    router_logits: Tensor, rows: Tensor, allowed: Tensor, layer: MoeLayerConfig, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply each token's rule: rows [T, len(RuleNumber)] and masks [T, E]. BATCH_EXPERTS is for a step's tokens together and
    not read here, see `apply_batch_budget`.

    Returns topk_weights [T, K] fp32 and topk_ids [T, K] int64, best first. Rank r is kept while r < top_k, the scores before
    it sum to less than mass, and its own score is at least floor and at least relative_floor times the score of rank 0. Rank 0
    always stays. Dropped places have weight 0 and id -1. A row of zeros with an empty mask (padding, dense layer) keeps
    nothing.
    """
    scores, ids = expert_scores(router_logits, selection_bias, allowed, layer)
    numbers = rows.unsqueeze(-1).unbind(dim=1)  # each [T, 1]
    rank = torch.arange(ids.shape[1], device=ids.device)
    mass_before = scores.cumsum(dim=-1) - scores
    floor = torch.maximum(numbers[RuleNumber.FLOOR], numbers[RuleNumber.RELATIVE_FLOOR] * scores[:, :1])
    enough = ((mass_before < numbers[RuleNumber.MASS]) & (scores >= floor)) | (rank == 0)
    kept = enough & (rank < numbers[RuleNumber.TOP_K]) & allowed.gather(-1, ids)
    weights = kept.to(scores.dtype) if layer.expert_weight == "one" else scores * kept
    total = weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    weights = torch.where(numbers[RuleNumber.RENORMALIZE] > 0, weights / total, weights)
    return weights, ids.masked_fill(~kept, -1)


def apply_batch_budget(topk_weights: Tensor, topk_ids: Tensor, rows: Tensor, allowed: Tensor, num_decode: int) -> Tensor:
    """The masks [T, E] under which a step's decoding tokens, the first `num_decode`, share experts when they choose again.

    A decode step reads every expert that any of its tokens chose, so fewer experts per token save little in a batch; fewer
    different ones do (XShare, vLLM issue 35550; opportunistic expert activation, arXiv 2511.02237). A decoding token whose
    batch_experts is finite keeps of its mask the experts that a token without a budget has chosen, which are read anyway, and
    of the others so many with the largest sum of weights over all tokens with a budget; ties go to the lower expert. Tokens
    without a budget, prompts among them, keep their masks.
    """
    num_experts = allowed.shape[1]
    kept = topk_ids >= 0
    chosen = torch.zeros_like(allowed, dtype=torch.float32).scatter_add_(1, topk_ids.clamp(min=0), kept.float())
    weights = torch.zeros_like(chosen).scatter_add_(1, topk_ids.clamp(min=0), topk_weights * kept)
    budget = rows[:, RuleNumber.BATCH_EXPERTS].masked_fill(
        torch.arange(len(rows), device=rows.device) >= num_decode, torch.inf
    )[:, None]
    limited = budget < torch.inf
    free = ((chosen > 0) & ~limited).any(dim=0)
    total = (weights * limited).sum(dim=0)
    number = torch.arange(num_experts, device=rows.device)
    better = (total[None, :] > total[:, None]) | ((total[None, :] == total[:, None]) & (number[None, :] < number[:, None]))
    rank = (better[None] & (allowed & ~free)[:, None, :]).sum(dim=-1)  # of each expert among those of the mask that cost
    return allowed & (free | (rank < budget))
