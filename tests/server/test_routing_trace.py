"""Routing traces: what they say, and that the counters of /metrics are their sum."""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.real import serving_model
from tests.server.serving import TOP_K, events, serving

LAYERS = [0, 2]  # of both models, layer 1 is dense


def merged(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A stream's traces by choice, put together as a client would."""
    traces: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        part = choice["routing_trace"]
        whole = traces.setdefault(choice["index"], {"tokens": []})
        whole["tokens"] += part.pop("tokens")
        assert not whole.keys() & part.keys() - {"tokens"}, "said twice"
        whole.update(part)
    return traces


async def test_a_trace_has_one_entry_per_token_and_layer(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("abc", max_tokens=4, routing="balanced", routing_trace=True)  # with BOS, four tokens
        assert body["choices"][0]["routing_trace"] == {"layers": LAYERS, "tokens": [[[0, 1], [0, 1]]] * 4}
        body = await server.complete("abc", max_tokens=2, n=2, routing="fast", routing_trace={"prompt": True})
        for choice in body["choices"]:
            assert choice["routing_trace"] == {"layers": LAYERS, "prompt": [[[0], [0]]] * 3, "tokens": [[[0], [0]]] * 2}
        for nothing in (False, None):
            body = await server.complete("abc", max_tokens=2, routing_trace=nothing)
            assert "routing_trace" not in body["choices"][0]


async def test_a_prompt_alone_is_traced_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields: dict[str, Any] = {"max_tokens": 0, "echo": True, "routing": "fast", "routing_trace": {"prompt": True}}
        body = await server.complete("abc", **fields)
        assert body["choices"][0]["routing_trace"] == {"layers": LAYERS, "prompt": [[[0], [0]]] * 4, "tokens": []}


async def test_a_stream_says_everything_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields = {"max_tokens": 5, "n": 2, "routing": "quality", "routing_trace": {"prompt": True}, "stream": True}
        reply = await server.client.post("/v1/completions", json={"prompt": "ab", **fields})
        chunks = events(reply.text)
        assert all(len(chunk["choices"][0]["routing_trace"]["tokens"]) == 1 for chunk in chunks)
        tokens = [[[0, 1, 2], [0, 1, 2]]]
        assert merged(chunks) == {index: {"layers": LAYERS, "prompt": tokens * 2, "tokens": tokens * 5} for index in range(2)}
        message = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "routing_trace": True, "stream": True}
        chunks = events((await server.client.post("/v1/chat/completions", json=message)).text)
        assert merged(chunks) == {0: {"layers": LAYERS, "tokens": [[list(range(4))] * 2] * 3}}


async def test_a_traced_prompt_is_computed_even_when_it_is_cached(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        prompt = "abcdefghijklm"
        for trace, cached in ((None, 0), (True, 12), ({"prompt": True}, 0), (None, 12)):
            body = await server.complete(prompt, max_tokens=2, routing="fast", routing_trace=trace)
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


@pytest.mark.parametrize("wrong", ["yes", 1, {"prompt": "yes"}, []])
async def test_anything_else_is_refused(tmp_path: Path, wrong: Any) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "routing_trace": wrong})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("routing_trace")


def passes(trace: dict[str, Any]) -> list[list[list[int]]]:
    """Every pass that the counters have counted, by expert layer the experts it ran."""
    once: list[list[list[int]]] = trace.get("prompt", []) + trace["tokens"]
    return once + [one for count in trace.get("recomputed", []) for one in once[:count]]


async def test_the_counters_are_the_sum_of_the_traces(moe_dir: Path) -> None:
    """Exactly, under every policy at once, streams and whole answers, several choices, and a cache too small for all."""
    flags = ("--max-model-len", "64", "--kv-cache-blocks", "26", "--block-size", "4", "--max-step-tokens", "24")
    counted: Counter[tuple[str, int, int]] = Counter()
    tokens = 0
    async with serving_model(moe_dir, *flags) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def ask(index: int) -> None:
            nonlocal tokens
            policy, stream = list(TOP_K)[index % 4], index % 3 == 0
            body = {"prompt": "def f(x): return x + 1"[: 6 + index], "max_tokens": 20 + index % 5, "seed": index}
            fields = {"ignore_eos": True, "n": 1 + index % 2, "stream": stream, "routing": policy}
            if index == 5:
                fields |= {"max_tokens": 0, "echo": True}
            reply = await client.post("/v1/completions", json=body | fields | {"routing_trace": {"prompt": True}})
            assert reply.status_code == 200, reply.text
            if stream:
                traces = list(merged(events(reply.text)).values())
            else:
                answer = json.loads(reply.text)
                traces = [choice["routing_trace"] for choice in answer["choices"]]
                usage, n = answer["usage"], len(traces)
                told = sum(len(trace["prompt"]) + len(trace["tokens"]) for trace in traces)
                unseen = 0 if usage["completion_tokens"] else n
                assert told == usage["prompt_tokens"] * n + usage["completion_tokens"] - n + unseen
            for trace in traces:
                assert trace["layers"] == LAYERS
                tokens += len(passes(trace))
                for one in passes(trace):
                    counted.update((policy, layer, e) for layer, ran in zip(LAYERS, one, strict=True) for e in ran)

        await asyncio.gather(*(ask(index) for index in range(12)))
        text = (await client.get("/metrics")).text
    pattern = r'ladimo_expert_tokens_total\{expert="(\d+)",layer="(\d+)",policy="(\w+)"\} ([\d.]+)'
    exported = Counter({(p, int(layer), int(e)): int(float(n)) for e, layer, p, n in re.findall(pattern, text)})
    assert +exported == counted
    assert re.search(r"^ladimo_step_tokens_sum (.*)$", text, re.M)[1] == f"{tokens}.0"  # type: ignore[index]
    assert float(re.search(r"^ladimo_preemptions_total (.*)$", text, re.M)[1]) > 0  # type: ignore[index]


async def test_a_dense_model_has_no_expert_layers(dense_dir: Path) -> None:
    async with serving_model(dense_dir) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"prompt": "abc", "max_tokens": 2, "ignore_eos": True, "routing_trace": {"prompt": True}}
        trace = (await client.post("/v1/completions", json=body)).json()["choices"][0]["routing_trace"]
        assert (trace["layers"], trace["tokens"]) == ([], [[], []])
        assert set(map(tuple, trace["prompt"])) == {()}
