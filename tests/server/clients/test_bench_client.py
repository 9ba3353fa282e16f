"""A client that measures as `vllm bench serve` and guidellm do: chunks are tokens, usage comes alone at the end."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.serving import MODEL, Parts, serving_http


@dataclass
class Measured:
    tokens: int = 0  # chunks with text; a chat ends with one that has a finish reason only
    text: str = ""
    usage: dict[str, Any] | None = None
    done: bool = False


async def measure(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Measured:
    measured = Measured()
    async with client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if not line or line.startswith(":"):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                measured.done = True
                continue
            assert not measured.done
            chunk = json.loads(data)
            if chunk["choices"]:
                choice = chunk["choices"][0]
                text = choice.get("text", choice.get("delta", {}).get("content"))
                measured.text += text or ""
                measured.tokens += text is not None
                if chunk.get("usage") is not None:
                    measured.usage = chunk["usage"]
            else:
                measured.usage = chunk["usage"]
    return measured


VLLM = {
    "model": MODEL,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}
GUIDELLM = {**VLLM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stop": None}


@pytest.mark.parametrize("flavour", [VLLM, GUIDELLM])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_one_chunk_per_token_and_usage_at_the_end(tmp_path: Path, flavour: dict[str, Any], path: str) -> None:
    async with serving_http(tmp_path, Parts(max_queue=64), eos_token_ids=frozenset({70, 80, 90})) as server:
        models = (await server.client.get("/v1/models")).json()["data"]
        assert (models[0]["id"], models[0]["root"]) == (MODEL, MODEL)

        async def one(number: int) -> None:
            tokens = 3 + number % 20
            if path == "/v1/completions":
                body = {**flavour, "prompt": "ab" * (1 + number % 5), "max_tokens": tokens}
            else:
                messages = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
                body = {**flavour, "logprobs": False, "messages": messages, "max_completion_tokens": tokens}
            measured = await measure(server.client, path, body)
            assert measured.tokens == tokens
            assert measured.usage is not None
            assert measured.usage["completion_tokens"] == tokens
            assert measured.done

        await asyncio.gather(*(one(number) for number in range(40)))
