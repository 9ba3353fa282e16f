"""Structured output: the constraint that a request puts on its text, in any of the supported fields."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from server.api.fields.completions import GenerationFields
from server.api.fields.constraints import StructuredOutputs, TypedGrammar
from server.api.requests.tools import ToolUse
from server.errors import BadRequest
from server.text.grammar import Grammar, GrammarCompiler

T = TypeVar("T")


async def make_grammar(fields: GenerationFields, grammars: GrammarCompiler, tools: ToolUse | None = None) -> Grammar | None:
    """The grammar of the request's constraint, compiled in a thread; None if there is no constraint.

    Raises BadRequest with the field's name if there are several constraints, or if the constraint cannot be enforced.
    """
    compilers = _compilers(fields, grammars)
    if tools is not None and tools.meets_response_format:
        compilers = {param: each for param, each in compilers.items() if not param.startswith("response_format")}
    compilers |= {} if tools is None else tools.grammar
    if not compilers:
        return None
    if len(compilers) > 1:
        raise BadRequest(f"{' and '.join(compilers)}: only one constraint can be met", param=list(compilers)[1])
    ((param, compile_grammar),) = compilers.items()
    if fields.min_tokens:
        # The constraint may allow only the end of the text before there are so many tokens.
        raise BadRequest(f"min_tokens: cannot be combined with {param}", param="min_tokens")
    try:
        return await asyncio.to_thread(compile_grammar)
    except ValueError as error:
        raise BadRequest(f"{param}: {error}", param=param) from error


def _compilers(fields: GenerationFields, grammars: GrammarCompiler) -> dict[str, Callable[[], Grammar]]:
    """A function that compiles each constraint of the request, by the JSON path of its field."""
    form = fields.response_format
    outputs = fields.structured_outputs or StructuredOutputs.model_validate({})
    named, plain = (None, None) if form is None else (form.json_schema, form.schema_)
    schemas = {
        "response_format.json_schema.schema": None if named is None else named.schema_,
        "response_format.schema": plain,
        "response_format": {} if form is not None and form.type == "json_object" and plain is None else None,
        "structured_outputs.json": outputs.json_,
        "structured_outputs.json_object": {} if outputs.json_object else None,
        "guided_json": fields.guided_json,
        "guided_json_object": {} if fields.guided_json_object else None,
        "json_schema": fields.json_schema,
        "format": fields.format,
    }
    patterns = {"structured_outputs.regex": outputs.regex, "guided_regex": fields.guided_regex, "regex": fields.regex}
    choices = {"structured_outputs.choice": outputs.choice, "guided_choice": fields.guided_choice}
    texts = {
        "structured_outputs.grammar": outputs.grammar,
        "guided_grammar": fields.guided_grammar,
        "ebnf": fields.ebnf,
    }
    match fields.grammar:
        case str(text):
            texts["grammar"] = text
        case TypedGrammar(value=str(pattern)):
            patterns["grammar.value"] = pattern
        case TypedGrammar(value=dict(schema)):
            schemas["grammar.value"] = schema
    return {
        **_asked(grammars.json_schema, schemas),
        **_asked(grammars.regex, patterns),
        **_asked(grammars.choice, choices),
        **_asked(grammars.grammar, texts),
    }


def _asked(compile_grammar: Callable[[T], Grammar], values: Mapping[str, T | None]) -> dict[str, Callable[[], Grammar]]:
    return {param: partial(compile_grammar, value) for param, value in values.items() if value is not None}
