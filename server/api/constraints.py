"""Structured output: the one constraint a request puts on its text, in whichever of the four spellings it came."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from server.api.schemas import GenerationFields, StructuredOutputs
from server.api.services import Services
from server.errors import BadRequest
from server.text.grammar import Grammar

T = TypeVar("T")


async def make_grammar(
    fields: GenerationFields, services: Services, calls: Callable[[], Grammar] | None = None
) -> Grammar | None:
    """Compiled on a thread of its own. `calls` is what tool_choice asks for. Raises BadRequest naming the field when there are
    several constraints or one cannot be met."""
    compilers = _compilers(fields, services) | ({} if calls is None else {"tool_choice": calls})
    if not compilers:
        return None
    if len(compilers) > 1:
        raise BadRequest(f"{' and '.join(compilers)}: only one constraint can be met", param=list(compilers)[1])
    ((param, compile_grammar),) = compilers.items()
    if fields.min_tokens:
        # The constraint may be met, and leave nothing but the end of text, before so many tokens.
        raise BadRequest(f"min_tokens: cannot be combined with {param}", param="min_tokens")
    try:
        return await asyncio.to_thread(compile_grammar)
    except ValueError as error:
        raise BadRequest(f"{param}: {error}", param=param) from error


def _compilers(fields: GenerationFields, services: Services) -> dict[str, Callable[[], Grammar]]:
    """What is asked for, by the JSON path that asks for it."""
    grammars, form = services.grammars, fields.response_format
    outputs = fields.structured_outputs or StructuredOutputs.model_validate({})
    asked: dict[str, Callable[[], Grammar] | None] = {
        "response_format": partial(grammars.json_schema, None) if form is not None and form.type == "json_object" else None,
        "response_format.json_schema.schema": (
            partial(grammars.json_schema, form.json_schema.schema_)
            if form is not None and form.json_schema is not None
            else None
        ),
        "structured_outputs.json_object": partial(grammars.json_schema, None) if outputs.json_object else None,
        "structured_outputs.json": _with(grammars.json_schema, outputs.json_),
        "structured_outputs.regex": _with(grammars.regex, outputs.regex),
        "structured_outputs.choice": _with(grammars.choice, outputs.choice),
        "guided_json": _with(grammars.json_schema, fields.guided_json),
        "guided_regex": _with(grammars.regex, fields.guided_regex),
        "guided_choice": _with(grammars.choice, fields.guided_choice),
    }
    return {param: compile_grammar for param, compile_grammar in asked.items() if compile_grammar is not None}


def _with(compile_grammar: Callable[[T], Grammar], value: T | None) -> Callable[[], Grammar] | None:
    return None if value is None else partial(compile_grammar, value)
