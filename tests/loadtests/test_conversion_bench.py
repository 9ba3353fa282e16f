"""The comparison of methods: budgets are kept, a stopped run goes on, rules are what the methods stand for."""

import dataclasses
import json
from pathlib import Path

import pytest

from ladimo.checkpoint import read_config
from ladimo.convert.report.outside import read_comparison
from ladimo.model.config import ModelConfig, MoeLayerConfig
from loadtests import conversion_bench
from loadtests.conversion_bench import BUDGETS, by_top_k, cost, main, table
from tests.factories import make_dense
from tests.ladimo.convert.conftest import make_text


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), max_position_embeddings=32, intermediate_size=96)


def test_results_keep_their_budgets_and_a_second_run_adds_nothing(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_text(tmp_path / "text.txt")
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    command = [str(dense), "--out", str(out), "--text", str(text), "--evaluate", str(text), "--evaluate-tokens", "300"]
    command += ["--tokens", "2000", "--seeds", "0,1", "--methods", "elastic, untrained; cmoe", "--plot", str(plot)]
    main(command)
    record = json.loads(out.read_text())
    assert {(result["method"], result["seed"]) for result in record["results"]} == {
        (method, seed) for method in ("elastic, untrained", "cmoe") for seed in (0, 1)
    }
    for result in record["results"]:
        assert result["active_parameters_ratio"] <= result["budget"]
        assert result["perplexity_ratio"] > 0
    assert plot.read_text().startswith("<svg")
    assert {entry["seeds"] for entry in read_comparison(out)} == {2}
    printed = capsys.readouterr().out.splitlines()
    assert "| method | tokens |" in "\n".join(printed)
    assert json.loads(printed[-1])["benchmark"] == "conversion_bench"
    monkeypatch.setattr(conversion_bench, "convert", None)  # nothing is converted again
    main(command)
    assert json.loads(out.read_text())["results"] == record["results"]


def test_budgets_are_chosen_and_pruned_attention_is_measured_against_the_dense_model(dense: Path, tmp_path: Path) -> None:
    """A later run adds budgets to methods that convert for each of them, with blocks of 24 tokens."""
    text, out = make_text(tmp_path / "text.txt"), tmp_path / "bench.json"
    names = "tomoe, each budget; tomoe, 75% of queries and keys"  # the second one with trained gates
    command = [str(dense), "--out", str(out), "--text", str(text), "--evaluate", str(text), "--evaluate-tokens", "300"]
    command += ["--tokens", "2000", "--seeds", "0", "--mask-steps", "4", "--window", "24", "--keep", str(tmp_path / "kept")]
    main([*command, "--methods", "tomoe, each budget", "--budgets", "0.8"])
    main([*command, "--methods", names, "--budgets", "0.8,0.7"])
    record = json.loads(out.read_text())
    assert "windows of 23 tokens" in record["protocol"]
    kept = {str(file.parent.relative_to(tmp_path / "kept")) for file in tmp_path.glob("kept/tomoe*/*/report.json")}
    assert kept == {f"tomoe-{name}" for name in ("each-budget-2000-0/0.8", "each-budget-2000-0/0.7")} | {
        "tomoe-75-of-queries-and-keys-2000-0/0.8-0.7"
    }
    results = record["results"]
    assert [(result["method"], result["budget"]) for result in results] == [
        (name, budget) for name in names.split("; ") for budget in (0.8, 0.7)
    ]
    assert all(result["budget"] - 0.05 < result["active_parameters_ratio"] <= result["budget"] for result in results)
    assert results[-1]["stored_bytes"] < results[0]["stored_bytes"]
    with pytest.raises(SystemExit):
        main([*command, "--budgets", "0.75"])


def test_the_help_names_all_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "75% of queries" in capsys.readouterr().out


def test_the_last_layers_get_one_more_expert_as_the_budget_allows(dense: Path) -> None:
    config = read_config(dense)
    layer = MoeLayerConfig(8, 6, 12, expert_weight="one", router="glu")
    config = dataclasses.replace(config, layers=(layer,) * 3)
    assert isinstance(config, ModelConfig)
    for budget, rules in by_top_k(dense, config, BUDGETS).items():
        counts = [rule.top_k for rule in rules if rule is not None]
        assert counts == sorted(counts)
        assert counts[-1] - counts[0] <= 1
        fuller = tuple(rule and dataclasses.replace(rule, top_k=min(8, rule.top_k + 1)) for rule in rules)
        assert cost(config, rules) <= budget < cost(config, fuller)
    assert set(by_top_k(dense, config, BUDGETS)) <= set(BUDGETS)


def test_the_table_shows_median_spread_and_what_is_active() -> None:
    results = [
        {
            "method": "elastic",
            "tokens": 1000,
            "seed": seed,
            "budget": 0.8,
            "active_parameters_ratio": 0.79,
            "perplexity_ratio": ratio,
            "conversion_seconds": 3.0,
        }
        for seed, ratio in enumerate((1.02, 1.01, 1.05))
    ]
    assert "| elastic | 1,000 | 3 | - | 1.020 (1.010-1.050) at 79.0% | - | - | - | 3 |" in table(results)
