"""The benchmarks of what observing costs run to their end and say what they measured; their numbers are not judged here."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from loadtests.costs import counting_bench, mixed_bench, prefill_bench, sampling_bench, scrape_bench, stall_bench
from tests.factories import make_nested
from tests.server.real import serving_model


def test_counting_bench(moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counting_bench.main([str(moe_dir), "--batch", "1,3", "--rounds", "2", "--prompt", "5", "--tokens", "9"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in record["results"]] == [1, 3]
    assert all(0 < row["share"] < 1 and row["ratio"] > 0 for row in record["results"])


def test_mixed_bench(tmp_path: Path, moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a nested checkpoint, and of one of another method."""
    flags = ["--batch", "1,4", "--rounds", "2", "--prompt", "5", "--tokens", "9", "--dtype", "float32"]
    for model in (make_nested(tmp_path / "nested"), moe_dir):
        mixed_bench.main([str(model), *flags])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows = {(row["batch"], row["policies"]): row for row in record["results"]}
        assert len(rows) == 4 + 6
        assert all(row["tokens_per_second"] > 0 for row in rows.values())
        assert rows[4, "all full"]["ratio"] == 1
        assert rows[4, "all fast"]["cost"] < rows[4, "equal parts of all"]["cost"] < rows[4, "all full"]["cost"]


def test_prefill_bench(tmp_path: Path, dense_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint with whole weights, of one without, and of one whose policies read all bits."""
    flags = ["--prompt", "20", "--rounds", "2", "--device", "cpu"]
    nested, planes = (make_nested(tmp_path / str(bits), num_experts=1, top_bits=bits) for bits in (16, 8))
    prefill_bench.main([str(nested), *flags, "--policies", "fast"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    full, fast = record["results"]
    assert (full["policy"], full["predicted_time_ratio"], full["time_ratio"]) == ("full", [1, 1], 1)
    assert fast["policy"] == "fast" and fast["time_ratio"] > 0 and len(fast["predicted_time_ratio"]) == 2
    prefill_bench.main([str(planes), *flags, "--dense", str(dense_dir)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["policy"] for row in record["results"]} == {prefill_bench.DENSE, "full", "quality", "balanced", "fast"}
    assert record["form_costs"][0]["processor"]
    with pytest.raises(SystemExit):
        prefill_bench.main([str(planes), *flags])
    assert "give --dense" in capsys.readouterr().err


def test_sampling_bench(moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling_bench.main([str(moe_dir), "--rows", "1,3", "--rounds", "1", "--repeats", "1"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["rows"], row["kind"]) for row in record["results"]} == {
        (n, kind) for n in (1, 3) for kind in sampling_bench.KINDS
    }
    assert all(row["milliseconds"] > 0 and row["share_of_step"] > 0 for row in record["results"])


@pytest.mark.long
def test_scrape_bench(moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seconds", "0.5", "--rounds", "1", "--every", "0.1", "--clients", "2", "--tokens", "20"]
    scrape_bench.main([str(moe_dir), *flags, "--flag=--device=cpu"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["scrape_cpu_milliseconds"] > 0
    assert {arm: len(rounds) for arm, rounds in record["tokens_per_second"].items()} == {"quiet": 1, "scraped": 1}


@asynccontextmanager
async def served_here(model: Path, flags: Sequence[str]) -> AsyncIterator[httpx.AsyncClient]:
    """A server in the process of the test, which costs less than one of its own."""
    async with serving_model(model, *flags) as address, httpx.AsyncClient(base_url=address, timeout=None) as client:
        yield client


def test_stall_bench(moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rounds", "1", "--mebibytes", "0.05", "--quiet", "0.5", "--tokens", "20", "--flag=--stall-timeout=60"]
    stall_bench.main([str(moe_dir), *flags], served_here)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["statuses"].keys() == record["longest_wait_milliseconds"].keys() - {"quiet"}
    assert set(record["statuses"].values()) <= {200, 400, 413}
