"""The wire models of completions, chat, tokenize and detokenize. `server.api.requests` translates them for the engine."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.chat import ChatFields
from server.api.fields.choice import Routing
from server.api.fields.constraints import ConstraintFields
from server.api.fields.tools import MAX_CALLS, CallId, ToolCall, ToolFields
from server.api.fields.wire import (
    Absent,
    Bias,
    Off,
    On,
    One,
    Penalty,
    PromptIds,
    Share,
    Stop,
    StopAtError,
    Text,
    TokenId,
    TokenIds,
    TokenIdText,
    WireModel,
    as_list,
    at_most,
    only,
    or_else,
)

MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_TEXT = 2**19  # /tokenize takes at least so many characters, whatever the model; /detokenize at most so many tokens
MAX_STOPS = 32
MAX_STOP_TOKENS = 128
MAX_CHOICES = 16  # `n`
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_SALT_CHARACTERS = 256
MAX_TIER_CHARACTERS = 64
SEEDS = 2**63
DEFAULT_COMPLETION_TOKENS = 16
ROUTING_TRACE = (
    "Report what ran for each token. Each choice then has `routing_trace`. Its `layers` are the numbers of the expert layers. "
    "Its `tokens` list, for each generated token and expert layer, the experts of the pass that drew the token, best first. "
    "`prompt` lists the same for the prompt's tokens, if asked for. The last prompt token is not in it, because its pass drew "
    "the first generated token; with max_tokens 0, `prompt` has all of them. `recomputed` is there after preemptions: it "
    "says for each how many of the first passes ran again. Models of method `nested` also have `refined`: for each generated "
    "token, how many neurons of each expert layer, and then how many words of the output head, were read at 8 bits because "
    "they matter to the token, while the rest was read at 4. Where a policy reads everything at the same bits, the number is "
    "0. `prompt_refined` says the same of the prompt's tokens, and `refinable` how many neurons and words there are. In a "
    "stream, each chunk has the part of its tokens. `layers`, `refinable`, `prompt` and `prompt_refined` come with a choice's "
    "first chunk, `recomputed` with its last."
)
PACKED_TRACE = (
    "Form of the lists by token. `lists`: nested lists. `base64`: an object each. Its `data` is an array in C order, in "
    "base64. Its `shape` is [tokens, expert layers, places]. Its `dtype` is uint8, or little-endian uint16 if a layer has more "
    "than 255 experts. `places` is the most experts that a token may run in a layer under the policy. It is the same in every "
    "chunk of a stream. A place without an expert holds the largest number of the dtype (255 or 65535). `refined` and "
    "`prompt_refined` are objects, too. Their dtype is little-endian uint32 and their shape [tokens, expert layers + 1]."
)
SERVICE_TIER = (
    "A tier has a policy and a priority. The operator sets them, and GET /v1/routing shows them. By default, `flex` runs under "
    "the policy fast and lets others go first, and `priority` runs under full and goes first. `auto` and `default` mean the "
    "server's default. Only under `auto` may automatic control lower the accuracy. If the request chooses a policy, an "
    "accuracy or a `priority` itself, its choice counts and not that of the tier. The answer names the tier that was used; "
    "for `auto` this is `default`."
)


def _as_prompts(value: object) -> object:
    """A single prompt (text, or a list of token ids) as a list with one prompt."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, int) for item in value)):
        return [value]
    return value


