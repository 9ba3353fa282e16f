"""Pruning leaves out the experts that add least, and what is left is a model of the same type."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo import cli
from ladimo.checkpoint import load_model, read_config, read_json, read_policies, write_json
from ladimo.convert.report_files import PROFILE
from ladimo.convert.stock.prune import prune
from ladimo.model.inputs import StepInputs
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import VOCAB_SIZE, make_dense
from tests.ladimo.model.families.test_moe_families import MODELS
from tests.ladimo.stepping import make_tables

IDS = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(5))


def with_scores(directory: Path, scores: list[float]) -> Path:
    """A profile in which every layer has these scores, the second expert layer in reverse."""
    layers = read_config(directory).moe_layer_indices
    entries = [{"layer": layer, "saliency": scores[:: -1 if layer == layers[1] else 1]} for layer in layers]
    write_json(directory / PROFILE, {"layers": entries})
    return directory


@torch.no_grad()
def logits(directory: Path, policy: RoutingPolicy | None = None) -> torch.Tensor:
    model = load_model(directory, torch.float32, torch.device("cpu"))
    chosen = policy or read_policies(directory, model.config)["full"]
    found: torch.Tensor = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [chosen])).logits
    return found


@pytest.mark.parametrize(
    ("family", "scores", "kept"),
    [
        ("mixtral", [0.4, 0.1, 0.3, 0.2], (0, 2, 3)),
        ("qwen2_moe", [0.1, 0.9, 0.8, 0.2, 0.7, 0.3], (1, 2, 4, 5)),
        ("olmoe", [0.5, 0.5, 0.5, 0.5, 0.1], (0, 1, 2)),
    ],
)
def test_the_pruned_model_is_the_model_under_a_mask(
    family: str, scores: list[float], kept: tuple[int, ...], tmp_path: Path
) -> None:
    """In our network and in transformers, which reads the written checkpoint."""
    source = with_scores(make_dense(tmp_path / "source", **MODELS[family]), scores)
    assert cli.main(["prune", str(source), str(tmp_path / "out"), "--experts", str(len(kept))]) == 0
    config = read_config(source)
    second = tuple(sorted(sorted(range(len(scores)), key=lambda e: (-scores[::-1][e], e))[: len(kept)]))
    rules: list[LayerRule | None] = []
    for index, layer in enumerate(config.layers):
        experts = second if index == config.moe_layer_indices[1] else kept
        rule = None if layer is None else LayerRule(min(3, len(kept)), renormalize=layer.norm_topk_prob, experts=experts)
        rules.append(rule)
    expected = logits(source, RoutingPolicy("masked", "", tuple(rules)))
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-4
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (model(IDS).logits.flatten(0, 1) - expected).abs().max() < 1e-4


def test_it_runs_as_many_experts_as_are_left(tmp_path: Path) -> None:
    source = with_scores(make_dense(tmp_path / "source", **MODELS["mixtral"]), [0.4, 0.1, 0.3, 0.2])
    assert prune(str(source), tmp_path / "out", 2) == {0: (0, 2), 1: (1, 3), 2: (0, 2)}
    raw = read_json(tmp_path / "out/config.json")
    assert (raw["num_local_experts"], raw["num_experts_per_tok"]) == (2, 2)
    assert list(read_policies(tmp_path / "out", read_config(tmp_path / "out"))) == ["full", "top-1"]


def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(tmp_path: Path, moe_dir: Path) -> None:
    source = make_dense(tmp_path / "source", **MODELS["mixtral"])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="was not profiled; run `ladimo profile` on it first"):
        prune(str(source), out, 2)
    with pytest.raises(ValueError, match="experts: must be between 1 and 3, got 4"):
        prune(str(source), out, 4)
    with pytest.raises(ValueError, match="has no scores for the experts of layer 0"):
        prune(str(with_scores(source, [0.1, 0.2])), out, 2)
    with pytest.raises(ValueError, match="only models that were trained as MoE"):
        prune(str(moe_dir), out, 2)
    with pytest.raises(ValueError, match="exists already"):
        prune(str(source), source, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
