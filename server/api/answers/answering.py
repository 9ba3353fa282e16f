"""Writes the answer of a generation in an endpoint's dialect, whole or as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.answers.dialects import Dialect
from server.api.answers.generation import Delta, Generation
from server.api.answers.routing_trace import joined
from server.api.fields.completions import GenerationFields
from server.api.http.failures import to_service_error
from server.api.http.streaming import EventStream, started, until_disconnect
from server.errors import InternalError
from server.metrics import Metrics
from server.text.answer_text import join_calls

logger = logging.getLogger(__name__)

# For the OpenAPI page: an answer is JSON, or server-sent events with `stream`.
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {EventStream.media_type: {}}}}


class Tracing(Protocol):
    """Makes a span of every generation. `server.telemetry` implements it, if its extra is installed and configured."""

    def follow(
        self, generation: Generation, operation: str, fields: GenerationFields, headers: Mapping[str, str]
    ) -> AsyncGenerator[Delta, None]:
        """Yield the generation's deltas, and record them in a span. `fields` and `headers` are those of the request."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class AnswerParts:
    """The parts of the server that every answer needs. `telemetry`: None if requests are not traced. `comment_seconds`: a
    stream sends a comment after so many seconds without an event."""

    metrics: Metrics
    telemetry: Tracing | None
    comment_seconds: float


async def answer(
    generation: Generation, dialect: Dialect, body: GenerationFields, request: Request, parts: AnswerParts
) -> Response:
    telemetry = parts.telemetry
    if telemetry is None:
        deltas = generation.deltas()
    else:
        deltas = telemetry.follow(generation, dialect.operation, body, request.headers)
    if not body.stream:
        wholes = await until_disconnect(request, _collect(deltas, len(generation.choices)))
        return JSONResponse(dialect.answer(wholes, generation))
    # The response begins only after the first token, or after a while. An error before that gets its own HTTP status.
    first = await started(request, deltas, parts.comment_seconds)
    events = _events(first, deltas, generation, dialect, parts.metrics)
    return EventStream(events, deltas, first, parts.comment_seconds)


async def _collect(deltas: AsyncGenerator[Delta, None], choices: int) -> list[Delta]:
    """For each choice, its deltas joined into one."""
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
            calls=join_calls(call for part in choice for call in part.calls),
            trace=joined(traces) if (traces := [part.trace for part in choice if part.trace is not None]) else None,
        )
        for index, choice in enumerate(parts)
    ]


async def _events(
    first: "asyncio.Future[Delta]",
    deltas: AsyncGenerator[Delta, None],
    generation: Generation,
    dialect: Dialect,
    metrics: Metrics,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error replaces the remaining events."""
    try:
        for event in dialect.begin():
            yield event
        delta: Delta | None = await first
        while delta is not None:
            for event in dialect.events(delta, generation):
                yield event
            delta = await anext(deltas, None)
        for event in dialect.end(generation):
            yield event
    except Exception as error:
        failure = to_service_error(error)
        if isinstance(failure, InternalError):
            logger.exception("a stream failed")
        metrics.request_failures.labels(failure.code).inc()
        for event in dialect.fail(failure):
            yield event
