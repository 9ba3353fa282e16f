"""The routing rule. A policy gives each layer a row of numbers (`RuleNumber`) and a mask. `select_experts` reads both as data
and has no branch that depends on a policy.

`apply_batch_budget` lets the decoding tokens of a step share a budget of experts. The budget is also a number of the row.

Legend: T tokens, E experts, K = E places per token. No shape depends on a policy.
"""

import torch
from torch import Tensor

from ladimo.model.config import MoeLayerConfig
from ladimo.model.rule import RuleNumber


def expert_scores(
    router_logits: Tensor, selection_bias: Tensor | None, allowed: Tensor, layer: MoeLayerConfig
) -> tuple[Tensor, Tensor]:
    """The scores of all experts, best first, and the experts' numbers: both [T, E].

    router_logits and `allowed` are [T, E]. Experts that `allowed` excludes come last and have score 0. Softmax runs over the
    allowed experts only; sigmoid scores are independent of each other. `selection_bias` [E] changes the order, but not the
    scores. On a tie the expert with the lower number comes first, as in the kernels.
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
    """Choose the experts of each token by its rule.

    router_logits [T, E], `rows` [T, len(RuleNumber)], `allowed` [T, E] (the masks), selection_bias [E].
    Returns topk_weights [T, K] fp32 and topk_ids [T, K] int64, best first.

    Rank r is kept if r < top_k, the scores before it sum to less than mass, and its score is at least floor and at least
    relative_floor times the score of rank 0. Rank 0 is always kept. A dropped place has weight 0 and id -1. A row of zeros with
    an empty mask keeps nothing; padded tokens and dense layers have such rows. BATCH_EXPERTS concerns all tokens of a step
    together, so it is not read here but in `apply_batch_budget`.
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
    """Narrow the masks of decoding tokens, so that they share experts. Returns masks [T, E]; tokens then choose again.

    topk_weights and topk_ids [T, K] are the first choice, `rows` [T, len(RuleNumber)] and `allowed` [T, E] the tokens' rules.
    The first `num_decode` tokens are the decoding ones.

    A decode step reads every expert that any of its tokens chose. So in a batch it saves little to run fewer experts per token;
    what saves is fewer different experts (XShare, vLLM issue 35550; opportunistic expert activation, arXiv 2511.02237).

    A decoding token with a finite batch_experts has a budget. It keeps those experts of its mask that some token without a
    budget has chosen, because these are read anyway. Of the other experts of its mask it keeps batch_experts: those with the
    largest sum of weights over all tokens with a budget. On a tie the lower expert wins. Tokens without a budget keep their
    masks; all prompt tokens are among them.
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
    rank = (better[None] & (allowed & ~free)[:, None, :]).sum(dim=-1)  # among the experts of the mask that are not free
    return allowed & (free | (rank < budget))
