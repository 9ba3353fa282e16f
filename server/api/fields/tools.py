"""The fields for functions that a model may call, and for calls in a conversation."""

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from server.api.fields.wire import JsonSchema, WireModel, or_else
from server.text.tool_dialects import Function

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 2**18  # of all schemas and descriptions together, as JSON
MAX_CALLS = 128  # in one message
MAX_ID_CHARACTERS = 256

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]


class FunctionDefinition(WireModel):
    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = Field(
        None, description="JSON schema of the arguments, which are an object. Without it, the function takes no arguments."
    )
    strict: bool = Field(False, description="Enforce the schema, also if the model chooses whether to call.")


class Tool(WireModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(WireModel):
    name: str


class NamedTool(WireModel):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(WireModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(WireModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice,
    or_else('must be "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or allowed_tools'),
]


def _of_bounded_size(tools: list[Tool]) -> list[Tool]:
    room = MAX_TOOLS_CHARACTERS
    for tool in tools:
        room -= len(json.dumps(tool.model_dump()))
        if room < 0:
            raise ValueError(f"all tools together may have at most {MAX_TOOLS_CHARACTERS} characters of JSON")
    repeated = [name for name, times in Counter(tool.function.name for tool in tools).items() if times > 1]
    if repeated:
        raise ValueError(f"there are several functions of the name {repeated[0]!r}")
    return tools


class ToolFields(WireModel):
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_of_bounded_size)] = []
    tool_choice: ToolChoice = Field(
        "auto",
        description="none: no calls. auto: the model chooses. required: at least one call. An object names one function.",
    )
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one answer.")

    @property
    def functions_of_tools(self) -> list[Function]:
        """The functions that the model is told about; none if it may not call any."""
        if self.tool_choice == "none":
            return []
        definitions = [tool.function for tool in self.tools]
        return [Function(each.name, each.description, each.parameters, each.strict) for each in definitions]

    @property
    def allowed_names(self) -> set[str] | None:
        """The names of the functions that may be called; None: all of them."""
        match self.tool_choice:
            case NamedTool(function=function):
                return {function.name}
            case AllowedToolsChoice(allowed_tools=allowed):
                return {tool.function.name for tool in allowed.tools}
            case _:
                return None

    @property
    def must_call(self) -> bool:
        match self.tool_choice:
            case AllowedToolsChoice(allowed_tools=allowed):
                return allowed.mode == "required"
            case choice:
                return choice not in ("none", "auto")

    @property
    def several_calls(self) -> bool:
        return self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)


class FunctionCall(WireModel):
    name: FunctionName
    arguments: str = Field(description="JSON text.")


class ToolCall(WireModel):
    """A call that the assistant made earlier in the conversation."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall

    def to_dict(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}
