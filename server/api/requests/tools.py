"""A request's tools: what the prompt tells of them, what constrains calls, and who reads them out of the answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.api.fields.completions import ChatCompletionRequest
from server.api.fields.tools import ToolFields
from server.errors import BadRequest
from server.text.grammar import Grammar, GrammarCompiler
from server.text.tool_dialects import Function, ToolDialect
from server.text.tool_grammar import arguments_schema, calls_in_text, only_calls
from server.text.tool_parsers import ToolParser

# What a function that is not strict may be called with where others are.
ANY_ARGUMENTS = {"type": "object", "additionalProperties": True}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: what the model is told of. parser: makes the reader of one answer; None where nothing may be called. grammar:
    compiles what the answer is constrained to, by the field that asks for it; raises BadRequest naming the schema that cannot
    be followed. meets_response_format: this grammar lets answers in the response_format through, too, and no others."""

    functions: Sequence[Function] = ()
    parser: Callable[[], ToolParser] | None = None
    grammar: Mapping[str, Callable[[], Grammar]] = field(default_factory=dict)
    meets_response_format: bool = False


def use_tools(chat: ChatCompletionRequest, dialect: ToolDialect, grammars: GrammarCompiler) -> ToolUse:
    """Calls are constrained where they are forced, where a function is strict, and where an answer that is no call would have
    to follow a response_format. Raises BadRequest when tool_choice asks for a function that there is not."""
    functions, allowed = chat.functions_of_tools, chat.allowed_names
    if chat.must_call and not functions:
        raise BadRequest("tool_choice: there are no tools to choose from", param="tool_choice")
    unknown = (allowed or set()) - {function.name for function in functions}
    if unknown:
        raise BadRequest(f"tool_choice: there is no function {min(unknown)!r} in tools", param="tool_choice")
    if not functions:
        return ToolUse()
    named = [function for function in functions if allowed is None or function.name in allowed]
    names = [function.name for function in named]
    forced, several, answer = chat.must_call, chat.several_calls, None if chat.must_call else chat.answer_schema
    constrained = forced or answer is not None or any(function.strict for function in named)
    followed = named if forced else [each if each.strict else replace(each, parameters=ANY_ARGUMENTS) for each in named]

    def parser() -> ToolParser:
        return ToolParser(dialect, names, constrained=constrained, forced=forced, single=not several)

    def source(functions: Sequence[Function]) -> str:
        if forced or answer is not None:
            return only_calls(dialect, functions, several, grammars.literal, answer)
        return calls_in_text(dialect, functions, grammars.literal)

    def grammar() -> Grammar:
        return _compile(source, followed, answer is not None, chat, grammars)

    param = "tool_choice" if forced else "tools"
    return ToolUse(functions, parser, {param: grammar} if constrained else {}, meets_response_format=answer is not None)


def _compile(
    source: Callable[[Sequence[Function]], str],
    functions: Sequence[Function],
    answered: bool,
    fields: ToolFields,
    grammars: GrammarCompiler,
) -> Grammar:
    try:
        return grammars.lark(source(functions))
    except ValueError as failure:
        places = {tool.function.name: place for place, tool in enumerate(fields.tools)}
        for function in functions:
            try:
                grammars.json_schema(arguments_schema(function.parameters))
            except ValueError as error:
                param = f"tools[{places[function.name]}].function.parameters"
                raise BadRequest(f"{param}: {error}", param=param) from error
        if answered:
            raise BadRequest(f"response_format: {failure}", param="response_format") from failure
        raise
