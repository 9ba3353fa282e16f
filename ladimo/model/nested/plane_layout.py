"""The planes of nested weights as GPU kernels read them: whole lines of memory at a time, and single neurons alone.

`ladimo.model.nested` defines what the integers mean. Values stay the same here; only their places change.

Legend: E experts, N rows (outputs), K columns (inputs), P columns filled up with zeros, D hidden_size, F moe_intermediate_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.nested.weights import SCALE_DTYPE, NestedWeights
from ladimo.model.precision import GROUP
from ladimo.model.quantization import QuantizedWeights, find_format

HALF_GROUPS = 4  # groups of columns in the words of half a block
BLOCK_COLUMNS = 2 * HALF_GROUPS * GROUP


class Words:
    """Rows of 32-bit words, filled up to whole blocks of 32 words. A block holds 256 columns, its first 16 words the first half
    of them: four groups that share a scale each. Group i of a half is in bits 4 i to 4 i + 3 of the words' lower halves (even
    columns) and upper halves (odd columns). Integers are stored plus 8.

    So a block of a row is 128 bytes in a line, and one shift takes a group out of 16 words, two neighbours in each. A pair of
    16-bit numbers in that order is what matrix units want.
    """

    name, bits, lowest, highest = "int4 words", 4, -8, 7

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        return find_format("int4").scales(groups, limit)

    def to_bytes(self, integers: Tensor) -> Tensor:
        """Integers int8 [N, K], K a multiple of 256 -> words int32 [N, K / 8]."""
        nibbles = (integers.to(torch.int32) + 8).unflatten(-1, (-1, HALF_GROUPS, GROUP // 2, 2))
        words = torch.zeros_like(nibbles[..., 0, :, 0])
        for group in range(HALF_GROUPS):
            for odd in range(2):
                words |= nibbles[..., group, :, odd] << 4 * group + 16 * odd
        return words.flatten(-2)

    def to_integers(self, data: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=data.device).view(2, HALF_GROUPS).T
        words = data.unflatten(-1, (-1, 1, GROUP // 2, 1))
        integers: Tensor = (words >> shifts.view(HALF_GROUPS, 1, 2) & 15) - 8
        return integers.to(torch.int8).flatten(-4)


WORDS = Words()


@dataclass(frozen=True, slots=True)
class NeuronRows:
    """The low planes of down_proj [E, D, F] with a row for each neuron, so that it can be read alone."""

    data: Tensor  # int8 [E, P, W]: of each neuron the bytes of format int4, P neurons in whole groups, W = D / 2 filled up
    scales: Tensor  # [E, P / 32, 2 W]: one per group of neurons and output

    def to_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weights [E, 2 W, P] that the integers stand for, in `dtype`: those of the planes, filled up with zeros."""
        integers = find_format("int4").to_integers(self.data).float().unflatten(1, (-1, GROUP))
        weights: Tensor = (integers * self.scales.unsqueeze(2)).flatten(1, 2)
        return weights.transpose(1, 2).to(dtype)


@dataclass(frozen=True, slots=True)
class DownWeights(NestedWeights):
    """down_proj [E, D, F]. `neurons`: the low planes once more."""

    neurons: NeuronRows


def to_words(plane: QuantizedWeights) -> QuantizedWeights:
    """A plane [..., N, K] in words, its scales in 16 bits, which loses nothing: the stored scales have 16."""
    if plane.format is WORDS:
        return plane
    integers = plane.format.to_integers(plane.data)[..., : plane.cols]
    idle = -plane.cols % BLOCK_COLUMNS
    groups = -(-plane.cols // GROUP)
    scales = F.pad(plane.scales[..., :groups], (0, (plane.cols + idle) // GROUP - groups)).to(SCALE_DTYPE)
    return QuantizedWeights(WORDS.to_bytes(F.pad(integers, (0, idle))), scales, plane.cols, WORDS)


def to_neuron_rows(plane: QuantizedWeights) -> NeuronRows:
    """The low planes of down_proj [E, D, F] by neuron."""
    num_experts, outputs, neurons = plane.shape
    groups, idle = -(-neurons // GROUP), -outputs % (2 * GROUP)
    integers = plane.format.to_integers(plane.data)[..., :neurons].transpose(1, 2)
    rows = F.pad(integers, (0, idle, 0, groups * GROUP - neurons))  # [E, P, 2 W]
    data = find_format("int4").to_bytes(rows.flatten(0, 1)).view(num_experts, groups * GROUP, -1)
    scales = F.pad(plane.scales[..., :groups].transpose(1, 2), (0, idle)).to(SCALE_DTYPE)
    return NeuronRows(data.contiguous(), scales.contiguous())
