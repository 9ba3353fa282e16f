"""A conversion method is one module: here one that works on the whole model, in a package that the product does not know."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ladimo.checkpoint import read_config, read_json, read_policies
from ladimo.cli import main
from ladimo.convert.methods.registry import METHODS
from ladimo.convert.recipe import SECTIONS

TOY = '''
"""Every layer in parts; the layer whose FFN is smallest by weight runs only some of them. Decided for the model as a whole."""

from dataclasses import dataclass

from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.registry import register
from ladimo.convert.policies.candidates import Candidates
from ladimo.convert.recipe import require
from ladimo.convert.report.charts import Bar, Axis, bar_chart
from ladimo.convert.report.document import Figure, MethodView
from ladimo.model.config import MoeLayerConfig
from ladimo.policy import LayerRule


@dataclass(frozen=True)
class ToyRecipe:
    parts: int = 3

    def __post_init__(self):
        require(self.parts >= 2, "toy.parts", "must be at least 2", self.parts)


@register
class Toy(Method):
    name = "toy"
    options = ToyRecipe

    def describe(self, recipe):
        return f"A toy with {recipe.section(ToyRecipe).parts} parts."

    def convert(self, run, calibration):
        parts = run.recipe.section(ToyRecipe).parts

        def weigh():
            sizes = {index: run.dense.ffn(index).down_proj.weight.norm().item() for index in run.candidates}
            return {"norms": {str(index): size for index, size in sizes.items()}, "smallest": min(sizes, key=sizes.get)}

        found = run.workspace.stage("norms", weigh)
        for index in run.candidates:
            mlp = run.dense.ffn(index)
            partition = contiguous_partition(mlp.up_proj.out_features, parts)
            config = MoeLayerConfig(parts, parts, partition.shape[1], expert_weight="one", router="none")
            run.workspace.save_layer(index, split_ffn(mlp, partition, config, {}), run.dense.stored_dtype)
            run.workspace.finish_layer(index, config, {"seconds": 0.0})
        layers = {index: run.workspace.layer_config(index) for index in run.candidates}
        return Converted(
            layers=layers,
            entries=[{"layer": index, "converted": True, "seconds": 0.0} for index in run.candidates],
            candidates=lambda model: self.policies(model, found["smallest"], parts),
            report={"toy": found},
        )

    def policies(self, model, smallest, parts):
        whole = LayerRule(top_k=parts, renormalize=False, experts=tuple(range(parts)))
        some = LayerRule(top_k=parts - 1, renormalize=False, experts=tuple(range(parts - 1)))
        full = tuple(None if layer is None else whole for layer in model.config.layers)
        fast = tuple(some if index == smallest else rule for index, rule in enumerate(full))
        return Candidates({"full": full, "quality": full, "balanced": fast, "fast": fast})

    def reprofile(self, recipe, model, stored, blocks, report):
        return self.policies(model, report["toy"]["smallest"], recipe.section(ToyRecipe).parts)

    def view(self, report):
        bars = [Bar(norm) for norm in report.raw["toy"]["norms"].values()]
        return MethodView(lead=["A toy."], layers=[Figure(bar_chart("Norms of a toy", bars, "layer", Axis("norm")))])
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "elsewhere" / "toy_methods"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from toy_methods import toy\n")
    (package / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(package.parent))
    __import__("toy_methods")
    yield
    del METHODS["toy"], SECTIONS["toy"]
    for name in [name for name in sys.modules if name.startswith("toy_methods")]:
        del sys.modules[name]


def test_a_whole_model_method_of_another_package(
    toy: None, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "moe", tmp_path / "recipe.toml"
    recipe.write_text("method = 'toy'\ntokens = 3000\n[toy]\nparts = 4\n")
    command = ["convert", str(source), str(out), "--text", str(text), "--recipe", str(recipe)]
    assert main(command) == 0, capsys.readouterr().err
    config = read_config(out)
    assert [layer.num_experts for layer in config.layers if layer is not None] == [4, 4, 4]
    report = read_json(out / "report.json")
    assert report["method"] == {"name": "toy", "description": "A toy with 4 parts."}
    assert report["recipe"]["toy"] == {"parts": 4}
    ratios = {entry["policy"]: entry["active_parameters_ratio"] for entry in report["policies"]}
    assert ratios["fast"] < ratios["full"] == pytest.approx(1.0, abs=0.02)
    assert {"full", "fast"} <= set(read_policies(out, config))
    page = (out / "report.html").read_text()
    assert "Norms of a toy" in page and "A toy." in page

    capsys.readouterr()
    assert main(["evaluate", str(out), "--text", str(text), "--tokens", "100", "--policy", "full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"][0]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert main(["profile", str(out), "--text", str(text)]) == 0
    assert main(["report", str(out)]) == 0
    assert main(command) == 0  # finished, and known as such
    assert (
        main(["convert", str(source), str(tmp_path / "other"), "--method", "toy", "--text", str(text), "--tokens", "3000"]) == 0
    )


def test_its_options_are_checked_like_all_others(
    toy: None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    for table, message in (("parts = 1", "toy.parts: must be at least 2, got 1"), ("part = 3", "toy.part: unknown key")):
        recipe.write_text(f"method = 'toy'\n[toy]\n{table}\n")
        assert main(["convert", str(source), str(tmp_path / "moe"), "--recipe", str(recipe)]) == 1
        assert message in capsys.readouterr().err


def test_without_its_package_the_method_is_unknown(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("method = 'toy'\n")
    assert main(["convert", str(source), str(tmp_path / "moe"), "--recipe", str(recipe)]) == 1
    assert (
        "method 'toy' is unknown; known: auto, cmoe, disp, elastic, ladimo, moefication, nested, static, tomoe"
        in capsys.readouterr().err
    )
