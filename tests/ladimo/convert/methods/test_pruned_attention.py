"""Pruned queries and keys: methods tomoe and disp with gates, and what runs, measures and refuses such a checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import TensorReader, load_model, read_config, read_json, read_policies, write_json
from ladimo.convert.data.calibration import Encoder, calibrate
from ladimo.convert.distill.end_to_end import Network
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.methods.masks.gates import GatedAttention, find_pairs, sample_pairs
from ladimo.convert.pipeline import convert
from ladimo.convert.reprofile import reprofile
from ladimo.convert.streamed_model import StreamedModel
from ladimo.export import export
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.attention.layer import Attention
from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.inputs import StepInputs
from ladimo.model.sharding import Shard
from tests.factories import make_dense
from tests.ladimo.convert.conftest import Made, make_text, small_recipe
from tests.ladimo.native import Cached
from tests.ladimo.stepping import Row, Stepper, make_tables

CPU = torch.device("cpu")
BUDGETS = [0.8, 0.6]
needs_kernel = pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")


@pytest.fixture(scope="module")
def pruned(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Six of eight channels of each head are kept. There are four query heads and two key heads, with biases."""
    directory = tmp_path_factory.mktemp("pruned")
    source = make_dense(directory / "source", max_position_embeddings=32, intermediate_size=90, attention_bias=True)
    values = {"budgets": BUDGETS, "steps": 12, "batch_tokens": 128, "block": 2, "qk": 0.75}
    recipe = small_recipe(
        **{"method": "tomoe", "policies.points": 2}, **{f"tomoe.{name}": value for name, value in values.items()}
    )
    assert convert(str(source), directory / "out", recipe, [text])
    return Made(source, text, directory / "out", recipe)


def test_the_channels_with_the_most_power_are_kept_unless_gates_are_trained(pruned: Made, tmp_path: Path) -> None:
    dense = StreamedModel(pruned.dense, CPU)
    made = calibrate(Encoder(pruned.dense, dense.config), pruned.recipe.tokens, pruned.recipe.seed, [pruned.text])
    power = find_pairs(dense, made.fit)  # the text is shorter than what is used of it
    found = [logits.topk(3).indices.sort().values.tolist() for logits in power]
    assert read_json(pruned.out / "config.json")["qk_pairs"] == found
    assert "chosen by the power of queries and keys" in read_json(pruned.out / "report.json")["method"]["description"]
    trained = pruned.recipe.override({"tomoe.qk_train": True, "tomoe.lr": 0.5, "policies.points": 0})
    assert convert(str(pruned.dense), tmp_path / "trained", trained, [pruned.text])
    config, report = read_config(tmp_path / "trained"), read_json(tmp_path / "trained/report.json")
    assert config.qk_head_dim == 6
    assert [[list(head) for head in layer] for layer in config.qk_pairs] != found
    assert "chosen by trained gates" in report["method"]["description"]
    with pytest.raises(ValueError, match=r"tomoe\.qk_train: must be true if qk is below 1 and start is false"):
        pruned.recipe.override({"tomoe.start": False})


