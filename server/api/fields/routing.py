"""Policies and defaults as operators send and read them, described for the OpenAPI page.

The fields of a rule come from `RuleNumber`, their only definition. The models here only describe. The policy store checks what
was sent, and names the first wrong field with the code `invalid_policy`. Tests compare the two.
"""

import math
from dataclasses import MISSING
from typing import Annotated, Any

from fastapi import Body
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, create_model
from pydantic_core import CoreSchema

from ladimo.model.rule import RuleNumber
from ladimo.policy import NAME_PATTERN, RULE_FIELDS
from server.api.fields.wire import Share
from server.policies.content import MAX_DESCRIPTION


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


def _number(number: RuleNumber) -> Any:
    spec, default = number.spec, RULE_FIELDS[number.field].default
    limits: dict[str, Any] = {}
    if spec.kind is not bool:
        limits = {"ge": spec.lowest, "allow_inf_nan": None if spec.kind is int else False}
        if spec.highest < math.inf:
            limits["le"] = spec.highest
    kind: Any = spec.kind | None if spec.nullable else spec.kind
    return kind, Field(... if default is MISSING else default, **limits)


LayerRuleBody: type[BaseModel] = create_model(
    "LayerRule",
    __base__=Strict,
    __doc__="The rule by which a token's experts are chosen in one layer.",
    **{number.field: _number(number) for number in RuleNumber},
    experts=(
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None,
        Field(None, description="The experts that may be chosen; all if null."),
    ),
)


def _read_only() -> Any:
    return Field(None, description="Ignored in a request.", json_schema_extra={"readOnly": True})


class PolicyBody(Strict):
    """A routing policy: one rule per layer, null for a dense layer. The answer of GET can be sent back with PUT as it is."""

    name: str | None = Field(None, pattern=f"^{NAME_PATTERN.pattern}$", description="If given, the name in the path.")
    description: str = Field("", max_length=MAX_DESCRIPTION, description="One line, without control characters.")
    layers: list[LayerRuleBody | None]  # type: ignore[valid-type]
    head_bits: int | None = Field(None, ge=1, le=16, description="How many bits of the output head are read; all if null.")
    head_refine: float | None = Field(
        None,
        ge=0,
        description="Words whose logit at 4 bits is at most this far below the best are read at 8 bits; none if null.",
    )
    version: str | None = _read_only()
    source: str | None = _read_only()
    accuracy: float | None = _read_only()
    figures: dict[str, Any] | None = _read_only()


class NamedDefault(Strict):
    """The policy of this name."""

    policy: str


class AccuracyDefault(Strict):
    """An accuracy from 0 (cheapest) to 1 (most accurate)."""

    accuracy: Share


Milliseconds = Annotated[float, Field(gt=0, le=1e9)]


class ObjectiveBody(Strict):
    """Targets for the 90th percentile of latencies; at least one. The accuracy does not go below `min_accuracy`."""

    itl_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    min_accuracy: Share = 0.0


class AutomaticDefault(Strict):
    """Automatic control sets the accuracy."""

    auto: ObjectiveBody


class _Canary(Strict):
    share: float = Field(gt=0, le=1, description="Of the requests that leave the choice to the server.")


class NamedCanary(NamedDefault, _Canary):
    """The policy of this name for a share of the requests."""


class AccuracyCanary(AccuracyDefault, _Canary):
    """An accuracy for a share of the requests."""


class RollbackBody(Strict):
    restore_policy: bool = Field(
        False, description="Store the policy version of the old default again, even if there is a newer version of that name."
    )


class _DescribedAs:
    """Marks a JSON object that is accepted unchecked. The OpenAPI page describes it by another type."""

    def __init__(self, described: Any) -> None:
        self._schema = TypeAdapter(described).core_schema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return handler(self._schema)


PolicyJson = Annotated[dict[str, Any], Body(), _DescribedAs(PolicyBody)]
CanaryJson = Annotated[dict[str, Any], Body(), _DescribedAs(NamedCanary | AccuracyCanary)]
DefaultJson = Annotated[dict[str, Any], Body(), _DescribedAs(NamedDefault | AccuracyDefault | AutomaticDefault)]
