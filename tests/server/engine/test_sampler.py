"""Sampling against the definition, row by row."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sampler import SamplingInputs, sample, uniform


def draw(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, u: float, min_p: float = 0.0) -> int:
    inputs = SamplingInputs(
        torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([top_k]), torch.tensor([min_p]), torch.tensor([u])
    )
    return int(sample(logits[None], inputs)[0])


def expected(logits: list[float], temperature: float, top_p: float, top_k: int, u: float) -> int:
    """The definition in double precision: sort, keep top_k, renormalise, keep the nucleus, invert the distribution."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    kept = weights[: top_k or len(weights)]
    total, before = sum(kept), 0.0
    nucleus: list[float] = []
    for weight in kept:
        if nucleus and before >= top_p:
            break
        nucleus.append(weight / total)
        before += weight / total
    threshold, running = u * sum(nucleus), 0.0
    for place, probability in enumerate(nucleus):
        running += probability
        if running > threshold:
            return order[place]
    return order[len(nucleus) - 1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.11, 0.37, 0.73, 0.91, 1.0]),
    st.integers(0, 12),
    st.integers(0, 996),
)
def test_draws_as_defined(values: list[int], temperature: float, top_p: float, top_k: int, thousandth: int) -> None:
    logits = [value / 8 for value in values]
    u = thousandth / 997
    drawn = draw(torch.tensor(logits), temperature, top_p, top_k, u)
    # Rounding may move a draw across a border, never further: the definition just beside u must agree.
    close_u = [min(max(value, 0.0), 1.0) for value in (u - 1e-5, u, u + 1e-5)]
    near = {expected(logits, temperature, p, top_k, v) for v in close_u for p in (top_p - 1e-6, top_p + 1e-6)}
    assert drawn in near


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 4000
    uniforms = torch.tensor([uniform(7, position) for position in range(rows)])
    inputs = SamplingInputs(
        torch.ones(rows), torch.ones(rows), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), uniforms
    )
    counts = torch.bincount(sample(logits.expand(rows, 4), inputs), minlength=4) / rows
    # Three standard deviations of a share are below 0.024 here; the numbers are fixed by the seed.
    assert (counts - logits.softmax(0)).abs().max() < 0.024


def test_rows_are_independent_and_zero_temperature_is_greedy() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    inputs = SamplingInputs(
        torch.tensor([0.0, 1.0, 0.7]),
        torch.tensor([1.0, 0.9, 1.0]),
        torch.tensor([0, 0, 5]),
        torch.zeros(3),
        torch.tensor([0.9, 0.2, 0.6]),
    )
    together = sample(logits, inputs).tolist()
    alone = [
        draw(logits[i], float(inputs.temperature[i]), float(inputs.top_p[i]), int(inputs.top_k[i]), float(inputs.uniform[i]))
        for i in range(3)
    ]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


def test_uniform_is_a_function_of_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in (0, 1, 2**62, -5) for position in range(50)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert uniform(3, 4) == uniform(3, 4)
