"""What one FFN does in the dense model, and the unit of layer errors. Legend: T tokens, D hidden_size."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerData:
    """One FFN's inputs and outputs in the dense model, [T, D] each, on the host."""

    fit_inputs: Tensor
    fit_targets: Tensor
    holdout_inputs: Tensor
    holdout_targets: Tensor

    @classmethod
    def cut(cls, inputs: Tensor, targets: Tensor, num_fit: int) -> "LayerData":
        """From inputs and outputs [T, D] of which the first `num_fit` tokens are to fit."""
        return cls(inputs[:num_fit], targets[:num_fit], inputs[num_fit:], targets[num_fit:])


def target_variance(targets: Tensor) -> float:
    """The variance of targets [T, D] over tokens, mean over channels. All layer errors are given in this unit."""
    return max(targets.float().var(dim=0, correction=0).mean().item(), 1e-20)
