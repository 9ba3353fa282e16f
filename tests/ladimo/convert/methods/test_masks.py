"""Methods tomoe and disp: masks, blocks, budgets, and a checkpoint that computes what was trained without copies of weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo.checkpoint import TensorReader, load_model, load_to_serve, read_config, read_frontier, read_json, read_policies
from ladimo.convert.methods.masks.blocks import (
    block_size,
    choose_widths,
    cut_blocks,
    layer_from_blocks,
    masks,
    ranking,
)
from ladimo.convert.methods.masks.hypernetwork import KEEP_FROM, Hypernetwork, MaskHead, sample_choices, sample_masks
from ladimo.convert.methods.masks.recipe import TomoeRecipe
from ladimo.convert.methods.masks.training import MaskedFfn, run_masked
from ladimo.convert.pipeline import convert
from ladimo.convert.reprofile import reprofile
from ladimo.model.cpu import build
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import Ffn, GatedMLP, GeluMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.ladimo.convert.conftest import Made, killed, make_text, small_recipe
from tests.ladimo.stepping import Row, Stepper, make_tables

CPU = torch.device("cpu")
BUDGETS = [0.8, 0.7, 0.6]


def recipe(method: str, **values: Any) -> Any:
    options = {"budgets": BUDGETS, "steps": 20, "batch_tokens": 128, "block": 2, **values}
    return small_recipe(
        **{"method": method, "split.experts": 8, "policies.points": 2},
        **{f"{method}.{name}": value for name, value in options.items()},
    )


@pytest.fixture(scope="module", params=["tomoe", "disp"])
def pruned(request: pytest.FixtureRequest, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert convert(str(source), out, recipe(request.param), [text])
    return Made(source, text, out, recipe(request.param))


def random_mlp(hidden_size: int = 12, neurons: int = 40, kind: type[Ffn] = GatedMLP) -> Ffn:
    torch.manual_seed(0)
    mlp = kind(hidden_size, neurons).requires_grad_(False)
    for weight in mlp.parameters():
        weight.normal_(std=0.3)
    return mlp


def run(layer: ExpertLayer, x: Tensor, width: int) -> Tensor:
    experts = layer.config.num_experts
    rows, allowed = RoutingPolicy("p", "", (LayerRule(width, renormalize=False),)).to_rows(experts)
    out: Tensor = layer(x, torch.tensor(rows[0]).expand(len(x), -1), torch.tensor(allowed).expand(len(x), -1))[0]
    return out


@pytest.mark.parametrize("kind", [GatedMLP, GeluMLP])
@pytest.mark.parametrize("experts", [1, 4])
@torch.no_grad()
def test_the_stored_layer_is_the_masked_ffn_token_by_token(experts: int, kind: type[Ffn]) -> None:
    """For every width: the neurons outside the mask of the token's expert add nothing, and all others are unchanged."""
    mlp, generator = random_mlp(kind=kind), torch.Generator().manual_seed(1)
    x, router = torch.randn(50, 12), torch.randn(experts, 12)
    logits = torch.randn(experts, 40)
    partition = cut_blocks(logits, 3, generator)  # 40 neurons do not fill 14 blocks of 3
    blocks = torch.stack([logits[:, row[row >= 0]].mean(dim=1) for row in partition], dim=1)
    layer = layer_from_blocks(mlp, partition, ranking(blocks), router if experts > 1 else None)
    choice = (x @ router.t()).argmax(dim=1) if experts > 1 else torch.zeros(50, dtype=torch.int64)
    assert len(choice.unique()) == experts
    for width in (1, 5, 14):
        mask = masks(partition, ranking(blocks), width, 40)[choice]
        torch.testing.assert_close(run(layer, x, width), run_masked(mlp, x, mask.float()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(layer, x, 14), mlp(x), rtol=1e-5, atol=1e-5)


def test_neurons_that_the_same_experts_hold_share_a_block() -> None:
    patterns = torch.tensor([[5.0, -5.0, 5.0, -5.0], [5.0, 5.0, -5.0, -5.0]])
    logits = patterns.repeat(1, 8)[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    partition = cut_blocks(logits, 4, torch.Generator().manual_seed(0))
    assert sorted(partition.flatten().tolist()) == list(range(32))
    for block in partition:
        assert len(logits[:, block].t().unique(dim=0)) == 1


@pytest.mark.parametrize(("neurons", "size"), [(352, 16), (1024, 16), (1536, 16), (11008, 128), (90, 16), (14336, 112)])
def test_blocks_are_whole_panels(neurons: int, size: int) -> None:
    assert block_size(neurons) == size


def test_the_noise_keeps_half_of_the_masks_where_the_export_cuts() -> None:
    """One Gumbel variable, not the difference of two: the middle is not at zero."""
    generator = torch.Generator().manual_seed(0)
    for logit in (KEEP_FROM, 0.0, 1.0):
        kept = sample_masks(torch.full((100_000,), logit), soft=False, generator=generator)
        assert set(kept.tolist()) == {0.0, 1.0}
        assert kept.mean().item() == pytest.approx(1 - math.exp(-math.exp(logit)), abs=0.01)
    assert (((soft := sample_masks(torch.zeros(100), True, generator)) > 0) & (soft < 1)).all()
    choices = sample_choices(torch.tensor([[2.0, 0.0]]).expand(20_000, -1), generator)
    assert choices.mean(dim=0)[0].item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)


@pytest.mark.parametrize("once", [True, False])
def test_a_dropped_neuron_gets_a_gradient_only_if_the_mask_multiplies_once(once: bool) -> None:
    mlp, x = random_mlp(), torch.randn(30, 12)
    mask = (torch.arange(40) < 20).float().expand(30, -1).clone().requires_grad_()
    out = run_masked(mlp, x, mask, once)
    torch.testing.assert_close(out, run_masked(mlp, x, mask))
    out.square().sum().backward()
    assert mask.grad is not None
    assert (mask.grad[:, :20] != 0).all()
    assert bool((mask.grad[:, 20:] != 0).all()) is once
    assert bool((mask.grad[:, 20:] != 0).any()) is once


@pytest.mark.parametrize("token_noise", [True, False])
def test_the_noise_is_drawn_per_expert_or_per_token(token_noise: bool) -> None:
    mlp, x = random_mlp(), torch.randn(1, 12).expand(64, -1)
    head = Hypernetwork(12, [40], 4, seed=0).heads[0]
    assert isinstance(head, MaskHead)
    head.start.fill_(KEEP_FROM)
    ffn = MaskedFfn(mlp, head, TomoeRecipe(token_noise=token_noise), torch.Generator().manual_seed(0))
    ffn.begin(torch.randn(4, 128), torch.tensor(0.0))
    different = len(ffn(x).detach().unique(dim=0))
    assert different == 64 if token_noise else different == 4
    assert ffn.imbalance is not None and 0.25 <= ffn.imbalance.item() < 0.4


def test_full_is_the_dense_model_and_nothing_is_stored_twice(pruned: Made) -> None:
    config = read_config(pruned.out)
    dense, own = TensorReader(pruned.dense), TensorReader(pruned.out)
    sizes = [sum(math.prod(reader.shape(name)) for name in reader.files) for reader in (dense, own)]
    routers = sum(layer.router_parameters(config.hidden_size) for layer in config.layers if layer)
    assert sizes[1] == sizes[0] + routers
    ids, logits = torch.arange(32).view(1, 32), []
    for directory in (pruned.dense, pruned.out):
        model = load_model(directory, torch.float32, CPU)
        full = read_policies(directory, model.config)["full"]
        logits.append(model(StepInputs.whole_sequences(ids), None, make_tables(model, [full])).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_policies_meet_their_budgets_and_smaller_ones_are_parts_of_larger_ones(pruned: Made) -> None:
    config, report = read_config(pruned.out), read_json(pruned.out / "report.json")
    policies = read_policies(pruned.out, config)
    entries = {entry["policy"]: entry for entry in report["policies"]}
    found = report["masks"]["budgets"]
    assert [one["target"] for one in found] == BUDGETS
    for one in found:
        assert 0.99 * one["target"] <= entries[one["policy"]]["active_parameters_ratio"] <= one["target"]
        assert one["ratio"] == pytest.approx(entries[one["policy"]]["active_parameters_ratio"])
    for larger, smaller in zip(found, found[1:], strict=False):
        assert all(a >= b for a, b in zip(larger["widths"], smaller["widths"], strict=True))
    assert policies["quality"].layers == policies["budget-80"].layers
    assert policies["fast"].layers == policies["budget-60"].layers
    frontier = read_frontier(pruned.out)
    assert frontier is not None
    assert {point.policy for point in frontier.points} <= set(entries)
    if report["method"]["name"] == "tomoe":
        assert found[0]["union"] > 0.95
    steps = [point["step"] for point in report["masks"]["curve"]]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert "Budget and coverage" in (pruned.out / "report.md").read_text()


@pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")
def test_the_compiled_step_serves_it(pruned: Made) -> None:
    """The same logits as in torch, with the policies of a batch mixed. The server needs no code for the methods."""
    model = load_model(pruned.out, torch.float32, CPU)
    served = load_to_serve(pruned.out, "cpu", "float32")
    assert served.backend.name == "native"
    chosen = [read_policies(pruned.out, model.config)[name] for name in ("full", "quality", "fast")]
    tables, tokens = make_tables(model, chosen), [list(range(start, start + 20)) for start in (0, 40, 90)]
    steps = Stepper(model, tables)
    rows = [Row(own, policy) for policy, own in enumerate(tokens, 1)]
    inputs = steps.inputs(prefill=[(row, 20) for row in rows])
    with torch.no_grad():
        expected = model(inputs, steps.kv_cache, tables)
        cache = served.backend.allocate_cache(model.config, steps.num_blocks, steps.block_size)
        given = served.step(inputs, cache, tables)
    assert expected.expert_ids is not None and given.expert_ids is not None
    assert torch.equal(given.expert_ids, expected.expert_ids)
    torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [pytest.param("tomoe", marks=pytest.mark.long), "disp"])
def test_a_stopped_training_goes_on_and_gives_the_same(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    """From the last snapshot, behind which the blocks are cut already."""
    changed = recipe(method, steps=30, budgets=[0.7])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert convert(str(source), whole, changed, [text])
    for pattern, nth in (("*masks.safetensors", 1), ("*masks.json", 1)):
        with killed.at(pattern, nth):
            convert(str(source), stopped, changed, [text])
    assert convert(str(source), stopped, changed, [text])
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    reports = [read_json(one / "report.json") for one in (whole, stopped)]
    assert reports[0]["masks"] == reports[1]["masks"]


def test_profile_keeps_the_budgets(pruned: Made, tmp_path: Path) -> None:
    before = read_policies(pruned.out, read_config(pruned.out))
    reprofile(str(pruned.out), make_text(tmp_path / "other.txt", seed=5))
    after = read_policies(pruned.out, read_config(pruned.out))
    assert {name: after[name].layers for name in ("full", "budget-80", "budget-60")} == {
        name: before[name].layers for name in ("full", "budget-80", "budget-60")
    }


def test_widths_are_those_of_the_widest_expert_and_fit_the_budget() -> None:
    logits = {0: torch.tensor([[9.0, 8.0, -9.0, -9.0], [9.0, -8.0, -9.0, -9.0]]), 1: torch.tensor([[1.0, 0.5, -0.5, -2.0]] * 2)}

    def cost(widths: Mapping[int, int]) -> float:
        return sum(widths.values()) / 8

    masked, fitted = choose_widths(logits, 0.75, cost)
    assert masked == {0: 2, 1: 2}
    assert cost(fitted) == 0.75
    assert fitted == {0: 2, 1: 4}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tomoe.budgets": [0.5, 0.6]}, "tomoe.budgets: must be falling"),
        ({"tomoe.lr": 0.0}, "tomoe.lr"),
        ({"tomoe.settle": 1.5}, "tomoe.settle"),
        ({"method": "disp", "disp.size": -1.0}, "disp.size"),
        ({"tomoe.budgets": [0.1]}, "cannot go below"),
        ({"tomoe.lr": 1e30}, "lower tomoe.lr"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], named: str, source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        convert(str(source), tmp_path / "out", small_recipe(**{"method": "tomoe", "tomoe.steps": 5, **values}), [text])
    assert not (tmp_path / "out").exists()
