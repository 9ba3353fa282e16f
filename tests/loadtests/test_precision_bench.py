"""Bits against accuracy on a tiny model: every row has its figures, and all ratios are to the whole weights."""

import json
from pathlib import Path

import pytest

from ladimo.checkpoint import read_config, read_policies
from ladimo.export import export
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


def test_exported_files_are_rows_beside_llama_cpp_s_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have the perplexity of the policies that they were exported under, up to llama.cpp's rounding of activations."""
    pytest.importorskip("llama_cpp")
    dense = make_dense(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    nested, text = make_nested(tmp_path / "nested", dense=dense, num_experts=1), tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    for policy in ("full", "fast"):
        export(nested, tmp_path / policy, "gguf", policy)
    unrounded, fast = (str(tmp_path / policy / "model.gguf") for policy in ("full", "fast"))
    main([str(dense), str(nested), "--text", str(text), "--window", "64", "--gguf", unrounded, "--exported", fast])
    rows = {row["weights"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
    for ours, theirs in (("full", "llama.cpp, unrounded"), ("fast", "exported fast")):
        assert rows[theirs]["perplexity"] == pytest.approx(rows[ours]["perplexity"], rel=0.02)
    # The file has norms in fp32, and the head beside the embedding, of which a token reads one row.
    assert rows["exported fast"]["bytes_ratio"] == pytest.approx(rows["fast"]["bytes_ratio"], rel=0.1)


def test_exported_files_need_the_unrounded_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path), "--text", str(tmp_path), "--exported", str(tmp_path)])
    assert "--exported: needs --gguf" in capsys.readouterr().err
