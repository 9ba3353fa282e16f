"""Routers: hidden states [T, D] -> router logits [T, E], one per expert. `select_experts` then chooses by these logits.

Legend: T tokens, D hidden_size, E experts, H router_hidden_size.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Linear

SELECTION_BIAS = "e_score_correction_bias"  # DeepSeek-V3's name; always in fp32, whatever the dtype of the other weights
FIXED_LOGIT = 40.0  # the sigmoid of 40 is 1 in fp32, and 40 is exact in every dtype


class Router(BackendModule):
    """The base of all routers. `e_score_correction_bias` [E] in fp32, or None, changes the order of the experts, not their
    scores."""

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, layer: MoeLayerConfig) -> None:
        super().__init__()
        bias = nn.Parameter(torch.zeros(layer.num_experts, dtype=torch.float32)) if layer.selection_bias else None
        self.register_parameter(SELECTION_BIAS, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [T, D] -> router logits [T, E]."""
        raise NotImplementedError


class LinearRouter(Router):
    """A linear map without bias, weight [E - fixed_experts, D]. The logits of the fixed experts are constant."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.fixed_experts = layer.fixed_experts
        bound = hidden_size**-0.5
        self.weight = nn.Parameter(torch.empty(layer.num_experts - self.fixed_experts, hidden_size).uniform_(-bound, bound))

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = self.backend.linear(hidden_states, self.weight)
        return F.pad(logits, (self.fixed_experts, 0), value=FIXED_LOGIT) if self.fixed_experts else logits


class MlpRouter(Router):
    """fc2(tanh(fc1 x)), weights [H, D] and [E, H]. MoEfication (arXiv 2110.01786), section 3.3."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        assert layer.router_hidden_size is not None
        self.fc1 = Linear(hidden_size, layer.router_hidden_size, bias=False)
        self.fc2 = Linear(layer.router_hidden_size, layer.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.fc2(torch.tanh(self.fc1(hidden_states)))
        return logits


class TableRouter(MlpRouter):
    """The column of fc2 that belongs to the largest of fc1 x, weights [H, D] and [E, H].

    A token chooses one of H sets of experts. fc2 has the logits of all experts for each choice, so a rule's `top_k` says how
    many experts of the chosen set run, best first. On a tie the lower row of fc1 wins.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        choice = self.fc1(hidden_states).argmax(dim=-1)
        return self.fc2.weight[:, choice].t().contiguous()  # the kernels want whole rows


class GluRouter(Router):
    """|silu(gate_proj x) * up_proj x|, both weights [E, D].

    The logit of an expert is the activation of its representative neuron. This is the analytical router of CMoE (arXiv
    2502.04416).
    """

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.gate_proj = Linear(hidden_size, layer.num_experts, bias=False)
        self.up_proj = Linear(hidden_size, layer.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        activation: Tensor = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return activation.abs()


@cache
def falling_logits(num_experts: int, device: torch.device) -> Tensor:
    """Logits [E] that rank the experts by their number. Made once, because on a GPU this would be three launches per layer."""
    with torch.inference_mode(False):
        return -torch.arange(num_experts, dtype=torch.float32, device=device) / num_experts


class FixedOrder(Router):
    """No router: every token ranks the experts by their number. It has no parameters."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(layer)
        self.num_experts = layer.num_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        return falling_logits(self.num_experts, hidden_states.device).expand(len(hidden_states), -1)


ROUTERS: dict[str, type[LinearRouter | MlpRouter | TableRouter | GluRouter | FixedOrder]] = {
    "linear": LinearRouter,
    "mlp": MlpRouter,
    "table": TableRouter,
    "glu": GluRouter,
    "none": FixedOrder,
}


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter `name`, in memory and on disk, in a model of `dtype`."""
    return torch.float32 if name.endswith(SELECTION_BIAS) else dtype


def make_router(hidden_size: int, layer: MoeLayerConfig) -> Router:
    """A new router of the layer's kind."""
    return ROUTERS[layer.router](hidden_size, layer)
