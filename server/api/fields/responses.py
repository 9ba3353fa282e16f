"""The wire model of POST /v1/responses, and its translation into a chat request.

Fields for stored responses, for OpenAI's own tools and for content other than text are declared here to be refused by name.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.completions import MAX_LOGPROBS, MAX_MESSAGES, ChatCompletionRequest, Message, RequestFields
from server.api.fields.constraints import ConstraintModel, JsonSchemaFormat, ResponseFormat
from server.api.fields.tools import (
    MAX_TOOLS,
    AllowedTools,
    AllowedToolsChoice,
    CallId,
    FunctionDefinition,
    FunctionName,
    FunctionReference,
    NamedTool,
    Tool,
)
from server.api.fields.wire import (
    Absent,
    JsonSchema,
    Off,
    One,
    StopAtError,
    WireModel,
    at_most,
    not_supported,
    only,
    or_else,
    supported,
)
from server.api.http.failures import json_path
from server.errors import BadRequest

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
MAX_INCLUDES = 16

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
ITEM_ID = "The id from an earlier response. This field and `status` have no effect."
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class ContentPart(WireModel):
    """Text of the user, or of the assistant in an earlier response."""

    type: Annotated[Literal["input_text", "output_text"], supported("input_text", "output_text")]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    prompt_cache_breakpoint: Absent = None


class MessageItem(WireModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart], StopAtError(), BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
    ]
    id: str | None = Field(None, description=ITEM_ID)
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(WireModel):
    """A call that the assistant made in an earlier response."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str = Field(description="JSON text.")
    id: str | None = Field(None, description=ITEM_ID)
    status: str | None = None


class FunctionCallOutputItem(WireModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[
        list[ContentPart], StopAtError(), BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
    ]
    id: str | None = Field(None, description=ITEM_ID)
    status: str | None = None


ITEM_TYPES = ("message", "function_call", "function_call_output")


def _type_of(item: object) -> object:
    """An item's type. An item without one is a message."""
    if isinstance(item, dict):
        return item.get("type") or "message"
    return getattr(item, "type", "message")


def _check_type(item: object) -> object:
    kind = _type_of(item)
    if kind not in ITEM_TYPES:
        raise not_supported(kind, ITEM_TYPES)
    return item


# Tags in <> are left out of the paths in errors.
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")],
    Discriminator(lambda item: f"<{_type_of(item)}>"),
    BeforeValidator(_check_type),
]


class FunctionTool(WireModel):
    """A function that the client runs. OpenAI's own tools are not supported, because they run on its servers."""

    type: Annotated[Literal["function"], supported("function")]
    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = Field(
        None, description="JSON schema of the arguments, which are an object. Without it, the function takes no arguments."
    )
    strict: bool = Field(False, description="Enforce the schema, also if the model chooses whether to call.")
    defer_loading: Off = False
    allowed_callers: Annotated[Any, only(["direct"])] = ["direct"]
    output_schema: Any = Field(None, description="Ignored. Results of calls are not checked.")

    def tool(self) -> Tool:
        names = ("name", "description", "parameters", "strict")
        return Tool(type="function", function=FunctionDefinition(**{name: getattr(self, name) for name in names}))

    def to_dict(self) -> dict[str, Any]:
        """As the response repeats it."""
        names = ("type", "name", "description", "parameters", "strict")
        return {name: getattr(self, name) for name in names}


class FunctionChoice(WireModel):
    type: Annotated[Literal["function"], supported("function")]
    name: FunctionName

    def chat_choice(self) -> NamedTool:
        return NamedTool(type="function", function=FunctionReference(name=self.name))


class AllowedChoice(WireModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]

    def chat_choice(self) -> AllowedToolsChoice:
        tools = [each.chat_choice() for each in self.tools]
        return AllowedToolsChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=self.mode, tools=tools))


ResponsesToolChoice = Annotated[
    Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice,
    or_else('must be "none", "auto", "required", {"type": "function", "name": ...}, or allowed_tools'),
]


