"""Bits against accuracy on a tiny model: every row has its figures, and all ratios are to the whole weights."""

import json
from pathlib import Path

import pytest

from ladimo.checkpoint import FRONTIER, read_config, write_json
from ladimo.model.cpu.build import library
from ladimo.policy import Frontier, FrontierPoint
from loadtests.precision_bench import main
from tests.factories import make_dense, make_nested

pytestmark = pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")


def test_every_row_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = make_dense(tmp_path / "dense")
    nested = make_nested(tmp_path / "nested", dense=dense)
    experts = (4.0,) * read_config(nested).num_hidden_layers
    points = [FrontierPoint(1, name, 1.0, 9.0, 1.0, experts, cost) for name, cost in (("fast", 0.3), ("full", 1.0))]
    write_json(nested / FRONTIER, Frontier(tuple(points)).to_dict())
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    main([str(dense), str(nested), "--text", str(text), "--tokens", "128", "--window", "64"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["weights"]: row for row in record["results"]}
    assert list(rows) == ["full", "fast", "int8", "int4"]
    assert rows["full"]["perplexity_ratio"] == 1
    assert rows["int8"]["bytes_ratio"] == pytest.approx(0.5625)
    assert len({row["perplexity"] for row in rows.values()}) == 4
    assert abs(rows["int8"]["perplexity_ratio"] - 1) < 0.1
