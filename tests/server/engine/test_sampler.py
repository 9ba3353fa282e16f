"""Sampling against the definition: each implementation, row by row, over the whole range of the uniform number."""

import ctypes
import math
import platform
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladimo.model.cpu import build
from ladimo.model.cpu.cache import cache_directories
from ladimo.model.cpu.native_draw import NativeDraw
from ladimo.model.cpu.pool import Pool
from server.engine.sampling.sampler import SamplingInputs, sample, uniform
from tests.ladimo.model.test_capture import DEVICE, NoHostCopies, NoHostValues, fake
from tests.ladimo.native import WIDTHS

Sample = Callable[[Tensor, SamplingInputs | None], Tensor]
LARGEST_UNIFORM = 1 - 2.0**-53
COMPILED = build.library() is not None
NARROW = ("avx2", "sse") if platform.machine() == "x86_64" else ()


@cache
def compiled(width: str = "as_wide_as_can_be", threads: int = 2) -> Sample:
    """The compiled draw, for vectors of a width."""
    code = ctypes.CDLL(str(build.compiled(cache_directories()[0], WIDTHS[width])))
    native = NativeDraw(Pool(code, threads))

    def run(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        if inputs is None:
            return native.likeliest(logits)
        return native.draw(logits, inputs.temperature, inputs.top_p, inputs.min_p, inputs.uniform, inputs.top_k)

    return run


@pytest.fixture(params=["torch", *(("as_wide_as_can_be", *NARROW) if COMPILED else ())], scope="module")
def draw(request: pytest.FixtureRequest) -> Sample:
    return sample if request.param == "torch" else compiled(request.param)


def inputs_for(
    uniforms: Any, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, cuts: bool = True
) -> SamplingInputs:
    """The same parameters for each of the uniform numbers."""
    numbers = torch.as_tensor(uniforms, dtype=torch.float64)

    def column(value: float) -> Tensor:
        return torch.full_like(numbers, value)

    rows = torch.full(numbers.shape, top_k, dtype=torch.int64)
    return SamplingInputs(column(temperature), column(top_p), rows, column(min_p), numbers, cuts)


def definition(logits: Any, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Any:
    """The distribution [V], in double precision: sort, keep top_k, then what min_p keeps, then the nucleus."""
    values = np.asarray(logits, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    weights = np.exp((values[order] - values[order[0]]) / temperature)
    weights[top_k or len(weights) :] = 0
    weights[weights < min_p] = 0
    before = np.cumsum(weights) - weights
    if top_p < 1:
        weights[(before >= top_p * weights.sum()) & (np.arange(len(weights)) > 0)] = 0
    out = np.zeros(len(values))
    out[order] = weights / weights.sum()
    return out


def check(draw: Sample, logits: Tensor, numbers: int = 997, **params: Any) -> None:
    """Over evenly spaced uniform numbers, each token comes where the cumulative distribution says. Rounding may move a border,
    that of the nucleus by a token."""
    uniforms = (np.arange(numbers) + 0.5) / numbers
    drawn = draw(logits.expand(numbers, -1).contiguous(), inputs_for(uniforms, **params)).numpy()
    top_p = params.pop("top_p", 1.0)
    fits = np.zeros(numbers, dtype=bool)
    for near in (top_p,) if top_p == 1 else (top_p, max(top_p - 1e-6, 1e-9), top_p + 1e-6):
        probabilities = definition(logits.numpy(), top_p=near, **params)
        ends = np.cumsum(probabilities)
        begins = ends - probabilities
        fits |= (begins[drawn] - 1e-5 <= uniforms) & (uniforms <= ends[drawn] + 1e-5) & (probabilities[drawn] > 0)
        if fits.all():
            break
    assert fits.all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([1e-9, 0.11, 0.37, 0.73, 0.91, 1.0]),
    st.integers(0, 14),
    st.sampled_from([0.0, 0.07, 0.3, 1.0]),
)
@example([8, 8, 8, 8, 0], 1.0, 0.37, 0, 0.0)  # equal ones: the first in the vocabulary stay
@example([8, 8, 8, 8, 0], 1.0, 1.0, 3, 0.0)
@example([0, 8, -40, 8, 8], 1.0, 0.91, 3, 0.07)
def test_draws_as_defined(draw: Sample, values: list[int], temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = torch.tensor(values) / 8
    check(draw, logits, numbers=199, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.3},
    {"top_p": 0.93},
    {"top_p": 0.9999},
    {"top_k": 40},
    {"top_k": 1000, "top_p": 0.93},
    {"min_p": 0.04},
    {"top_p": 0.3, "min_p": 0.04},
    {"top_k": 70, "top_p": 0.93, "min_p": 0.001},
)
LARGE = 5003  # more blocks than there are candidates at first, and the last one not full


def large_logits(kind: str) -> Tensor:
    numbers = torch.randn(LARGE, generator=torch.Generator().manual_seed(5))
    return {
        "flat": numbers / 100,
        "spread": numbers * 3,
        "ties": (numbers * 2).round(),
        "all equal": torch.zeros(LARGE),
        "below zero": numbers.abs() * -8 - 100,
        "few allowed": numbers.masked_fill(torch.arange(LARGE) % 1000 != 7, -math.inf),
    }[kind]


@pytest.mark.parametrize("kind", ["flat", "spread", "ties", "all equal", "below zero", "few allowed"])
def test_large_vocabularies(draw: Sample, kind: str) -> None:
    """Where 64 candidates suffice, where they do not, and where every token is kept."""
    logits = large_logits(kind)
    for limits in LIMITS:
        check(draw, logits, numbers=31, temperature=0.8, **limits)


@pytest.mark.parametrize(
    ("params", "reachable"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 10**9}, {0, 1, 2, 4}),
        ({"min_p": 1.0}, {2}),
        ({"top_p": 1e-12}, {2}),
        ({"top_p": 0.0}, {2}),
        ({"temperature": 1e-4}, {2}),
        ({"temperature": 1e4}, {0, 1, 2, 4}),
        ({"temperature": 0.0}, {2}),
        ({"min_p": 0.2}, {1, 2}),
    ],
)
def test_extreme_parameters(draw: Sample, params: dict[str, Any], reachable: set[int]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf, -0.5]).expand(500, 5).contiguous()
    numbers = np.linspace(0, LARGEST_UNIFORM, 500)
    assert set(draw(logits, inputs_for(numbers, **params)).tolist()) == reachable


