"""The product from end to end, with its own commands: convert a dense model, serve it, turn the knob, read the counters."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.factories import make_dense
from tests.ladimo.convert.conftest import make_text

RECIPE = """
layers = "0,2"
tokens = 3000
[split]
experts = 4
[train]
steps = 40
batch_tokens = 256
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m ladimo convert`, in this process."""
    folder = tmp_path_factory.mktemp("vertical")
    dense = make_dense(folder / "dense", max_position_embeddings=64)
    (folder / "recipe.toml").write_text(RECIPE)
    text = make_text(folder / "text.txt")
    command = ["ladimo", "convert", str(dense), str(folder / "moe"), "--method", "ladimo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--text", str(text), "--recipe", str(folder / "recipe.toml")])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("ladimo", run_name="__main__")
    assert end.value.code == 0
    return folder / "moe"


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """`ladimo-server` on a free port; its address is what it prints."""
    command = [sys.executable, "-m", "server", str(checkpoint), "--port", "0", "--insecure-admin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                yield found.group()
                break
        else:
            pytest.fail("the server ended before it was ready")
        process.terminate()
        assert process.wait(timeout=60) == 0


def counters(client: httpx.Client, policy: str) -> dict[tuple[int, int], float]:
    """(layer, expert) -> tokens under a policy, from /metrics."""
    pattern = re.compile(r'ladimo_expert_tokens_total\{expert="(\d+)",layer="(\d+)",policy="([^"]+)"\} (\S+)')
    found = pattern.findall(client.get("/metrics").text)
    return {(int(layer), int(expert)): float(count) for expert, layer, name, count in found if name == policy}


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "def value(x):", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    parsed: dict[str, Any] = answer.json()
    return parsed


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "def value(x):", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
def test_the_main_job(checkpoint: Path, address: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert [layer is not None for layer in config["moe_layers"]] == [True, False, True]
    with httpx.Client(base_url=address, timeout=60) as client:
        # One prompt under two policies, streamed: each answer is its policy's and says so.
        full = stream(client, routing="full")
        fast = stream(client, routing={"accuracy": 0})
        assert len(full) == len(fast) == 12
        assert (full[-1]["routing"]["policy"], full[-1]["routing"]["experts_per_token"]) == ("full", 2.0)
        assert fast[-1]["routing"]["experts_per_token"] == 1.0
        assert fast[-1]["routing"]["active_parameters_ratio"] < full[-1]["routing"]["active_parameters_ratio"] < 1
        # The default changes; the next request runs under the new one.
        name = fast[-1]["routing"]["policy"]
        assert complete(client)["routing"]["policy"] == "full"
        client.put("/admin/routing/default", json={"policy": name}).raise_for_status()
        after = complete(client)
        assert (after["routing"]["policy"], after["routing"]["reason"]) == (name, "default")
        assert after["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in fast)
        client.post("/admin/routing/rollback").raise_for_status()
        assert complete(client)["routing"]["policy"] == "full"


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_counters_are_tokens_times_k(checkpoint: Path, address: str, top_k: int) -> None:
    name = f"count-{top_k}"
    rule = {"top_k": top_k, "mass": None, "floor": 0.0, "renormalize": True, "experts": None}
    policy = {"name": name, "description": "", "layers": [rule, None, rule]}
    with httpx.Client(base_url=address, timeout=60) as client:
        client.put(f"/admin/routing/policies/{name}", json=policy).raise_for_status()
        usage = complete(client, routing=name)["usage"]
        counts = counters(client, name)
        again = complete(client, routing=name, prompt="def value(x):" * 3)["usage"]
        cached = complete(client, routing=name, prompt="def value(x):" * 3)["usage"]
        more = counters(client, name)
    computed = usage["prompt_tokens"] + usage["completion_tokens"] - 1  # nothing follows the last token
    assert usage["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens_details"]["cached_tokens"] == 0
    found = cached["prompt_tokens_details"]["cached_tokens"]
    assert found == 32  # two blocks of 16
    both = computed + sum(one["prompt_tokens"] + one["completion_tokens"] - 1 for one in (again, cached)) - found
    assert {layer for layer, _ in counts} == {0, 2}
    for layer in (0, 2):
        assert sum(count for (at, _), count in counts.items() if at == layer) == computed * top_k
        assert sum(count for (at, _), count in more.items() if at == layer) == both * top_k


def test_requests_at_once_keep_their_policies(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        names = [policy["name"] for policy in client.get("/v1/routing").json()["policies"]]
        alone = {name: complete(client, model=f"moe:{name}")["choices"][0]["text"] for name in names}
        batch = complete(client, prompt=["def value(x):"] * 3, routing=names[0])
        assert [choice["text"] for choice in batch["choices"]] == [alone[names[0]]] * 3
