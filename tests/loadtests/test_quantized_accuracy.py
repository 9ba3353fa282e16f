"""The accuracy of integer weights on a tiny model: three figures, int4 the least accurate."""

import json
from pathlib import Path

import pytest

from ladimo.model.cpu.build import library
from loadtests.accuracy.quantized_accuracy import main

pytestmark = pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")


def test_every_format_has_its_figures(moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    main([str(moe_dir), "--text", str(text), "--policy", "full", "--tokens", "256", "--window", "64"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = record["results"]
    assert list(results) == ["stored", "int8", "int4"]
    assert record["tokens"] == 256
    assert results["stored"]["perplexity_ratio"] == 1
    assert abs(results["int8"]["perplexity_ratio"] - 1) < 0.1
    assert results["int4"]["perplexity"] != results["int8"]["perplexity"] != results["stored"]["perplexity"]


def test_wrong_arguments_are_named(moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    for arguments, told in ((["--policy", "swift"], "there is no policy 'swift'"), ([], "one window is 512")):
        with pytest.raises(SystemExit):
            main([str(moe_dir), "--text", str(text), *arguments])
        assert told in capsys.readouterr().err
