"""Layers with integer weights, made from loaded layers. Embeddings, norms, biases and routers are not rounded.

The native back end does not use these layers: it rounds in the same way when it packs its weights (`ladimo.model.cpu`).
"""

import torch
from torch import Tensor, nn

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.moe import Experts
from ladimo.model.quantization import QuantizedWeights, find_format, quantize_weights
from ladimo.model.router import Router
from ladimo.model.transformer import MoeTransformer


class QuantizedLinear(BackendModule):
    """Replaces nn.Linear. The integer weights [N, K] are in buffers; the bias [N] is not rounded."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, format: str) -> None:
        super().__init__()
        _keep(self, "weight", quantize_weights(weight, format))
        self.register_parameter("bias", bias)
        self.cols, self.format = weight.shape[-1], format

    @property
    def quantized(self) -> QuantizedWeights:
        """The weights [N, K]."""
        return _kept(self, "weight", self.cols, self.format)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.backend.linear(x, self.quantized, self.bias)


class QuantizedExperts(nn.Module):
    """Replaces `Experts`. The integer weights gate_up_proj [E, 2F, D] and down_proj [E, D, F] are in buffers."""

    up_bias: nn.Parameter | None

    def __init__(self, experts: Experts, format: str) -> None:
        super().__init__()
        _, self.hidden_size, self.moe_intermediate_size = experts.down_proj.shape
        self.format = format
        self.register_parameter("up_bias", experts.up_bias)  # not rounded
        _keep(self, "gate_up", quantize_weights(experts.gate_up_proj, format))
        _keep(self, "down", quantize_weights(experts.down_proj, format))

    @property
    def gate_up_proj(self) -> QuantizedWeights:
        """The weights [E, 2F, D]."""
        return _kept(self, "gate_up", self.hidden_size, self.format)

    @property
    def down_proj(self) -> QuantizedWeights:
        """The weights [E, D, F]."""
        return _kept(self, "down", self.moe_intermediate_size, self.format)


def _keep(module: nn.Module, name: str, weights: QuantizedWeights) -> None:
    module.register_buffer(f"{name}_data", weights.data)
    module.register_buffer(f"{name}_scales", weights.scales)


def _kept(module: nn.Module, name: str, cols: int, format: str) -> QuantizedWeights:
    data, scales = module.get_buffer(f"{name}_data"), module.get_buffer(f"{name}_scales")
    return QuantizedWeights(data, scales, cols, find_format(format))


@torch.no_grad()
def quantize_layers(module: nn.Module, format: str) -> None:
    """Replace the linear layers and experts inside `module`, one by one. The old weights are freed on the way."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear(child.weight, child.bias, format))
        elif isinstance(child, Experts):
            setattr(module, name, QuantizedExperts(child, format))
        elif not isinstance(child, Router):
            quantize_layers(child, format)


@torch.no_grad()
def quantize_model(model: MoeTransformer, format: str) -> None:
    """`quantize_layers` for a whole model. If the output head is the embedding, the head gets rounded weights of its own."""
    quantize_layers(model, format)
    if model.lm_head is None:
        model.lm_head = QuantizedLinear(model.model.embed_tokens.weight, None, format)  # type: ignore[assignment]
    model.backend.prepare(model)
