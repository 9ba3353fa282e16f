"""Operation: health, metrics, version, models, tokens."""

import asyncio
import platform
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

import ladimo
from server.api.fields.completions import MAX_TEXT, DetokenizeRequest, TokenizeRequest
from server.api.http.bodies import JsonRoute
from server.api.http.failures import error_response
from server.api.http.streaming import until_disconnect
from server.api.requests.chat import chat_tokens
from server.api.requests.routing_choice import split_model
from server.api.requests.sampling import check_ids
from server.api.services import Services, ServicesDep
from server.engine.async_engine import EngineState
from server.engine.messages import EngineDead, ExpertSnapshot
from server.errors import BadRequest, Dead, UnknownModel
from server.text.lanes import SHORT

router = APIRouter(route_class=JsonRoute)

# Well below Prometheus's scrape timeout: a server whose engine hangs must be able to say so.
SCRAPE_SECONDS = 1.0


@router.get("/health")
@router.get("/health/live")
async def live(services: ServicesDep) -> Response:
    """Alive: loading counts, a dead or stalled engine does not. The engine's loop turns twice a second while idle, and between
    any two steps however long a prompt is."""
    state, age = services.engine.state, time.monotonic() - services.engine.heartbeat
    if state is EngineState.DEAD or (state is EngineState.READY and age > services.stall_timeout):
        return error_response(Dead(f"the engine is {state} and last turned {age:.0f} s ago", retry_after=30))
    return JSONResponse({"status": str(state)})


@router.get("/health/ready")
async def ready(services: ServicesDep) -> Response:
    """Takes requests now."""
    error = services.admission.unavailable()
    return JSONResponse({"status": "ready"}) if error is None else error_response(error)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: ServicesDep) -> Response:
    """Expert counters are read from the engine for each scrape, so they are exact."""
    return Response(services.metrics.render(await _experts(services)), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": ladimo.__version__, "python": platform.python_version()}


@router.get("/v1/models")
async def models(services: ServicesDep) -> dict[str, Any]:
    """The model, and the model under each policy."""
    names = [services.model_name, *(f"{services.model_name}:{name}" for name in services.store.policies())]
    return {"object": "list", "data": [_model(name, services) for name in names]}


@router.get("/v1/models/{model:path}")
async def model(model: str, services: ServicesDep) -> dict[str, Any]:
    policy = split_model(model, services.model_name)
    if policy is not None and policy not in services.store.policies():
        raise UnknownModel(f"the model {model!r} is not served here", param="model")
    return _model(model, services)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, services: ServicesDep) -> Response:
    """The tokens that a completion of this prompt, or an answer to these messages, would begin with."""
    split_model(body.model, services.model_name)
    ready = services.engine.state is EngineState.READY
    context = services.engine.limits.max_model_len if ready else services.config.max_position_embeddings
    most = max(MAX_TEXT, services.tokenizer.most_characters(context))
    param = "prompt" if body.messages is None else "messages"
    characters = len(body.prompt or "") + sum(message.characters for message in body.messages or ())
    if characters > most:
        raise BadRequest(f"{param}: {characters} characters are more than the {most} that are tokenized at once", param=param)
    if body.messages is not None:
        encoding = chat_tokens(body.messages, body.functions_of_tools, body.chat_format, services)
    else:
        encoding = services.tokenizer.encode(body.prompt or "", body.add_special_tokens)
    tokens = await until_disconnect(request, encoding)
    answer = await services.tokenizer.run(lambda: _token_list(tokens, context), len(tokens))
    return Response(answer, media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: ServicesDep) -> dict[str, str]:
    split_model(body.model, services.model_name)
    check_ids(body.tokens, services.config.vocab_size, "tokens")
    return {"prompt": await services.tokenizer.detokenize(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(services: ServicesDep) -> dict[str, Any]:
    return services.tokenizer.info


def _token_list(tokens: Sequence[int], context: int) -> bytes:
    """The answer of /tokenize. A million numbers at once would keep Python's lock too long."""
    parts = (",".join(map(str, tokens[start : start + SHORT])) for start in range(0, len(tokens), SHORT))
    return f'{{"count":{len(tokens)},"max_model_len":{context},"tokens":[{",".join(parts)}]}}'.encode()


def _model(name: str, services: Services) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": services.created,
        "owned_by": "ladimo",
        "root": services.model_name,  # vLLM's benchmark client asks for it
        "parent": None if name == services.model_name else services.model_name,
        "max_model_len": services.engine.limits.max_model_len if services.engine.state is EngineState.READY else None,
    }


async def _experts(services: Services) -> ExpertSnapshot | None:
    """None when the engine cannot answer now; the last figures stand then."""
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            return await services.engine.read_experts()
    except (EngineDead, TimeoutError):
        return None
