"""Structured output: whatever allowed tokens are picked, the text that comes out satisfies the grammar."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.grammar import Grammar, GrammarCompiler
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
    assert COMPILER.json_schema(None).start().allowed_tokens().nonzero()[0].tolist() == TOKENIZER.encode(
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
