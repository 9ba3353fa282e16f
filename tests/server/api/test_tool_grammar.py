"""Constraints on calls: what they let through is what the parser reads, and nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.text.grammar import GrammarCompiler
from server.text.tool_dialects import DIALECTS, HERMES, Function, ToolDialect
from server.text.tool_grammar import MAX_CALLS, arguments_schema, calls_in_text, only_calls
from server.text.tool_parsers import CallPiece, ToolParser
from tests.factories import EOS_ID

WEATHER = Function("get_weather", None, {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]})
NOW = Function("now")


def accepts(tokenizer: PreTrainedTokenizerFast, source: str, text: str) -> bool:
    """Whether the whole text may be generated, and the answer may end there."""
    state = GrammarCompiler(tokenizer, len(tokenizer)).lark(source).start()
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if not state.allowed_tokens()[token_id]:
            return False
        state.advance(token_id)
    assert tokenizer.eos_token_id is not None
    return bool(state.allowed_tokens()[tokenizer.eos_token_id])


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_only_calls_of_the_functions_with_valid_arguments_pass(
    dialect: ToolDialect, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    literal = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer)).literal

    def passes(text: str, many: bool) -> bool:
        return accepts(tiny_tokenizer, only_calls(dialect, [WEATHER, NOW], many, literal), text)

    paris, now = dialect.call("get_weather", '{"city": "Paris"}'), dialect.call("now", "{}")
    for many in (False, True):
        assert passes(paris, many)
        assert passes(now, many)
        for wrong in ('{"city": "Oslo"}', "{}", '{"city": "Paris", "more": 1}', '{"city": 1}'):
            assert not passes(dialect.call("get_weather", wrong), many)
        assert not passes(dialect.call("now", '{"city": "Paris"}'), many)
        assert not passes(dialect.call("later", "{}"), many)
        assert not passes("", many)
        assert not passes(f"Well: {now}", many)
    two = dialect.separator.join([paris, now])
    assert passes(two, many=True)
    assert not passes(two, many=False)
    assert passes(dialect.separator.join([now] * MAX_CALLS), many=True)
    assert not passes(dialect.separator.join([now] * (MAX_CALLS + 1)), many=True)


def test_markup_that_is_a_special_token_is_that_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    literal = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer)).literal
    bos = tiny_tokenizer.bos_token
    assert literal(f"a{bos}") == '("a" <[256]>)'
    assert accepts(tiny_tokenizer, f"start: {literal(f'a{bos}b')}", f"a{bos}b")
    assert not accepts(tiny_tokenizer, f"start: {literal('ab')}", f"a{bos}b")


def test_a_function_s_schema_is_that_of_an_object() -> None:
    assert arguments_schema(None) == {"type": "object", "additionalProperties": False}
    open_ones: list[dict[str, Any]] = [
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "anyOf": [{"required": ["a"]}], "properties": {"a": {}}},
    ]
    for schema in open_ones:
        assert arguments_schema(schema) == schema
    with pytest.raises(ValueError, match="object"):
        arguments_schema({"type": "string"})


def test_references_are_to_the_function_s_own_schema(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    unit = {"$defs": {"Unit": {"enum": ["C", "F"]}}, "properties": {"unit": {"$ref": "#/$defs/Unit"}}, "required": ["unit"]}
    other = json.loads(json.dumps(unit).replace('"C"', '"K"'))
    literal = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer)).literal
    source = only_calls(HERMES, [Function("one", None, unit), Function("two", None, other)], False, literal)
    assert accepts(tiny_tokenizer, source, HERMES.call("one", '{"unit": "C"}'))
    assert accepts(tiny_tokenizer, source, HERMES.call("two", '{"unit": "K"}'))
    assert not accepts(tiny_tokenizer, source, HERMES.call("one", '{"unit": "K"}'))


TEXT_BEFORE = ("", "Let me look.\n", "{}\n[1]\n  ", "x < y <tool\n", '{"nam\n')
CONSTRAINED = ("get_weather", "now")


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_in_free_text_calls_are_valid_and_everything_else_passes(
    dialect: ToolDialect, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    literal = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer)).literal
    source = calls_in_text(dialect, [WEATHER, NOW], literal)

    def passes(text: str) -> bool:
        return accepts(tiny_tokenizer, source, text)

    paris = dialect.call("get_weather", '{"city": "Paris"}')
    for before in TEXT_BEFORE:
        assert passes(before)
        assert passes(before + paris)
        assert passes(before + dialect.separator.join([paris, paris, dialect.call("now", "{}")]) + "\nDone.")
        assert not passes(before + paris[: paris.index("Paris")])
        for wrong in (dialect.call("get_weather", '{"city": "Oslo"}'), dialect.call("later", "{}")):
            assert not passes(before + wrong)
            assert not passes(before + paris + dialect.separator + wrong)
    assert passes(f'The JSON {{"name": "x"}} and {HERMES.closing} are text.')


def test_an_answer_may_be_a_call_or_json_of_a_schema(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    literal = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer)).literal
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    for dialect in DIALECTS.values():
        source = only_calls(dialect, [NOW], False, literal, answer)
        assert accepts(tiny_tokenizer, source, '{"ok": true}')
        assert accepts(tiny_tokenizer, source, dialect.call("now", "{}"))
        assert not accepts(tiny_tokenizer, source, "Hello")
        assert not accepts(tiny_tokenizer, source, '{"ok": 1}')


CHARACTERS = [*"<>{}[]:,; \n\t\r\x0b", '"', "a"]
WORDS = ["name", '{"name"', '{ "name" : "now"', "arguments", "Paris", "<tool_call>", "</tool_call>", "<|python_tag|>"]
BITS = st.sampled_from([*CHARACTERS, *WORDS, *(each.call("now", "{}") for each in DIALECTS.values())])


@settings(max_examples=150, deadline=None)
@given(dialect=st.sampled_from(list(DIALECTS.values())), bits=st.lists(BITS, max_size=25), data=st.data())
def test_parsers_read_whatever_the_constraint_lets_through(
    dialect: ToolDialect, bits: list[str], data: st.DataObject, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every call that a parser takes from a constrained text has valid arguments, unless the text ends within it."""
    compiler = GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer))
    state = compiler.lark(calls_in_text(dialect, [WEATHER, NOW], compiler.literal)).start()
    text = bytearray()
    for bit in bits:
        for token_id in tiny_tokenizer.encode(bit, add_special_tokens=False):
            if state.allowed_tokens()[token_id]:
                state.advance(token_id)
                text += tiny_tokenizer.decode([token_id]).encode()
    while not state.allowed_tokens()[EOS_ID]:  # to the end of a call that has begun
        token_id = data.draw(st.sampled_from([int(each) for each in state.allowed_tokens().nonzero()[0] if each < EOS_ID - 1]))
        if len(text) > 500:
            return
        state.advance(token_id)
        text += tiny_tokenizer.decode([token_id]).encode()
    parser = ToolParser(dialect, CONSTRAINED, constrained=True)
    calls: list[list[str]] = []
    for piece in [*parser.push(text.decode()), *parser.flush()]:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[-1][1] += piece.arguments
    for name, arguments in calls:
        assert json.loads(arguments) in ([{"city": "Paris"}, {"city": "Rome"}] if name == "get_weather" else [{}])
