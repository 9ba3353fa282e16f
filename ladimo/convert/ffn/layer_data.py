"""What one FFN does in the dense model, and the unit of every layer error. Legend: T tokens, D hidden_size."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerData:
    """One FFN's inputs and outputs in the dense model, [T, D] each, on the host."""

    fit_inputs: Tensor
    fit_targets: Tensor
    holdout_inputs: Tensor
    holdout_targets: Tensor


def target_variance(targets: Tensor) -> float:
    """Mean over channels of the variance over tokens [T, D] -> scalar; the unit of every layer error we report."""
    return max(targets.float().var(dim=0, correction=0).mean().item(), 1e-20)
