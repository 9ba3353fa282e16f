"""The expert kernels against their reference: one token, lists of tokens, tokens that take every expert."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.experts import apply_experts_grouped

pytest.importorskip("triton")
from ladimo.model.kernels.expert_grouped import grouped_tiles
from ladimo.model.kernels.experts import apply_experts
from ladimo.model.kernels.tiles import Tile

# Sizes that no tile divides.
EXPERTS, HIDDEN, INTERMEDIATE = 5, 52, 44
SMALL = Tile(16, 32, 32, num_warps=4, num_stages=2), Tile(16, 32, 32, num_warps=4, num_stages=2)
MATVEC = Tile(1, 16, 32, num_warps=4), Tile(1, 16, 32, num_warps=4)  # fewer programs to interpret than those of real runs


@dataclass
class Arguments:
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor

    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.hidden_states, self.topk_weights, self.topk_ids, self.gate_up_proj, self.down_proj


def draw(num_tokens: int, device: torch.device, case: str = "mixed", dtype: torch.dtype = torch.float32) -> Arguments:
    """`case`: mixed (some tokens with no expert, some with all), all, none, one_expert."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=-1)
    if case == "mixed":
        dropped = torch.rand(num_tokens, EXPERTS, generator=generator) < 0.6
        dropped[1::4] = True
        dropped[2::4] = False
        ids = ids.masked_fill(dropped, -1)
    elif case == "none":
        ids = torch.full_like(ids, -1)
    elif case == "one_expert":
        ids = torch.where(ids == 3, ids, -1)
    weights = torch.rand(ids.shape, generator=generator) * (ids >= 0)
    return Arguments(
        normal(num_tokens, HIDDEN),
        weights.to(device),
        ids.to(device),
        normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    )


# From how many tokens on those that take every expert are multiplied as the dense FFN would: never, or from two on.
dense = pytest.mark.parametrize("dense", [10**9, 2], ids=["sums apart", "dense rows"])


@dense
@pytest.mark.parametrize(
    ("num_tokens", "case"),
    [(2, "mixed"), (19, "mixed"), *((size, case) for size in (5, 37) for case in ("mixed", "all", "none", "one_expert"))],
)
def test_against_the_reference(num_tokens: int, case: str, dense: int, device: torch.device) -> None:
    arguments = draw(num_tokens, device, case).tuple()
    expected = apply_experts_grouped(*arguments)
    assert (expected != 0).any() == (case != "none")
    out = apply_experts(*arguments, tiles=SMALL, dense_tokens=dense)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mixed", "all", "none", "one_expert"])
def test_one_token_against_the_reference(case: str, device: torch.device) -> None:
    arguments = draw(1, device, case).tuple()
    expected = apply_experts_grouped(*arguments)
    assert (expected != 0).any() == (case != "none")
    torch.testing.assert_close(apply_experts(*arguments, tiles=MATVEC), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3, 17, 33, 70])
def test_tiles_of_real_runs(num_tokens: int, device: torch.device) -> None:
    """The tiles chosen by size, which differ from those above."""
    arguments = draw(num_tokens, device).tuple()
    torch.testing.assert_close(apply_experts(*arguments), apply_experts_grouped(*arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "dense"), [(1, 2), (9, 2), (9, 10**9)])
def test_half_precision(num_tokens: int, dense: int, device: torch.device) -> None:
    arguments = draw(num_tokens, device, dtype=torch.float16).tuple()
    single = (tensor.float() if tensor.is_floating_point() else tensor for tensor in arguments)
    out = apply_experts(*arguments, dense_tokens=dense)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), apply_experts_grouped(*single), rtol=2e-3, atol=4e-3)


def test_long_inputs_are_cut(device: torch.device) -> None:
    arguments = draw(17, device).tuple()  # 8, 8 and 1
    out = apply_experts(*arguments, tiles=SMALL, max_tokens=8)
    torch.testing.assert_close(out, apply_experts_grouped(*arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "dense"), [(1, 2), (9, 2), (9, 10**9)])
def test_an_expert_nobody_chose_is_not_read(num_tokens: int, dense: int, device: torch.device) -> None:
    """Its weights are not numbers, and the answer is."""
    arguments = draw(num_tokens, device, "one_expert")
    for expert in (0, 1, 2, 4):
        arguments.gate_up_proj[expert] = torch.nan
        arguments.down_proj[expert] = torch.nan
    out = apply_experts(*arguments.tuple(), dense_tokens=dense)
    assert out.isfinite().all() and out.abs().sum() > 0


@dense
def test_a_token_does_not_depend_on_its_neighbours(dense: int, device: torch.device) -> None:
    """Whatever the others choose and hold: bit for bit on a GPU, to the last bits where numpy multiplies the tiles."""
    one, crowd = draw(20, device), draw(20, device, "all")
    other = replace(one, hidden_states=-one.hidden_states, topk_weights=crowd.topk_weights, topk_ids=crowd.topk_ids)
    for token in (0, 3, 18):
        other.topk_ids[token], other.topk_weights[token] = one.topk_ids[token], one.topk_weights[token]
        other.hidden_states[token] = one.hidden_states[token]
    a, b = (apply_experts(*each.tuple(), tiles=SMALL, dense_tokens=dense) for each in (one, other))
    # The interpreter's products are BLAS's, whose sums may depend on a row's place among the others.
    tolerance = 0.0 if device.type == "cuda" else 1e-6
    torch.testing.assert_close(a[[0, 3, 18]], b[[0, 3, 18]], rtol=0, atol=tolerance)
    assert (a[[0, 18]] != 0).any()
    assert not torch.allclose(a[4], b[4], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("num_tokens", "dense"), [(1, 2), (6, 10**9), (6, 2), (40, 10**9), (40, 2)])
def test_all_experts_with_weight_one_are_the_dense_network(num_tokens: int, dense: int, device: torch.device) -> None:
    arguments = draw(num_tokens, device, "all")
    arguments.topk_weights = torch.ones_like(arguments.topk_weights)
    gate, up = arguments.gate_up_proj.view(EXPERTS, 2, INTERMEDIATE, HIDDEN).transpose(0, 1).flatten(1, 2)
    down = arguments.down_proj.transpose(0, 1).flatten(1)
    x = arguments.hidden_states
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(apply_experts(*arguments.tuple(), dense_tokens=dense), expected, rtol=0, atol=1e-5)


def test_all_experts_are_one_product_when_the_input_is_long(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every token in the dense list nothing is kept per expert: the buffer for that is never read."""
    arguments = draw(9, device, "all").tuple()
    expected = apply_experts_grouped(*arguments)
    real = Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        tensor = real(self, *shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    torch.testing.assert_close(apply_experts(*arguments, tiles=SMALL, dense_tokens=2), expected, rtol=0, atol=1e-5)


def test_tiles_grow_with_the_input() -> None:
    tiles = [grouped_tiles(num_tokens)[0].m for num_tokens in (2, 16, 17, 32, 33, 511, 512, 10**5)]
    assert tiles == [16, 16, 32, 32, 64, 64, 128, 128]
