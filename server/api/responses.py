"""POST /v1/responses: OpenAI's Responses API as far as it needs no memory, on the chat endpoint's path."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import ANSWERS, answer
from server.api.bodies import JsonRoute
from server.api.chat import chat_generation
from server.api.responses_dialect import ResponsesDialect
from server.api.responses_schemas import ResponsesRequest, in_own_words
from server.api.routing_trace import TraceWriter
from server.api.services import ServicesDep
from server.api.streaming import until_disconnect
from server.api.terms import make_terms, refuse_unknown
from server.errors import BadRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", responses=ANSWERS)
async def responses(body: ResponsesRequest, request: Request, services: ServicesDep) -> Response:
    """Nothing is stored: `store` is false in every answer, and what would read from the store is refused."""
    refuse_unknown(body, services)
    chat = body.chat()
    try:
        terms = make_terms(chat, 1, request, services)
        traces = TraceWriter.of(chat.routing_trace, terms.route.policy, services.config)
        dialect = ResponsesDialect(body, terms.service_tier, services, traces)
        generation = await until_disconnect(request, chat_generation(chat, dialect.id, terms, services))
    except BadRequest as error:
        raise in_own_words(error) from error
    return await answer(generation, dialect, chat, request, services)