def _as_trace(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Prompt = Annotated[Text | PromptIds, or_else("must be a non-empty string or a non-empty list of token ids")]


class RoutingTraceField(WireModel):
    """What a routing trace contains, and its form."""

    prompt: bool = Field(False, description="Report the prompt's tokens, too. They are then computed even if they are cached.")
    format: Literal["lists", "base64"] = Field("lists", description=PACKED_TRACE)


class StreamOptions(WireModel):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Add the usage so far to every chunk.")

    include_obfuscation: Off = False


class RequestFields(ConstraintFields):
    """The fields of every endpoint that generates text."""

    model: str | None = Field(None, description="The served model, or MODEL:POLICY.")
    routing: Routing | None = None
    routing_trace: Annotated[
        RoutingTraceField | None, BeforeValidator(_as_trace, json_schema_input_type=bool | RoutingTraceField | None)
    ] = Field(None, description=ROUTING_TRACE)
    min_tokens: int = Field(0, ge=0, description="The answer does not end before it has so many tokens.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False, description="0: always the most likely token.")
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1: no limit.")
    min_p: Share = Field(0.0, description="Drop tokens whose probability is below this share of the largest one.")
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=MAX_BIASES), at_most(MAX_BIASES)] = {}
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[
        list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(as_list, json_schema_input_type=str | list[str])
    ] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] = []
    ignore_eos: bool = False
    stream: bool = False
    user: str | None = None
    service_tier: str = Field("auto", min_length=1, max_length=MAX_TIER_CHARACTERS, description=SERVICE_TIER)
    priority: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Lower runs earlier. If not given, that of the service tier; 0 by default."
    )
    cache_salt: str = Field(
        "", min_length=1, max_length=MAX_SALT_CHARACTERS, description="Cached prompts are shared only under the same salt."
    )

    prompt_logprobs: Absent = None
    allowed_token_ids: Absent = None
    bad_words: Annotated[Any, only([])] = []
    logits_processors: Absent = None
    truncate_prompt_tokens: Absent = None
    use_beam_search: Off = False
    length_penalty: One = 1
    include_stop_str_in_output: Off = False
    skip_special_tokens: On = True
    spaces_between_special_tokens: On = True
    return_token_ids: Off = False
    return_tokens_as_token_ids: Off = False


class GenerationFields(RequestFields):
    """The fields of both completion endpoints."""

    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt. With a seed, choice i uses seed + i.")
    stream_options: StreamOptions | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens of a choice that the request asks for; None: it does not say."""
        return self.max_tokens

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None: no log-probabilities at all."""
        return None


class CompletionRequest(GenerationFields):
    prompt: Annotated[
        list[Prompt],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    add_special_tokens: bool = True
    echo: bool = Field(False, description="Return the prompt before the answer, with its log-probabilities if asked for.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, description="Must equal n.")

    suffix: Annotated[Any, only("")] = ""
    prompt_embeds: Absent = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(WireModel):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = Field(None, description="Ignored. Prompts with a common prefix always share it.")


class Message(WireModel):
    """`tool_calls` belongs to the role assistant; its content may then be null. `tool_call_id` belongs to the role tool."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], StopAtError(), BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] = []
    tool_call_id: CallId | None = None

    function_call: Absent = None
    audio: Absent = None
    refusal: Absent = None

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, data: Any) -> Any:
        calls = isinstance(data, dict) and data.get("role") == "assistant" and data.get("tool_calls")
        return {**data, "content": data.get("content") or ""} if calls else data

    @model_validator(mode="after")
    def _parts_fit_the_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "tool_calls belongs to the role assistant")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "tool_call_id belongs to the role tool, and is needed there")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    @property
    def characters(self) -> int:
        return len(self.text) + sum(len(call.function.arguments) for call in self.tool_calls)

    def to_dict(self) -> dict[str, Any]:
        """In the form that chat templates expect."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatCompletionRequest(GenerationFields, ChatFields, ToolFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), StopAtError()]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Replaces max_tokens.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="Needs logprobs to be true.")

    functions: Annotated[Any, only([])] = []
    function_call: Annotated[Any, only("none", "auto")] = "none"
    modalities: Annotated[Any, only(["text"])] = ["text"]
    audio: Absent = None
    prediction: Absent = None
    reasoning_effort: Absent = None
    verbosity: Absent = None
    web_search_options: Absent = None
    moderation: Absent = None

    # Labels and hints. They change no answer here.
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    store: Off = False
    add_special_tokens: Off = False
    echo: Off = False

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The schema that response_format asks for. Empty: any JSON object. None: it asks for no JSON."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return (form.schema_ or {}) if form.json_schema is None else form.json_schema.schema_

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(ChatFields, ToolFields):
    """A prompt, read as the completions endpoint does, or messages and tools, rendered as the chat endpoint does."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), StopAtError()] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages")
        if self.tools and self.messages is None:
            raise PydanticCustomError("tools", "tools go with messages")
        return self


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_TEXT)]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The wrong field as a JSON path, or the name of the wrong header.")
    code: str = Field(description="A stable word for the kind of error.")


class ErrorBody(BaseModel):
    """The form of every error, also as an event of a stream."""

    error: ErrorObject
