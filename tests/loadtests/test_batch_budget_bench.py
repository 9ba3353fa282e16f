"""The benchmark of shared budgets on a tiny model: fewer different experts the smaller the budget."""

import json
from pathlib import Path

import pytest

from ladimo.model.cpu.build import library
from loadtests.costs.batch_budget_bench import main

pytestmark = pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")


def test_budgets_bound_what_a_step_reads(moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    sizes = ["--batch", "4", "--length", "40", "--budgets", "1,2,4", "--rounds", "1", "--policy", "full"]
    main([str(moe_dir), "--text", str(text), *sizes])
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
    assert list(rows) == ["no budget", "budget 1", "budget 2", "budget 4", "top_k 1"]
    distinct = {name: row["distinct_experts_per_step"] for name, row in rows.items()}
    assert distinct["budget 1"] == 1 and distinct["budget 2"] <= 2 < distinct["no budget"]
    assert distinct["budget 4"] == distinct["no budget"] and rows["budget 4"]["perplexity_ratio"] == 1
    assert rows["budget 1"]["perplexity"] != rows["no budget"]["perplexity"]


def test_a_short_text_is_an_error(moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    with pytest.raises(SystemExit):
        main([str(moe_dir), "--text", str(text), "--batch", "64"])
    assert "tokens" in capsys.readouterr().err
