"""POST /v1/responses: OpenAI's Responses API without stored conversations. A request is answered as a chat request."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers.answering import ANSWERS, answer
from server.api.answers.responses_dialect import ResponsesDialect
from server.api.answers.routing_trace import TraceWriter
from server.api.fields.responses import ResponsesRequest, in_own_words
from server.api.http.bodies import JsonRoute
from server.api.http.streaming import until_disconnect
from server.api.requests.chat import chat_generation
from server.api.requests.terms import make_terms, refuse_unknown
from server.api.services import AnswerPartsDep, GenerationPartsDep, LanguageDep, PermitDep, RequestRulesDep
from server.errors import BadRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", responses=ANSWERS)
async def responses(
    body: ResponsesRequest,
    request: Request,
    permit: PermitDep,
    rules: RequestRulesDep,
    language: LanguageDep,
    parts: GenerationPartsDep,
    answer_parts: AnswerPartsDep,
) -> Response:
    """Nothing is stored. `store` is false in every answer, and fields that would read stored responses are refused."""
    refuse_unknown(body, rules.strict_fields)
    chat = body.chat
    try:
        terms = make_terms(chat, 1, request, permit, rules)
        traces = TraceWriter(chat.routing_trace, terms.binding, parts.config)
        dialect = ResponsesDialect(body, body.model or rules.model_name, terms.service_tier, language.tokenizer, traces)
        generation = await until_disconnect(request, chat_generation(chat, dialect.id, terms, language, parts))
    except BadRequest as error:
        raise in_own_words(error) from error
    return await answer(generation, dialect, chat, request, answer_parts)
