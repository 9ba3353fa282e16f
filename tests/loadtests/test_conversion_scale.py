"""The benchmark of a conversion's time and memory, on a tiny shape."""

import json
from pathlib import Path

import pytest

from loadtests.conversion_scale import main


@pytest.mark.slow
def test_a_tiny_shape_is_converted_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[elastic]\nsteps = 6\n")
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "2000", "--recipe", str(recipe), "--device", "cpu"]
    main(flags)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["shape"], record["layers"], record["method"]) == ("tiny", 1, "elastic")
    assert record["seconds"] > 0 and record["peak_bytes"] >= record["peak_bytes_before"] > 0
