"""Any values in any fields: an answer or a 4xx, never a 500, and the server answers the next request.

A real (random) model, so that whatever passes the HTTP edge goes through the real sampler and grammars, too.
"""

import asyncio
import gzip
import json
import os
import resource
import zlib
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.fields.completions import ChatCompletionRequest, CompletionRequest
from server.api.fields.responses import ResponsesRequest
from tests.server.real import DEMO, serving_model
from tests.server.serving import events

JSON = ((b"Content-Type", b"application/json"),)


class Client:
    """A server on a thread of its own, spoken to from ordinary functions, as hypothesis needs."""

    def __init__(self, model: Path, max_model_len: int = 64) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._client = self._wait(self._start(model, max_model_len))
        self.answered = 0  # requests that were not refused

    def post(self, path: str, content: bytes, headers: Sequence[tuple[bytes, bytes]] = JSON) -> httpx.Response:
        reply: httpx.Response = self._wait(self._client.post(path, content=content, headers=headers))
        self.answered += reply.status_code == 200
        return reply

    def close(self) -> None:
        self._wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, model: Path, max_model_len: int) -> httpx.AsyncClient:
        flags = ("--max-num-seqs", "4", "--max-model-len", str(max_model_len))
        url = await self._stack.enter_async_context(serving_model(model, *flags))
        return await self._stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(120)


@pytest.fixture(scope="module")
def client(moe_dir: Path) -> Iterator[Client]:
    client = Client(moe_dir)
    yield client
    client.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Client]:
    """Tools need a longer context than a model of bytes has."""
    client = Client(DEMO, 1024)
    yield client
    client.close()


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63) - 1, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
TOKEN = st.integers(0, 257)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 12),
    "min_tokens": st.integers(0, 12),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(TOKEN.map(str), st.floats(-100, 100), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=5)),
    "stop_token_ids": st.lists(TOKEN, max_size=128),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "priority": st.integers(-5, 5),
    "service_tier": st.sampled_from(["auto", "default", "flex", "priority", "scale", ""]),
    "cache_salt": TEXT,
    "user": TEXT,
    "routing": st.sampled_from(["fast", "full", "auto", {"accuracy": 0.5}, {"policy": "fast", "min_accuracy": 1}]),
}
# One at most is met, so there is mostly one at most.
CONSTRAINTS: dict[str, st.SearchStrategy[Any]] = {
    "guided_choice": st.lists(TEXT, max_size=3),
    "guided_regex": st.sampled_from(["[ab]+", "a{3}", "(", ""]),
    "response_format": st.sampled_from(
        [{"type": "text"}, {"type": "json_object"}, {"type": "json_object", "schema": {}}, {"type": "json_schema"}]
    ),
    "structured_outputs": st.sampled_from([{}, {"json_object": True}, {"grammar": "root ::= [a-c]+"}, {"odd": 1}]),
    "grammar": st.sampled_from(["root ::= [a-c]+", "start: /a/", "(", {"type": "regex", "value": "a"}]),
    "json_schema": st.sampled_from([{"type": "integer", "format": "byte"}, {"$ref": "#"}, {"not": {}}, "{"]),
    "format": st.sampled_from(["json", "", "xml", {"type": "boolean"}]),
}
IDS = st.lists(TOKEN, max_size=70)
PROMPT = st.one_of(TEXT.map("a".__add__), TEXT, IDS, st.lists(TEXT, max_size=3), st.lists(IDS, max_size=3))
COMPLETION = GOOD | {
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "best_of": st.integers(1, 3),
    "add_special_tokens": st.booleans(),
}
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
CHAT = GOOD | {
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.dictionaries(TEXT, TEXT, max_size=2),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "max_completion_tokens": st.integers(1, 12),
    "tools": st.lists(
        st.sampled_from([TOOL, {**TOOL, "function": {"name": "g", "strict": True}}, {"type": "function"}]), max_size=3
    ),
    "tool_choice": st.sampled_from(["none", "auto", "required", "any", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": st.booleans(),
}
INPUT_PART = st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text", "input_image"]), "text": TEXT})
INPUT_ITEM = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.one_of(TEXT, st.lists(INPUT_PART, max_size=2))},
    optional={"type": st.sampled_from(["message", "function_call", "reasoning"]), "id": TEXT, "status": TEXT},
)
NAME = st.sampled_from(["f", "g", "a b", ""])
SCHEMA = st.sampled_from([None, {}, {"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "array"}, "{", 3])
ARGUMENTS = st.sampled_from(["{}", '{"a": 1}', "{", ""])
FUNCTION = st.fixed_dictionaries({"name": NAME}, optional={"parameters": SCHEMA, "description": TEXT, "strict": st.booleans()})
NAMED = st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": NAME})})
CHOICE = st.sampled_from(["none", "auto", "required", "any"])
CALL = st.fixed_dictionaries({"id": TEXT, "function": st.fixed_dictionaries({"name": NAME, "arguments": ARGUMENTS})})
TOOL_MESSAGE = st.one_of(
    MESSAGE,
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(CALL, max_size=2)}, optional={"content": TEXT}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT}, optional={"tool_call_id": TEXT}),
)
CALL_ITEM = st.one_of(
    INPUT_ITEM,
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": TEXT, "name": NAME, "arguments": ARGUMENTS}),
    st.fixed_dictionaries(
        {"type": st.just("function_call_output"), "call_id": TEXT, "output": st.one_of(TEXT, st.lists(INPUT_PART, max_size=2))}
    ),
)
CHAT_TOOLS = {
    "messages": st.lists(TOOL_MESSAGE, min_size=1, max_size=3),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=2),
    "tool_choice": st.one_of(CHOICE, NAMED),
}
RESPONSES_TOOLS = {
    "input": st.lists(CALL_ITEM, min_size=1, max_size=3),
    "tools": st.lists(st.builds(lambda function: {"type": "function", **function}, FUNCTION), max_size=2),
    "tool_choice": st.one_of(CHOICE, st.fixed_dictionaries({"type": st.sampled_from(["function", "mcp"]), "name": NAME})),
}
SHARED = {"parallel_tool_calls": st.booleans(), "stream": st.booleans(), "routing": GOOD["routing"], "stop": GOOD["stop"]}
FORMATS = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema"},
    {"type": "json_schema", "schema": {}, "name": "a"},
]
RESPONSES = {name: values for name, values in GOOD.items() if name not in ("max_tokens", "n", "response_format")} | {
    "instructions": TEXT,
    "max_output_tokens": st.integers(1, 12),
    "top_logprobs": st.integers(0, 20),
    "include": st.lists(st.sampled_from(["message.output_text.logprobs", "reasoning.encrypted_content"]), max_size=2),
    "metadata": st.dictionaries(TEXT, TEXT, max_size=2),
    "store": st.booleans(),
    "text": st.fixed_dictionaries({"format": st.sampled_from(FORMATS)}),
}


