"""POST /v1/completions and POST /v1/chat/completions, streamed or whole."""

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api.generation import Delta, Generation, make_generation
from server.api.routing_choice import routing_choice
from server.api.schemas import DEFAULT_COMPLETION_TOKENS, ChatCompletionRequest, CompletionRequest, GenerationFields
from server.api.services import Services, ServicesDep
from server.api.streaming import DONE, EventStream, sse, until_disconnect
from server.errors import BadRequest, InternalError, to_service_error
from server.policies.store import Route

router = APIRouter()
logger = logging.getLogger(__name__)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    services.admission.check(len(body.prompt))
    route = _route(body, request, services)
    dialect = TextDialect(body.model or services.model_name)

    async def generation() -> Generation:
        prompts = [
            await services.tokenizer.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        return make_generation(dialect.id, prompts, body, body.max_tokens, DEFAULT_COMPLETION_TOKENS, route, services, "prompt")

    return await _answer(await until_disconnect(request, generation()), dialect, body, request, services)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request, services: ServicesDep) -> Response:
    services.admission.check(1)
    route = _route(body, request, services)
    dialect = ChatDialect(body.model or services.model_name)
    messages = [{"role": message.role, "content": message.text} for message in body.messages]

    async def generation() -> Generation:
        try:
            prompt = await services.tokenizer.encode_chat(messages)
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from error
        max_tokens = body.max_completion_tokens or body.max_tokens
        return make_generation(dialect.id, [prompt], body, max_tokens, None, route, services, "messages")

    return await _answer(await until_disconnect(request, generation()), dialect, body, request, services)


class Dialect(ABC):
    """How one endpoint writes answers and chunks."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())

    def answer(self, texts: Sequence[str], generation: Generation) -> dict[str, Any]:
        choices = [
            self.choice(choice.index, text, choice.finish_reason)
            for choice, text in zip(generation.choices, texts, strict=True)
        ]
        return self._envelope(self.object, choices) | {"usage": generation.usage, "routing": generation.routing}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope(self.chunk_object, choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def chunk_choice(self, delta: Delta, first: bool) -> dict[str, Any]: ...


class TextDialect(Dialect):
    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def chunk_choice(self, delta: Delta, first: bool) -> dict[str, Any]:
        return self.choice(delta.index, delta.text, delta.finish_reason)


class ChatDialect(Dialect):
    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def chunk_choice(self, delta: Delta, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        content = {**role, "content": delta.text}
        return {"index": delta.index, "delta": content, "logprobs": None, "finish_reason": delta.finish_reason}


def _route(body: GenerationFields, request: Request, services: Services) -> Route:
    ask = routing_choice(body.routing, request, body.model, services.model_name, services.store)
    route = services.store.resolve(ask)
    request.state.routing_policy = route.policy.name
    return route


async def _answer(
    generation: Generation, dialect: Dialect, body: GenerationFields, request: Request, services: Services
) -> Response:
    deltas = generation.deltas()
    if not body.stream:
        texts = await until_disconnect(request, _collect(deltas, len(generation.choices)))
        return JSONResponse(dialect.answer(texts, generation))
    # The first token is awaited before the response begins, so that what fails until then has its own HTTP status.
    first = await until_disconnect(request, anext(deltas))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(first, deltas, generation, dialect, include_usage, services), deltas)


async def _collect(deltas: AsyncGenerator[Delta, None], choices: int) -> list[str]:
    texts: list[list[str]] = [[] for _ in range(choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            texts[delta.index].append(delta.text)
    return ["".join(pieces) for pieces in texts]


async def _events(
    first: Delta,
    deltas: AsyncGenerator[Delta, None],
    generation: Generation,
    dialect: Dialect,
    include_usage: bool,
    services: Services,
) -> AsyncGenerator[bytes, None]:
    """One event per token; the last has the routing object; then usage if asked for; an error takes the place of the rest."""
    begun: set[int] = set()
    running = len(generation.choices)
    usage = {"usage": None} if include_usage else {}
    try:
        delta: Delta | None = first
        while delta is not None:
            chunk = dialect.chunk([dialect.chunk_choice(delta, delta.index not in begun)])
            begun.add(delta.index)
            running -= delta.finish_reason is not None
            yield sse(chunk | usage | ({} if running else {"routing": generation.routing}))
            delta = await anext(deltas, None)
        if include_usage:
            yield sse(dialect.chunk([]) | {"usage": generation.usage, "routing": generation.routing})
    except Exception as error:
        failure = to_service_error(error)
        if isinstance(failure, InternalError):
            logger.exception("a stream failed")
        services.metrics.request_failures.labels(failure.code).inc()
        yield sse(failure.to_dict())
    yield DONE
