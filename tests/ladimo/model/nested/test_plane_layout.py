"""The places of planes in memory: other places, the same weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.model.nested.plane_layout import BLOCK_COLUMNS, to_neuron_rows, to_words
from tests.factories import nested_weights


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 5), st.integers(1, 600))
@settings(max_examples=20, deadline=None)
def test_planes_in_words_stand_for_the_same_weights(lead: list[int], rows: int, cols: int) -> None:
    weights = nested_weights(*lead, rows, cols)
    for plane in (weights.high, weights.low):
        words = to_words(plane)
        assert words.shape == plane.shape == (*lead, rows, cols)
        assert words.data.shape[-1] * 8 == -(-cols // BLOCK_COLUMNS) * BLOCK_COLUMNS
        assert torch.equal(words.to_dtype(torch.float32), plane.to_dtype(torch.float32))
        assert to_words(words) is words  # a model may be prepared twice


@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150))
@settings(max_examples=20, deadline=None)
def test_planes_by_neuron_stand_for_the_same_weights(num_experts: int, outputs: int, neurons: int) -> None:
    plane = nested_weights(num_experts, outputs, neurons).low
    for stored in (plane, to_words(plane)):
        weights = to_neuron_rows(stored).to_dtype(torch.float32)
        assert torch.equal(weights[:, :outputs, :neurons], plane.to_dtype(torch.float32))
        assert (weights[:, outputs:] == 0).all() and (weights[:, :, neurons:] == 0).all()


def test_a_neuron_is_one_row() -> None:
    """Whoever changes a neuron's row changes its column of the matrix, and no other."""
    rows = to_neuron_rows(nested_weights(2, 40, 50).low)
    data = rows.data.clone()
    data[1, 33] ^= 0x11
    changed = replace(rows, data=data).to_dtype(torch.float32) != rows.to_dtype(torch.float32)
    assert changed.any(dim=1).nonzero().tolist() == [[1, 33]]


@pytest.mark.parametrize("place", [0, 31, 32, 128, 255])
def test_words_hold_columns_where_the_definition_says(place: int) -> None:
    """Column by column: half of the block, group of the half, and neighbours in the halves of a word."""
    plane = nested_weights(1, BLOCK_COLUMNS).high
    integers = plane.format.to_integers(plane.data)[0]
    half, group, column = place // 128, place % 128 // 32, place % 32
    word = int(to_words(plane).data[0, half * 16 + column // 2])
    assert (word >> 4 * group + 16 * (column % 2) & 15) - 8 == integers[place]