@pytest.mark.parametrize("size", [1, 5, 64, 65, LARGE])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 70}, {"min_p": 0.1}])
def test_the_only_token_allowed_is_drawn(draw: Sample, size: int, params: dict[str, Any]) -> None:
    logits = torch.full((3, size), -math.inf)
    logits[:, size // 2] = -1e4
    assert draw(logits, inputs_for([0.0, 0.5, LARGEST_UNIFORM], **params)).tolist() == [size // 2] * 3


def test_logits_that_are_no_numbers_give_a_token_all_the_same(draw: Sample) -> None:
    for value in (math.nan, math.inf, -math.inf):
        tokens = draw(torch.full((2, 70), value), inputs_for([0.3, 0.9], top_p=0.5))
        assert all(0 <= token < 70 for token in tokens.tolist())


def test_greedy_is_the_first_of_the_likeliest(draw: Sample) -> None:
    logits = (torch.randn(40, LARGE, generator=torch.Generator().manual_seed(2)) * 2).round()
    assert torch.equal(draw(logits, None), logits.argmax(dim=-1))
    assert torch.equal(draw(logits, inputs_for([0.5] * 40, temperature=0)), logits.argmax(dim=-1))


def mixed_rows() -> tuple[Tensor, SamplingInputs]:
    """Rows of every kind of parameters, their logits with ties."""
    kinds = list(product((0.0, 0.7, 1.0), (0.4, 0.95, 1.0), (0, 3, 200), (0.0, 0.02)))
    logits = (torch.randn(len(kinds), LARGE, generator=torch.Generator().manual_seed(1)) * 16).round() / 8
    temperature, top_p, top_k, min_p = (torch.tensor(column) for column in zip(*kinds, strict=True))
    numbers = torch.tensor([uniform(3, position) for position in range(len(kinds))], dtype=torch.float64)
    return logits, SamplingInputs(temperature.double(), top_p.double(), top_k, min_p.double(), numbers)


def rows_of(inputs: SamplingInputs, rows: list[int], cuts: bool = True) -> SamplingInputs:
    temperature, top_p, top_k = inputs.temperature[rows], inputs.top_p[rows], inputs.top_k[rows]
    return SamplingInputs(temperature, top_p, top_k, inputs.min_p[rows], inputs.uniform[rows], cuts)


def test_a_row_is_drawn_the_same_beside_any_neighbours(draw: Sample) -> None:
    logits, inputs = mixed_rows()
    together = draw(logits, inputs).tolist()
    free = ((inputs.top_p == 1) & (inputs.top_k == 0) & (inputs.min_p == 0)).nonzero().flatten().tolist()
    assert draw(logits[free], rows_of(inputs, free, cuts=False)).tolist() == [together[row] for row in free]
    for row in range(len(logits)):
        assert draw(logits[[row]], rows_of(inputs, [row], cuts=row not in free)).tolist() == [together[row]]
    backwards = list(reversed(range(len(logits))))
    assert draw(logits[backwards], rows_of(inputs, backwards)).tolist() == together[::-1]


@pytest.mark.skipif(not COMPILED, reason="there is no compiled CPU kernel here")
def test_implementations_agree_whatever_the_number_of_threads() -> None:
    logits, inputs = mixed_rows()
    expected = sample(logits, inputs)
    for threads in (1, 2, 5):
        assert torch.equal(compiled(threads=threads)(logits, inputs), expected)


def test_frequencies_follow_the_distribution(draw: Sample) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 4000
    uniforms = [uniform(7, position) for position in range(rows)]
    counts = torch.bincount(draw(logits.expand(rows, 4).contiguous(), inputs_for(uniforms)), minlength=4).double()
    expected = logits.softmax(0).double() * rows
    # Chi-square with three degrees of freedom exceeds 16.3 once in a thousand times; the numbers are fixed by the seed.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.parametrize("cuts", [True, False])
def test_a_draw_can_be_captured(cuts: bool) -> None:
    """No value is needed on the host, so a graph can hold it."""
    with fake():
        logits = torch.empty(4, 300, dtype=torch.bfloat16, device=DEVICE)
        columns = [torch.empty(4, dtype=torch.float64, device=DEVICE) for _ in range(4)]
        top_k = torch.empty(4, dtype=torch.int64, device=DEVICE)
        with NoHostValues(), NoHostCopies():  # type: ignore[no-untyped-call]
            drawn = sample(logits, SamplingInputs(columns[0], columns[1], top_k, columns[2], columns[3], cuts))
        assert drawn.shape == (4,)


def test_uniform_is_a_function_of_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in (0, 1, 2**62, -5) for position in range(50)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert uniform(3, 4) == uniform(3, 4)
