"""Routing traces: what they say, and that the counters of /metrics are their sum."""

import asyncio
import base64
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from ladimo.checkpoint import read_config, write_policy
from ladimo.policy import LayerRule, RoutingPolicy
from server.api.answers.routing_trace import TraceWriter
from server.api.fields.completions import RoutingTraceField
from server.engine.messages import RoutingTrace
from server.engine.request import TokenRouting
from server.policies.route import Binding, Route
from tests.factories import make_nested
from tests.server.fakes import FAKE_CONFIG
from tests.server.real import DEMO, serving_model
from tests.server.serving import TOP_K, events, serving

LAYERS = [0, 2]  # of both models, layer 1 is dense


def merged(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A stream's traces by choice, put together as a client would."""
    traces: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        part = choice["routing_trace"]
        whole = traces.setdefault(choice["index"], {})
        for name in {"tokens", "refined"} & part.keys():
            whole.setdefault(name, []).extend(part.pop(name))
        assert not whole.keys() & part.keys(), "said twice"
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
        packed = await server.complete("abc", **{**fields, "routing_trace": {"prompt": True, "format": "base64"}})
        trace = packed["choices"][0]["routing_trace"]
        assert (trace["tokens"]["shape"], unpacked(trace["prompt"])) == ([0, 2, 1], [[[0], [0]]] * 4)
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


def unpacked(array: dict[str, Any]) -> list[list[list[int]]]:
    """What a client makes of a packed array: lists again, without the padding."""
    padding = np.iinfo(array["dtype"]).max
    return [[[expert for expert in layer if expert != padding] for layer in token] for token in numbers(array).tolist()]


def numbers(array: dict[str, Any]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(array["data"]), dtype=array["dtype"]).reshape(array["shape"])


async def test_packed_traces_say_the_same_as_lists(moe_dir: Path) -> None:
    """Whole and streamed, on both endpoints, under a policy whose tokens run different numbers of experts."""
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path, prompt in (
            ("/v1/completions", {"prompt": "hello"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ):
            fields = {**prompt, "max_tokens": 12, "n": 2, "seed": 1, "ignore_eos": True, "routing": "quality"}
            plain, packed = [
                (await client.post(path, json=fields | {"routing_trace": {"prompt": True, "format": form}})).json()["choices"]
                for form in ("lists", "base64")
            ]
            asked = {"routing_trace": {"prompt": True, "format": "base64"}, "stream": True}
            chunks = events((await client.post(path, json=fields | asked)).text)
            for index, choice in enumerate(plain):
                lists, arrays = choice["routing_trace"], packed[index]["routing_trace"]
                assert arrays["layers"] == lists["layers"] == LAYERS
                for name in ("prompt", "tokens"):
                    assert arrays[name]["dtype"] == "uint8"
                    assert arrays[name]["shape"] == [len(lists[name]), 2, 2]
                    assert unpacked(arrays[name]) == lists[name]
                parts = [
                    part["routing_trace"]
                    for chunk in chunks
                    for part in chunk["choices"]
                    if part["index"] == index and "routing_trace" in part
                ]
                assert [token for part in parts for token in unpacked(part["tokens"])] == lists["tokens"]
                assert [unpacked(part["prompt"]) for part in parts if "prompt" in part] == [lists["prompt"]]
            assert {len(layer) for token in plain[0]["routing_trace"]["tokens"] for layer in token} == {1, 2}


@pytest.mark.parametrize(("num_experts", "dtype", "padding"), [(255, "uint8", 255), (256, "uint16", 65535)])
def test_the_padding_is_never_an_expert(num_experts: int, dtype: str, padding: int) -> None:
    layers = tuple(layer and replace(layer, num_experts=num_experts) for layer in FAKE_CONFIG.layers)
    rule = LayerRule(3, mass=0.9)
    asked = RoutingTraceField.model_validate({"format": "base64"})
    binding = Binding(Route(RoutingPolicy("p", "", (rule, None, rule)), None, "body", "p"))
    writer = TraceWriter(asked, binding, replace(FAKE_CONFIG, layers=layers))
    trace = RoutingTrace((TokenRouting(((num_experts - 1, 0), (7,))), TokenRouting(((1, 2, 3), (4, 5)))))
    wire = writer.write(trace, first=True, last=True)["tokens"]
    assert (wire["dtype"], wire["shape"]) == (dtype, [2, 2, 3])
    assert unpacked(wire) == [[list(ran) for ran in token.experts] for token in trace.tokens]
    assert numbers(wire).flatten().tolist()[:6] == [num_experts - 1, 0, padding, 7, padding, padding]


@pytest.mark.parametrize("wrong", ["yes", 1, {"prompt": "yes"}, [], {"format": "hex"}])
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


async def test_a_nested_model_tells_what_each_token_refined(tmp_path: Path) -> None:
    """The demo model at 4 and 8 bits: lists, packed and streamed say the same, and /metrics has their sum."""
    nested = make_nested(tmp_path / "nested", dense=DEMO, num_experts=1)
    config = read_config(nested)
    rule = LayerRule(1, renormalize=False, bits=4, attention_bits=4, refine=1.5)
    write_policy(nested, RoutingPolicy("refined", "", (rule,) * config.num_hidden_layers, 4, 3.0))
    counts: Counter[str] = Counter()
    async with serving_model(nested) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def ask(policy: str, **fields: Any) -> httpx.Response:
            body = {"prompt": "def f(x):", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "routing": policy}
            return await client.post("/v1/completions", json=body | fields)

        whole, packed = [
            (await ask("refined", routing_trace={"prompt": True, "format": form})).json()["choices"][0]["routing_trace"]
            for form in ("lists", "base64")
        ]
        stream = merged(events((await ask("refined", routing_trace={"prompt": True}, stream=True)).text))
        assert stream == {0: whole}
        assert whole["refinable"] == packed["refinable"] == [1024] * 6 + [4096]
        for name in ("refined", "prompt_refined"):
            assert packed[name]["dtype"] == "uint32"
            assert numbers(packed[name]).tolist() == whole[name]
        assert [len(whole[name]) for name in ("tokens", "refined")] == [6, 6]
        assert len(whole["prompt"]) == len(whole["prompt_refined"]) > 1
        for token in whole["prompt_refined"] + whole["refined"]:
            assert all(0 < count < most for count, most in zip(token[:6], whole["refinable"], strict=False))
            counts.update(dict(zip(["0", "1", "2", "3", "4", "5", "head"], token, strict=True)))
        quality = (await ask("quality", routing_trace=True)).json()["choices"][0]["routing_trace"]
        assert quality["refined"] == [[0] * 7] * 6 and "prompt_refined" not in quality
        text = (await client.get("/metrics")).text
    exported: Counter[str] = Counter()
    for layer, count in re.findall(r'ladimo_refined_total\{group="\d+",layer="(\w+)",policy="refined"\} ([\d.]+)', text):
        exported[layer] += int(float(count))
    assert exported == Counter({layer: 3 * count for layer, count in counts.items()})  # three requests


async def test_a_dense_model_has_no_expert_layers(dense_dir: Path) -> None:
    async with serving_model(dense_dir) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"prompt": "abc", "max_tokens": 2, "ignore_eos": True, "routing_trace": {"prompt": True}}
        trace = (await client.post("/v1/completions", json=body)).json()["choices"][0]["routing_trace"]
        assert (trace["layers"], trace["tokens"]) == ([], [[], []])
        assert set(map(tuple, trace["prompt"])) == {()}
        packed = {**body, "routing_trace": {"format": "base64"}}
        trace = (await client.post("/v1/completions", json=packed)).json()["choices"][0]["routing_trace"]
        assert trace == {"layers": [], "tokens": {"dtype": "uint8", "shape": [2, 0, 0], "data": ""}}
