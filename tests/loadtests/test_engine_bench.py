"""The benchmark of the engine on tiny models: every row is there, and what cannot be measured says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.engine_bench import REFERENCE, main

SIZES = ["--device", "cpu", "--prompt", "8", "--tokens", "5", "--prefill", "20", "--rounds", "1", "--batch", "1,3"]


def record_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main([*SIZES, *arguments])
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(capsys, "--shape", "tiny", "--peers", "generate,llama.cpp,continuous")
    rows = {(row["measure"], row["batch"], row["policy"]): row for row in record["results"]}
    names = {REFERENCE, "dense", "all", "half", "quarter"}
    assert set(rows) == {(m, b, name) for m, b in (("decode", 1), ("decode", 3), ("prefill", 1)) for name in names}
    assert rows["decode", 1, "half"]["distinct_experts_per_step"] == 4
    assert rows["decode", 3, "all"]["distinct_experts_per_step"] == 8
    assert all(row["ratio_to_transformers"] == 1 for key, row in rows.items() if key[2] == REFERENCE)
    assert set(record["left_out"]) == {"llama.cpp, dense", "transformers continuous batching, dense"}


def test_checkpoints(moe_dir: Path, dense_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(capsys, str(moe_dir), "--dense", str(dense_dir), "--policies", "full,fast", "--peers", "")
    decode = {row["policy"] for row in record["results"] if row["measure"] == "decode"}
    assert decode == {"dense", "full", "fast"}
    assert record["dtype"] == "float32"


def test_a_policy_that_is_not_there_is_named(moe_dir: Path, dense_dir: Path) -> None:
    with pytest.raises(ValueError, match="there is no policy 'swift'"):
        main([*SIZES, str(moe_dir), "--dense", str(dense_dir), "--policies", "full,swift"])


@pytest.mark.parametrize("arguments", [[], ["--shape", "tiny", "--peers", "magic"]])
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SIZES, *arguments])
