"""What layer distillation minimises and reports. Legend: T tokens, D hidden_size, E experts, K experts per token."""

import torch
from torch import Tensor


def target_variance(targets: Tensor) -> float:
    """Mean over channels of the variance over tokens [T, D] -> scalar; the unit of every layer error we report."""
    return max(targets.float().var(dim=0, correction=0).mean().item(), 1e-20)


def balance_loss(router_logits: Tensor, topk_ids: Tensor) -> Tensor:
    """E * sum_i f_i P_i over router_logits [T, E] and topk_ids [T, K] (-1 = no expert); f_i: share of tokens that chose expert
    i, P_i: its mean softmax score. K when the load is even. Switch Transformers (arXiv 2101.03961), equation 4, for K experts
    per token.
    """
    num_tokens, num_experts = router_logits.shape
    share = torch.bincount(topk_ids.flatten() + 1, minlength=num_experts + 1)[1:] / num_tokens
    return num_experts * (share * router_logits.softmax(dim=-1).mean(dim=0)).sum()
