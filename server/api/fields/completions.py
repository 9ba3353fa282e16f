"""The wire: what request bodies look like, built from `api.wire`. Translation into engine terms is `api.generation`'s."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.chat import ChatFields
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
MAX_TEXT = 2**19  # characters that /tokenize takes of any model, tokens that /detokenize takes
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
    "Tell which experts ran. Each choice then has `routing_trace`: `layers`, the numbers of the expert layers; `tokens`, per "
    "generated token and expert layer the experts of the pass that drew the token, best first; with `prompt`, the same for the "
    "prompt's tokens but the last, whose pass drew the first generated token (all of them when max_tokens is 0), and, if the "
    "sequence was preempted, `recomputed`: how many of its first passes ran again, per preemption. In a stream each chunk has "
    "its tokens' part; `layers` and `prompt` come with a choice's first chunk, `recomputed` with its last."
)
PACKED_TRACE = (
    "How `tokens` and `prompt` are written. `lists`: nested lists. `base64`: an object each; `data` is the base64 of an array "
    "in C order, `shape` [tokens, expert layers, places] and `dtype` uint8; where a layer has more than 255 experts, uint16, "
    "little-endian. `places` is the most experts that the policy lets a token run in a layer and the same in every chunk of a "
    "stream; places that ran none hold the largest number of the dtype (255 or 65535)."
)
SERVICE_TIER = (
    "Cheap or fast: a tier has a policy and a priority, which the operator sets and GET /v1/routing shows. If nothing else is "
    "set, `flex` runs under the policy fast and lets others go first; `priority` runs under full and goes first. `auto` and "
    "`default` mean the server's default; only under `auto` may automatic control lower the accuracy. A policy or accuracy "
    "that the request chooses itself (`routing`, a header, the model's name) wins over the tier's, and so does its own "
    "`priority`. The answer names the tier that served it, which for `auto` is `default`."
)


def _as_prompts(value: object) -> object:
    """One prompt as a list of one: text, or a list of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, int) for item in value)):
        return [value]
    return value


def _as_policy(value: object) -> object:
    return {"policy": value} if isinstance(value, str) else value


def _as_trace(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Prompt = Annotated[Text | PromptIds, or_else("must be a non-empty string or a non-empty list of token ids")]


class RoutingField(WireModel):
    """How to route this request: a policy or a position of the knob."""

    policy: str | None = Field(None, description='A policy\'s name, or "auto".')
    accuracy: Share | None = Field(None, description="The knob: 1 is most accurate, 0 cheapest.")
    min_accuracy: Share | None = Field(None, description="Automatic control may lower the accuracy down to here.")

    @model_validator(mode="after")
    def _one_choice(self) -> "RoutingField":
        if (self.policy is None) == (self.accuracy is None):
            raise PydanticCustomError("routing", "name either a policy or an accuracy")
        return self


class RoutingTraceField(WireModel):
    """How much of the routing to tell."""

    prompt: bool = Field(
        False, description="Tell of the prompt's tokens, too. They are computed then, even if they are cached."
    )
    format: Literal["lists", "base64"] = Field("lists", description=PACKED_TRACE)


class StreamOptions(WireModel):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Usage so far in every chunk.")

    include_obfuscation: Off = False


class RequestFields(ConstraintFields):
    """What every endpoint that generates takes."""

    model: str | None = Field(None, description="The served model, or MODEL:POLICY.")
    routing: Annotated[RoutingField, BeforeValidator(_as_policy, json_schema_input_type=str | RoutingField)] | None = None
    routing_trace: Annotated[
        RoutingTraceField | None, BeforeValidator(_as_trace, json_schema_input_type=bool | RoutingTraceField | None)
    ] = Field(None, description=ROUTING_TRACE)
    min_tokens: int = Field(0, ge=0, description="No end of text, stop token or stop string before so many tokens.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False, description="0: the most likely token.")
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1: no limit.")
    min_p: Share = Field(0.0, description="Drop tokens less likely than this share of the most likely one's probability.")
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
        None, ge=-(2**63), lt=2**63, description="Lower runs earlier; the service tier's if not given, which is 0 by default."
    )
    cache_salt: str = Field(
        "", min_length=1, max_length=MAX_SALT_CHARACTERS, description="Cached prompts are shared under the same salt only."
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
    """What both completion endpoints take."""

    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt; with a seed, choice i uses seed + i.")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many rivals to report beside each token; None for no log-probabilities at all."""
        return None


class CompletionRequest(GenerationFields):
    prompt: Annotated[
        list[Prompt],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    add_special_tokens: bool = True
    echo: bool = Field(False, description="The prompt comes back before the answer, with its log-probabilities if asked for.")
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
    prompt_cache_breakpoint: Any = Field(None, description="Ignored: prompts share whatever prefixes they have.")


class Message(WireModel):
    """`tool_calls` belongs to the assistant, whose content may be null then; `tool_call_id` to the role tool, to a result."""

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
        """As chat templates know it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatCompletionRequest(GenerationFields, ChatFields, ToolFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), StopAtError()]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Takes the place of max_tokens.")
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

    # Labels and hints, which change no answer here.
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
        """The schema of the JSON that response_format asks for, empty for any object; None where it asks for none."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return (form.schema_ or {}) if form.json_schema is None else form.json_schema.schema_

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeRequest(ChatFields, ToolFields):
    """Text as the completions endpoint would read it, or messages and tools as the chat endpoint would render them."""

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
    param: str | None = Field(description="JSON path of the field, or name of the header, that is wrong.")
    code: str = Field(description="A stable word.")


class ErrorBody(BaseModel):
    """What every error looks like, also as an event of a stream."""

    error: ErrorObject
