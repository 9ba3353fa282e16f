"""POST /v1/responses: one object or typed events, on the chat endpoint's path."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import response_create_params

from server.api.fields.responses import ResponsesRequest
from server.app import Access
from tests.server.serving import MODEL, Parts, serving, serving_http

URL = "/v1/responses"


def typed_events(text: str) -> list[dict[str, Any]]:
    """A finished stream's events; asserts that each names its type and that they are numbered."""
    found: list[dict[str, Any]] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(found)
        found.append(event)
    return found


async def respond(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(URL, json={"input": "hi", "max_output_tokens": 3, **fields})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_a_response_says_what_the_chat_endpoint_says(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        body = {"messages": messages, "max_tokens": 3, "routing": "fast", "seed": 1}
        chat = (await server.client.post("/v1/chat/completions", json=body)).json()
        found = await respond(
            server.client,
            instructions="be brief",
            routing="fast",
            seed=1,
            metadata={"run": "7"},
            user="me",
            prompt_cache_key="k",
            safety_identifier="s",
            max_tool_calls=3,
            prompt_cache_retention="24h",
        )
        assert found["id"].startswith("resp_")
        assert (found["object"], found["model"], found["store"], found["service_tier"]) == ("response", MODEL, False, "default")
        assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        (message,) = found["output"]
        assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
        assert message["content"][0] == {
            "type": "output_text",
            "text": chat["choices"][0]["message"]["content"],
            "annotations": [],
            "logprobs": [],
        }
        assert found["routing"] == chat["routing"]
        theirs, ours = chat["usage"], found["usage"]
        assert ours.pop("input_tokens_details").keys() == {"cached_tokens", "cache_write_tokens"}
        assert ours == {
            "input_tokens": theirs["prompt_tokens"],
            "output_tokens": theirs["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": theirs["total_tokens"],
        }
        repeated = ("instructions", "metadata", "user", "prompt_cache_key", "safety_identifier", "max_tool_calls")
        assert [found[name] for name in repeated] == ["be brief", {"run": "7"}, "me", "k", "s", 3]


async def test_a_conversation_comes_as_items(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        first = await respond(server.client)
        turn = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
        seen = server.watch_requests()
        await respond(server.client, input=[{"role": "user", "content": "hi"}, *first["output"], turn], max_output_tokens=1)
        text = first["output"][0]["content"][0]["text"]
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "ab"},
        ]
        await server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
        ours, theirs = seen.values()
        assert ours.prompt_ids == theirs.prompt_ids


async def test_calls_and_their_results_come_as_items(tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    body = {
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A moment."}]},
            {"type": "function_call", "call_id": "c1", "id": "fc_1", "status": "completed", **call},
            {"type": "function_call", "call_id": "c2", **call},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": parameters}],
    }
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "A moment.",
            "tool_calls": [{"id": name, "type": "function", "function": call} for name in ("c1", "c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    async with serving(tmp_path, max_model_len=4096, num_blocks=2000, max_step_tokens=4096) as server:
        seen = server.watch_requests()
        found = await respond(server.client, **body)
        assert found["tools"] == [body["tools"][0] | {"description": None, "strict": False}]  # type: ignore[operator]
        await server.client.post("/v1/chat/completions", json={"messages": messages, "tools": tools, "max_tokens": 3})
        ours, theirs = seen.values()
        assert ours.prompt_ids == theirs.prompt_ids


async def test_a_stream_builds_the_response_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields = {"max_output_tokens": 4, "service_tier": "flex", "routing_trace": True, "seed": 1}
        whole = await respond(server.client, **fields)
        reply = await server.client.post(URL, json={"input": "hi", "stream": True, **fields})
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        assert reply.headers["X-Routing-Policy"] == "fast"
        found = typed_events(reply.text)
        kinds = [event["type"] for event in found]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert set(kinds[4:-4]) == {"response.output_text.delta"}
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        begun, ended = found[0]["response"], found[-1]["response"]
        assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
        (message,) = ended["output"]
        assert {event["item_id"] for event in found[3:-2]} == {message["id"]}
        assert "".join(event["delta"] for event in found[4:-4]) == found[-4]["text"] == message["content"][0]["text"]
        assert found[-3]["part"] == message["content"][0]
        assert found[-2]["item"] == message
        volatile = {"id", "created_at", "output", "usage"}
        assert {k: v for k, v in ended.items() if k not in volatile} == {k: v for k, v in whole.items() if k not in volatile}
        assert len(ended["routing_trace"]["tokens"]) == 4
        assert message["content"] == whole["output"][0]["content"]


async def test_log_probabilities(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        plain = await respond(server.client, include=["message.output_text.logprobs"])
        ranked = await respond(server.client, top_logprobs=2)
        for found, rivals in ((plain, 0), (ranked, 2)):
            scored = found["output"][0]["content"][0]["logprobs"]
            assert [len(token["top_logprobs"]) for token in scored] == [rivals] * 3
        reply = await server.client.post(URL, json={"input": "hi", "max_output_tokens": 3, "stream": True, "top_logprobs": 2})
        said = typed_events(reply.text)
        deltas = [event for event in said if event["type"] == "response.output_text.delta"]
        done = next(event for event in said if event["type"] == "response.output_text.done")
        assert [token for event in deltas for token in event["logprobs"]] == done["logprobs"] == scored


async def test_an_answer_that_ends_by_itself_is_completed(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for stream in (False, True):
            # The answer's ids count up to the vocabulary's end and begin again.
            body = {"input": "hi", "stop_token_ids": [*range(64)], "stream": stream}
            reply = await server.client.post(URL, json=body)
            found = typed_events(reply.text)[-1]["response"] if stream else reply.json()
            assert (found["status"], found["incomplete_details"]) == ("completed", None), found
            assert found["completed_at"] >= found["created_at"]
            assert found["output"][0]["status"] == "completed"


async def test_structured_output(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        found = await respond(server.client, text={"format": form})
        assert found["text"]["format"] == form
        await respond(server.client, text={"format": {"type": "json_object"}})
        await respond(server.client, text={"format": {"type": "text"}})
        constrained = [request.sampling.constraint is not None for request in seen.values()]
        assert constrained == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "unsupported_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_file"}]}]},
            "input[0].content[1].type",
            "unsupported_parameter",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, None, "invalid_request"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "invalid_request"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}], "tool_choice": "required"},
            "tools[0].parameters",
            "invalid_request",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "invalid_request"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id", "invalid_request"),
        ({"max_tokens": 3}, "max_tokens", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": []}, "messages", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", None),
        ({"input": []}, "input", "invalid_request"),
        ({"input": 5}, "input", "invalid_request"),
        ({"input": "x" * 60}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 1000}, "max_output_tokens", "context_length_exceeded"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_request"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "invalid_request"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}},
            "text.format.schema",
            "invalid_request",
        ),
        ({"include": ["nonsense"]}, "include[0]", "invalid_request"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "invalid_request"),
        ({"service_tier": "scale"}, "service_tier", "invalid_request"),
        ({"routing": "gone"}, "routing", "unknown_policy"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post(URL, json={"input": "hi"} | fields)
        error = reply.json()["error"]
        assert reply.status_code == (404 if code == "unknown_policy" else 400), reply.text
        assert (error["param"], error["code"]) == (param, code or "unsupported_parameter")
        assert "max_tokens" not in error["message"] or param == "max_tokens"


async def test_what_asks_for_nothing_passes(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await respond(
            server.client,
            store=False,
            background=False,
            truncation="disabled",
            tools=[],
            tool_choice="auto",
            parallel_tool_calls=False,
            reasoning={"effort": None, "summary": None},
            text={"format": {"type": "text"}, "verbosity": "medium"},
            include=["reasoning.encrypted_content"],
            previous_response_id=None,
            conversation=None,
        )


def test_every_field_of_the_official_client_is_known() -> None:
    theirs = response_create_params.ResponseCreateParamsBase.__annotations__.keys() | {"stream"}
    assert len(theirs) > 20
    assert theirs - ResponsesRequest.model_fields.keys() == set()


async def test_unknown_fields_under_strict_fields(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(strict_fields=True)) as server:
        await respond(server.client, text={"format": {"type": "text"}}, routing="fast")
        for fields, param in (
            ({"inptu": 1}, "inptu"),
            ({"text": {"fromat": 1}}, "text.fromat"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "odd": 1}]}]},
                "input[0].content[0].odd",
            ),
        ):
            reply = await server.client.post(URL, json={"input": "hi", **fields})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_stream_that_fails_says_so_in_events(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        release = server.hold_after(4)
        body = {"input": "hi", "stream": True, "max_output_tokens": 20}
        async with server.client.stream("POST", URL, json=body) as reply:
            text, broken = "", False
            async for piece in reply.aiter_text():
                text += piece
                if "output_text.delta" in text and not broken:
                    broken = True
                    server.runner.fail_with = RuntimeError("broken")
                    release.set()
        found = typed_events(text)
        failed, error = found[-2:]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"]["code"] == "server_error"
        assert failed["response"]["output"][0]["status"] == "incomplete"
        assert (error["type"], error["code"], error["error"]["code"]) == ("error", "engine_dead", "engine_dead")
        assert error["error"].keys() == {"message", "type", "param", "code"}


async def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        release = server.hold_after(3)
        body = {"input": "hi", "stream": True, "max_output_tokens": 30}
        async with server.client.stream("POST", URL, json=body) as reply:
            await anext(reply.aiter_bytes())
            assert server.services.admission.in_flight == 1
        release.set()
        await server.until(lambda: server.services.admission.in_flight == 0)


async def test_responses_count_like_other_requests(tmp_path: Path) -> None:
    parts = Parts(access=Access(api_keys=["key"]))
    async with serving(tmp_path, parts) as server:
        assert (await server.client.post(URL, json={"input": "hi"})).status_code == 401
        key = {"Authorization": "Bearer key", "X-Routing-Policy": "fast"}
        replies = await asyncio.gather(
            *(server.client.post(URL, json={"input": "hi", "max_output_tokens": 2}, headers=key) for _ in range(3))
        )
        assert {reply.json()["routing"]["reason"] for reply in replies} == {"header"}
        samples = await server.metrics()
        assert samples['ladimo_policy_requests_total{reason="header",requested="fast",served="fast"}'] == 3
        assert samples['ladimo_request_success_total{finish_reason="length",policy="fast"}'] == 3
