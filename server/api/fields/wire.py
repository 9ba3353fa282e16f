"""The parts of the wire models: their base class, the types of fields, and refused fields.

Null means "not given". A field of OpenAI or vLLM that is not supported accepts only the value that asks for nothing. Any other
value is refused, and not ignored. Unknown fields are ignored, or refused under --strict-fields.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json

from server.errors import UnsupportedParameter

MAX_STOP_CHARACTERS = 1024
MAX_CONSTRAINT_CHARACTERS = 2**16
MAX_CONSTRAINT_CHOICES = 1024
PIECE = 2**12  # items of a long list that are checked in one call of C


def only(*neutral: object) -> AfterValidator:
    """A field that is not supported. It accepts only the values `neutral`, which ask for nothing."""

    def check(value: object) -> object:
        if not any(type(value) is type(each) and value == each for each in neutral):
            hint = f"leave it out or send {json.dumps(neutral[0])}" if neutral else "leave it out"
            raise PydanticCustomError(UnsupportedParameter.code, "not supported by this server; {hint}", {"hint": hint})
        return value

    return AfterValidator(check)


def not_supported(value: object, known: Sequence[str]) -> PydanticCustomError:
    """The error for a value that other servers know and this one does not."""
    context = {"value": repr(value[:40]) if isinstance(value, str) else "this", "known": ", ".join(known)}
    return PydanticCustomError(UnsupportedParameter.code, "{value} is not supported by this server; it takes {known}", context)


def supported(*values: str) -> WrapValidator:
    """A choice among `values`. Other servers know more values, so any other value is refused as not supported."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        if value in values:
            return handler(value)
        raise not_supported(value, values)

    return WrapValidator(validate)


def or_else(message: str) -> WrapValidator:
    """Replaces the messages of a union's members by one message."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("wrong_type", "{expected}", {"expected": message}) from None

    return WrapValidator(validate)


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_json_object(value: object) -> object:
    """Parse a JSON schema that was sent as JSON text."""
    if isinstance(value, str) and len(value) <= MAX_CONSTRAINT_CHARACTERS:
        try:
            return from_json(value)
        except ValueError:
            return value
    return value


def _of_bounded_size(schema: dict[str, Any]) -> dict[str, Any]:
    size = 0
    for part in json.JSONEncoder().iterencode(schema):  # a long schema is not written to its end
        size += len(part)
        if size > MAX_CONSTRAINT_CHARACTERS:
            raise ValueError("too long")
    return schema


class StopAtError(FailFast):
    """Report only a list's first error, because reporting thousands takes seconds. Hashable, as parts of a union must be."""

    __hash__ = object.__hash__


def _by_pieces(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Check a long list piece by piece, so that other threads can run between two pieces."""
    if not isinstance(value, list) or len(value) <= PIECE:
        return handler(value)
    for begin in range(0, len(value), PIECE):
        try:
            handler(value[begin : begin + PIECE])
        except ValidationError as error:
            first = error.errors()[0]
            place, *inner = first["loc"]
            assert isinstance(place, int)
            moved = InitErrorDetails(
                type=first["type"], loc=(begin + place, *inner), input=first["input"], ctx=first.get("ctx", {})
            )
            raise ValidationError.from_exception_data(error.title, [moved]) from None
    return value


def at_most(entries: int) -> BeforeValidator:
    """Refuse an object with more entries before its members are checked."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError("too_long", "must have at most {entries} entries", {"entries": entries})
        return value

    return BeforeValidator(check)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], WrapValidator(_by_pieces)]
PromptIds = Annotated[list[TokenId], Field(min_length=1), WrapValidator(_by_pieces)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
JsonSchema = Annotated[
    dict[str, Any],
    BeforeValidator(_as_json_object),
    AfterValidator(_of_bounded_size),
    or_else(f"must be a JSON schema of at most {MAX_CONSTRAINT_CHARACTERS} characters"),
]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_CONSTRAINT_CHARACTERS)]
Alternatives = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    Field(min_length=1, max_length=MAX_CONSTRAINT_CHOICES),
]
One = Annotated[Any, only(1, 1.0)]
Off = Annotated[Any, only(False)]
On = Annotated[Any, only(True)]
Absent = Annotated[Any, only()]


class WireModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def unknown_field(model: WireModel) -> str | None:
    """The JSON path of the first unknown field, at any depth; None if there is none."""
    for name in model.model_extra or {}:
        return name
    for name, value in model:
        for place, item in enumerate(value) if isinstance(value, list) else ((None, value),):
            inner = unknown_field(item) if isinstance(item, WireModel) else None
            if inner is not None:
                return f"{name}.{inner}" if place is None else f"{name}[{place}].{inner}"
    return None
