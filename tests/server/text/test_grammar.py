"""Structured output: whatever allowed tokens are picked, the text that comes out satisfies the grammar."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from server.text.grammar import Grammar, GrammarCompiler
from server.text.json_schema import FOLLOWED_FORMATS
from tests.factories import EOS_ID, VOCAB_SIZE, make_tokenizer

TOKENIZER = make_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "kind": {"enum": ["a", "b"]}, "ok": {"type": "boolean"}},
    "required": ["id", "kind", "ok"],
    "additionalProperties": False,
}


def write(grammar: Grammar, picks: st.DataObject, most: int = 200) -> str | None:
    """A text made of allowed tokens that hypothesis picks; None when it has not ended after `most` tokens."""
    state, tokens = grammar.start(), list[int]()
    for _ in range(most):
        allowed = state.allowed_tokens().nonzero()[0].tolist()
        token = EOS_ID if EOS_ID in allowed and len(tokens) > 8 else picks.draw(st.sampled_from(allowed))
        state.advance(token)
        if token == EOS_ID:
            return str(TOKENIZER.decode(tokens))
        tokens.append(token)
    return None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_regex(picks: st.DataObject) -> None:
    pattern = r"[a-z]{2,6}(=[0-9]{1,3})?;"
    text = write(COMPILER.regex(pattern), picks)
    assert text is not None
    assert re.fullmatch(pattern, text)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_choice(picks: st.DataObject) -> None:
    choices = ["red", "green", "dark blue", 'quo"te', "größer"]
    assert write(COMPILER.choice(choices), picks) in choices


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_json_schema(picks: st.DataObject) -> None:
    text = write(COMPILER.json_schema(SCHEMA), picks)
    if text is not None:  # an integer may be long
        value = json.loads(text)
        assert set(value) == {"id", "kind", "ok"}
        assert isinstance(value["id"], int)
        assert value["kind"] in ("a", "b")
        assert isinstance(value["ok"], bool)


def test_any_object_begins_with_a_brace() -> None:
    assert COMPILER.json_schema({}).start().allowed_tokens().nonzero()[0].tolist() == TOKENIZER.encode(
        "{", add_special_tokens=False
    )


def test_states_are_independent() -> None:
    grammar = COMPILER.choice(["ab", "cd"])
    first, second = grammar.start(), grammar.start()
    first.advance(TOKENIZER.encode("a", add_special_tokens=False)[0])
    assert first.allowed_tokens().sum() == 1
    assert second.allowed_tokens().sum() == 2


def test_what_follows_a_complete_text_is_not_the_grammar_s_business() -> None:
    state = COMPILER.choice(["ab"]).start()
    for token in [*TOKENIZER.encode("ab", add_special_tokens=False), EOS_ID, 5, EOS_ID]:
        state.advance(token)
        assert state.problem is None
    assert state.allowed_tokens().nonzero()[0].tolist() == [EOS_ID]


def test_a_grammar_that_needs_too_much_work_says_so() -> None:
    state = COMPILER.regex("(a?){3000}a{3000}").start()
    assert state.allowed_tokens().any()
    state.advance(TOKENIZER.encode("a", add_special_tokens=False)[0])
    assert state.problem is not None
    assert state.allowed_tokens().nonzero()[0].tolist() == [EOS_ID]


def test_a_grammar_is_read_once_however_many_sequences_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = COMPILER.json_schema({"type": "object", "properties": {f"name{n}": {"type": "integer"} for n in range(200)}})
    monkeypatch.setattr("server.text.grammar.LLMatcher", None)  # starting a sequence reads nothing
    assert all(grammar.start().allowed_tokens().any() for _ in range(300))


@pytest.mark.parametrize("pattern", ["(((", "a{2,1}", "[z-a]", "(?<x"])
def test_broken_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        COMPILER.regex(pattern)


@pytest.mark.parametrize("schema", [{"type": "nope"}, {"$ref": "#/nowhere"}, {"type": 3}, {"enum": []}])
def test_broken_schemas_are_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        COMPILER.json_schema(schema)


@pytest.mark.parametrize("choices", [[], [""], ["a", ""]])
def test_empty_choices_are_refused(choices: list[str]) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        COMPILER.choice(choices)


def follows(schema: dict[str, Any], value: object) -> bool:
    """Whether the grammar of the schema lets the value be written."""
    state = COMPILER.json_schema(schema).start()
    for token in TOKENIZER.encode(json.dumps(value, separators=(",", ":")), add_special_tokens=False):
        if not state.allowed_tokens()[token]:
            return False
        state.advance(token)
    return bool(state.allowed_tokens()[EOS_ID])


UNKNOWN_FORMATS = [
    *("path", "password", "binary", "byte", "regex", "base64url", "file-path", "json-string", "iri", "uri-template", "made-up"),
]


@pytest.mark.parametrize("name", UNKNOWN_FORMATS)
def test_unknown_formats_are_annotations_wherever_they_are(name: str) -> None:
    text: dict[str, Any] = {"type": "string", "format": name}
    assert follows(text, "any text")
    schemas: list[tuple[dict[str, Any], object]] = [
        ({"type": "array", "items": text}, ["a"]),
        ({"type": "array", "prefixItems": [text]}, ["a"]),
        ({"anyOf": [text, {"type": "null"}]}, "a"),
        ({"type": "object", "additionalProperties": text}, {"a": "b"}),
        ({"$ref": "#/$defs/T", "$defs": {"T": text}}, "a"),
        ({"$ref": "#/components/a~1b/0", "components": {"a/b": [text]}}, "a"),
        ({"type": "object", "properties": {"a": {"allOf": [{"$ref": "#/$defs/T"}]}}, "$defs": {"T": text}}, {"a": "b"}),
    ]
    for schema, value in schemas:
        assert follows(schema, value), schema


def test_a_format_that_is_data_or_a_name_is_left_alone() -> None:
    inner: dict[str, Any] = {"type": "string", "format": "path"}
    assert follows({"const": inner}, inner)
    assert follows({"enum": [inner]}, inner)
    named: dict[str, Any] = {"type": "object", "properties": {"format": {"const": "path"}}, "required": ["format"]}
    assert follows(named, {"format": "path"})
    assert not follows(named, {"format": "other"})
    assert follows({"type": "string", "default": inner, "examples": [inner]}, "a")


def test_known_formats_constrain_and_are_those_that_the_library_knows() -> None:
    assert follows({"type": "string", "format": "date"}, "2026-01-31")
    assert not follows({"type": "string", "format": "date"}, "2026-13-01")
    for name in [*UNKNOWN_FORMATS, *FOLLOWED_FORMATS]:
        raw = json.dumps({"type": "string", "format": name})
        known = not LLMatcher(COMPILER._tokenizer, LLMatcher.grammar_from_json_schema(raw), log_level=0).is_error()
        assert known == (name in FOLLOWED_FORMATS)


ITEMS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "member"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
        ({**OBJECT, "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({**OBJECT, "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({**OBJECT, "dependencies": {"a": ["b"]}}, "dependencies"),
        ({**OBJECT, "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({**OBJECT, "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({**OBJECT, "minProperties": 1}, "minProperties"),
        ({**ITEMS, "uniqueItems": True}, "uniqueItems"),
        ({**ITEMS, "contains": {"const": 1}}, "contains"),
        ({**ITEMS, "unevaluatedItems": False}, "unevaluatedItems"),
        ({"oneOf": [{"type": "string", "minLength": 1}, {"type": "string", "maxLength": 5}]}, "oneOf"),
        ({"type": "integer", "divisibleBy": 2}, "divisibleBy"),
        ({"extends": {"type": "string"}}, "extends"),
        ({"disallow": "string"}, "disallow"),
        ({**OBJECT, "x-guidance": {"lenient": True}}, "x-guidance"),
    ],
)
def test_a_member_that_cannot_be_followed_is_refused_by_name(schema: dict[str, Any], member: str) -> None:
    for whole in (schema, {"type": "object", "properties": {"inner": schema}}):
        with pytest.raises(ValueError, match="Properties" if member == "minProperties" else member):
            COMPILER.json_schema(whole)


def test_pattern_properties_and_other_rare_members_are_followed() -> None:
    pattern: dict[str, Any] = {
        "type": "object",
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": False,
    }
    assert follows(pattern, {"x1": 5})
    assert not follows(pattern, {"x1": "a"})
    assert not follows(pattern, {"y": 5})
    pair: dict[str, Any] = {"type": "array", "items": [{"type": "integer"}], "additionalItems": False}
    assert follows(pair, [1])
    assert not follows(pair, [1, 2])
    assert not follows({"type": "integer", "multipleOf": 3}, 4)
    assert not follows({"$ref": "#/$defs/T", "minLength": 3, "$defs": {"T": {"type": "string"}}}, "a")
    assert not follows({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {})


def test_schemas_that_go_round_or_deep_are_read() -> None:
    tree: dict[str, Any] = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "at": {"type": "string", "format": "path"}},
    }
    assert follows(tree, {"next": {"at": "a"}})
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="nested"):
        COMPILER.json_schema(deep)
