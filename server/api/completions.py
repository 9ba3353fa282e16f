"""POST /v1/completions and POST /v1/chat/completions, streamed or whole."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api.constraints import make_grammar
from server.api.deadline import request_deadline
from server.api.dialects import ChatDialect, Dialect, TextDialect
from server.api.generation import Delta, Generation, Prompt, Terms, make_echo, make_generation
from server.api.routing_choice import routing_choice
from server.api.routing_trace import joined
from server.api.sampling import check_ids, check_length, too_long
from server.api.schemas import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
    StreamOptions,
)
from server.api.services import Services, ServicesDep
from server.api.streaming import DONE, EventStream, sse, until_disconnect
from server.api.wire import unknown_field
from server.errors import BadRequest, InternalError, UnsupportedParameter, to_service_error
from server.policies.targets import AUTO
from server.policies.tiers import DEFAULT

router = APIRouter()
logger = logging.getLogger(__name__)

# Whole as JSON, or with `stream` as server-sent events: the page of the API names both.
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {EventStream.media_type: {}}}}


@router.post("/v1/completions", responses=ANSWERS)
async def completions(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    terms = _terms(body, len(body.prompt), request, services)
    if body.best_of not in (None, body.n):
        raise UnsupportedParameter("best_of: not supported by this server; leave it out or send n's value", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens: 0 asks for nothing unless echo is true", param="max_tokens")
    dialect = TextDialect(body.model or services.model_name, terms.service_tier, services)

    async def generation() -> Generation:
        prompts = [await _prompt(body, place, services) for place in range(len(body.prompt))]
        grammar = await make_grammar(body, services)
        default = DEFAULT_COMPLETION_TOKENS
        return make_generation(dialect.id, prompts, body, body.max_tokens, default, terms, grammar, services)

    return await _answer(await until_disconnect(request, generation()), dialect, body, request, services)


@router.post("/v1/chat/completions", responses=ANSWERS)
async def chat_completions(body: ChatCompletionRequest, request: Request, services: ServicesDep) -> Response:
    terms = _terms(body, 1, request, services)
    dialect = ChatDialect(body.model or services.model_name, terms.service_tier, services)
    messages = [{"role": message.role, "content": message.text} for message in body.messages]

    async def generation() -> Generation:
        _check_text("".join(message["content"] for message in messages), "messages", services)
        try:
            prompt = Prompt(await services.tokenizer.encode_chat(messages), "messages")
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from error
        max_tokens = body.max_completion_tokens or body.max_tokens
        grammar = await make_grammar(body, services)
        return make_generation(dialect.id, [prompt], body, max_tokens, None, terms, grammar, services)

    return await _answer(await until_disconnect(request, generation()), dialect, body, request, services)


def _terms(body: GenerationFields, prompts: int, request: Request, services: Services) -> Terms:
    """What is known before any work is done. Raises what admission, routing and wrong fields raise."""
    services.admission.check(prompts * body.n, param="n" if body.n > 1 else "prompt")
    unknown = unknown_field(body) if services.strict_fields else None
    if unknown is not None:
        raise UnsupportedParameter(f"{unknown}: unknown field", param=unknown)
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


async def _prompt(body: CompletionRequest, place: int, services: Services) -> Prompt:
    """Encode one of the prompts, and lay out its echo when that is asked for."""
    param = f"prompt[{place}]" if len(body.prompt) > 1 else "prompt"
    prompt, tokenizer = body.prompt[place], services.tokenizer
    if isinstance(prompt, str):
        _check_text(prompt, param, services)
        ids = await tokenizer.encode(prompt, body.add_special_tokens)
    else:
        ids = prompt
    if not body.echo:
        return Prompt(ids, param)
    limits = services.engine.limits
    check_length(ids, body.max_tokens, limits.max_model_len, param)  # before time is spent on each token
    check_ids(ids, limits.vocab_size, param)
    return Prompt(ids, param, await tokenizer.run(lambda: make_echo(ids, tokenizer.decode, whole=body.max_tokens == 0)))


def _check_text(text: str, param: str, services: Services) -> None:
    """Refuse what is hopelessly too long before any time is spent on encoding it."""
    max_model_len = services.engine.limits.max_model_len
    if services.tokenizer.cannot_fit(text, max_model_len):
        raise too_long(f"has {len(text)} characters, which is too long", max_model_len, param)


async def _answer(
    generation: Generation, dialect: Dialect, body: GenerationFields, request: Request, services: Services
) -> Response:
    telemetry = services.telemetry
    if telemetry is None:
        deltas = generation.deltas()
    else:
        deltas = telemetry.follow(generation, dialect.operation, body, request.headers)
    if not body.stream:
        wholes = await until_disconnect(request, _collect(deltas, len(generation.choices)))
        return JSONResponse(dialect.answer(wholes, generation))
    # The first token is awaited before the response begins, so that what fails until then has its own HTTP status.
    first = await until_disconnect(request, anext(deltas))
    options = body.stream_options or StreamOptions.model_validate({})
    return EventStream(_events(first, deltas, generation, dialect, options, services), deltas)


async def _collect(deltas: AsyncGenerator[Delta, None], choices: int) -> list[Delta]:
    """Each choice's deltas joined into one."""
    parts: list[list[Delta]] = [[] for _ in range(choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            parts[delta.index].append(delta)
    return [
        Delta(
            index=index,
            text="".join(part.text for part in choice),
            finish_reason=choice[-1].finish_reason,
            first=True,
            tokens=tuple(token for part in choice for token in part.tokens),
            trace=joined(traces) if (traces := [part.trace for part in choice if part.trace is not None]) else None,
        )
        for index, choice in enumerate(parts)
    ]


async def _events(
    first: Delta,
    deltas: AsyncGenerator[Delta, None],
    generation: Generation,
    dialect: Dialect,
    options: StreamOptions,
    services: Services,
) -> AsyncGenerator[bytes, None]:
    """One event per token, in a chat one more for each choice's end; the last has the routing object; then usage if asked
    for; an error takes the place of the rest."""
    running = len(generation.choices)
    try:
        delta: Delta | None = first
        while delta is not None:
            chunks = dialect.chunks(delta)
            running -= delta.finish_reason is not None
            if not running:
                chunks[-1]["routing"] = generation.routing
            for chunk in chunks:
                if options.include_usage:
                    chunk["usage"] = generation.usage if options.continuous_usage_stats else None
                yield sse(chunk)
            delta = await anext(deltas, None)
        if options.include_usage:
            yield sse(dialect.chunk([]) | {"usage": generation.usage, "routing": generation.routing})
    except Exception as error:
        failure = to_service_error(error)
        if isinstance(failure, InternalError):
            logger.exception("a stream failed")
        services.metrics.request_failures.labels(failure.code).inc()
        yield sse(failure.to_dict())
    yield DONE
