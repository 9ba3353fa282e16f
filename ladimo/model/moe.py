"""The expert layer: a router chooses the experts, and the experts compute. Legend: T tokens, D hidden_size, E experts, F
size."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.quantization import Weights
from ladimo.model.router import make_router
from ladimo.model.rule import RuleNumber


class Experts(nn.Module):
    """The experts of one layer, stacked in two tensors: gate_up_proj [E, 2F, D] and down_proj [E, D, F].

    Without a gate, gate_up_proj [E, F, D] has up rows only, and there is up_bias [E, F].
    """

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__()
        num_experts, size, gated = layer.num_experts, layer.moe_intermediate_size, layer.ffn_kind == "swiglu"
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, (2 if gated else 1) * size, hidden_size))
        self.up_bias = None if gated else nn.Parameter(torch.zeros(num_experts, size))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, hidden_size, size))


class SharedExpertGate(nn.Module):
    """Weighs the shared expert: sigmoid(weight x), weight [1, D]. It is never rounded to integers."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, 1]."""
        return F.linear(hidden_states, self.weight).sigmoid()


class ExpertLayer(BackendModule):
    """Takes the place of a dense FFN. `gate` is the router. `experts` are the parts of the FFN.

    Some models also have a shared expert, which runs for every token.
    """

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__()
        self.config = layer
        self.gate = make_router(hidden_size, layer)
        self.experts = Experts(hidden_size, layer)
        # That of the FFN whose parts the experts are. It counts once, whatever experts run.
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if layer.ffn_kind == "gelu" else None
        if layer.shared_expert_intermediate_size:
            self.shared_expert = GatedMLP(hidden_size, layer.shared_expert_intermediate_size)
            self.shared_expert_gate = SharedExpertGate(hidden_size)

    def add_shared(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """The output [T, D] of the chosen experts, with what every token gets: the shared expert's output, or a bias."""
        if self.output_bias is not None:
            return out + self.output_bias
        if not self.config.shared_expert_intermediate_size:
            return out
        shared: Tensor = self.shared_expert_gate(hidden_states) * self.shared_expert(hidden_states)
        return out + shared

    def forward(
        self, hidden_states: Tensor, rows: Tensor, allowed: Tensor, num_budgeted: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [T, D] -> output [T, D], topk_ids [T, E], -1 where no expert ran, and the refined neurons [T, G], None
        if the weights are not nested.

        `rows` [T, len(RuleNumber)] and the masks `allowed` [T, E] are the tokens' rules. The batch budgets of the rules apply
        to the first `num_budgeted` tokens.
        """
        router_logits = self.gate(hidden_states)
        bias = self.gate.e_score_correction_bias
        topk_weights, topk_ids = self.backend.select_experts(router_logits, rows, allowed, self.config, bias)
        if num_budgeted:
            shared = self.backend.apply_batch_budget(topk_weights, topk_ids, rows, allowed, num_budgeted)
            topk_weights, topk_ids = self.backend.select_experts(router_logits, rows, shared, self.config, bias)
        gate_up: Weights | NestedWeights = self.experts.gate_up_proj
        down: Weights | NestedWeights = self.experts.down_proj
        if not isinstance(gate_up, NestedWeights):
            assert not isinstance(down, NestedWeights)
            out = self.backend.apply_experts(hidden_states, topk_weights, topk_ids, gate_up, down, self.experts.up_bias)
            return self.add_shared(out, hidden_states), topk_ids, None
        assert isinstance(down, NestedWeights)
        bits, refine = rows[:, RuleNumber.BITS], rows[:, RuleNumber.REFINE]
        weights = gate_up, down, self.experts.get_buffer("norms")
        up_bias = self.experts.up_bias
        out, refined = self.backend.apply_nested(hidden_states, topk_weights, topk_ids, *weights, bits, refine, up_bias)
        return self.add_shared(out, hidden_states), topk_ids, refined
