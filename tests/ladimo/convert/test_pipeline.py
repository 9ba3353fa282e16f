"""The whole conversion: what it writes, resuming, refusals."""

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ladimo.checkpoint import load_model, read_config, read_frontier, read_json, read_policies, write_json
from ladimo.convert.pipeline import convert
from ladimo.model.inputs import RoutingTables, StepInputs
from tests.factories import LLAMA3_ROPE, make_dense
from tests.ladimo.convert.conftest import Made, killed, make_text, small_recipe

CONTRACT = ("config.json", "model.safetensors", "tokenizer.json", "provenance.json", "report.json", "report.md", "report.html")


def full_logits(directory: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Our model's logits [B * S, V] under policy full."""
    model = load_model(directory, torch.float32, torch.device("cpu"))
    config = model.config
    tables = RoutingTables.empty(2, config.num_hidden_layers, config.max_num_experts, "cpu")
    tables.write(1, *read_policies(directory, config)["full"].to_rows(config.max_num_experts))
    logits: torch.Tensor = model(StepInputs.whole_sequences(input_ids), None, tables).logits
    return logits


def results(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: weights and routing."""
    return {
        str(file.relative_to(out)): file.read_bytes() for file in [out / "model.safetensors", *out.rglob("routing/**/*.json")]
    }


def test_the_directory_is_that_of_the_contract(made: Made) -> None:
    assert [name for name in CONTRACT if not (made.out / name).is_file()] == []
    assert list(made.out.parent.iterdir()) == [made.out]
    config = read_config(made.out)
    assert config.moe_layer_indices == (0, 1, 2)
    policies, frontier = read_policies(made.out, config), read_frontier(made.out)
    assert {"full", "quality", "balanced", "fast"} <= set(policies)
    assert frontier is not None
    assert {point.policy for point in frontier.points} <= set(policies)
    modes = {(made.out / name).stat().st_mode for name in CONTRACT}
    assert len(modes) == 1  # weights are no harder to read than the rest
    raw = read_json(made.out / "config.json")
    assert raw["model_type"] == "ladimo_llama"
    AutoTokenizer.from_pretrained(made.out)
    provenance = read_json(made.out / "provenance.json")
    assert provenance["source"]["path"] == str(made.dense)
    assert {"method", "seed", "versions", "revision", "device", "arguments"} <= set(provenance)


def test_report_says_what_happened(made: Made) -> None:
    report = read_json(made.out / "report.json")
    for layer in report["layers"]:
        assert layer["error"] < layer["initial_error"]
        assert layer["curve"][-1]["holdout"] == pytest.approx(layer["error"], rel=1e-3)
    ratios = {entry["policy"]: entry["active_parameters_ratio"] for entry in report["policies"]}
    assert ratios["fast"] <= ratios["balanced"] <= ratios["quality"] <= ratios["full"] < 1
    for entry in report["policies"]:
        assert entry["perplexity_ratio"] == pytest.approx(entry["perplexity"] / report["source"]["perplexity"])
        assert 0 <= entry["next_token_agreement"] <= 1
        assert entry["kl"] >= 0
    full = next(entry for entry in report["policies"] if entry["policy"] == "full")
    assert full["experts_per_token"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "write", "layers"),
    [
        ({"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE}, {}, "0,2"),
        ({"tie_word_embeddings": True}, {"dtype": torch.bfloat16}, "all"),
        ({"attention_bias": True}, {"max_shard_size": "30KB"}, "1"),
    ],
    ids=["gqa-untied-llama3", "tied-bf16", "sharded-bias"],
)
def test_transformers_gives_the_same_logits(
    config: dict[str, Any], write: dict[str, Any], layers: str, text: Path, tmp_path: Path
) -> None:
    dense = make_dense(tmp_path / "dense", max_position_embeddings=64, **write, **config)
    out = tmp_path / "moe"
    convert(str(dense), out, small_recipe(layers=layers, **{"train.steps": 5}), [text])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    input_ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(full_logits(out, input_ids), theirs, rtol=1e-4, atol=1e-4)
    dtype = write.get("dtype", torch.float32)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_the_seed_decides_everything(made: Made, tmp_path: Path) -> None:
    convert(str(made.dense), tmp_path / "again", made.recipe, [made.text])
    assert results(tmp_path / "again") == results(made.out)
    convert(str(made.dense), tmp_path / "other", made.recipe.override({"seed": 1, "train.steps": 5}), [made.text])
    assert results(tmp_path / "other")["model.safetensors"] != results(made.out)["model.safetensors"]


def test_a_layer_does_not_depend_on_which_others_are_trained(made: Made, tmp_path: Path) -> None:
    convert(str(made.dense), tmp_path / "one", made.recipe.override({"layers": "1"}), [made.text])
    one, whole = (load_model(path, torch.float32, torch.device("cpu")) for path in (tmp_path / "one", made.out))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(one.get_parameter(name), whole.get_parameter(name))


def test_auto_converts_the_least_damaging_layers(made: Made, tmp_path: Path) -> None:
    convert(str(made.dense), tmp_path / "auto", made.recipe.override({"layers": "auto", "target_active": 0.8}), [made.text])
    report = read_json(tmp_path / "auto/report.json")
    damage = {layer["layer"]: layer["converted_alone_perplexity"] for layer in report["layers"]}
    converted = {layer["layer"] for layer in report["layers"] if layer["converted"]}
    assert 0 < len(converted) < 3
    assert max(damage[layer] for layer in converted) <= min(damage[layer] for layer in set(damage) - converted)
    full = next(entry for entry in report["policies"] if entry["policy"] == "full")
    assert full["active_parameters_ratio"] <= 0.8
    assert [rule is None for rule in full["rules"]] == [layer not in converted for layer in range(3)]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("*/calibration.json", marks=pytest.mark.long),  # text chosen, marker missing
        "*/layers/1/done.json",  # layer 1 saved, marker missing
        pytest.param("*/policies.json", marks=pytest.mark.long),
        "*/checkpoint/routing/policies/balanced.json",  # half of the checkpoint written
        "rmtree */moe.partial",  # OUT in place, work directory not removed
    ],
)
def test_an_interrupted_conversion_resumes_to_the_same_result(made: Made, tmp_path: Path, pattern: str) -> None:
    out = tmp_path / "moe"
    with killed.at(pattern):
        convert(str(made.dense), out, made.recipe, [made.text])
    in_place = pattern.startswith("rmtree")
    assert out.exists() == in_place
    assert (tmp_path / "moe.partial").exists()
    assert convert(str(made.dense), out, made.recipe, [made.text]) != in_place
    assert results(out) == results(made.out)
    assert list(tmp_path.iterdir()) == [out]


def test_finished_layers_are_not_trained_again(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with killed.at("*/layers/2/model.safetensors"):
        convert(str(made.dense), tmp_path / "moe", made.recipe, [made.text])
    caplog.set_level("INFO", "ladimo")
    caplog.clear()
    convert(str(made.dense), tmp_path / "moe", made.recipe, [made.text])
    assert "resuming: 2 of 3 layers are done" in caplog.text
    trained = [record.getMessage() for record in caplog.records if "holdout error" in record.getMessage()]
    assert len(trained) == 1
    assert trained[0].startswith("layer 2:")


def test_other_arguments_are_refused_by_name(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    with killed.at("*/layers/0/done.json"):
        convert(str(made.dense), out, made.recipe, [made.text])
    with pytest.raises(ValueError, match=r"other arguments: recipe\.split\.experts was 4, now 3;"):
        convert(str(made.dense), out, made.recipe.override({"split.experts": 3}), [made.text])
    with pytest.raises(ValueError, match=r"text\.0\.sha256"):
        convert(str(made.dense), out, made.recipe, [make_text(tmp_path / "text.txt", seed=1)])
    assert not out.exists()


def test_a_finished_checkpoint_is_left_alone(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    shutil.copytree(made.out, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert convert(str(made.dense), out, made.recipe, [made.text]) is False
    with pytest.raises(ValueError, match=r"other arguments: recipe\.seed was 0, now 1; nothing was changed"):
        convert(str(made.dense), out, made.recipe.override({"seed": 1}), [made.text])
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_a_checkpoint_of_an_older_version_is_finished_too(made: Made, tmp_path: Path) -> None:
    """Its recipe lacks the keys that came later; they count as their defaults."""
    out = tmp_path / "moe"
    shutil.copytree(made.out, out)
    provenance = read_json(out / "provenance.json")
    del provenance["arguments"]["recipe"]["elastic"]["routed_margin"]
    write_json(out / "provenance.json", provenance)
    assert convert(str(made.dense), out, made.recipe, [made.text]) is False


def test_a_foreign_directory_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not a converted checkpoint"):
        convert(str(made.dense), tmp_path / "mine", made.recipe, [made.text])
    (tmp_path / "moe.partial").mkdir()
    (tmp_path / "moe.partial/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not the work directory of a conversion"):
        convert(str(made.dense), tmp_path / "moe", made.recipe, [made.text])
    assert (tmp_path / "moe.partial/notes.txt").read_text() == "keep"


def broken(source: Path, target: Path, kind: str) -> Path:
    """A copy of a dense checkpoint with one thing wrong."""
    shutil.copytree(source, target)
    config = read_json(target / "config.json")
    weights = target / "model.safetensors"
    if kind == "gpt2":
        write_json(target / "config.json", {**config, "model_type": "gpt2"})
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "shape":
        write_json(target / "config.json", {**config, "intermediate_size": 91})
    elif kind == "depth":
        write_json(target / "config.json", {**config, "num_hidden_layers": 4})
    elif kind == "json":
        (target / "config.json").write_text("{")
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt2", "model_type is 'gpt2'"),
        ("truncated", "truncated or not a safetensors file"),
        ("no weights", "neither model.safetensors nor"),
        ("shape", r"has shape \[90, 32\], config.json asks for \[91, 32\]"),
        ("depth", "model.layers.3.* is missing"),
        ("json", "not valid JSON"),
    ],
)
def test_a_broken_source_is_refused(made: Made, tmp_path: Path, kind: str, message: str) -> None:
    dense = broken(made.dense, tmp_path / "dense", kind)
    with pytest.raises(ValueError, match=message):
        convert(str(dense), tmp_path / "moe", made.recipe, [made.text])
    assert list(tmp_path.iterdir()) == [dense]


def test_a_missing_shard_is_refused(made: Made, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", max_shard_size="30KB")
    sorted(dense.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.*no such file"):
        convert(str(dense), tmp_path / "moe", made.recipe, [made.text])


def test_a_converted_source_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a Mixture-of-Experts already"):
        convert(str(made.out), tmp_path / "moe", made.recipe, [made.text])


def test_a_full_disk_leaves_no_out_and_the_next_run_finishes(made: Made, tmp_path: Path) -> None:
    """The kernel refuses files above 20 kB, as it would refuse them on a full disk."""
    out = tmp_path / "moe"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"safetensors.*File too large"):
            convert(str(made.dense), out, made.recipe, [made.text])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists()
    convert(str(made.dense), out, made.recipe, [made.text])
    assert results(out) == results(made.out)


def test_provenance_is_json_without_surprises(made: Made) -> None:
    stored = json.loads((made.out / "provenance.json").read_text())
    assert stored["arguments"]["recipe"] == made.recipe.to_dict()
