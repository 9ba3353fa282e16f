"""Kernels that read weights as integers against their references, which make the weights whole first."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo.model import quantization
from ladimo.model.experts import apply_experts_grouped
from ladimo.model.quantization import QuantizedWeights, quantize_weights

pytest.importorskip("triton")
from ladimo.model.kernels import experts, linear
from ladimo.model.kernels.tiles import Tile

FORMATS = ("int8", "int4")
SMALL = Tile(16, 32, 32, num_warps=4, num_stages=2), Tile(16, 32, 32, num_warps=4, num_stages=2)
MATVEC = Tile(1, 16, 64, num_warps=4), Tile(1, 16, 64, num_warps=4)  # fewer programs to interpret
EXPERTS = 4
# Hidden and expert sizes: groups that are not full, whole tiles, rows shorter than half a pair of groups.
SIZES = [(52, 44), (64, 128), (20, 33), (97, 70)]
Arguments = tuple[Tensor, Tensor, Tensor, QuantizedWeights, QuantizedWeights]


def draw(
    num_tokens: int,
    device: torch.device,
    format: str,
    sizes: tuple[int, int] = SIZES[0],
    case: str = "mixed",
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """`case`: mixed (some tokens with no expert, some with all), all, none, one_expert."""
    hidden, size = sizes
    generator = torch.Generator().manual_seed(num_tokens + hidden)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=-1)
    if case == "mixed":
        dropped = torch.rand(num_tokens, EXPERTS, generator=generator) < 0.6
        dropped[0, 0] = False
        dropped[1::4] = True
        dropped[2::4] = False
        ids = ids.masked_fill(dropped, -1)
    elif case == "none":
        ids = torch.full_like(ids, -1)
    elif case == "one_expert":
        ids = torch.where(ids == 3, ids, -1)
    scores = torch.rand(ids.shape, generator=generator) * (ids >= 0)
    gate_up = torch.randn(EXPERTS, 2 * size, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(EXPERTS, hidden, size, generator=generator) * size**-0.5
    x = torch.randn(num_tokens, hidden, generator=generator)
    return (
        x.to(device, dtype),
        scores.to(device),
        ids.to(device),
        quantize_weights(gate_up.to(device), format),
        quantize_weights(down.to(device), format),
    )


def reference_of(arguments: Arguments) -> Tensor:
    x, scores, ids, gate_up, down = arguments
    return apply_experts_grouped(x.float(), scores, ids, gate_up.to_dtype(torch.float32), down.to_dtype(torch.float32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["mixed", "all", "none", "one_expert"])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_experts(num_tokens: int, case: str, format: str, device: torch.device) -> None:
    arguments = draw(num_tokens, device, format, case=case)
    expected = reference_of(arguments)
    assert (expected != 0).any() == (case != "none")
    tiles = MATVEC if num_tokens == 1 else SMALL
    torch.testing.assert_close(experts.apply_experts(*arguments, tiles=tiles), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("num_tokens", "sizes"), [(1, SIZES[1]), (1, SIZES[2]), *((3, sizes) for sizes in SIZES[1:])])
def test_experts_of_any_size(num_tokens: int, sizes: tuple[int, int], format: str, device: torch.device) -> None:
    """With the tiles of real runs."""
    arguments = draw(num_tokens, device, format, sizes)
    torch.testing.assert_close(experts.apply_experts(*arguments), reference_of(arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_that_take_every_expert_are_one_product(
    format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = draw(9, device, format, case="all")
    expected = reference_of(arguments)
    real = Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        tensor = real(self, *shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    torch.testing.assert_close(experts.apply_experts(*arguments, tiles=SMALL, dense_tokens=2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_in_half_precision(num_tokens: int, format: str, device: torch.device) -> None:
    arguments = draw(num_tokens, device, format, dtype=torch.float16)
    out = experts.apply_experts(*arguments)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), reference_of(arguments), rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_an_expert_nobody_chose_is_not_read(num_tokens: int, format: str, device: torch.device) -> None:
    """Its scales are not numbers, and the answer is."""
    arguments = draw(num_tokens, device, format, case="one_expert")
    expected = reference_of(arguments)
    for weights in arguments[3:]:
        weights.scales[:3] = torch.nan
    torch.testing.assert_close(experts.apply_experts(*arguments), expected, rtol=0, atol=1e-5)


def rows(num_rows: int, num_inputs: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).to(device, dtype)


def matrix(num_outputs: int, num_inputs: int, format: str, device: torch.device) -> QuantizedWeights:
    generator = torch.Generator().manual_seed(num_outputs)
    weights = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    return quantize_weights(weights.to(device), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [(33, 128), (7, 33), (4, 20), (5, 2100)])
@pytest.mark.parametrize("num_rows", [1, 17, 300])
def test_linear(num_rows: int, sizes: tuple[int, int], format: str, device: torch.device) -> None:
    """One row, one tile of rows, several, and so many that the weights are made whole."""
    weights, x = matrix(*sizes, format, device), rows(num_rows, sizes[1], device)
    bias = rows(1, sizes[0], device)[0] if sizes[0] % 2 else None
    out = linear.linear(x, weights, bias)
    assert out.shape == (num_rows, sizes[0])
    torch.testing.assert_close(out, quantization.linear(x, weights, bias), rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 9])
def test_linear_in_half_precision(num_rows: int, format: str, device: torch.device) -> None:
    weights, x = matrix(40, 96, format, device), rows(num_rows, 96, device, torch.float16)
    out = linear.linear(x, weights)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), quantization.linear(x.float(), weights), rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(600, 40), (5, 1500), (7, 2050), (530, 3000)])
def test_linear_of_one_row(sizes: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Weights as they are: few and many outputs, one to three tiles of columns. Several rows are torch's."""
    weights, x, bias = (torch.randn(shape, device=device).to(dtype) for shape in (sizes, (3, sizes[1]), (sizes[0],)))
    expected = x.double() @ weights.double().t() + bias.double()
    for rows in (1, 3):
        out = linear.linear(x[:rows], weights, bias)
        torch.testing.assert_close(out.double(), expected[:rows], rtol=0, atol=2e-3 if dtype == torch.float32 else 0.2)
    torch.testing.assert_close(linear.linear(x[0], weights), linear.linear(x[:1], weights)[0], rtol=0, atol=0)


def test_linear_of_other_shapes(device: torch.device) -> None:
    """Leading dimensions, strides and no rows at all."""
    weights, x = matrix(6, 40, "int4", device), rows(12, 40, device)
    expected = quantization.linear(x, weights)
    assert torch.equal(linear.linear(x.view(3, 4, 40), weights), linear.linear(x, weights).view(3, 4, 6))
    torch.testing.assert_close(linear.linear(x.t().contiguous().t(), weights), expected, rtol=0, atol=2e-5)
    assert linear.linear(x[:0], weights).shape == (0, 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [(64, 128), (7, 33), (9, 20), (3, 700)])
def test_whole_weights(sizes: tuple[int, int], format: str, device: torch.device) -> None:
    weights = matrix(*sizes, format, device)
    assert torch.equal(linear.whole(weights, torch.float32), weights.to_dtype(torch.float32))
    assert torch.equal(linear.whole(weights, torch.float16), weights.to_dtype(torch.float16))
