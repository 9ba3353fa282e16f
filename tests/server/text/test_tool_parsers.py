"""What parsers make of models' texts: calls and text in order, the same however the text is divided, and nothing lost."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.tool_dialects import DIALECTS, HERMES, LLAMA3, PLAIN_JSON, ToolDialect, detect_dialect
from server.text.tool_parsers import CallPiece, Piece, ToolParser

NAMES = ["get_weather", "get", "add-2"]
Read = list[str | tuple[str, Any]]


def joined(pieces: list[Piece]) -> Read:
    """Text as it is, calls as (name, arguments)."""
    read: list[str | list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.index == sum(not isinstance(each, str) for each in read)
                read.append([piece.name, ""])
            call = read[-1]
            assert isinstance(call, list)
            call[1] += piece.arguments
        elif read and isinstance(read[-1], str):
            read[-1] += piece
        else:
            read.append(piece)
    return [each if isinstance(each, str) else (each[0], json.loads(each[1])) for each in read]


def parse(dialect: ToolDialect, *parts: str, **options: bool) -> Read:
    parser = ToolParser(dialect, NAMES, **options)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined(pieces + parser.flush())


PARIS = ("get_weather", {"city": "Paris"})
HERMES_PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA_PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TEXTS: list[tuple[ToolDialect, str, Read | None]] = [
    (HERMES, HERMES_PARIS, [PARIS]),
    (HERMES, f"Let me look.\n{HERMES_PARIS}", ["Let me look.", PARIS]),
    (HERMES, f"{HERMES_PARIS}\n{HERMES_PARIS}\n", [PARIS, PARIS]),
    (HERMES, f"a\n\n{HERMES_PARIS}\n\nb \n", ["a", PARIS, "b \n"]),
    (HERMES, HERMES_PARIS.removesuffix("\n</tool_call>"), [PARIS]),
    (HERMES, '<tool_call>{"arguments": {}, "name": "get"}</tool_call>', [("get", {})]),
    (HERMES, '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', [("get", {"a": 1})]),
    (HERMES, '<tool_call>{"name":"get","arguments":{"a":"</tool_call>{\\""}}</tool_call>', [("get", {"a": '</tool_call>{"'})]),
    (HERMES, '<tool_call>[{"name": "get", "arguments": {}}, {"name": "get", "arguments": {}}]</tool_call>', [("get", {})] * 2),
    (HERMES, '<tool_call>{"type": "function", "function": {"name": "get", "arguments": {}}}</tool_call>', [("get", {})]),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"a": "\\ud800"}}</tool_call>', [("get", {"a": "\ud800"})]),
    # Not calls: they come as they are, which None says.
    (HERMES, "x < y <tool <tool_calls> ", ["x < y <tool <tool_calls> "]),
    (HERMES, f"<<tool_call{HERMES_PARIS}", ["<<tool_call", PARIS]),
    (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', None),
    (HERMES, '<tool_call>\n{"name": "get", "arguments": {broken}}\n</tool_call>', None),
    (HERMES, '<tool_call>\n{"name": "get", "arguments": [1]}\n</tool_call>', None),
    (HERMES, '<tool_call>\n{"name": "get", "arguments": {"a": NaN}}\n</tool_call>', None),
    (HERMES, '<tool_call>\n{"name": "get", "arguments": {"a": 1e999}}\n</tool_call>', None),
    (HERMES, '<tool_call>{"name": ["get"], "arguments": {}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"a": "b', None),
    (HERMES, '<tool_call>{"name": "get"}]</tool_call>', None),
    (HERMES, '<tool_call>get_weather(city="Paris")</tool_call>', None),
    (HERMES, "<tool_call>", None),
    (HERMES, LLAMA_PARIS, None),
    # A broken call does not hide the next one.
    (HERMES, f'<tool_call>{{"name": "get, \n</tool_call>\n{HERMES_PARIS}', ['<tool_call>{"name": "get, \n</tool_call>', PARIS]),
    (LLAMA3, LLAMA_PARIS, [PARIS]),
    (LLAMA3, f"<|python_tag|>{LLAMA_PARIS}", [PARIS]),
    (LLAMA3, f"I will look.<|python_tag|>{LLAMA_PARIS}", ["I will look.", PARIS]),
    (LLAMA3, f"I will look.\n\n{LLAMA_PARIS}", ["I will look.", PARIS]),
    (LLAMA3, f"{LLAMA_PARIS}; {LLAMA_PARIS};{LLAMA_PARIS}", [PARIS] * 3),
    (LLAMA3, f"{LLAMA_PARIS}\n{LLAMA_PARIS}", [PARIS] * 2),
    (LLAMA3, '{"type": "function", "name": "get", "parameters": {"a": {"b": []}}}', [("get", {"a": {"b": []}})]),
    (LLAMA3, f"call {LLAMA_PARIS}", None),
    (LLAMA3, '{"name": "Ann", "age": 3}', None),
    (LLAMA3, '{"name": "get", "age": 3}', None),
    (LLAMA3, "{{{ [ {", None),
    (LLAMA3, "<|python_tag|>print(1)", None),
    (PLAIN_JSON, '{"name": "get_weather", "arguments": {"city": "Paris"}}', [PARIS]),
    (PLAIN_JSON, f'[{LLAMA_PARIS}, {{"name": "get", "arguments": {{}}}}]', [PARIS, ("get", {})]),
    (PLAIN_JSON, f"```json\n{LLAMA_PARIS}\n```", ["```json", PARIS, "```"]),
    (PLAIN_JSON, f'[{LLAMA_PARIS}, {{"name": "get"}}]', None),
    (PLAIN_JSON, "[1, 2]\n{}\n[]", None),
    (PLAIN_JSON, "[" * 5000, None),
    (PLAIN_JSON, '{"name": "get", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", None),
    (PLAIN_JSON, " \n", None),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "text", "read"), TEXTS)
def test_texts_are_read(dialect: ToolDialect, text: str, read: Read | None) -> None:
    expected = [text] if read is None else read
    assert parse(dialect, text) == expected
    assert parse(dialect, *text[:3000], text[3000:]) == expected


CHARS = st.sampled_from(
    [*'<>{}[]":,;\\ \n', "tool_call", "python_tag|", "get", "name", "arguments", HERMES_PARIS, LLAMA_PARIS, "é"]
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(list(DIALECTS.values())), st.lists(CHARS, max_size=30), st.booleans())
def test_any_division_reads_the_same_and_text_is_kept(dialect: ToolDialect, parts: list[str], single: bool) -> None:
    text = "".join(parts)
    whole = parse(dialect, text, single=single)
    assert parse(dialect, *parts, single=single) == parse(dialect, *text, single=single) == whole
    if not any(isinstance(each, tuple) for each in whole):
        assert whole == ([text] if text else [])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(DIALECTS.values())),
    st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.dictionaries(
                st.text(max_size=5),
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.floats(-1e9, 1e9),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=5,
                ),
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 9),
    st.booleans(),
)  # fmt: skip
def test_calls_come_back_as_they_were_written(
    dialect: ToolDialect, calls: list[tuple[str, Any]], width: int, forced: bool
) -> None:
    text = dialect.separator.join(dialect.call(name, json.dumps(arguments)) for name, arguments in calls)
    parts = [text[start : start + width] for start in range(0, len(text), width)]
    assert parse(dialect, *parts, forced=forced) == calls
    assert parse(dialect, *parts, forced=forced, single=True) == calls[:1]


def test_constrained_arguments_go_out_as_they_come_and_others_when_they_are_whole() -> None:
    for constrained, expected in ((True, ['{"ci', 'ty": "Pa', 'ris"}']), (False, ['{"city": "Paris"}'])):
        parser = ToolParser(HERMES, NAMES, constrained=constrained)
        pieces = [
            piece
            for part in ("I look ", HERMES_PARIS[:53], HERMES_PARIS[53:61], HERMES_PARIS[61:])
            for piece in parser.push(part)
        ]
        assert pieces[0] == "I look"
        assert [piece.arguments for piece in pieces if isinstance(piece, CallPiece)] == expected


def test_a_forced_answer_has_no_text_and_an_unfinished_call_keeps_its_arguments() -> None:
    parser = ToolParser(HERMES, NAMES, forced=True)
    assert parser.push("<tool_call>\n{") == []
    assert parser.flush() == []
    parser = ToolParser(HERMES, NAMES, forced=True)
    assert parser.push(HERMES_PARIS[:53]) == [CallPiece(0, "get_weather", '{"ci')]
    assert parser.flush() == []


def test_a_single_call_ends_the_answer() -> None:
    parser = ToolParser(HERMES, NAMES, single=True)
    done = [parser.done]
    for part in (HERMES_PARIS[:-20], HERMES_PARIS[-20:] + HERMES_PARIS):
        parser.push(part)
        done.append(parser.done)
    assert done == [False, False, True]
    assert parser.push("more") == parser.flush() == []


def test_dialects_are_told_by_their_templates() -> None:
    assert detect_dialect("...<tool_call>\\n{...") is HERMES
    assert detect_dialect("{{ '<|python_tag|>' }}") is LLAMA3
    assert detect_dialect("{{ messages }}") is PLAIN_JSON
