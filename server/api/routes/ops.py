"""The routes for operation and clients' set-up: health, metrics, version, models, tokens."""

import asyncio
import platform
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
from server.api.services import (
    AdmissionDep,
    ConfigDep,
    CreatedDep,
    EngineDep,
    LanguageDep,
    MetricsDep,
    ModelNameDep,
    ScrapeSecondsDep,
    StallTimeoutDep,
    StoreDep,
)
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.messages import EngineDead, ExpertSnapshot
from server.errors import BadRequest, Dead, UnknownModel
from server.text.lanes import SHORT

router = APIRouter(route_class=JsonRoute)


@router.get("/health")
@router.get("/health/live")
async def live(engine: EngineDep, stall_timeout: StallTimeoutDep) -> Response:
    """Whether the process works. A loading server is alive; one with a dead or stalled engine is not. The engine's loop runs
    twice a second while it is idle, and otherwise after each step. Long prompts take several steps."""
    state, age = engine.state, engine.heartbeat_age
    if state is EngineState.DEAD or (state is EngineState.READY and age > stall_timeout):
        return error_response(Dead(f"the engine is {state} and last turned {age:.0f} s ago", retry_after=30))
    return JSONResponse({"status": str(state)})


@router.get("/health/ready")
async def ready(admission: AdmissionDep) -> Response:
    """Whether the server accepts requests now."""
    error = admission.unavailable()
    return JSONResponse({"status": "ready"}) if error is None else error_response(error)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(metrics: MetricsDep, engine: EngineDep, scrape_seconds: ScrapeSecondsDep) -> Response:
    """Expert counters are read from the engine for each scrape, so they are exact."""
    return Response(metrics.render(await _experts(engine, scrape_seconds)), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": ladimo.__version__, "python": platform.python_version()}


@router.get("/v1/models")
async def models(model_name: ModelNameDep, created: CreatedDep, engine: EngineDep, store: StoreDep) -> dict[str, Any]:
    """The model, and the model under each policy."""
    names = [model_name, *(f"{model_name}:{name}" for name in store.policies())]
    return {"object": "list", "data": [_model(name, model_name, created, engine) for name in names]}


@router.get("/v1/models/{model:path}")
async def model(
    model: str, model_name: ModelNameDep, created: CreatedDep, engine: EngineDep, store: StoreDep
) -> dict[str, Any]:
    policy = split_model(model, model_name)
    if policy is not None and policy not in store.policies():
        raise UnknownModel(f"the model {model!r} is not served here", param="model")
    return _model(model, model_name, created, engine)


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest,
    request: Request,
    language: LanguageDep,
    engine: EngineDep,
    config: ConfigDep,
    model_name: ModelNameDep,
) -> Response:
    """The token ids of a prompt, or of a conversation as the chat endpoint would render it."""
    split_model(body.model, model_name)
    tokenizer, ready = language.tokenizer, engine.state is EngineState.READY
    context = engine.limits.max_model_len if ready else config.max_position_embeddings
    most = max(MAX_TEXT, tokenizer.most_characters(context))
    param = "prompt" if body.messages is None else "messages"
    characters = len(body.prompt or "") + sum(message.characters for message in body.messages or ())
    if characters > most:
        raise BadRequest(f"{param}: {characters} characters are more than the {most} that are tokenized at once", param=param)
    if body.messages is not None:
        encoding = chat_tokens(body.messages, body.functions_of_tools, body.chat_format, language)
    else:
        encoding = tokenizer.encode(body.prompt or "", body.add_special_tokens)
    tokens = await until_disconnect(request, encoding)
    answer = await tokenizer.run(lambda: _token_list(tokens, context), len(tokens))
    return Response(answer, media_type="application/json")


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, language: LanguageDep, config: ConfigDep, model_name: ModelNameDep
) -> dict[str, str]:
    split_model(body.model, model_name)
    check_ids(body.tokens, config.vocab_size, "tokens")
    return {"prompt": await language.tokenizer.detokenize(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(language: LanguageDep) -> dict[str, Any]:
    return language.tokenizer.info


def _token_list(tokens: Sequence[int], context: int) -> bytes:
    """The answer of /tokenize, written in pieces. A million numbers in one call would hold Python's lock too long."""
    parts = (",".join(map(str, tokens[start : start + SHORT])) for start in range(0, len(tokens), SHORT))
    return f'{{"count":{len(tokens)},"max_model_len":{context},"tokens":[{",".join(parts)}]}}'.encode()


def _model(name: str, model_name: str, created: int, engine: AsyncEngine) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ladimo",
        "root": model_name,  # vLLM's benchmark client asks for it
        "parent": None if name == model_name else model_name,
        "max_model_len": engine.limits.max_model_len if engine.state is EngineState.READY else None,
    }


async def _experts(engine: AsyncEngine, seconds: float) -> ExpertSnapshot | None:
    """None if the engine cannot answer in time. Then the last figures are shown again."""
    try:
        async with asyncio.timeout(seconds):
            return await engine.read_experts()
    except (EngineDead, TimeoutError):
        return None
