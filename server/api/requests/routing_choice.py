"""The request's choice of a policy or accuracy. Body, headers and model name are read, in this order of precedence."""

from collections.abc import Sequence

from fastapi import Request

from server.api.fields.choice import PhaseField, RoutingField
from server.api.http.headers import number_header, single_header
from server.errors import BadRequest, UnknownModel
from server.policies.store import PolicyStore
from server.policies.targets import (
    AUTO,
    DECODE,
    PREFILL,
    Ask,
    AtAccuracy,
    Automatic,
    InPhases,
    Named,
    PhaseTarget,
    Target,
)

POLICY_HEADER, ACCURACY_HEADER = "X-Routing-Policy", "X-Routing-Accuracy"


def routing_choice(
    body: RoutingField | None, request: Request, model: str | None, model_name: str, store: PolicyStore
) -> Ask | None:
    """The request's choice; None if it makes none. Raises BadRequest, UnknownModel, UnknownPolicy."""
    suffix = split_model(model, model_name)
    if suffix is not None and suffix != AUTO:
        store.get(suffix, param="model")
    if body is not None:
        if body.phases is not None:
            _check_ends([phase.until for phase in body.phases])
            phases = tuple(PhaseTarget(_target(phase), phase.until, phase.min_accuracy) for phase in body.phases)
            return Ask(InPhases(phases), "body", "routing")
        return Ask(_target(body), "body", "routing", body.min_accuracy)
    return _from_headers(request) or (None if suffix is None else Ask(_named(suffix), "model", "model"))


def split_model(model: str | None, model_name: str) -> str | None:
    """The policy in MODEL:POLICY; None if there is only the model's name. Raises UnknownModel."""
    if model is None or model == model_name:
        return None
    if not model.startswith(f"{model_name}:"):
        raise UnknownModel(f"the model {model!r} is not served here; this is {model_name!r}", param="model")
    return model.removeprefix(f"{model_name}:")


def _from_headers(request: Request) -> Ask | None:
    policy, accuracy = single_header(request, POLICY_HEADER), number_header(request, ACCURACY_HEADER)
    if policy is not None and accuracy is not None:
        raise BadRequest(f"send either {POLICY_HEADER} or {ACCURACY_HEADER}", param=ACCURACY_HEADER)
    if policy is not None:
        return Ask(_named(policy), "header", POLICY_HEADER)
    if accuracy is not None:
        if not 0 <= accuracy <= 1:  # also true for NaN
            raise BadRequest(f"{ACCURACY_HEADER}: must be a number between 0 and 1", param=ACCURACY_HEADER)
        return Ask(AtAccuracy(accuracy), "header", ACCURACY_HEADER)
    return None


def _check_ends(ends: Sequence[str | None]) -> None:
    last = len(ends) - 1
    for place, until in enumerate(ends):
        wrong = None
        if place == last:
            if until not in (None, DECODE):
                wrong = f"the last phase lasts to the end of the answer; leave it out or send {DECODE!r}"
        elif until is None:
            wrong = "every phase but the last one needs it"
        elif until == DECODE:
            wrong = f"only the last phase can last until {DECODE!r}"
        elif until == PREFILL and place > 0:
            wrong = f"only the first phase can last until {PREFILL!r}"
        if wrong is not None:
            param = f"routing.phases[{place}].until"
            raise BadRequest(f"{param}: {wrong}", param=param)


def _target(choice: RoutingField | PhaseField) -> Target:
    return AtAccuracy(choice.accuracy) if choice.accuracy is not None else _named(choice.policy or "")


def _named(name: str) -> Target:
    return Automatic() if name == AUTO else Named(name)
