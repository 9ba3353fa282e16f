"""Kernels that read nested weights at each token's own bits, against their references in torch."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.nested.plane_layout import DownWeights, to_neuron_rows, to_words
from ladimo.model.nested.refinement import column_norms
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.quantization import QuantizedWeights
from tests.factories import nested_weights

pytest.importorskip("triton")
from ladimo.model.kernels.nested import experts as nested_experts
from ladimo.model.kernels.nested import head as nested_head
from ladimo.model.kernels.nested import linear as nested_linear

EXAMPLES = 40 if os.environ.get("LONG_TESTS") else 3  # the interpreter is slow
INF = float("inf")
# What a token asks for: bits and REFINE. Padding has zeros.
KINDS = {
    "padding": (0, 0),
    "4": (4, INF),
    "8": (8, INF),
    "whole": (INF, INF),
    "some": (4, 1.0),
    "all": (4, 0),
    "none": (4, 1e9),
}
REFERENCE = TorchBackend()


def wishes(kinds: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Bits and REFINE [T], as columns of the tokens' rules."""
    rules = torch.tensor([(1.0, *KINDS[kind]) for kind in kinds], device=device)
    return rules[:, 1], rules[:, 2]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def whole(weights: NestedWeights) -> Tensor:
    assert weights.full is not None
    return weights.full


def on_device(weights: NestedWeights, device: torch.device) -> NestedWeights:
    high, low = (
        replace(plane, data=plane.data.to(device), scales=plane.scales.to(device)) for plane in (weights.high, weights.low)
    )
    return NestedWeights(whole(weights).to(device), high, low)


def matrix(*shape: int, device: torch.device, seed: int = 0) -> NestedWeights:
    """In words."""
    weights = nested_weights(*shape, seed=seed)
    return on_device(replace(weights, high=to_words(weights.high), low=to_words(weights.low)), device)


def poisoned(plane: QuantizedWeights) -> QuantizedWeights:
    return replace(plane, scales=torch.full_like(plane.scales, torch.nan))


kinds_of_linears = st.lists(st.sampled_from(["padding", "4", "8", "whole"]), min_size=1, max_size=9)


@given(kinds_of_linears, st.integers(1, 70), st.sampled_from([20, 256, 300]), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None)
def test_linear(kinds: list[str], rows: int, cols: int, has_bias: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights, x = matrix(rows, cols, device=device), draw(len(kinds), cols, device=device)
    bias = draw(rows, device=device, seed=1) if has_bias else None
    bits, _ = wishes(kinds, device)
    out = nested_linear.linear(x, weights, bits, bias)
    padding = bits == 0
    expected = REFERENCE.nested_linear(x, weights, bits, bias)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=0, atol=2e-5)
    nothing = torch.zeros(rows, device=device) if bias is None else bias
    assert torch.equal(out[padding], nothing.expand(int(padding.sum()), -1))


@pytest.mark.parametrize("decode_tokens", [32, 0])
def test_linear_in_half_precision(decode_tokens: int, device: torch.device) -> None:
    """When decoding, scales multiply sums, else weights."""
    weights, x = matrix(33, 96, device=device), draw(4, 96, device=device, dtype=torch.float16)
    bits, _ = wishes(["4", "8", "whole", "4"], device)
    weights = replace(weights, full=whole(weights).half())
    out = nested_linear.linear(x, weights, bits, decode_tokens=decode_tokens)
    assert out.dtype == torch.float16
    expected = REFERENCE.nested_linear(x.float(), replace(weights, full=whole(weights).float()), bits)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=4e-3)


