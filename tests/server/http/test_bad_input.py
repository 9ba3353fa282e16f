"""Every wrong request gets one clear error in OpenAI's shape, and the next request is served."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import Access
from tests.server.serving import CONTEXT, MODEL, Parts, serving

GOOD = {"prompt": "a", "max_tokens": 1}

BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": ""}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": []}, 400, "invalid_request", "prompt"),
    ({"prompt": [[]]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": [""]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": 5}, 400, "invalid_request", "prompt"),
    ({"prompt": ["a", 5]}, 400, "invalid_request", "prompt[1]"),
    ({"prompt": [1.5]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": [True]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": [-1]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": [258]}, 400, "invalid_request", "prompt"),
    ({"prompt": [10**30]}, 400, "invalid_request", "prompt[0]"),
    ({"prompt": {"a": 1}}, 400, "invalid_request", "prompt"),
    ({"prompt": ["a"] * 13}, 400, "invalid_request", "prompt"),
    ({"prompt": ["a"] * 2000}, 400, "invalid_request", "prompt"),
    ({"prompt": [1] * CONTEXT}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": "x" * 5000}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": ["a", "x" * 5000]}, 400, "context_length_exceeded", "prompt[1]"),
    ({"max_tokens": CONTEXT - 1}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 10**30}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({"max_tokens": -1}, 400, "invalid_request", "max_tokens"),
    ({"max_tokens": "3"}, 400, "invalid_request", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "invalid_request", "max_tokens"),
    ({"temperature": -0.1}, 400, "invalid_request", "temperature"),
    ({"temperature": 2.1}, 400, "invalid_request", "temperature"),
    ({"temperature": "hot"}, 400, "invalid_request", "temperature"),
    ({"top_p": -0.01}, 400, "invalid_request", "top_p"),
    ({"top_p": 1.01}, 400, "invalid_request", "top_p"),
    ({"top_k": -2}, 400, "invalid_request", "top_k"),
    ({"top_k": 10**30}, 400, "invalid_request", "top_k"),
    ({"seed": 2**63}, 400, "invalid_request", "seed"),
    ({"stop": ""}, 400, "invalid_request", "stop[0]"),
    ({"stop": ["a", 3]}, 400, "invalid_request", "stop[1]"),
    ({"stop": ["x"] * 33}, 400, "invalid_request", "stop"),
    ({"stop_token_ids": [258]}, 400, "invalid_request", "stop_token_ids"),
    ({"stream": "yes"}, 400, "invalid_request", "stream"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"model": f"{MODEL}:nope"}, 404, "unknown_policy", "model"),
    ({"routing": "nope"}, 404, "unknown_policy", "routing"),
    ({"routing": {"policy": "nope"}}, 404, "unknown_policy", "routing"),
    ({"routing": {"accuracy": 1.5}}, 400, "invalid_request", "routing.accuracy"),
    ({"routing": {"accuracy": -0.1}}, 400, "invalid_request", "routing.accuracy"),
    ({"routing": {"accuracy": "high"}}, 400, "invalid_request", "routing.accuracy"),
    ({"routing": {"policy": "fast", "min_accuracy": 2}}, 400, "invalid_request", "routing.min_accuracy"),
    ({"routing": {}}, 400, "invalid_request", "routing"),
    ({"routing": {"policy": "fast", "accuracy": 1}}, 400, "invalid_request", "routing"),
    ({"routing": 3}, 400, "invalid_request", "routing"),
    ({"n": 0}, 400, "invalid_request", "n"),
    ({"n": 13}, 400, "invalid_request", "n"),  # more than fit this server at once
    ({"n": 17}, 400, "invalid_request", "n"),
    ({"n": 10**9}, 400, "invalid_request", "n"),
    ({"n": 10**30}, 400, "invalid_request", "n"),
    ({"n": 2, "prompt": ["a"] * 7}, 400, "invalid_request", "n"),
    ({"best_of": 3}, 400, "unsupported_parameter", "best_of"),
    ({"n": 2, "best_of": 1}, 400, "unsupported_parameter", "best_of"),
    ({"logprobs": -1}, 400, "invalid_request", "logprobs"),
    ({"logprobs": 21}, 400, "invalid_request", "logprobs"),
    ({"logprobs": "1"}, 400, "invalid_request", "logprobs"),
    ({"logprobs": True}, 400, "invalid_request", "logprobs"),
    ({"echo": 1}, 400, "invalid_request", "echo"),
    ({"prompt_logprobs": 1}, 400, "unsupported_parameter", "prompt_logprobs"),
    ({"suffix": "b"}, 400, "unsupported_parameter", "suffix"),
    ({"min_tokens": -1}, 400, "invalid_request", "min_tokens"),
    ({"min_tokens": 2}, 400, "invalid_request", "min_tokens"),  # max_tokens is 1
    ({"min_p": 1.1}, 400, "invalid_request", "min_p"),
    ({"presence_penalty": 2.1}, 400, "invalid_request", "presence_penalty"),
    ({"frequency_penalty": -2.1}, 400, "invalid_request", "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "invalid_request", "repetition_penalty"),
    ({"repetition_penalty": -1}, 400, "invalid_request", "repetition_penalty"),
    ({"repetition_penalty": 10**400}, 400, "invalid_request", "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, 400, "invalid_request", "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, 400, "invalid_request", "logit_bias.five.[key]"),
    ({"logit_bias": {"-1": 1}}, 400, "invalid_request", "logit_bias.-1.[key]"),
    ({"logit_bias": {"258": 1}}, 400, "invalid_request", "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "invalid_request", "logit_bias"),
    ({"logit_bias": [5]}, 400, "invalid_request", "logit_bias"),
    ({"priority": 2**63}, 400, "invalid_request", "priority"),
    ({"priority": 0.5}, 400, "invalid_request", "priority"),
    ({"cache_salt": ""}, 400, "invalid_request", "cache_salt"),
    ({"cache_salt": "x" * 257}, 400, "invalid_request", "cache_salt"),
    ({"user": 5}, 400, "invalid_request", "user"),
    ({"guided_grammar": "root ::= a"}, 400, "invalid_request", "guided_grammar"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, 400, "invalid_request",
     "stream_options.continuous_usage_stats"),
]  # fmt: skip

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CHATS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": []}, 400, "invalid_request", "messages"),
    ({"messages": "hi"}, 400, "invalid_request", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, 400, "invalid_request", "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, 400,
     "invalid_request", "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "context_length_exceeded", "messages"),
    ({"max_completion_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
    ({"tools": [{"type": "function"}]}, 400, "invalid_request", "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "invalid_request", "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "invalid_request", "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, 400, "invalid_request", "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, 400, "invalid_request", "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{place}"}} for place in range(129)]}, 400, "invalid_request",
     "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 70_000}}}]}, 400, "invalid_request",
     "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": f"f{place}", "description": "x" * 60_000}} for place in range(5)]},
     400, "invalid_request", "tools"),
    ({"tool_choice": "required"}, 400, "invalid_request", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, 400, "invalid_request", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "invalid_request",
     "tool_choice"),
    ({"functions": [{"name": "f"}]}, 400, "unsupported_parameter", "functions"),
    ({"function_call": {"name": "f"}}, 400, "unsupported_parameter", "function_call"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "invalid_request", "messages[1]"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, 400, "invalid_request", "messages[0]"),
    ({"messages": [{**USER, "tool_call_id": "c1"}]}, 400, "invalid_request", "messages[0]"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, 400, "invalid_request", "messages[1].content"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]}, 400,
     "invalid_request", "messages[1].tool_calls[0].function.arguments"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({"echo": True}, 400, "unsupported_parameter", "echo"),
    ({"logprobs": 1}, 400, "invalid_request", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_request", "top_logprobs"),
    ({"chat_template": "{{ 1 }}"}, 400, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": "y" * 20_000}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {str(n): n for n in range(33)}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, 400, "invalid_request", "chat_template_kwargs"),
]  # fmt: skip


def check_error(reply: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert len(reply.content) < 1500
    assert reply.headers["x-request-id"]
    assert reply.headers["x-routing-policy"]


async def test_bad_completion_fields(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for fields, status, code, param in BAD_COMPLETIONS:
            check_error(await server.client.post("/v1/completions", json={**GOOD, **fields}), status, code, param)
            assert server.services.admission.in_flight == 0
        assert server.runner.batches == []  # nothing reached the engine
        assert (await server.complete(**GOOD))["choices"][0]["text"] == "b"


async def test_bad_chat_fields(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for fields, status, code, param in BAD_CHATS:
            reply = await server.client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1, **fields})
            check_error(reply, status, code, param)
        assert server.runner.batches == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"prompt": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_000 + b"}", None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "routing": {"accuracy": NaN}}', "routing.accuracy"),
        (b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", None),
        (b'{"prompt": "\\ud800"}', None),
        (b'{"prompt": "a", "stop": "\\udfff"}', None),
        (b'{"prompt": "a", "unknown": "\\ud800"}', None),
        (b'{"max_tokens": 1}', "prompt"),
    ],
)
async def test_malformed_bodies(tmp_path: Path, body: bytes, param: str | None) -> None:
    async with serving(tmp_path) as server:
        headers = {"Content-Type": "application/json"}
        reply = await server.client.post("/v1/completions", content=body, headers=headers)
        check_error(reply, 400, "invalid_request", param)
        assert (await server.complete(**GOOD))["choices"][0]["text"] == "b"


async def test_content_type_size_route_and_method(tmp_path: Path) -> None:
    access = Access(max_body_bytes=2000)
    async with serving(tmp_path, Parts(access=access)) as server:
        client = server.client
        check_error(await client.post("/v1/completions", content=b"{}"), 415, "unsupported_media_type", None)
        form = await client.post("/v1/completions", data={"prompt": "a"})
        check_error(form, 415, "unsupported_media_type", None)
        check_error(await client.post("/v1/completions", json={"prompt": "a" * 3000}), 413, "body_too_large", None)

        async def chunks() -> Any:
            for _ in range(5):
                yield b" " * 1000

        check_error(await client.post("/v1/completions", content=chunks()), 413, "body_too_large", None)
        check_error(await client.get("/nowhere"), 404, "not_found", None)
        wrong = await client.get("/v1/completions")
        check_error(wrong, 405, "method_not_allowed", None)
        assert wrong.headers["allow"] == "POST"
        assert (await client.post("/metrics")).headers["allow"] == "GET, HEAD"
        charset = {"Content-Type": "application/json; charset=utf-8"}
        assert (await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=charset)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status", "code", "param"),
    [
        ({"X-Routing-Policy": "nope"}, 404, "unknown_policy", "X-Routing-Policy"),
        ({"X-Routing-Accuracy": "much"}, 400, "invalid_request", "X-Routing-Accuracy"),
        ({"X-Routing-Accuracy": "nan"}, 400, "invalid_request", "X-Routing-Accuracy"),
        ({"X-Routing-Accuracy": "1.01"}, 400, "invalid_request", "X-Routing-Accuracy"),
        ({"X-Routing-Accuracy": "1", "X-Routing-Policy": "fast"}, 400, "invalid_request", "X-Routing-Accuracy"),
        *(
            ({"X-Routing-Accuracy": text}, 400, "invalid_request", "X-Routing-Accuracy")
            for text in ("0_1", "+0.5", ".5", "1.", "01", "inf", "0x1", "\u0661", "")
        ),
        *(
            ({"X-Request-Timeout": text}, 400, "invalid_request", "X-Request-Timeout")
            for text in ("1_0", "+1", "inf", "1e999", "nan", "0", "-1", "")
        ),
        ({"X-Routing-Policy": ""}, 400, "invalid_request", "X-Routing-Policy"),
        ({"X-Routing-Policy": " "}, 400, "invalid_request", "X-Routing-Policy"),
    ],
)
async def test_bad_routing_headers(tmp_path: Path, headers: dict[str, str], status: int, code: str, param: str) -> None:
    async with serving(tmp_path) as server:
        sent = {name.encode(): text.encode() for name, text in headers.items()}
        check_error(await server.client.post("/v1/completions", json=GOOD, headers=sent), status, code, param)


@pytest.mark.parametrize("name", ["X-Routing-Policy", "X-Routing-Accuracy", "X-Request-Timeout"])
async def test_a_header_that_is_sent_twice(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as server:
        for values in (["1", "1"], ["1", "0.5"], ["1", ""]):
            headers = [(name, value) for value in values]
            check_error(await server.client.post("/v1/completions", json=GOOD, headers=headers), 400, "invalid_request", name)


@pytest.mark.parametrize(
    ("name", "value"), [("X-Routing-Policy", " fast \t"), ("X-Routing-Accuracy", "\t0.5 "), ("X-Routing-Accuracy", "5e-1")]
)
async def test_white_space_and_every_form_of_a_number(tmp_path: Path, name: str, value: str) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json=GOOD, headers={name: value})
        assert reply.status_code == 200, reply.text
        assert reply.json()["routing"]["reason"] == "header"


async def test_stream_options_need_a_stream(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={**GOOD, "stream_options": {"include_usage": True}})
        assert reply.status_code == 400
        assert "stream" in reply.json()["error"]["message"]


async def test_token_routes(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for path, body in [
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": [USER]}),
            ("/detokenize", {"tokens": [258]}),
            ("/detokenize", {"tokens": ["a"]}),
            ("/detokenize", {}),
        ]:
            reply = await server.client.post(path, json=body)
            assert reply.status_code == 400, (path, body)
            assert reply.json()["error"]["code"] == "invalid_request"
