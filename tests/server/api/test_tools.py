"""Tools over HTTP: what reaches the model, what comes back whole and in a stream, and what stops where."""

import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from server.text.tool_dialects import HERMES, LLAMA3, PLAIN_JSON, ToolDialect
from tests.server.serving import Parts, Server, events, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ASK = {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, NOW]}
PARIS = '{"city": "Paris"}'


def tool_server(tmp_path: Path, dialect: ToolDialect = HERMES, **parts: Any) -> AbstractAsyncContextManager[Server]:
    sizes = {"max_model_len": 4096, "num_blocks": 8000, "max_step_tokens": 4096, "eos_token_ids": frozenset({257})}
    return serving(tmp_path, Parts(tool_dialect=dialect, **parts), **sizes)


async def chat(server: Server, **fields: Any) -> dict[str, Any]:
    """The answer, which is the same whole and streamed."""
    reply = await server.client.post("/v1/chat/completions", json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    whole: dict[str, Any] = reply.json()
    stream = await server.client.post("/v1/chat/completions", json={**ASK, **fields, "stream": True})
    assert without_ids(joined(events(stream.text))) == without_ids(whole["choices"])
    return whole


def joined(chunks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices as a client puts them together from a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        choice = choices.setdefault(part["index"], {"index": part["index"], "message": {"content": None}, "logprobs": None})
        assert choice.get("finish_reason") is None, "nothing comes after the end"
        delta, message = part["delta"], choice["message"]
        assert set(delta) <= {"role", "content", "tool_calls"}
        message |= {"role": delta["role"]} if "role" in delta else {}
        if "content" in delta:
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice["finish_reason"] = part["finish_reason"]
        if part["finish_reason"] is not None:
            assert delta == {}
        if part["logprobs"] is not None:
            choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
            choice["logprobs"]["content"] += part["logprobs"]["content"]
    return [choices[index] for index in sorted(choices)]


def without_ids(choices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(json.dumps(list(choices)))
    for choice in shown:
        for call in choice["message"].get("tool_calls", []):
            assert call.pop("id").startswith("call_")
            assert call.pop("type") == "function"
    return shown


def calls_of(answer: dict[str, Any], choice: int = 0) -> list[tuple[str, str]]:
    calls = answer["choices"][choice]["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize("dialect", [HERMES, LLAMA3, PLAIN_JSON], ids=lambda dialect: dialect.name)
async def test_auto_reads_calls_and_text_apart(tmp_path: Path, dialect: ToolDialect) -> None:
    call, now = dialect.call("get_weather", PARIS), dialect.call("now", "{}")
    async with tool_server(tmp_path, dialect) as server:
        server.say(call)
        answer = await chat(server)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"
        assert calls_of(answer) == [("get_weather", PARIS)]
        server.say(f"Let me look.\n{call}{dialect.separator}{now}")
        answer = await chat(server)
        assert answer["choices"][0]["message"]["content"] == "Let me look."
        assert calls_of(answer) == [("get_weather", PARIS), ("now", "{}")]
        assert len({call["id"] for call in answer["choices"][0]["message"]["tool_calls"]}) == 2
        for text in ("It is sunny.", dialect.call("unknown", "{}"), call[:-14], dialect.call("now", "[]")):
            server.say(text)
            answer = await chat(server)
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
            assert answer["choices"][0]["finish_reason"] == "stop"
        samples = await server.metrics()
        assert samples['ladimo_request_success_total{finish_reason="tool_calls",policy="full"}'] == 4


async def test_nothing_is_a_call_where_nothing_may_be_called(tmp_path: Path) -> None:
    call = HERMES.call("get_weather", PARIS)
    async with tool_server(tmp_path) as server:
        server.say(call)
        nothing: list[dict[str, Any]] = [{"tools": []}, {"tool_choice": "none"}, {"tools": None, "tool_choice": "auto"}]
        for fields in nothing:
            answer = await chat(server, **fields)
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": call}
        bare = await server.client.post("/v1/chat/completions", json={**ASK, "tool_choice": "none"})
        assert bare.json()["usage"]["prompt_tokens"] < 40  # the model is not told of them either
        allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
        answer = await chat(server, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        assert answer["choices"][0]["message"]["content"] == call


async def test_without_parallel_calls_the_answer_ends_with_the_first(tmp_path: Path) -> None:
    call = HERMES.call("get_weather", PARIS)
    async with tool_server(tmp_path) as server:
        server.say(f"a {call}\n{call} and so on")
        answer = await chat(server, parallel_tool_calls=False)
        assert calls_of(answer) == [("get_weather", PARIS)]
        assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("a", "tool_calls")
        assert answer["usage"]["completion_tokens"] < len(call)  # and computes nothing more
        assert len(calls_of(await chat(server))) == 2


async def test_choices_have_their_own_calls_and_log_probabilities_of_every_token(tmp_path: Path) -> None:
    call = HERMES.call("now", "{}")
    async with tool_server(tmp_path) as server:
        server.say("Hello", call, "Hello", call)
        answer = await chat(server, n=2, logprobs=True)
        assert [calls_of(answer, index) for index in (0, 1)] == [[], [("now", "{}")]]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "tool_calls"]
        counts = [len(choice["logprobs"]["content"]) for choice in answer["choices"]]
        assert counts == [len("Hello") + 1, len(call) + 1]


async def test_stop_strings_look_at_text_and_not_into_calls(tmp_path: Path) -> None:
    call = HERMES.call("get_weather", PARIS)
    async with tool_server(tmp_path) as server:
        server.say(f"Look, {call}")
        answer = await chat(server, stop=["Paris", "}"])
        assert calls_of(answer) == [("get_weather", PARIS)]
        answer = await chat(server, stop="ok")
        assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("Lo", "stop")
        server.say(f"{call}Now END {call}")
        answer = await chat(server, stop="END")
        assert (answer["choices"][0]["message"]["content"], len(calls_of(answer))) == ("Now ", 1)
        assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_cut_within_a_call(tmp_path: Path) -> None:
    call = HERMES.call("get_weather", PARIS)
    async with tool_server(tmp_path) as server:
        server.say(call)
        cut = call.index('"Paris"')
        answer = await chat(server, max_tokens=cut)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["message"]["content"] == call[:cut]  # half a call is none
        answer = await chat(server, max_tokens=cut, tool_choice="required")
        assert answer["choices"][0]["finish_reason"] == "length"
        assert calls_of(answer) == [("get_weather", '{"city": ')]


async def test_forced_arguments_are_streamed_as_they_come(tmp_path: Path) -> None:
    async with tool_server(tmp_path) as server:
        server.say(HERMES.call("get_weather", PARIS))
        reply = await server.client.post("/v1/chat/completions", json={**ASK, "tool_choice": "required", "stream": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in events(reply.text)]
        parts = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert parts == ["", *PARIS]
        assert not any("content" in delta for delta in deltas)
        assert "tool_call>" not in reply.text


def strict(tool: dict[str, Any], **function: Any) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True, **function}}


async def test_strict_functions_and_formats_constrain_what_the_model_chooses_freely(tmp_path: Path) -> None:
    async with tool_server(tmp_path) as server:
        server.say(f"Look: {HERMES.call('get_weather', PARIS)}")
        seen = server.watch_requests()
        for fields, constrained in (
            ({}, False),
            ({"tools": [strict(WEATHER), NOW]}, True),
            ({"tools": [strict(WEATHER), NOW], "tool_choice": "none"}, False),
            ({"response_format": {"type": "json_object"}}, True),
            ({"tools": [strict(WEATHER)], "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, True),
        ):
            seen.clear()
            answer = await chat(server, **fields)
            assert all((request.sampling.constraint is not None) == constrained for request in seen.values())
            if fields.get("tool_choice") != "none":
                assert calls_of(answer) == [("get_weather", PARIS)]
        reply = await server.client.post("/v1/chat/completions", json={**ASK, "tools": [strict(WEATHER)], "stream": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in events(reply.text)]
        parts = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert parts == ["", *PARIS]  # they cannot turn out to be wrong, so they come at once
        wrong: list[tuple[dict[str, Any], str]] = [
            (
                {"tools": [NOW, strict(WEATHER, parameters={"properties": {"a": {"type": "no"}}})]},
                "tools[1].function.parameters",
            ),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
            ({"tools": [strict(WEATHER)], "guided_regex": "a"}, "tools"),
        ]
        for fields, param in wrong:
            reply = await server.client.post("/v1/chat/completions", json={**ASK, **fields})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def prompt_of(server: Server, **fields: Any) -> str:
    """What the model is given, which /tokenize says, too."""
    tokens = (await server.client.post("/tokenize", json=fields)).json()
    answer = await server.client.post("/v1/chat/completions", json={**fields, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == tokens["count"]
    text: str = (await server.client.post("/detokenize", json={"tokens": tokens["tokens"]})).json()["prompt"]
    return text


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "broken"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
]


async def test_a_template_that_knows_no_tools_gets_them_as_text(tmp_path: Path) -> None:
    async with tool_server(tmp_path, PLAIN_JSON) as server:
        plain = await prompt_of(server, messages=ASK["messages"])
        assert plain == "<|bos|>user: Weather?\nassistant: "
        text = await prompt_of(server, **ASK)
        assert text.startswith("<|bos|>system: You can call functions.")
        assert json.dumps(WEATHER["function"]) in text
        assert '{"name": "now", "parameters": {"type": "object", "properties": {}}}' in text
        assert '{"name": "NAME", "arguments": {...}}' in text
        assert text.endswith("\nuser: Weather?\nassistant: ")
        text = await prompt_of(server, messages=CONVERSATION, tools=[NOW])
        assert text.startswith("<|bos|>system: Be brief.\n\nYou can call functions.")
        assert text.endswith(
            f"\nuser: Weather?\nassistant: {PLAIN_JSON.call('get_weather', PARIS)}\n{PLAIN_JSON.call('now', 'broken')}\n"
            "user: Result of get_weather: sunny\nResult of now: noon\nassistant: "
        )
        assert "functions" not in await prompt_of(server, messages=CONVERSATION)


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}"
    "{{ m.name }}\n{% endfor %}assistant: "
)


async def test_a_template_that_knows_tools_gets_them_as_they_are(tmp_path: Path) -> None:
    async with tool_server(tmp_path, chat_template=TOOL_TEMPLATE) as server:
        text = await prompt_of(server, messages=CONVERSATION, tools=[WEATHER])
        listed, *lines = text.split("\n")
        assert json.loads(listed) == [WEATHER]
        assert lines == [
            "system: Be brief.",
            "user: Weather?",
            "assistant: [get_weather Paris][now ]",
            "tool: sunnyget_weather",
            "tool: noonnow",
            "assistant: ",
        ]


SCHEMA_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
     "tools[1].function.parameters"),
    ({"tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "no"}}}}}]},
     "tools[1].function.parameters"),
    ({"min_tokens": 1}, "min_tokens"),
    ({"response_format": {"type": "json_object"}}, "tool_choice"),
]  # fmt: skip


async def test_what_cannot_be_forced_is_refused_by_name(tmp_path: Path) -> None:
    async with tool_server(tmp_path) as server:
        for fields, param in SCHEMA_FAULTS:
            reply = await server.client.post("/v1/chat/completions", json={**ASK, "tool_choice": "required", **fields})
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == param
