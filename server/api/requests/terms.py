"""Finds the terms of a request from its fields and headers, before any work is done."""

from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from server.api.admission import Permit
from server.api.answers.generation import Terms
from server.api.fields.completions import GenerationFields
from server.api.fields.wire import WireModel, unknown_field
from server.api.http.deadline import request_deadline
from server.api.requests.pressure import meet_deadline, under_pressure
from server.api.requests.routing_choice import routing_choice
from server.errors import UnsupportedParameter
from server.policies.route import Binding
from server.policies.store import PolicyStore
from server.policies.targets import AUTO
from server.policies.tiers import DEFAULT

FairQueueing = Literal["key", "user", "none"]


@dataclass(frozen=True, slots=True)
class RequestRules:
    """The operator's settings for all requests. `request_timeout`: seconds that a request may take; None: no limit.
    `strict_fields`: unknown fields are errors. `fair_queueing`: who takes turns while requests wait."""

    store: PolicyStore
    model_name: str
    request_timeout: float | None
    strict_fields: bool
    fair_queueing: FairQueueing


def make_terms(body: GenerationFields, prompts: int, request: Request, permit: Permit, rules: RequestRules) -> Terms:
    """Admit the request and find its terms. Raises the errors of admission and routing, and those of wrong fields."""
    permit.enter(prompts * body.n, param="n" if body.n > 1 else "prompt")
    refuse_unknown(body, rules.strict_fields)
    deadline = request_deadline(request, rules.request_timeout)
    tier = rules.store.tier(body.service_tier)
    choice = routing_choice(body.routing, request, body.model, rules.model_name, rules.store)
    leaves_choice = tier.controlled and (choice is None or choice.follows_default)
    requested = "default" if choice is None else AUTO
    canary = rules.store.canary_route(request.state.request_id, requested) if leaves_choice else None
    route = canary or rules.store.resolve(choice or tier.ask, controlled=tier.controlled)
    route = meet_deadline(route, deadline, body.token_limit, rules.store, permit.admission)
    priority = tier.priority if body.priority is None else body.priority
    if priority > 0:
        permit.let_pass()
    route = under_pressure(route, tier, priority, rules.store, permit.admission)
    request.state.binding = binding = Binding(route)
    return Terms(
        permit,
        binding,
        deadline,
        _flow(body, request, rules.fair_queueing),
        service_tier=DEFAULT if body.service_tier == AUTO else body.service_tier,
        priority=priority,
    )


def _flow(body: GenerationFields, request: Request, fair_queueing: FairQueueing) -> str:
    """The request's flow: requests of different flows take turns while they wait."""
    caller: str = request.state.caller
    match fair_queueing:
        case "none":
            return ""
        case "key":
            return caller
        case "user":
            return f"{caller} {body.user or ''}"


def refuse_unknown(body: WireModel, strict_fields: bool) -> None:
    """Under --strict-fields, refuse unknown fields. Raises UnsupportedParameter."""
    unknown = unknown_field(body) if strict_fields else None
    if unknown is not None:
        raise UnsupportedParameter(f"{unknown}: unknown field", param=unknown)