class TextFormat(ConstraintModel):
    """`text`: no constraint. `json_object`: any JSON object. `json_schema`: JSON that fits the schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError("schema", "schema belongs to the type json_schema, and to no other")
        return self

    def to_dict(self) -> dict[str, Any]:
        """As the response repeats it."""
        return self.model_dump(by_alias=True, exclude_none=True)

    def response_format(self) -> ResponseFormat:
        schema = None if self.schema_ is None else JsonSchemaFormat(name=self.name, schema=self.schema_)
        return ResponseFormat.model_validate({"type": self.type, "json_schema": schema})


class TextField(WireModel):
    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium")] = "medium"


class ReasoningField(WireModel):
    """Only values that ask for nothing are accepted, because models here have no separate reasoning."""

    effort: Annotated[Any, only("none")] = None
    summary: Absent = None
    generate_summary: Absent = None
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


class ResponsesStreamOptions(WireModel):
    include_obfuscation: Off = False


class ResponsesRequest(RequestFields):
    """OpenAI's Responses without stored conversations. Each request has its whole conversation, and nothing is stored."""

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES),
        StopAtError(),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextField | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: Annotated[list[Includable], Field(max_length=MAX_INCLUDES), StopAtError()] = Field(
        [], description=f"Only {LOGPROBS} has an effect here."
    )
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description=f"More than 0 implies {LOGPROBS}.")
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] = Field(
        {}, description="Returned in the response."
    )
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS), StopAtError()] = []
    tool_choice: ResponsesToolChoice = "auto"
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one answer.")
    max_tool_calls: int | None = Field(None, ge=1, description="No effect. It concerns OpenAI's own tools only.")
    prompt_cache_key: str | None = Field(None, description="No effect. Prompts with a common prefix always share it.")
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    store: Off = False
    background: Off = False
    truncation: Annotated[Any, only("disabled")] = "disabled"
    reasoning: ReasoningField | None = None
    prompt_cache_options: Annotated[Any, only({}, {"mode": "implicit"})] = {}
    previous_response_id: Absent = None
    conversation: Absent = None
    prompt: Absent = None
    context_management: Absent = None
    moderation: Absent = None
    access_programs: Absent = None
    background_options: Absent = None
    image: Absent = None
    # The chat endpoint's names for fields that have other names here.
    messages: Absent = None
    max_tokens: Absent = None
    max_completion_tokens: Absent = None
    response_format: Absent = None
    n: One = 1

    _chat: ChatCompletionRequest = PrivateAttr()

    @model_validator(mode="after")
    def _options_need_stream(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @model_validator(mode="after")
    def _in_chat_words(self) -> "ResponsesRequest":
        """Make the chat request. Its checks find the errors that concern several fields together."""
        try:
            self._chat = self._to_chat()
        except ValidationError as error:
            first = error.errors()[0]
            message = in_own_words(
                BadRequest(f"{json_path(first['loc'])}: {first['msg'].removeprefix('Value error, ')}")
            ).message
            raise PydanticCustomError("fields", "{message}", {"message": message}) from None
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        """This request as a request of the chat endpoint."""
        return self._chat

    def _to_chat(self) -> ChatCompletionRequest:
        common = {name: getattr(self, name) for name in RequestFields.model_fields if name in self.model_fields_set}
        form = None if self.text is None else self.text.format
        choice = self.tool_choice
        return ChatCompletionRequest(
            **common,
            messages=[Message.model_validate(each) for each in _messages(self.instructions, self.input)],
            max_completion_tokens=self.max_output_tokens,
            response_format=None if form is None else form.response_format(),
            logprobs=self.top_logprobs > 0 or LOGPROBS in self.include,
            top_logprobs=self.top_logprobs,
            tools=[tool.tool() for tool in self.tools],
            tool_choice=choice if isinstance(choice, str) else choice.chat_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
        )


def _messages(instructions: str | None, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """The input as chat messages. Calls are added to the assistant's message before them. The parts of a text are joined."""
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    for item in items:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case FunctionCallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            case FunctionCallItem():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    return messages


def _text(parts: Sequence[ContentPart]) -> str:
    return "".join(part.text for part in parts)


# The names of fields in the chat endpoint's errors, and their names here.
OWN_WORDS = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "messages": "input",
}
# "messages" is also an ordinary word. As a field's name it is followed by a colon.
THEIR_WORDS = re.compile(r"\bresponse_format(?:\.json_schema\.schema)?\b|\bmax_tokens\b|\bmessages(?=:)")
# As in tools[0].function.parameters. Here a tool is itself the function.
FUNCTION = re.compile(r"(?<=\])\.function\b")


def in_own_words(error: BadRequest) -> BadRequest:
    """An error about the chat request, in the names of this endpoint's fields."""
    message = THEIR_WORDS.sub(lambda found: OWN_WORDS[found[0]], error.message)
    param = None if error.param is None else FUNCTION.sub("", OWN_WORDS.get(error.param, error.param))
    return type(error)(FUNCTION.sub("", message), param=param)
