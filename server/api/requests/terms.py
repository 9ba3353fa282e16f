"""What a request runs under, from its fields and headers, before any work is done."""

from fastapi import Request

from server.api.answers.generation import Terms
from server.api.fields.completions import GenerationFields
from server.api.fields.wire import WireModel, unknown_field
from server.api.http.deadline import request_deadline
from server.api.requests.routing_choice import routing_choice
from server.api.services import Services
from server.errors import UnsupportedParameter
from server.policies.targets import AUTO
from server.policies.tiers import DEFAULT


def make_terms(body: GenerationFields, prompts: int, request: Request, services: Services) -> Terms:
    """What is known before any work is done. Raises what admission, routing and wrong fields raise."""
    services.admission.check(prompts * body.n, param="n" if body.n > 1 else "prompt")
    refuse_unknown(body, services)
    deadline = request_deadline(request, services.request_timeout)
    tier = services.store.tier(body.service_tier)
    ask = routing_choice(body.routing, request, body.model, services.model_name, services.store) or tier.ask
    route = services.store.resolve(ask, controlled=tier.controlled)
    request.state.routing_policy = route.policy.name
    return Terms(
        route,
        deadline,
        _flow(body, request, services),
        service_tier=DEFAULT if body.service_tier == AUTO else body.service_tier,
        priority=tier.priority if body.priority is None else body.priority,
    )


def _flow(body: GenerationFields, request: Request, services: Services) -> str:
    """For whom the request is, as far as turns go."""
    caller: str = request.state.caller
    match services.fair_queueing:
        case "none":
            return ""
        case "key":
            return caller
        case "user":
            return f"{caller} {body.user or ''}"


def refuse_unknown(body: WireModel, services: Services) -> None:
    """Under --strict-fields. Raises UnsupportedParameter."""
    unknown = unknown_field(body) if services.strict_fields else None
    if unknown is not None:
        raise UnsupportedParameter(f"{unknown}: unknown field", param=unknown)