def fields(good: dict[str, st.SearchStrategy[Any]], odd_names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly good values of some of the fields, and odd values of a few."""
    constraint = st.sampled_from(sorted(CONSTRAINTS)).flatmap(lambda name: st.fixed_dictionaries({name: CONSTRAINTS[name]}))
    some = st.builds(lambda left, right: left | right, st.fixed_dictionaries({}, optional=good), st.just({}) | constraint)
    odd = st.dictionaries(st.one_of(st.sampled_from(odd_names), st.text(max_size=4)), ODD, max_size=2)
    return st.builds(lambda left, right: left | right, some, st.one_of(st.just({}), odd))


def check(client: Client, path: str, body: dict[str, Any]) -> None:
    reply = client.post(path, json.dumps(body).encode())
    if reply.status_code != 200:
        assert 400 <= reply.status_code < 429, (reply.status_code, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert len(reply.content) < 3000
    elif body.get("stream") is True and path == "/v1/responses":
        assert reply.text.splitlines()[-3] in ("event: response.completed", "event: response.incomplete")
    elif body.get("stream") is True:
        assert not any("error" in event for event in events(reply.text))
    elif path == "/v1/responses":
        assert reply.json()["status"] in ("completed", "incomplete")
    else:
        assert all(choice["finish_reason"] in ("stop", "length", "tool_calls") for choice in reply.json()["choices"])


PATH = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"])
# LONG_TESTS tries twice as many.
FUZZ = settings(
    max_examples=400 if os.environ.get("LONG_TESTS") else 200, deadline=None, suppress_health_check=list(HealthCheck)
)


@FUZZ
@given(body=fields(COMPLETION, list(CompletionRequest.model_fields)), prompt=PROMPT)
def test_completions(client: Client, body: dict[str, Any], prompt: object) -> None:
    check(client, "/v1/completions", {"prompt": prompt, "max_tokens": 4, **body})


@FUZZ
@given(body=fields(CHAT, list(ChatCompletionRequest.model_fields)), messages=st.lists(MESSAGE, max_size=2))
def test_chat(client: Client, body: dict[str, Any], messages: object) -> None:
    check(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 4, **body})


@FUZZ
@given(body=fields(RESPONSES, list(ResponsesRequest.model_fields)), items=st.one_of(TEXT, st.lists(INPUT_ITEM, max_size=2)))
def test_responses(client: Client, body: dict[str, Any], items: object) -> None:
    check(client, "/v1/responses", {"input": items, "max_output_tokens": 4, **body})


@settings(FUZZ, max_examples=100)
@given(body=st.fixed_dictionaries(CHAT_TOOLS, optional=SHARED))
def test_chat_tools(demo: Client, body: dict[str, Any]) -> None:
    check(demo, "/v1/chat/completions", {"max_tokens": 8, **body})


@settings(FUZZ, max_examples=100)
@given(body=st.fixed_dictionaries(RESPONSES_TOOLS, optional=SHARED))
def test_responses_tools(demo: Client, body: dict[str, Any]) -> None:
    check(demo, "/v1/responses", {"max_output_tokens": 8, **body})


@FUZZ
@given(path=PATH, body=st.binary(max_size=60))
def test_any_bytes(client: Client, path: str, body: bytes) -> None:
    reply = client.post(path, body)
    assert 400 <= reply.status_code < 429, reply.text


@FUZZ
@given(path=PATH, body=ODD)
def test_any_json(client: Client, path: str, body: object) -> None:
    reply = client.post(path, json.dumps(body).encode())
    assert 400 <= reply.status_code < 429, reply.text


HEADER = st.sampled_from(
    ["X-Routing-Policy", "X-Routing-Accuracy", "X-Request-Timeout", "Content-Encoding", "Upgrade", "Connection", "Expect"]
)
VALUE = st.one_of(
    st.sampled_from(["", " ", "fast", "auto", "0.5", " 1 ", "1e-1", "0_1", "inf", "gzip", "deflate", "br", "h2c", "upgrade"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=6),
)


@FUZZ
@given(
    headers=st.lists(st.tuples(HEADER, VALUE), max_size=3),
    pack=st.sampled_from([bytes, gzip.compress, zlib.compress, b"\xef\xbb\xbf".__add__]),
    path=st.sampled_from(["/v1/completions", "//v1/completions", "/v1/completions/", "/V1/completions"]),
)
def test_any_headers_and_packings(client: Client, headers: list[tuple[str, str]], pack: Any, path: str) -> None:
    sent = [
        (b"Content-Type", b"application/json"),
        *((name.encode(), value.strip().encode("latin-1")) for name, value in headers),
    ]
    reply = client.post(path, pack(b'{"prompt": "a", "max_tokens": 1}'), sent)
    assert reply.status_code == 200 or 400 <= reply.status_code < 429 or reply.status_code == 504, reply.text


@pytest.mark.long
def test_memory_stays_flat(client: Client) -> None:
    def resident_after(requests: int) -> int:
        for number in range(requests):
            odd: dict[str, Any] = {
                "prompt": "a",
                "max_tokens": 2,
                f"field{number}": "x" * 1000,
                "guided_regex": f"a{{{number}}}",
            }
            check(client, "/v1/completions", odd | ({"temperature": "x" * 1000} if number % 2 else {}))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = resident_after(200)
    assert resident_after(600) - before < 20 * 2**20


def test_much_was_answered_and_the_server_is_still_there(client: Client, demo: Client) -> None:
    assert client.answered > 100
    assert demo.answered > 20
    reply = client.post("/v1/completions", b'{"prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": true}')
    assert reply.json()["usage"]["completion_tokens"] == 3
