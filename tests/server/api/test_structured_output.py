"""Structured output over HTTP on a real (random) model: every spelling is honoured, a broken one is a 400."""

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.server.real import serving_model
from tests.server.serving import serving

CHAT = [{"role": "user", "content": "x"}]

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}
PATTERN = r"[a-c]{3}-[0-9]{2}"
CHOICES = ["rouge", "vert clair", "blé"]
JSON_FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"json_schema": SCHEMA},
    {"json_schema": json.dumps(SCHEMA)},
    {"format": SCHEMA},
    {"grammar": {"type": "json", "value": SCHEMA}},
]
REGEX_FORMS: list[dict[str, Any]] = [
    {"guided_regex": PATTERN},
    {"structured_outputs": {"regex": PATTERN}},
    {"regex": PATTERN},
    {"grammar": {"type": "regex", "value": PATTERN}},
]
GBNF = 'root ::= kind "-" [0-9]{2}\nkind ::= "rouge" | "vert"\n'
LARK = 'start: kind "-" /[0-9]{2}/\nkind: "rouge" | "vert"\n'
GRAMMAR_FIELDS = ["grammar", "ebnf", "guided_grammar"]
OBJECT_FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"structured_outputs": {"json_object": True}},
    {"structured_outputs": {"json": {}}},
    {"guided_json": {}},
    {"guided_json_object": True},
    {"format": "json"},
]
NOTHING_ASKED: dict[str, Any] = {
    "response_format": {"type": "text"},
    "structured_outputs": {"json_object": False, "disable_any_whitespace": True},
    "guided_decoding_backend": "outlines",
    "guided_json_object": False,
    "format": "",
    "grammar": None,
    "grammar_lazy": False,
    "grammar_triggers": [],
}
# Spellings of other servers that cannot be honoured: by what is sent, what is refused.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"disable_additional_properties": True}}, "structured_outputs.disable_additional_properties"),
    ({"structured_outputs": {"schema": {}}}, "structured_outputs.schema"),
    ({"response_format": {"type": "text", "value": {}}}, "response_format.value"),
    ({"response_format": {"type": "json_object", "regex": "a"}}, "response_format.regex"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shema": {}}}},
     "response_format.json_schema.shema"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"guided_decoding": {"json": {}}}, "guided_decoding"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"stop_regex": "a"}, "stop_regex"),
    ({"grammar_lazy": True}, "grammar_lazy"),
    ({"grammar_triggers": [{"type": 1}]}, "grammar_triggers"),
    ({"choice": ["a"]}, "choice"),
    ({"json": {}}, "json"),
    ({"json_object": True}, "json_object"),
    ({"response_schema": {}}, "response_schema"),
    ({"output_format": {}}, "output_format"),
    ({"nvext": {"guided_json": {}}}, "nvext"),
    ({"extra_body": {"guided_json": {}}}, "extra_body"),
]  # fmt: skip
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
     "response_format.json_schema.schema"),
    ({"guided_json": {"$ref": "http://127.0.0.1:1/schema.json"}}, "guided_json"),  # nothing is fetched
    ({"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[" * 100_000}, "guided_json"),
    ({"guided_json": [1]}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"),
    ({"guided_regex": "((("}, "guided_regex"),
    ({"guided_regex": "a{2,1}"}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * 70_000}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice"),
    ({"structured_outputs": {"regex": "[z-a]"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "root ::= a"}}, "structured_outputs.grammar"),
    ({"grammar": "root ::= ("}, "grammar"),
    ({"grammar": "root ::= " + "(" * 5000}, "grammar"),
    ({"grammar": "hello"}, "grammar"),
    ({"grammar": ""}, "grammar"),
    ({"grammar": "a" * 40_000}, "grammar"),
    ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
    ({"grammar": {"type": "json", "value": "a"}}, "grammar"),
    ({"grammar": {"type": "regex", "value": "((("}}, "grammar.value"),
    ({"ebnf": "start: @other"}, "ebnf"),
    ({"regex": "((("}, "regex"),
    ({"format": "xml"}, "format"),
    ({"json_schema": {"not": {}}}, "json_schema"),
    ({"json_schema": SCHEMA, "regex": "a"}, "regex"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_regex": "a", "min_tokens": 1}, "min_tokens"),
]  # fmt: skip


async def complete(client: httpx.AsyncClient, **fields: Any) -> str:
    body = {"prompt": "def f(", "max_tokens": 80, "temperature": 0.9, "seed": 5, **fields}
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"]
    return text


async def test_text_satisfies_its_constraint_in_every_spelling(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for form in JSON_FORMS:
            value = json.loads(await complete(client, **form))
            assert set(value) == {"kind", "ok"}
            assert (value["kind"] in "ab", type(value["ok"])) == (True, bool)
        for form in REGEX_FORMS:
            assert re.fullmatch(PATTERN, await complete(client, **form))
        for form in ({"guided_choice": CHOICES}, {"structured_outputs": {"choice": CHOICES}}):
            assert await complete(client, **form) in CHOICES
        for field in GRAMMAR_FIELDS:
            for grammar in (GBNF, LARK):
                assert re.fullmatch(r"(rouge|vert)-[0-9]{2}", await complete(client, **{field: grammar}))
        assert re.fullmatch(r"(rouge|vert)-[0-9]{2}", await complete(client, structured_outputs={"grammar": GBNF}))
        for form in OBJECT_FORMS:
            fields = {"prompt": "x", "max_tokens": 4, "temperature": 0, **form}
            text = (await client.post("/v1/completions", json=fields)).json()["choices"][0]["text"]
            assert text.startswith("{")
        free = {"prompt": "x", "max_tokens": 9, "seed": 1}
        texts = [await client.post("/v1/completions", json=fields) for fields in (free, {**free, **NOTHING_ASKED})]
        assert texts[0].json()["choices"] == texts[1].json()["choices"]


async def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for fields, param in REFUSED:
            for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": CHAT})):
                reply = await server.client.post(path, json={**body, "max_tokens": 1, **fields})
                assert reply.status_code == 400, fields
                error = reply.json()["error"]
                assert (error["param"], error["code"]) == (param, "unsupported_parameter"), fields


async def test_constraints_of_a_batch_do_not_mix_and_streams_are_the_same(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        fields = {"messages": [{"role": "user", "content": "x"}], "guided_regex": PATTERN, "n": 4, "seed": 3, "max_tokens": 40}
        whole = (await client.post("/v1/chat/completions", json=fields)).json()
        texts = [choice["message"]["content"] for choice in whole["choices"]]
        assert all(re.fullmatch(PATTERN, text) for text in texts)
        assert len(set(texts)) > 1
        stream = (await client.post("/v1/chat/completions", json={**fields, "stream": True})).text
        streamed = [""] * 4
        for line in stream.splitlines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                streamed[choice["index"]] += choice["delta"].get("content", "")
        assert streamed == texts


async def test_a_broken_constraint_is_refused_and_the_next_request_works(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for fields, param in BROKEN:
            reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, **fields})
            assert reply.status_code == 400, (fields, reply.text)
            error = reply.json()["error"]
            assert error["param"] in (param, None), fields
            assert error["param"] is not None or param == "response_format"
            assert len(reply.content) < 1000
            assert await complete(client, guided_choice=["yes"]) == "yes"


async def test_constraints_that_grow_without_end_do_not_stop_the_server(moe_dir: Path) -> None:
    lengths = "(" + "|".join("a" * length for length in range(1, 300)) + ")*"
    hostile = ["(x+x+)+y", "(.*a){50}b", ".*a.{500}", "((a{1,100}){1,100}){1,100}", r"[^\s\S]", lengths]
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for pattern in hostile:
            reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, "guided_regex": pattern})
            assert reply.status_code in (200, 400), pattern
        nested: dict[str, Any] = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
        reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, "guided_json": nested})
        assert reply.status_code in (200, 400)
        assert await complete(client, guided_choice=["yes"]) == "yes"


async def test_a_constraint_that_cannot_be_followed_to_its_end_is_an_error_not_a_short_text(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        fields = {"prompt": "x", "max_tokens": 60, "guided_regex": "(a?){3000}a{3000}"}
        for more in ({}, {"ignore_eos": True}, {"n": 3}):
            whole = await client.post("/v1/completions", json={**fields, **more})
            assert (whole.status_code, whole.json()["error"]["code"]) == (400, "invalid_request")
            assert "too complex" in whole.json()["error"]["message"]
        stream = (await client.post("/v1/completions", json={**fields, "stream": True})).text
        *_, last, done = [line for line in stream.splitlines() if line]
        assert "too complex" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        assert await complete(client, guided_choice=["yes"]) == "yes"
        beyond = {"prompt": "x", "max_tokens": 9, "guided_choice": ["yes"], "ignore_eos": True}
        assert (await client.post("/v1/completions", json=beyond)).json()["usage"]["completion_tokens"] == 9
