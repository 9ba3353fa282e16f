"""Models written for other programs say what our network says under the policy, or are refused by name."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ladimo import cli, export
from ladimo.checkpoint import load_model, read_config, read_json, read_policies, write_policy
from ladimo.export.checking import Check
from ladimo.export.dense import DenseTarget
from ladimo.export.policy_view import PolicyView
from ladimo.model.inputs import StepInputs
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import PARTIAL_LONGROPE, VOCAB_SIZE, make_moe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
EXACT = {"expert_weight": "one", "score_function": "sigmoid"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that count with one, and policies that run fixed sets of them, of unequal number per layer."""
    directory = make_moe(tmp_path_factory.mktemp("exact"), top_k=4, layer=EXACT)
    fixed = LayerRule(4, renormalize=False, experts=(0, 2)), LayerRule(4, renormalize=False, experts=(1, 2, 3))
    write_policy(directory, RoutingPolicy("fixed", "", (fixed[0], None, fixed[1])))
    averaged = LayerRule(4, renormalize=True, experts=(0, 3))
    write_policy(directory, RoutingPolicy("averaged", "", (averaged, None, averaged)))
    routed = LayerRule(2, renormalize=False)
    write_policy(directory, RoutingPolicy("routed", "", (routed, None, routed)))
    return directory


@torch.no_grad()
def ours(directory: Path, policy: str) -> torch.Tensor:
    model = load_model(directory, torch.float32, CPU)
    tables = make_tables(model, [read_policies(directory, model.config)[policy]])
    logits: torch.Tensor = model(StepInputs.whole_sequences(IDS), None, tables).logits
    return logits


@torch.no_grad()
def theirs(directory: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits: torch.Tensor = model(IDS).logits.flatten(0, 1)
    return logits


@pytest.mark.parametrize(("policy", "width"), [("full", 96), ("fixed", 96), ("averaged", 96)])
def test_dense_is_the_same_model(moe: Path, tmp_path: Path, policy: str, width: int) -> None:
    assert cli.main(["export", str(moe), str(tmp_path / "out"), "--policy", policy]) == 0
    raw = read_json(tmp_path / "out/config.json")
    assert (raw["model_type"], raw["intermediate_size"]) == ("llama", width)
    assert (ours(moe, policy) - theirs(tmp_path / "out")).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([104, 105])


def test_dense_is_as_narrow_as_the_widest_layer(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", top_k=4, layer=EXACT, dense_layers=())
    rules = [LayerRule(4, renormalize=False, experts=experts) for experts in ((0,), (1, 2), (3, 0))]
    write_policy(moe, RoutingPolicy("narrow", "", tuple(rules)))
    export.export(moe, tmp_path / "out", "dense", "narrow")
    assert read_json(tmp_path / "out/config.json")["intermediate_size"] == 48
    assert (ours(moe, "narrow") - theirs(tmp_path / "out")).abs().max() < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2"},
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "phi", "num_key_value_heads": 4},
        {"model_type": "phi3", "rope_parameters": PARTIAL_LONGROPE, "original_max_position_embeddings": 16},
        {"attention_bias": True},
    ],
)
def test_families_with_biases_and_sizes_of_their_own(fields: dict[str, Any], tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", top_k=4, layer=EXACT, **fields)
    export.export(moe, tmp_path / "out", "dense", "full")
    assert (ours(moe, "full") - theirs(tmp_path / "out")).abs().max() < 1e-4


def test_a_policy_that_routes_is_refused_by_name(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(moe), str(tmp_path / "out"), "--policy", "routed"]) == 1
    message = "policy 'routed', layer 0: chooses 2 of 4 experts by token and weighs them all alike; no target can express that"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LayerRule(4, mass=0.9, renormalize=False), "mass"),
        (LayerRule(4, floor=0.1, renormalize=False), "floor"),
        (LayerRule(4, relative_floor=0.1, renormalize=False), "relative_floor"),
        (LayerRule(4, renormalize=False, batch_experts=2), "batch_experts"),
    ],
)
def test_rules_that_depend_on_the_token_are_refused(moe: Path, rule: LayerRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyView(moe, read_config(moe), RoutingPolicy("odd", "", (rule, None, rule)))


def test_experts_weighted_by_score_are_refused(moe_dir: Path) -> None:
    rule = LayerRule(4)
    view = PolicyView(moe_dir, read_config(moe_dir), RoutingPolicy("all", "", (rule, None, rule)))
    with pytest.raises(ValueError, match="layer 0: chooses 4 of 4 experts by token; the target has no router"):
        DenseTarget().check(view)


def test_one_expert_alone_needs_no_weight(moe_dir: Path, tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    rule = LayerRule(1, experts=(2,))
    write_policy(moe, RoutingPolicy("single", "", (rule, None, rule)))
    export.export(moe, tmp_path / "out", "dense", "single")
    assert (ours(moe, "single") - theirs(tmp_path / "out")).abs().max() < 1e-4


def test_what_exists_or_is_unknown_is_refused(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export.export(moe, tmp_path / "here", "dense", "full")
    with pytest.raises(ValueError, match="policy 'none': .* has averaged, balanced, fast, fixed, full, quality, routed"):
        export.export(moe, tmp_path / "out", "dense", "none")
    with pytest.raises(ValueError, match="target 'onnx': supported: dense, glm4, mimo, qwen2, mixtral, gguf"):
        export.export(moe, tmp_path / "out", "onnx", "full")


@pytest.fixture
def own_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that a test registers are forgotten after it."""
    monkeypatch.setattr(export, "_TARGETS", dict(export._TARGETS))


def test_a_target_of_ones_own(moe: Path, tmp_path: Path, own_targets: None) -> None:
    """One object, registered: the command line knows it."""

    class Names:
        name, help = "names", "the tensors' names"

        def check(self, view: PolicyView) -> None: ...

        def write(self, view: PolicyView, out: Path) -> None:
            (out / "names.txt").write_text("\n".join(name for name, _ in view.common_tensors()))

        def verify(self, check: Check, out: Path) -> None:
            assert (out / "names.txt").exists()

    export.register(Names())
    assert cli.main(["export", str(moe), str(tmp_path / "out"), "--target", "names"]) == 0
    assert "model.layers.0.self_attn.q_proj.weight" in (tmp_path / "out/names.txt").read_text().split()


def test_a_target_that_fails_leaves_nothing(moe: Path, tmp_path: Path, own_targets: None) -> None:
    class Broken(DenseTarget):
        name = "broken"

        def write(self, view: PolicyView, out: Path) -> None:
            (out / "half").touch()
            raise OSError("disk full")

    export.register(Broken())
    with pytest.raises(OSError, match="disk full"):
        export.export(moe, tmp_path / "out", "broken", "full")
    assert not list(tmp_path.iterdir())


def test_a_model_that_computes_something_else_is_refused(
    moe: Path, tmp_path: Path, own_targets: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check reads the files back in transformers. What differs by a little more than the tolerance does not appear."""

    class Skewed(DenseTarget):
        name = "skewed"

        def tensors(self, view: PolicyView, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().tensors(view, config):
                yield name, tensor * 1.0001 if name == "model.norm.weight" else tensor

    export.register(Skewed())
    assert cli.main(["export", str(moe), str(tmp_path / "out"), "--target", "skewed"]) == 1
    assert "logits differ from our own by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_gguf_holds_every_tensor(moe: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    export.export(moe, tmp_path / "out", "gguf", "fixed")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert {"token_embd.weight", "output.weight", "blk.2.ffn_down.weight", "blk.0.attn_q.weight"} <= names
    assert len(names) == 3 + 3 * 9
