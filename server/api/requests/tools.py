"""A request's tools: the functions in the prompt, the grammar of calls, and the parser of calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.api.fields.completions import ChatCompletionRequest
from server.api.fields.tools import ToolFields
from server.errors import BadRequest
from server.text.grammar import Grammar, GrammarCompiler
from server.text.tool_dialects import Function, ToolDialect
from server.text.tool_grammar import arguments_schema, calls_in_text, only_calls
from server.text.tool_parsers import ToolParser

# The arguments of a function that is not strict, beside functions that are.
ANY_ARGUMENTS = {"type": "object", "additionalProperties": True}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: those that the prompt describes. parser: makes the parser of one answer; None if nothing may be called.
    grammar: functions that compile the answer's grammar, by the field that asks for it. They raise BadRequest with the name of
    a schema that cannot be enforced. meets_response_format: the grammar allows only calls and answers in response_format."""

    functions: Sequence[Function] = ()
    parser: Callable[[], ToolParser] | None = None
    grammar: Mapping[str, Callable[[], Grammar]] = field(default_factory=dict)
    meets_response_format: bool = False


def use_tools(chat: ChatCompletionRequest, dialect: ToolDialect, grammars: GrammarCompiler) -> ToolUse:
    """A grammar constrains the answer in three cases: calls are forced, a function is strict, or there is a response_format for
    answers without a call. Raises BadRequest if tool_choice names a function that is not in tools."""
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