def test_a_mask_has_as_many_pairs_as_are_kept_and_pairs_near_the_border_learn() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.5, -9.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(2, 4)
    for _ in range(50):
        mask = sample_pairs(logits, 2, generator)
        assert set(mask.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
        assert mask.detach().sum(dim=1).tolist() == pytest.approx([2, 2])
        chosen += mask.detach()
    assert chosen[0, 0] == pytest.approx(50) and chosen[0, 3] == pytest.approx(0)
    assert (chosen[0, 1:3] > 2).all() and (chosen[1] > 2).all()
    sample_pairs(logits, 2, generator)[0, 2].backward()
    assert logits.grad is not None and logits.grad[0, 2] > 0


def test_the_checkpoint_computes_what_the_gates_computed(pruned: Made) -> None:
    """Token by token: a dropped pair adds nothing to any score, a kept one turns at its own frequency, and scores are scaled as
    in the dense model."""
    config = read_config(pruned.out)
    assert config.qk_head_dim == 6
    dense = StreamedModel(pruned.dense, CPU, "float32")
    network, ids = Network(dense), torch.randint(250, (3, 32), generator=torch.Generator().manual_seed(0))
    gated = []
    for layer, pairs in zip(network.layers, config.qk_pairs, strict=True):
        assert isinstance(layer.self_attn, Attention)
        gate = GatedAttention(layer.self_attn)
        gate.mask = torch.zeros(2, 4).scatter(1, torch.tensor(pairs), 1.0)
        gated.append(gate)
    with torch.no_grad():
        masked, whole = (network.run(ids, None, attentions).log_probs for attentions in (gated, None))
    model = load_model(pruned.out, torch.float32, CPU)
    tables = make_tables(model, [read_policies(pruned.out, config)["full"]])
    with torch.no_grad():
        own = model(StepInputs.whole_sequences(ids), None, tables).logits.log_softmax(dim=-1)
    torch.testing.assert_close(own, masked, rtol=1e-5, atol=1e-5)
    assert (whole - masked).abs().max() > 0.01


def test_projections_and_cache_are_smaller(pruned: Made) -> None:
    config, dense = read_config(pruned.out), read_config(pruned.dense)
    readers = TensorReader(pruned.dense), TensorReader(pruned.out)
    sizes = [sum(math.prod(reader.shape(name)) for name in reader.files) for reader in readers]
    routers = sum(layer.router_parameters(config.hidden_size) for layer in config.layers if layer)
    assert config.pruned_parameters == (4 + 2) * 2 * (config.hidden_size + 1)
    assert sizes[1] == sizes[0] + routers - config.num_hidden_layers * config.pruned_parameters
    assert KVCache.bytes_per_block(config, 16, torch.float32) == KVCache.bytes_per_block(dense, 16, torch.float32) * 14 // 16
    full = config.active_parameters_ratio(tuple(float(layer.num_experts) for layer in config.layers if layer))
    whole = (config.num_hidden_layers * config.pruned_parameters - routers) / config.dense_parameters
    assert full == pytest.approx(1 - whole)
    entries = {entry["policy"]: entry for entry in read_json(pruned.out / "report.json")["policies"]}
    assert entries["full"]["active_parameters_ratio"] == pytest.approx(full)
    for budget in BUDGETS:
        assert 0.99 * budget <= entries[f"budget-{100 * budget:g}"]["active_parameters_ratio"] <= budget


@torch.no_grad()
@pytest.mark.parametrize("block_size", [4, 32])  # tiles of large blocks are read where they are in the cache
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernel)])
def test_serving_over_the_cache_gives_what_whole_sequences_give(compiled: bool, block_size: int, pruned: Made) -> None:
    reference = load_model(pruned.out, torch.float32, CPU)
    policies = [read_policies(pruned.out, reference.config)[name] for name in ("full", "fast")]
    tables = make_tables(reference, policies)
    steps = Stepper(reference, tables, block_size)
    if compiled:
        steps = Cached(reference, NativeStep(reference, "float32", num_threads=1), policies, block_size)
    rows = [Row(list(range(start, start + 20)), policy) for policy, start in ((1, 0), (2, 60))]
    found: list[list[Tensor]] = [[], []]
    for decode, counts in (([], (9, 7)), ([], (6, 12)), (rows, ()), (rows[:1], ())):
        for number, logits in enumerate(steps.step(decode, list(zip(rows, counts, strict=False)))):
            found[number].append(logits)
    for number, row in enumerate(rows):
        got = torch.cat(found[number])
        inputs = StepInputs.whole_sequences(torch.tensor([row.tokens[: len(got)]]))
        inputs.policy_ids.fill_(row.policy)
        torch.testing.assert_close(got, reference(inputs, None, tables).logits, rtol=1e-4, atol=1e-4)


def test_it_is_measured_against_its_dense_source(pruned: Made, tmp_path: Path) -> None:
    report = read_json(pruned.out / "report.json")
    measured = evaluate_checkpoint(str(pruned.out), pruned.text, tokens=300)
    of_source = evaluate_checkpoint(str(pruned.dense), pruned.text, tokens=300)["policies"][0]["perplexity"]
    assert measured["dense"]["perplexity"] == pytest.approx(of_source, rel=1e-4)
    full = next(entry for entry in measured["policies"] if entry["policy"] == "full")
    assert full["kl"] > 1e-4
    assert report["policies"][0]["kl"] > 1e-4
    before = {entry["policy"]: entry["active_parameters_ratio"] for entry in report["policies"]}
    after = reprofile(str(pruned.out), make_text(tmp_path / "other.txt", seed=3))
    assert {entry["policy"]: entry["active_parameters_ratio"] for entry in after["policies"]}["fast"] == before["fast"]


def test_what_cannot_hold_it_says_so(pruned: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pruned queries and keys"):
        export(pruned.out, tmp_path / "exported", "dense", "full")
    with pytest.raises(ValueError, match="pruned queries and keys"):
        Shard(0, 2).config(read_config(pruned.out))
    with pytest.raises(ValueError, match="pruned queries and keys"):
        AutoModelForCausalLM.from_pretrained(pruned.out)


@pytest.mark.parametrize(
    "change",
    [
        lambda pairs: pairs[:-1],
        lambda pairs: [[[1, 0, 2], heads[1]] for heads in pairs],
        lambda pairs: [[[0, 1, 4], heads[1]] for heads in pairs],
        lambda pairs: [[[0, 1], heads[1]] for heads in pairs],
        lambda pairs: [[[], []] for _ in pairs],
        lambda pairs: "all",
    ],
)
def test_wrong_pairs_in_the_configuration_are_named(change: Any, pruned: Made, tmp_path: Path) -> None:
    raw = read_json(pruned.out / "config.json")
    write_json(tmp_path / "config.json", {**raw, "qk_pairs": change(raw["qk_pairs"])})
    with pytest.raises(ValueError, match="qk_pairs must have"):
        read_config(tmp_path)


def test_heads_that_cannot_be_pruned_are_refused(text: Path, tmp_path: Path) -> None:
    source = make_dense(tmp_path / "source", model_type="qwen3", head_dim=8, max_position_embeddings=32)
    with pytest.raises(ValueError, match=r"tomoe\.qk"):
        convert(str(source), tmp_path / "out", small_recipe(**{"method": "tomoe", "tomoe.qk": 0.5}), [text])