def test_without_whole_weights_more_bits_are_eight(device: torch.device) -> None:
    weights, x = replace(matrix(20, 40, device=device), full=None), draw(2, 40, device=device)
    out = nested_linear.linear(x, weights, wishes(["8", "whole"], device)[0])
    expected = REFERENCE.nested_linear(x, weights, wishes(["8", "8"], device)[0])
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_columns_in_parts(device: torch.device) -> None:
    """Long rows and few of them: several programs add up a row, as many for one token as for many."""
    weights = matrix(5, 2100, device=device)
    x, (bits, _) = draw(3, 2100, device=device), wishes(["4", "8", "whole"], device)
    parts = nested_linear.product(x, weights, nested_linear.Tokens(bits), True)
    assert len(parts) == 2 and (parts != 0).all()
    expected = REFERENCE.nested_linear(x, weights, bits)
    torch.testing.assert_close(parts.sum(dim=0), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(nested_linear.linear(x, weights, bits), expected, rtol=0, atol=2e-5)


def test_number_of_parts() -> None:
    """Of a 7B model, at 32 rows of weights per program: projections, gate and up, down, the output head."""
    assert [nested_linear.num_parts(tiles, blocks) for tiles, blocks in ((128, 16), (688, 16), (128, 43), (1000, 16))] == [
        4,
        1,
        4,
        1,
    ]


@pytest.mark.parametrize("kind", ["4", "8", "whole"])
def test_a_plane_that_nobody_wants_is_not_read(kind: str, device: torch.device) -> None:
    """What is not wanted holds no numbers, and the answer is one."""
    weights, x = matrix(40, 70, device=device), draw(2, 70, device=device)
    bits, _ = wishes([kind, "padding"], device)
    expected = REFERENCE.nested_linear(x, weights, bits)[0]
    broken = replace(
        weights,
        full=weights.full if kind == "whole" else torch.full_like(whole(weights), torch.nan),
        high=poisoned(weights.high) if kind == "whole" else weights.high,
        low=weights.low if kind == "8" else poisoned(weights.low),
    )
    torch.testing.assert_close(nested_linear.linear(x, broken, bits)[0], expected, rtol=0, atol=2e-5)


def test_a_token_does_not_depend_on_what_others_want(device: torch.device) -> None:
    """Bit for bit on a GPU, to the last bits where numpy multiplies the tiles, and even if the others' numbers are broken."""
    weights, x = matrix(40, 300, device=device), draw(6, 300, device=device)
    crowd, _ = wishes(["4", "8", "whole", "8", "4", "padding"], device)
    tolerance = 0.0 if device.type == "cuda" else 1e-6
    out = nested_linear.linear(x, weights, crowd)
    for token in range(5):
        alone = nested_linear.linear(x[token : token + 1], weights, crowd[token : token + 1])
        torch.testing.assert_close(alone[0], out[token], rtol=0, atol=tolerance)
    broken = replace(weights, low=poisoned(weights.low), full=torch.full_like(whole(weights), torch.nan))
    with_nan = nested_linear.linear(x, broken, crowd)
    assert torch.equal(with_nan[[0, 4, 5]], out[[0, 4, 5]])
    assert with_nan[1:4].isnan().all()


Layer = tuple[NestedWeights, DownWeights, Tensor]


def layer(num_experts: int, hidden: int, size: int, device: torch.device, gated: bool = True) -> Layer:
    """Gate and up, or up alone, down, and the norms of the columns of down."""
    rows = 2 * size if gated else size
    gate_up, down = (matrix(num_experts, *shape, device=device) for shape in ((rows, hidden), (hidden, size)))
    by_neuron = DownWeights(down.full, down.high, down.low, to_neuron_rows(down.low))
    return gate_up, by_neuron, column_norms(whole(down))


def route(kinds: list[str], num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, E]: some experts of each token, none for padding."""
    generator = torch.Generator().manual_seed(len(kinds))
    ids = torch.rand(len(kinds), num_experts, generator=generator).argsort(dim=-1)
    ids[:, 1:] = ids[:, 1:].masked_fill(torch.rand(len(kinds), num_experts - 1, generator=generator) < 0.5, -1)
    ids[[kind == "padding" for kind in kinds]] = -1
    weights = torch.rand(ids.shape, generator=generator) * (ids >= 0)
    return weights.to(device), ids.to(device)


@given(
    st.lists(st.sampled_from([*KINDS]), min_size=1, max_size=4),
    st.integers(1, 2),
    st.sampled_from([(20, 33), (70, 40), (40, 64)]),
)
@pytest.mark.parametrize("gated", [True, False])
@settings(max_examples=EXAMPLES, deadline=None)
def test_experts(gated: bool, kinds: list[str], num_experts: int, sizes: tuple[int, int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = layer(num_experts, *sizes, device, gated)
    bias = None if gated else draw(num_experts, sizes[1], device=device, seed=2)
    tokens = draw(len(kinds), sizes[0], device=device), *route(kinds, num_experts, device)
    out, counts = nested_experts.apply_nested(*tokens, *weights, *wishes(kinds, device), bias)
    expected, expected_counts = REFERENCE.apply_nested(*tokens, *weights, *wishes(kinds, device), bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert torch.equal(counts, expected_counts)
    every = (tokens[2] >= 0).sum(dim=1) * sizes[1]
    for kind, total, number in zip(kinds, counts.sum(dim=1).tolist(), every.tolist(), strict=True):
        assert total == (number if kind == "all" else total if kind == "some" else 0)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_many_tokens(gated: bool, device: torch.device) -> None:
    """In the tiles of prompts, cut into two parts."""
    kinds, weights = [*KINDS][1:], layer(1, 20, 33, device, gated)
    bias = None if gated else draw(1, 33, device=device, seed=2)
    tokens = draw(len(kinds), 20, device=device), *route(kinds, 1, device)
    wanted = *wishes(kinds, device), bias
    expected, expected_counts = REFERENCE.apply_nested(*tokens, *weights, *wanted)
    out, counts = nested_experts.apply_nested(*tokens, *weights, *wanted, decode_tokens=0, max_tokens=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert torch.equal(counts, expected_counts)


def test_only_refined_neurons_are_read(device: torch.device) -> None:
    """What the low planes hold of the rest changes nothing, not even if it is no number."""
    gate_up, down, norms = layer(1, 40, 64, device)
    x, (weights, ids) = draw(1, 40, device=device), route(["some"], 1, device)
    bits, refine = wishes(["some"], device)
    arguments = x, weights, ids
    expected, counts = nested_experts.apply_nested(*arguments, gate_up, down, norms, bits, refine)
    gate, up = (x @ gate_up.at(4, torch.float32)[0].t()).chunk(2, dim=-1)
    scores = (torch.nn.functional.silu(gate) * up).abs()[0] * norms[0]
    chosen = scores >= scores.mean()
    assert 0 < int(chosen.sum()) == int(counts.sum()) < 64
    scales, data = gate_up.low.scales.clone(), down.neurons.data.clone()
    scales[0, ~torch.cat((chosen, chosen))] = torch.nan
    data[0, ~chosen] ^= 0x55
    gate_up, down = (
        replace(gate_up, low=replace(gate_up.low, scales=scales)),
        replace(down, low=poisoned(down.low), neurons=replace(down.neurons, data=data)),
    )
    out, _ = nested_experts.apply_nested(*arguments, gate_up, down, norms, bits, refine)
    assert torch.equal(out, expected)
    assert not torch.equal(nested_experts.apply_nested(*arguments, gate_up, down, norms, bits, refine * 0)[0], expected)


@given(st.lists(st.sampled_from([*KINDS]), min_size=1, max_size=4), st.integers(16, 70), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None)
def test_head(kinds: list[str], num_words: int, has_bias: bool) -> None:
    """Words that refine are those near the best: all of them for the largest REFINE."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights, x = matrix(num_words, 40, device=device), draw(len(kinds), 40, device=device)
    bias = draw(num_words, device=device, seed=1) if has_bias else None
    bits, refine = wishes(kinds, device)
    out, counts = nested_head.logits(x, weights, bits, refine, bias)
    expected, expected_counts = REFERENCE.nested_logits(x, weights, bits, refine, bias)
    live = bits > 0
    torch.testing.assert_close(out[live], expected[live], rtol=0, atol=2e-5)
    assert torch.equal(counts[live], expected_counts[live])
    assert (counts[~live] == 0).all()


def test_head_of_many_rows(device: torch.device) -> None:
    """In the tiles of prompts, cut into two parts."""
    kinds = [*KINDS][1:]
    weights, x = matrix(40, 20, device=device), draw(len(kinds), 20, device=device)
    wanted = wishes(kinds, device)
    expected, expected_counts = REFERENCE.nested_logits(x, weights, *wanted)
    out, counts = nested_head.logits(x, weights, *wanted, decode_rows=0, max_rows=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert torch.equal(counts, expected_counts)


def test_only_likely_words_are_read(device: torch.device) -> None:
    weights, x = matrix(60, 40, device=device), draw(1, 40, device=device)
    wanted = wishes(["some"], device)
    expected, counts = nested_head.logits(x, weights, *wanted)
    at4 = (x @ weights.at(4, torch.float32).t())[0]
    chosen = at4 >= at4.max() - 1
    assert 0 < int(chosen.sum()) == int(counts.sum()) < 60
    scales = weights.low.scales.clone()
    scales[~chosen] = torch.nan
    out, _ = nested_head.logits(x, replace(weights, low=replace(weights.low, scales=scales)), *wanted)
    assert torch.equal(out, expected)
