"""The inputs and outputs of one FFN in the dense model, and the unit of layer errors. Legend: T tokens, D hidden_size."""

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
        """Split inputs and outputs [T, D]. The first `num_fit` tokens are for fitting, the others are held out."""
        return cls(inputs[:num_fit], targets[:num_fit], inputs[num_fit:], targets[num_fit:])


def target_variance(targets: Tensor) -> float:
    """The variance of targets [T, D] over tokens, as a mean over channels. All layer errors are divided by it."""
    return max(targets.float().var(dim=0, correction=0).mean().item(), 1e-20)
