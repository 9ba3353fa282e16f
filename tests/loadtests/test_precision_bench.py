"""Bits against accuracy on a tiny model: every row has its figures, and all ratios are to the whole weights."""

import json
from pathlib import Path

import pytest

from ladimo.checkpoint import read_config, read_policies
from ladimo.model.cpu.build import library
from loadtests.accuracy.precision_bench import main
from tests.factories import make_dense, make_nested

pytestmark = pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")


def test_every_row_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = make_dense(tmp_path / "dense")
    nested = make_nested(tmp_path / "nested", dense=dense)
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    main([str(dense), str(nested), "--text", str(text), "--tokens", "128", "--window", "64"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["weights"]: row for row in record["results"]}
    assert set(rows) == {*read_policies(nested, read_config(nested)), "int8", "int4"}
    bytes_read = [rows[name]["bytes_ratio"] for name in ("full", "quality", "fast")]
    assert bytes_read == sorted(bytes_read, reverse=True)
    assert rows["full"]["perplexity_ratio"] == 1
    assert rows["int8"]["bytes_ratio"] == pytest.approx(0.5625)
    assert len({row["perplexity"] for row in rows.values()}) == len(rows)
    assert abs(rows["int8"]["perplexity_ratio"] - 1) < 0.1
