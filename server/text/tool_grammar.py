"""Grammars for tool calls, in llguidance's dialect of Lark."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.text.json_schema import readable
from server.text.tool_dialects import SPACES, Function, ToolDialect

# The most calls in an answer that consists of calls. Without a limit, a model could add calls until the context is full.
MAX_CALLS = 16
# Only one spelling of white space: the one that most models saw in training. Where blanks are allowed, a small model may add
# them for ever.
SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A schema without any of these lists all its properties, so a function takes no other arguments.
OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
BEGINNING = '{"name"'  # how the JSON of every call begins

Literal = Callable[[str], str]  # turns a text into a terminal of the grammar


def only_calls(
    dialect: ToolDialect,
    functions: Sequence[Function],
    several: bool,
    literal: Literal,
    answer: dict[str, Any] | None = None,
) -> str:
    """Lark source for an answer that consists of calls only: one call, or `several`.

    With `answer`, JSON that follows this schema is allowed instead. Raises ValueError for a schema that is not supported, and
    for parameters of a function that are not of type object.
    """
    more = f" ({literal(dialect.separator)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    before = f"{literal(dialect.before)} " if dialect.before else ""
    lines = [f"start: call{more}", f"call: {before}{_parts(BEGINNING, literal)} rest"]
    if answer is not None:
        lines[0] += " | answer"
        schema = readable(answer) if answer else {"type": "object"}
        lines.append(f"answer: %json {json.dumps({**schema, 'x-guidance': SPELLING})}")
    return "\n".join([*lines, *_rest(dialect, functions, literal)])


def calls_in_text(dialect: ToolDialect, functions: Sequence[Function], literal: Literal) -> str:
    """Lark source for text with any number of calls in it. Once a call has begun, it must go on as a valid call.

    Raises ValueError as `only_calls` does.
    """
    if not dialect.bare:
        triggers = [
            f"start: call* TEXT\ncall: begin {literal(dialect.before.removeprefix(dialect.opening) + BEGINNING)} rest",
            _lazy("begin", f"(.|\\n)*{_pattern(dialect.opening)}"),
        ]
    else:
        # A bare call begins at the start of a line, or directly after another call.
        space = f"[{SPACES.encode('unicode_escape').decode()}]*"
        name = f'\\{{{space}"name"'
        line = "|".join(["\\n", *([_pattern(dialect.opening)] if dialect.opening else [])])
        triggers = [
            "start: (call next_call*)? TEXT\ncall: begin rest\nnext_call: next rest",
            _lazy("begin", f"((.|\\n)*({line}))?{space}{name}"),
            _lazy("next", f"({space}{dialect.separator.strip()}{space}|(.|\\n)*({line}){space}|{space}){name}"),
        ]
    return "\n".join([*triggers, "TEXT: /(.|\\n)*/", *_rest(dialect, functions, literal)])


def _rest(dialect: ToolDialect, functions: Sequence[Function], literal: Literal) -> list[str]:
    """The rules for the rest of a call after BEGINNING, for each of the functions."""
    names = [f"call_{place}" for place in range(len(functions))]
    after = f" {literal(dialect.after)}" if dialect.after else ""
    lines = [f"rest: ({' | '.join(names)}){after}"]
    for name, function in zip(names, functions, strict=True):
        header = _parts(dialect.header(function.name).removeprefix(BEGINNING), literal)
        schema = json.dumps({**arguments_schema(function.parameters), "x-guidance": SPELLING})
        lines += [f'{name}: {header} {name}_arguments "}}"', f"{name}_arguments: %json {schema}"]
    return lines


def _parts(text: str, literal: Literal) -> str:
    """The beginning of a JSON object, split into the same small terminals that other JSON is made of.

    The library does not go back inside a terminal. One long terminal would therefore exclude other JSON that begins alike.
    """
    return " ".join(literal(part) for part in re.findall(r'"[^"]*"|[{:,] ?', text))


def _lazy(name: str, pattern: str) -> str:
    """A terminal that ends at its first match, so that the call behind it is not read as text."""
    return f"{name}[lazy]: /{pattern}/"


def _pattern(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema for a function's arguments. Raises ValueError if it is not of type object or not supported."""
    schema = readable(dict(parameters or {}))
    if schema.setdefault("type", "object") != "object":
        raise ValueError("the schema of a function's parameters must be of type object")
    if not any(word in schema for word in OPEN):
        schema["additionalProperties"] = False
    return schema
