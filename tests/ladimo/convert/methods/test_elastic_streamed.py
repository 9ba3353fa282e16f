"""Elastic for models that are too large to be distilled whole: students run beside the dense model, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ladimo.checkpoint import read_config, read_json
from ladimo.convert.distill.end_to_end import Network
from ladimo.convert.distill.streamed import run_students
from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.layers import GatedMLP
from tests.ladimo.convert.conftest import Made, killed
from tests.ladimo.convert.methods.test_elastic import elastic_recipe, half_student
from tests.ladimo.convert.test_pipeline import results

LARGE: dict[str, object] = {"elastic.max_parameters": 1000, "elastic.steps": 40}


@pytest.fixture(scope="module")
def layered(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read it, never change it."""
    out = tmp_path_factory.mktemp("layered") / "moe"
    assert convert(str(source), out, elastic_recipe(**LARGE), [text])
    return Made(source, text, out, elastic_recipe(**LARGE))


def test_students_get_what_their_own_layers_make_of_the_text(source: Path) -> None:
    dense = StreamedModel(source, torch.device("cpu"), "float32")
    network = Network(dense)
    blocks = torch.randint(256, (6, 32), generator=torch.Generator().manual_seed(0))
    student = half_student(dense)
    theirs, ours = network.run(blocks, None).hidden_states, network.run(blocks, student).hidden_states
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def substitute(index: int, number: int, inputs: Tensor, targets: Tensor) -> nn.Module | None:
        seen[index, number] = inputs, targets
        return student[index] if number == 1 else None

    run_students(dense, blocks, 2, substitute)
    assert seen.keys() == {(index, number) for index in range(dense.config.num_hidden_layers) for number in (0, 1)}
    for (index, number), (inputs, targets) in seen.items():
        layer = network.layers[index].mlp
        mlp = (student[index] if number == 1 else None) or layer
        assert isinstance(mlp, GatedMLP)
        with torch.no_grad():
            missing = targets - mlp(inputs)  # what the student's hidden states lack after this layer
        expected = theirs[index] - (ours if number == 1 else theirs)[index]
        torch.testing.assert_close(missing, expected.detach(), rtol=1e-3, atol=1e-5)


def test_larger_models_are_distilled_layer_by_layer(layered: Made, tmp_path: Path) -> None:
    out = tmp_path / "solved"
    convert(str(layered.dense), out, layered.recipe.override({"elastic.steps": 0}), [layered.text])
    trained, solved = (read_json(directory / "report.json") for directory in (layered.out, out))
    for entry, plain in zip(trained["elastic"]["budgets"], solved["elastic"]["budgets"], strict=True):
        assert entry["widths"] == plain["widths"]
        errors = entry["layer_errors"]
        assert errors.keys() == {str(i) for i, width in enumerate(entry["widths"]) if width < trained["elastic"]["experts"]}
        assert all(after <= before for before, after in errors.values())
        assert any(after < 0.95 * before for before, after in errors.values())
        assert not plain["layer_errors"]
        assert not entry["curve"]  # nothing was distilled end to end
    kl = [{entry["policy"]: entry["kl"] for entry in report["policies"]} for report in (trained, solved)]
    assert kl[0]["fast"] < 0.9 * kl[1]["fast"]
    assert kl[0]["full"] == pytest.approx(0.0, abs=1e-6)
    assert {layer.router for layer in read_config(layered.out).layers if layer is not None} == {"none"}
    assert "layer by layer" in trained["method"]["description"]
    page, text = (layered.out / "report.html").read_text(), (layered.out / "report.md").read_text()
    assert ">Layer by layer<" in page
    before, after = trained["elastic"]["budgets"][-1]["layer_errors"]["1"]
    assert f"{before:.4f} to {after:.4f}" in text and f"{before:.4f} to {after:.4f}" in page


@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_killed_run_resumes_to_the_same_result(layered: Made, nth: int, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    with killed.at("*/student-?.json", nth):
        convert(str(layered.dense), out, layered.recipe, [layered.text])
    assert not out.exists()
    done = len(list((tmp_path / "moe.partial" / "layers").glob("*/student-*.json")))
    assert done == nth - 1
    assert convert(str(layered.dense), out, layered.recipe, [layered.text])
    assert results(out) == results(layered.out)


def test_a_training_that_makes_it_worse_is_dropped(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = elastic_recipe(**{**LARGE, "elastic.steps": 3, "elastic.layer_lr": 1e3})
    assert convert(str(source), tmp_path / "moe", recipe, [text])
    budgets = read_json(tmp_path / "moe" / "report.json")["elastic"]["budgets"]
    assert all(before == after for budget in budgets for before, after in budget["layer_errors"].values())


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"elastic\.layer_lr: must be above 0"):
        Recipe.from_dict({"elastic": {"layer_lr": 0.0}})
