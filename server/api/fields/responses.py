"""The wire of POST /v1/responses: the body, and how it says what a chat request says in other words.

What needs a memory of earlier responses, OpenAI's own tools, or anything but text is declared here to be refused by name.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.completions import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    ChatCompletionRequest,
    Message,
    RequestFields,
)
from server.api.fields.constraints import ConstraintModel, JsonSchemaFormat, ResponseFormat
from server.api.fields.wire import Absent, JsonSchema, Off, One, StopAtError, WireModel, at_most, only, supported
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
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class ContentPart(WireModel):
    """Text of the user's or, as a response gave it, of the assistant's."""

    type: Annotated[Literal["input_text", "output_text"], supported("input_text", "output_text")]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    prompt_cache_breakpoint: Absent = None


class MessageItem(WireModel):
    """`id`, `status` and `phase` are those of a response's item that is sent back; they change nothing."""

    type: Annotated[Literal["message"], supported("message")] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart], StopAtError(), BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
    ]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def message(self) -> Message:
        return _message(self.role, "".join(part.text for part in self.content))


class TextFormat(ConstraintModel):
    """`text` asks for nothing; `json_object` for any JSON object; `json_schema` for JSON that fits the schema."""

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
    """Models here do not reason apart from their answer."""

    effort: Annotated[Any, only("none")] = None
    summary: Absent = None
    generate_summary: Absent = None
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


class ResponsesStreamOptions(WireModel):
    include_obfuscation: Off = False


class ResponsesRequest(RequestFields):
    """OpenAI's Responses, the part that needs no memory: each request carries its whole conversation, and nothing is stored."""

    input: Annotated[
        list[MessageItem],
        Field(min_length=1, max_length=MAX_MESSAGES),
        StopAtError(),
        BeforeValidator(_as_items, json_schema_input_type=str | list[MessageItem]),
    ]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextField | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: Annotated[list[Includable], Field(max_length=MAX_INCLUDES), StopAtError()] = Field(
        [], description=f"Only {LOGPROBS} ever adds anything here."
    )
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description=f"More than 0 implies {LOGPROBS}.")
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] = Field(
        {}, description="Comes back in the response."
    )
    tool_choice: Annotated[Any, only("auto", "none")] = "auto"
    tools: Annotated[Any, only([])] = []
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = Field(None, ge=1, description="For OpenAI's own tools, which there are none of here.")
    prompt_cache_key: str | None = Field(None, description="A hint that is not needed: prompts share their prefixes anyway.")
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
    # The chat endpoint's words for what has another name here.
    messages: Absent = None
    max_tokens: Absent = None
    max_completion_tokens: Absent = None
    response_format: Absent = None
    n: One = 1

    @model_validator(mode="after")
    def _options_need_stream(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    def chat(self) -> ChatCompletionRequest:
        """The same in the chat endpoint's words."""
        messages = [item.message() for item in self.input]
        if self.instructions is not None:
            messages.insert(0, _message("system", self.instructions))
        common = {name: getattr(self, name) for name in RequestFields.model_fields if name in self.model_fields_set}
        form = None if self.text is None else self.text.format
        return ChatCompletionRequest(
            **common,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            response_format=None if form is None else form.response_format(),
            logprobs=self.top_logprobs > 0 or LOGPROBS in self.include,
            top_logprobs=self.top_logprobs,
        )


def _message(role: str, text: str) -> Message:
    """With its whole text as one part: there may be hundreds of thousands, and this is the event loop's time."""
    return Message.model_validate({"role": role, "content": text})


# The chat endpoint's words in errors, and this endpoint's; longer ones first.
OWN_WORDS = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "messages": "input",
}


def in_own_words(error: BadRequest) -> BadRequest:
    """An error about the chat request that a body became, as one about the body."""
    message = error.message
    for theirs, ours in OWN_WORDS.items():
        # "messages" is an everyday word, too; a field's name is followed by a colon.
        message = re.sub(rf"\b{theirs}\b" if theirs != "messages" else "messages(?=:)", ours, message)
    return type(error)(message, param=OWN_WORDS.get(error.param or "", error.param))
