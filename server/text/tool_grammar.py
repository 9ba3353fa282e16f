"""Constraints on calls of tools, in the grammar library's own language."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.text.tool_dialects import Function, ToolDialect

# Calls in one answer that must call: a model that never ends its answer would call until the context is full.
MAX_CALLS = 16

# One spelling of white space, that of the calls in most models' training; a small model that may add blanks does so for ever.
SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A schema without any of these says what its properties are, and a function takes no others.
OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")


def forced_calls(dialect: ToolDialect, functions: Sequence[Function], many: bool, literal: Callable[[str], str]) -> str:
    """Lark source for one call of any of the functions, or for several where `many`. `literal` writes a text as a terminal."""
    assert functions
    before, after = (f"{literal(part)} " if part else "" for part in (dialect.before, dialect.after))
    names = [f"call_{place}" for place in range(len(functions))]
    lines = [f"start: call ({literal(dialect.separator)} call){{0,{MAX_CALLS - 1}}}" if many else "start: call"]
    lines.append(f"call: {before}({' | '.join(names)}) {after}")
    for name, function in zip(names, functions, strict=True):
        schema = json.dumps({**arguments_schema(function.parameters), "x-guidance": SPELLING})
        lines.append(f'{name}: {literal(dialect.header(function.name))} {name}_arguments "}}"')
        lines.append(f"{name}_arguments: %json {schema}")
    return "\n".join(lines)


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a function's arguments must follow: its schema, as that of an object. Raises ValueError when it is no object's."""
    schema = dict(parameters or {})
    if schema.setdefault("type", "object") != "object":
        raise ValueError("the schema of a function's parameters must be of type object")
    if not any(word in schema for word in OPEN):
        schema["additionalProperties"] = False
    return schema
