"""`n`, seeds, and the sampling fields: what the client asks for is what the engine is told."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.request import SamplingParams
from tests.server.serving import Parts, events, serving

FIELDS: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.05,
    "seed": -1,
    "min_tokens": 2,
    "presence_penalty": -1.5,
    "frequency_penalty": 2,
    "repetition_penalty": 1.2,
    "logit_bias": {"7": -100, "0": 3.5},
    "stop_token_ids": [9],
    "ignore_eos": True,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_sampling_field_reaches_the_engine(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        fields = {**prompt, **FIELDS, "max_tokens": 3, "priority": -4, "cache_salt": "tenant"}
        assert (await server.client.post(path, json=fields)).status_code == 200
        (request,) = seen.values()
        assert request.sampling == SamplingParams(
            max_tokens=3,
            temperature=0.7,
            top_p=0.9,
            top_k=7,
            min_p=0.05,
            seed=2**63 - 1,
            min_tokens=2,
            presence_penalty=-1.5,
            frequency_penalty=2.0,
            repetition_penalty=1.2,
            logit_bias=((7, -100.0), (0, 3.5)),
            stop_token_ids=frozenset({9}),
            ignore_eos=True,
        )
        assert (request.priority, request.cache_salt) == (-4, "tenant")


@pytest.mark.parametrize("field", [{"top_p": 0}, {"top_k": 1}, {"temperature": 1e-5}])
async def test_what_leaves_one_token_is_greedy(tmp_path: Path, field: dict[str, Any]) -> None:
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        await server.complete("a", max_tokens=1, **field)
        (request,) = seen.values()
        assert request.sampling.temperature == 0


async def test_n_choices_of_every_prompt_have_their_own_seeds(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        body = await server.complete(["a", "k"], n=3, max_tokens=2, seed=2**63 - 2, best_of=3)
        assert [c["index"] for c in body["choices"]] == list(range(6))
        assert [c["text"] for c in body["choices"]] == ["bc"] * 3 + ["lm"] * 3
        assert body["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 12,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # a prompt counts once
        seeds = [seen[f"{body['id']}-{index}"].sampling.seed for index in range(6)]
        assert seeds == [2**63 - 2, 2**63 - 1, 0] * 2
        seen.clear()
        await server.complete("a", n=2, max_tokens=1)
        assert [request.sampling.seed for request in seen.values()] == [None, None]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_of_n_choices_ends_each_once(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path, max_num_seqs=2) as server:
        prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        fields = {**prompt, "n": 3, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage = events((await server.client.post(path, json=fields)).text)
        ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"] is not None]
        assert sorted(ends) == [0, 1, 2]
        assert len(chunks) == (12 if path == "/v1/completions" else 15)
        assert all(len(c["choices"]) == 1 for c in chunks)
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
        if path != "/v1/completions":
            roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
            assert sorted(roles) == [0, 1, 2]


async def test_usage_in_every_chunk_when_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        fields = {"prompt": "a", "max_tokens": 3, "stream": True, "stream_options": options}
        chunks = events((await server.client.post("/v1/completions", json=fields)).text)
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]
        assert [len(c["choices"]) for c in chunks] == [1, 1, 1, 0]


async def refusal(server: Any, fields: dict[str, Any]) -> tuple[int, str, str | None]:
    reply: httpx.Response = await server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})
    error = reply.json().get("error", {})
    return reply.status_code, error.get("code"), error.get("param")


async def test_unknown_fields_are_refused_where_the_operator_wants_that(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(strict_fields=True)) as server:
        assert await refusal(server, {"temprature": 0}) == (400, "unsupported_parameter", "temprature")
        assert await refusal(server, {"routing": {"policy": "fast", "x": 1}}) == (
            400,
            "unsupported_parameter",
            "routing.x",
        )
        assert (await refusal(server, {"routing": "fast", "temperature": 0}))[0] == 200
        message = {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}
        reply = await server.client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
        assert reply.json()["error"]["param"] == "messages[0].content[0].cache"
    async with serving(tmp_path / "lenient") as server:
        assert (await refusal(server, {"temprature": 0, "routing": {"policy": "fast", "x": 1}}))[0] == 200
