"""`--method auto`, the default: which method a conversion takes, and that it says so."""

from pathlib import Path
from typing import get_args

import pytest

from ladimo.checkpoint import read_config, read_json
from ladimo.cli import main
from ladimo.convert.methods.automatic import choose_method
from ladimo.convert.methods.nested import NestedRecipe
from ladimo.convert.methods.registry import METHODS
from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import AUTO, Recipe, SplitRecipe
from ladimo.model.config import FfnKind


@pytest.mark.parametrize(
    ("recipe", "method", "reason"),
    [
        (Recipe(), "nested", "the default"),
        (Recipe().override({"tokens": 5000, "layers": "all", "train.steps": 3}), "nested", "the default"),
        (Recipe.from_dict({"method": "auto", "seed": 3}), "nested", "the default"),
        (Recipe().override({"nested.top_bits": 8}), "nested", "because of --top-bits"),
        (Recipe().with_section(NestedRecipe(points=9)), "nested", "because of nested.points"),
        (Recipe().override({"split.experts": 4}), "elastic", "because of --experts"),
        (Recipe().override({"split.experts": 8}), "elastic", "because of --experts"),  # the default value is asked for, too
        (Recipe().override({"split.top_k": 1}), "elastic", "because of --top-k"),
        (Recipe().override({"target_active": 0.8, "layers": "0,2"}), "elastic", "because of --target-active, --layers"),
        (Recipe.from_dict({"target_active": 0.8}), "elastic", "because of --target-active"),
        (Recipe.from_dict({"split": {"experts": 8}}), "elastic", "because of --experts"),
        (Recipe.from_dict({"elastic": {"budgets": [0.9, 0.7, 0.5]}}), "elastic", "because of elastic.budgets"),
        (Recipe(target_active=0.6), "elastic", "because of --target-active"),
        (Recipe(split=SplitRecipe(experts=16)), "elastic", "because of --experts"),
        (Recipe(method="cmoe", target_active=0.6), "cmoe", "as asked"),
        (Recipe().override({"method": "nested", "split.experts": 4}), "nested", "as asked"),
    ],
)
def test_it_is_nested_unless_experts_are_asked_for(recipe: Recipe, method: str, reason: str) -> None:
    assert choose_method(recipe) == (method, reason)


def test_it_fits_every_family() -> None:
    """Whichever of the two it is."""
    assert all(set(METHODS[name].ffn_kinds) == set(get_args(FfnKind)) for name in ("nested", "elastic"))


def test_contradictions_are_refused() -> None:
    recipe = Recipe().override({"nested.top_bits": 8, "split.experts": 4})
    with pytest.raises(ValueError, match="--top-bits needs method nested, --experts needs elastic; choose one with --method"):
        choose_method(recipe)


def test_what_was_given_is_not_stored() -> None:
    recipe = Recipe().override({"split.experts": 8})
    assert recipe == Recipe()
    assert "given" not in recipe.to_dict()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_conversion_says_what_it_took_and_records_it(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(source), str(tmp_path / "out"), "--text", str(text), "--tokens", "2000", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "method: nested, the default"
    provenance, report = (read_json(tmp_path / "out" / name) for name in ("provenance.json", "report.json"))
    assert provenance["method"] == provenance["arguments"]["recipe"]["method"] == report["method"]["name"] == "nested"
    assert read_config(tmp_path / "out").nested_bits
    for same in ([], ["--method", AUTO], ["--method", "nested"]):
        assert main([*command, *same]) == 0
        assert "complete already" in capsys.readouterr().out
    assert main([*command, "--experts", "4"]) == 1
    assert "recipe.method was 'nested', now 'elastic'" in capsys.readouterr().err


@pytest.mark.parametrize(("jobs", "ray"), [(2, None), (None, "local")])
def test_a_method_that_cannot_work_in_parallel_refuses_workers(
    jobs: int | None, ray: str | None, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"'nested' does not convert layers in parallel \(--jobs, --ray\); methods that do: .*elastic"
    ):
        convert(str(source), tmp_path / "out", Recipe(), jobs=jobs, ray=ray)
    assert not (tmp_path / "out").exists()
