"""POST /v1/completions and POST /v1/chat/completions, as streams or as whole answers."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers.answering import ANSWERS, answer
from server.api.answers.dialects import ChatDialect, TextDialect
from server.api.answers.generation import Generation, make_generation
from server.api.answers.routing_trace import TraceWriter
from server.api.fields.completions import DEFAULT_COMPLETION_TOKENS, ChatCompletionRequest, CompletionRequest
from server.api.http.bodies import JsonRoute
from server.api.http.streaming import until_disconnect
from server.api.requests.chat import chat_generation
from server.api.requests.constraints import make_grammar
from server.api.requests.prompts import text_prompt
from server.api.requests.terms import make_terms
from server.api.services import AnswerPartsDep, GenerationPartsDep, LanguageDep, PermitDep, RequestRulesDep
from server.errors import BadRequest, UnsupportedParameter

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", responses=ANSWERS)
async def completions(
    body: CompletionRequest,
    request: Request,
    permit: PermitDep,
    rules: RequestRulesDep,
    language: LanguageDep,
    parts: GenerationPartsDep,
    answer_parts: AnswerPartsDep,
) -> Response:
    terms = make_terms(body, len(body.prompt), request, permit, rules)
    if body.best_of not in (None, body.n):
        raise UnsupportedParameter("best_of: not supported by this server; leave it out or send n's value", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens: 0 asks for nothing unless echo is true", param="max_tokens")
    traces = TraceWriter(body.routing_trace, terms.binding, parts.config)
    model, tokenizer = body.model or rules.model_name, language.tokenizer
    dialect = TextDialect(model, terms.service_tier, body.stream_options, tokenizer, traces)

    async def generation() -> Generation:
        limits = parts.engine.limits
        prompts = [
            await text_prompt(body, place, tokenizer, limits.max_model_len, limits.vocab_size)
            for place in range(len(body.prompt))
        ]
        grammar = await make_grammar(body, language.grammars)
        default = DEFAULT_COMPLETION_TOKENS
        return make_generation(dialect.id, prompts, body, body.max_tokens, default, terms, grammar, parts)

    return await answer(await until_disconnect(request, generation()), dialect, body, request, answer_parts)


@router.post("/v1/chat/completions", responses=ANSWERS)
async def chat_completions(
    body: ChatCompletionRequest,
    request: Request,
    permit: PermitDep,
    rules: RequestRulesDep,
    language: LanguageDep,
    parts: GenerationPartsDep,
    answer_parts: AnswerPartsDep,
) -> Response:
    terms = make_terms(body, 1, request, permit, rules)
    traces = TraceWriter(body.routing_trace, terms.binding, parts.config)
    model, options = body.model or rules.model_name, body.stream_options
    dialect = ChatDialect(model, terms.service_tier, options, language.tokenizer, traces, tools=bool(body.tools))
    generation = chat_generation(body, dialect.id, terms, language, parts)
    return await answer(await until_disconnect(request, generation), dialect, body, request, answer_parts)
