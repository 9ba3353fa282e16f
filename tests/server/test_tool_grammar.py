"""Constraints on calls: what they let through is what the parser reads, and nothing else."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.text.grammar import GrammarCompiler
from server.text.tool_dialects import DIALECTS, HERMES, Function, ToolDialect
from server.text.tool_grammar import MAX_CALLS, arguments_schema, forced_calls

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
        return accepts(tiny_tokenizer, forced_calls(dialect, [WEATHER, NOW], many, literal), text)

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
    source = forced_calls(HERMES, [Function("one", None, unit), Function("two", None, other)], False, literal)
    assert accepts(tiny_tokenizer, source, HERMES.call("one", '{"unit": "C"}'))
    assert accepts(tiny_tokenizer, source, HERMES.call("two", '{"unit": "K"}'))
    assert not accepts(tiny_tokenizer, source, HERMES.call("one", '{"unit": "K"}'))
