"""Routers: hidden states [T, D] -> one logit per expert [T, E]. What is done with the logits is `select_experts`' business.

Legend: T tokens, D hidden_size, E experts, H router_hidden_size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.config import MoeLayerConfig

SELECTION_BIAS = "e_score_correction_bias"  # DeepSeek-V3's name; kept in fp32 whatever the dtype of the weights
FIXED_LOGIT = 40.0  # its sigmoid is one in fp32, and it is exact in every dtype


class Router(nn.Module):
    """What all have in common: `e_score_correction_bias` [E] in fp32, or None. It enters the order, not the scores."""

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, layer: MoeLayerConfig) -> None:
        super().__init__()
        bias = nn.Parameter(torch.zeros(layer.num_experts, dtype=torch.float32)) if layer.selection_bias else None
        self.register_parameter(SELECTION_BIAS, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError


class LinearRouter(Router):
    """One bias-free linear map, weight [E - fixed_experts, D]; the logits of the fixed experts are a constant."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.fixed_experts = layer.fixed_experts
        bound = hidden_size**-0.5
        self.weight = nn.Parameter(torch.empty(layer.num_experts - self.fixed_experts, hidden_size).uniform_(-bound, bound))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.pad(F.linear(hidden_states, self.weight), (self.fixed_experts, 0), value=FIXED_LOGIT)


class MlpRouter(Router):
    """fc2(tanh(fc1 x)), weights [H, D] and [E, H]. MoEfication (arXiv 2110.01786), section 3.3."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        assert layer.router_hidden_size is not None
        self.fc1 = nn.Linear(hidden_size, layer.router_hidden_size, bias=False)
        self.fc2 = nn.Linear(layer.router_hidden_size, layer.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.fc2(torch.tanh(self.fc1(hidden_states)))
        return logits


class GluRouter(Router):
    """|silu(gate_proj x) * up_proj x|, both [E, D]: the activation of one representative neuron per expert.

    CMoE (arXiv 2502.04416), analytical router.
    """

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.gate_proj = nn.Linear(hidden_size, layer.num_experts, bias=False)
        self.up_proj = nn.Linear(hidden_size, layer.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        activation: Tensor = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return activation.abs()


class FixedOrder(Router):
    """No router: every token ranks the experts by their number. Parameter-free."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.num_experts = layer.num_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        falling = -torch.arange(self.num_experts, dtype=torch.float32, device=hidden_states.device) / self.num_experts
        return falling.expand(len(hidden_states), -1)


ROUTERS: dict[str, type[LinearRouter | MlpRouter | GluRouter | FixedOrder]] = {
    "linear": LinearRouter,
    "mlp": MlpRouter,
    "glu": GluRouter,
    "none": FixedOrder,
}


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the parameter of this name is kept in, in memory and on disk, by a model of `dtype`."""
    return torch.float32 if name.endswith(SELECTION_BIAS) else dtype


def make_router(hidden_size: int, layer: MoeLayerConfig) -> Router:
    return ROUTERS[layer.router](hidden_size, layer)
