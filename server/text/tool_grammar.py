"""Constraints on calls of tools, in the grammar library's own language."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.text.json_schema import readable
from server.text.tool_dialects import SPACES, Function, ToolDialect

# Calls in one answer that must call: a model that never ends its answer would call until the context is full.
MAX_CALLS = 16
# One spelling of white space, that of the calls in most models' training; a small model that may add blanks does so for ever.
SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A schema without any of these says what its properties are, and a function takes no others.
OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
BEGINNING = '{"name"'  # of a call's JSON

Literal = Callable[[str], str]  # writes a text as a terminal


def only_calls(
    dialect: ToolDialect,
    functions: Sequence[Function],
    several: bool,
    literal: Literal,
    answer: dict[str, Any] | None = None,
) -> str:
    """Lark source for nothing but one call of any of the functions, or several; or else for JSON of the schema `answer`.
    Raises ValueError when the parameters of a function are no object."""
    more = f" ({literal(dialect.separator)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    before = f"{literal(dialect.before)} " if dialect.before else ""
    lines = [f"start: call{more}", f"call: {before}{_parts(BEGINNING, literal)} rest"]
    if answer is not None:
        lines[0] += " | answer"
        schema = readable(answer) if answer else {"type": "object"}
        lines.append(f"answer: %json {json.dumps({**schema, 'x-guidance': SPELLING})}")
    return "\n".join([*lines, *_rest(dialect, functions, literal)])


def calls_in_text(dialect: ToolDialect, functions: Sequence[Function], literal: Literal) -> str:
    """Lark source for any text with any number of calls in it: where a call begins, it has to go on as one. Raises
    ValueError."""
    if not dialect.bare:
        triggers = [
            f"start: call* TEXT\ncall: begin {literal(dialect.before.removeprefix(dialect.opening) + BEGINNING)} rest",
            _lazy("begin", f"(.|\\n)*{_pattern(dialect.opening)}"),
        ]
    else:
        # At the start of a line, or after the call before.
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
    """Rules for a call of one of the functions after its BEGINNING."""
    names = [f"call_{place}" for place in range(len(functions))]
    after = f" {literal(dialect.after)}" if dialect.after else ""
    lines = [f"rest: ({' | '.join(names)}){after}"]
    for name, function in zip(names, functions, strict=True):
        header = _parts(dialect.header(function.name).removeprefix(BEGINNING), literal)
        schema = json.dumps({**arguments_schema(function.parameters), "x-guidance": SPELLING})
        lines += [f'{name}: {header} {name}_arguments "}}"', f"{name}_arguments: %json {schema}"]
    return lines


def _parts(text: str, literal: Literal) -> str:
    """The beginning of an object as the terminals that other JSON consists of: the library does not go back in a terminal, so
    that a longer one would shut other JSON out."""
    return " ".join(literal(part) for part in re.findall(r'"[^"]*"|[{:,] ?', text))


def _lazy(name: str, pattern: str) -> str:
    """A terminal that ends with the first match, so that what follows cannot be taken for text."""
    return f"{name}[lazy]: /{pattern}/"


def _pattern(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a function's arguments must follow: its schema, as that of an object. Raises ValueError when it is no object's."""
    schema = readable(dict(parameters or {}))
    if schema.setdefault("type", "object") != "object":
        raise ValueError("the schema of a function's parameters must be of type object")
    if not any(word in schema for word in OPEN):
        schema["additionalProperties"] = False
    return schema
