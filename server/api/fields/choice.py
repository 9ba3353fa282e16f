"""The body field `routing`: by which policy or accuracy a request runs, as a whole or in phases."""

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.wire import MAX_STOP_CHARACTERS, Share, WireModel
from server.policies.targets import DECODE, PREFILL

MAX_PHASES = 8
UNTIL = (
    "The text that ends the phase. It is looked for in the answer, after the end of the phase before. "
    f"`{PREFILL}`: the phase is the prompt; only for the first phase. "
    f"`{DECODE}`: the phase lasts to the end of the answer; only for the last phase, which may as well have no `until`."
)


class Choice(WireModel):
    policy: str | None = Field(None, description='A policy\'s name, or "auto".')
    accuracy: Share | None = Field(None, description="From 0 (cheapest) to 1 (most accurate).")
    min_accuracy: Share | None = Field(None, description="Automatic control may lower the accuracy, but not below this value.")


class PhaseField(Choice):
    """A part of the request, with its policy or accuracy."""

    until: str | None = Field(None, min_length=1, max_length=MAX_STOP_CHARACTERS, description=UNTIL)

    @model_validator(mode="after")
    def _one_choice(self) -> "PhaseField":
        if (self.policy is None) == (self.accuracy is None):
            raise PydanticCustomError("routing", "name either a policy or an accuracy")
        return self


class RoutingField(Choice):
    """How to route this request: by a policy, by an accuracy, or in phases."""

    phases: Annotated[list[PhaseField], Field(min_length=1, max_length=MAX_PHASES)] | None = Field(
        None, description="Parts of the request in their order, each with its own policy or accuracy."
    )

    @model_validator(mode="after")
    def _one_choice(self) -> "RoutingField":
        if sum(choice is not None for choice in (self.policy, self.accuracy, self.phases)) != 1:
            raise PydanticCustomError("routing", "name either a policy, an accuracy or phases")
        if self.phases is not None and self.min_accuracy is not None:
            raise PydanticCustomError("routing", "min_accuracy cannot be combined with phases; each phase may have its own")
        return self


def _as_policy(value: object) -> object:
    return {"policy": value} if isinstance(value, str) else value


Routing = Annotated[RoutingField, BeforeValidator(_as_policy, json_schema_input_type=str | RoutingField)]
