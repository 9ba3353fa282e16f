"""A request's tools: what the prompt tells of them, what constrains calls, and who reads them out of the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.api.services import Services
from server.api.tool_fields import ToolFields
from server.errors import BadRequest
from server.text.grammar import Grammar
from server.text.tool_dialects import Function
from server.text.tool_grammar import forced_calls
from server.text.tool_parsers import ToolParser


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: what the model is told of. parser: one for each answer; None where nothing may be called. grammar: compiles
    what calls are constrained to; None: nothing. It raises BadRequest naming the schema that cannot be followed."""

    functions: Sequence[Function] = ()
    parser: Callable[[], ToolParser] | None = None
    grammar: Callable[[], Grammar] | None = None


def use_tools(fields: ToolFields, services: Services) -> ToolUse:
    """Raises BadRequest when tool_choice asks for a function that there is not."""
    functions, allowed = fields.functions_of_tools, fields.allowed_names
    if fields.must_call and not functions:
        raise BadRequest("tool_choice: there are no tools to choose from", param="tool_choice")
    unknown = (allowed or set()) - {function.name for function in functions}
    if unknown:
        raise BadRequest(f"tool_choice: there is no function {min(unknown)!r} in tools", param="tool_choice")
    if not functions:
        return ToolUse()
    callable_ones = [function for function in functions if allowed is None or function.name in allowed]
    names = [function.name for function in callable_ones]
    forced, several = fields.must_call, fields.several_calls

    def parser() -> ToolParser:
        return ToolParser(services.tool_dialect, names, forced=forced, single=not several)

    def grammar() -> Grammar:
        return _forced_grammar(callable_ones, several, fields, services)

    return ToolUse(functions, parser, grammar if forced else None)


def _forced_grammar(functions: Sequence[Function], several: bool, fields: ToolFields, services: Services) -> Grammar:
    grammars, dialect = services.grammars, services.tool_dialect
    try:
        return grammars.lark(forced_calls(dialect, functions, several, grammars.literal))
    except ValueError:
        for function in functions:  # which of them is it?
            try:
                grammars.lark(forced_calls(dialect, [function], False, grammars.literal))
            except ValueError as error:
                place = [tool.function.name for tool in fields.tools].index(function.name)
                param = f"tools[{place}].function.parameters"
                raise BadRequest(f"{param}: {error}", param=param) from error
        raise
