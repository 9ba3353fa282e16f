"""The back end for GPUs: Triton kernels replace torch's operations. Imported only if Triton is installed."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ladimo.model.attention.layer import Attention
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.inputs import RoutingTables
from ladimo.model.kernels import attention, experts, linear, norm_activation, routing
from ladimo.model.kernels.nested import experts as nested_experts
from ladimo.model.kernels.nested import head as nested_head
from ladimo.model.kernels.nested import linear as nested_linear
from ladimo.model.nested.layers import NestedExperts, NestedLinear
from ladimo.model.nested.plane_layout import DownWeights
from ladimo.model.nested.refinement import WHOLE
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.quantization import Weights

# The kernels can unpack integer formats with these numbers of bits.
BITS = (8, 4)

P = ParamSpec("P")
R = TypeVar("R")


def unless_trained(kernel: Callable[P, R], reference: Callable[P, R]) -> Callable[P, R]:
    """A function that runs the kernel, or the reference if an argument needs gradients. The kernels compute no gradients."""

    @wraps(reference)
    def choose(*arguments: P.args, **options: P.kwargs) -> R:
        return (reference if _wants_gradients(arguments) else kernel)(*arguments, **options)

    return choose


def _wants_gradients(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def _apply_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    up_bias: Tensor | None = None,
) -> Tensor:
    """The kernels know experts with a gate. Others run in torch."""
    if up_bias is not None:
        return TorchBackend.apply_experts(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj, up_bias)
    return experts.apply_experts(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj)


def _attend_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor) -> Tensor:
    """The kernel knows keys that are as wide as values. Pruned ones run in torch."""
    attend = attention.attend_decode if k_cache.shape[-1] == v_cache.shape[-1] else TorchBackend.attend_decode
    return attend(q, k_cache, v_cache, block_table, context_lens)


class TritonBackend(TorchBackend):
    """Runs Triton kernels where no gradients are needed."""

    name = "triton"

    rms_norm = staticmethod(unless_trained(norm_activation.rms_norm, TorchBackend.rms_norm))
    add_rms_norm = staticmethod(unless_trained(norm_activation.add_rms_norm, TorchBackend.add_rms_norm))
    silu_mul = staticmethod(unless_trained(norm_activation.silu_mul, TorchBackend.silu_mul))
    rotate_and_store = staticmethod(unless_trained(attention.rotate_and_store, TorchBackend.rotate_and_store))
    attend_decode = staticmethod(unless_trained(_attend_decode, TorchBackend.attend_decode))
    select_experts = staticmethod(unless_trained(routing.select_experts, TorchBackend.select_experts))
    apply_batch_budget = staticmethod(unless_trained(routing.apply_batch_budget, TorchBackend.apply_batch_budget))
    apply_experts = staticmethod(unless_trained(_apply_experts, TorchBackend.apply_experts))
    linear = staticmethod(unless_trained(linear.linear, TorchBackend.linear))

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        for module in model.modules():
            if isinstance(module, NestedLinear | NestedExperts):
                module.lay_out()

    def lay_out(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.join_projections()

    def nested_linear(self, x: Tensor, weights: NestedWeights, bits: Tensor, bias: Tensor | None = None) -> Tensor:
        if _wants_gradients((x,)):
            return super().nested_linear(x, weights, bits, bias)
        return nested_linear.linear(x, weights, bits, bias)

    def apply_nested(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        gate_up: NestedWeights,
        down: NestedWeights,
        norms: Tensor,
        bits: Tensor,
        refine: Tensor,
        up_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # The kernels know the mean score of this process's neurons only.
        if self.part is not WHOLE or _wants_gradients((hidden_states, topk_weights)):
            weights = gate_up, down, norms
            return super().apply_nested(hidden_states, topk_weights, topk_ids, *weights, bits, refine, up_bias)
        assert isinstance(down, DownWeights)  # by `prepare`
        arguments = hidden_states, topk_weights, topk_ids, gate_up, down, norms, bits, refine, up_bias
        return nested_experts.apply_nested(*arguments)

    def nested_logits(
        self, x: Tensor, weights: NestedWeights, bits: Tensor, refine: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if _wants_gradients((x,)):
            return super().nested_logits(x, weights, bits, refine, bias)
        return nested_head.logits(x, weights, bits, refine, bias)

    def record(self, tables: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        routing.record(expert_ids, policy_ids, tables.expert_tokens, tables.distinct_experts)
