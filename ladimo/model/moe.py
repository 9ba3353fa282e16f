"""The expert layer: a router decides, experts compute; all that passes between them is (topk_weights, topk_ids)."""

import torch
from torch import Tensor, nn

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import MoeLayerConfig
from ladimo.model.router import make_router


class Experts(nn.Module):
    """The experts of one layer as two stacked tensors: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__()
        num_experts, size = layer.num_experts, layer.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, hidden_size, size))


class ExpertLayer(BackendModule):
    """Replaces a dense FFN: `gate` is the router, `experts` the split network."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__()
        self.config = layer
        self.gate = make_router(hidden_size, layer)
        self.experts = Experts(hidden_size, layer)

    def forward(self, hidden_states: Tensor, rows: Tensor, allowed: Tensor, num_budgeted: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] under rules, `rows` [T, len(RuleNumber)] and masks `allowed` [T, E] -> output [T, D], topk_ids
        [T, E]. `num_budgeted`: of how many tokens, the first, the rules' batch budgets count."""
        router_logits = self.gate(hidden_states)
        bias = self.gate.e_score_correction_bias
        topk_weights, topk_ids = self.backend.select_experts(router_logits, rows, allowed, self.config, bias)
        if num_budgeted:
            shared = self.backend.apply_batch_budget(topk_weights, topk_ids, rows, allowed, num_budgeted)
            topk_weights, topk_ids = self.backend.select_experts(router_logits, rows, shared, self.config, bias)
        experts = self.experts
        out = self.backend.apply_experts(hidden_states, topk_weights, topk_ids, experts.gate_up_proj, experts.down_proj)
        return out, topk_ids
