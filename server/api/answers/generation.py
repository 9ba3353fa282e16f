"""Runs one HTTP request as sequences of the engine: checks them, follows them to their ends, and counts them.

make_generation -> Generation -> deltas() -> a dialect writes the deltas, as a stream or as a whole answer
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ladimo.model.config import ModelConfig
from server.api.admission import Permit
from server.api.answers.logprobs import ScoredToken
from server.api.answers.routing_object import routing_object
from server.api.answers.routing_trace import without_answer
from server.api.fields.completions import GenerationFields
from server.api.requests.sampling import check_ids, check_length, choice_seed, make_sampling
from server.api.shadow import ShadowQuality
from server.api.waiting import WaitingRequests
from server.engine.async_engine import AsyncEngine
from server.engine.messages import RoutingTrace, TokenEvent
from server.engine.request import FinishReason, GenerationRequest, LaterPhases, Trace
from server.errors import BadRequest, DeadlineExceeded
from server.metrics import Metrics
from server.policies.route import Binding, Route
from server.policies.targets import PREFILL
from server.text.answer_text import TOOL_CALLS, AnswerText, CallDelta
from server.text.detokenizer import Detokenizer, TokenDecoder
from server.text.grammar import Grammar, GrammarState
from server.text.phase_ends import PhaseEnds
from server.text.tokenizer import Tokenizer
from server.text.tool_parsers import ToolParser

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationParts:
    """The parts of the server that every generation needs."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    metrics: Metrics
    config: ModelConfig
    shadow: ShadowQuality
    waiting: WaitingRequests


@dataclass(frozen=True, slots=True)
class Terms:
    """The conditions under which a request runs.

    `permit`: holds the request's places. `binding`: its route, which may change while it waits. `deadline`: the event loop's
    time at which an unfinished answer is given up; None: never. `flow`: requests of different flows take turns while they wait.
    `service_tier`: the tier that is used. `priority`: lower runs earlier. `received`: the time of arrival in nanoseconds of
    Unix time.
    """

    permit: Permit
    binding: Binding
    deadline: float | None
    flow: str
    service_tier: str
    priority: int
    received: int = field(default_factory=time.time_ns)

    @property
    def route(self) -> Route:
        """The route of now."""
        return self.binding.route


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated before its answer. `offsets`: the character of `text` at which each token begins."""

    text: str
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids. `param`: the name of its field in errors."""

    ids: Sequence[int]
    param: str
    echo: Echo | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one generated token adds to choice `index`. Only the last delta has a finish reason.

    `tokens`: filled if log-probabilities were asked for. The first delta also has those of an echoed prompt. `trace`: set if a
    routing trace was asked for. `calls`: additions to tool calls.
    """

    index: int
    text: str
    finish_reason: str | None
    first: bool
    tokens: tuple[ScoredToken, ...] = ()
    trace: RoutingTrace | None = None
    calls: tuple[CallDelta, ...] = ()


class Choice:
    """One sequence and its text so far. `completion_tokens`: the tokens that were passed on. `phase_tokens`: how many of these
    each phase's policy drew.

    `answer`: False if only the prompt was asked for (max_tokens 0). The engine then still draws a token, which is not shown.
    """

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        text: AnswerText,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        echo: Echo | None = None,
        answer: bool = True,
    ) -> None:
        self.index, self.request = index, request
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.experts_per_token: tuple[float | None, ...] = ()
        self.refined_rows = 0.0
        self.phase_tokens = Counter[int]()
        self.output_ids: list[int] = []
        self.finish_reason: str | None = None
        self.answer = answer
        self._engine, self._echo = engine, echo
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._text = text
        self._offset = 0 if echo is None else len(echo.text)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        first = True
        async with aclosing(self._engine.generate(self.request)) as events:
            async for event in events:
                self.experts_per_token, self.cached_tokens = event.experts_per_token, event.cached_tokens
                self.refined_rows = event.refined_rows
                delta = self._prompt_delta(event) if first else Delta(self.index, "", None, first=False)
                if self.answer:
                    delta = self._extended(delta, event)
                    self.phase_tokens[event.phase] += 1
                else:
                    self.finish_reason = FinishReason.LENGTH.value
                    trace = None if event.trace is None else without_answer(event.trace)
                    delta = replace(delta, finish_reason=self.finish_reason, trace=trace)
                first = False
                yield delta
                if delta.finish_reason is not None:
                    return

    def _prompt_delta(self, event: TokenEvent) -> Delta:
        """The first delta before its generated token is added. It has the echoed prompt, if there is one."""
        if self._echo is None:
            return Delta(self.index, "", None, first=True)
        places = zip(self.request.prompt_ids, self._echo.offsets, event.prompt_logprobs or (), strict=False)
        tokens = tuple(ScoredToken(token_id, offset, logprobs) for token_id, offset, logprobs in places)
        return Delta(self.index, self._echo.text, None, first=True, tokens=tokens)

    def _extended(self, delta: Delta, event: TokenEvent) -> Delta:
        """The delta with the event's token."""
        assert event.token_id is not None
        constraint = self.request.sampling.constraint
        if event.finished is not None and isinstance(constraint, GrammarState) and constraint.problem is not None:
            raise BadRequest(f"the constraint became too complex to follow after {self.completion_tokens} tokens")
        tokens = delta.tokens
        if event.logprobs is not None:
            # The offset of the token itself, even if a stop string holds back or cuts off its text.
            tokens = (*tokens, ScoredToken(event.token_id, self._offset, event.logprobs))
        piece = self._detokenizer.push(event.token_id)
        self._offset += len(piece)
        self.output_ids.append(event.token_id)
        shown = self._text.push(piece, early=len(self.output_ids) <= self.request.sampling.min_tokens)
        text, calls = delta.text + shown.text, shown.calls
        if shown.ended:
            self._engine.finish(self.request.request_id)
            self.finish_reason = self._stopped
        elif event.finished is not None:
            rest = self._text.flush()
            text, calls = text + rest.text, calls + rest.calls
            reason = event.finished.finish_reason
            self.finish_reason = self._stopped if reason is FinishReason.STOP else reason.value
        return replace(delta, text=text, finish_reason=self.finish_reason, tokens=tokens, trace=event.trace, calls=calls)

    @property
    def _stopped(self) -> str:
        return TOOL_CALLS if self._text.called else FinishReason.STOP.value


class Generation:
    """The choices of one HTTP request, `n` for each prompt. `deltas` may be called once."""

    def __init__(self, completion_id: str, terms: Terms, choices: Sequence[Choice], n: int, parts: GenerationParts) -> None:
        self.completion_id, self.choices, self.n = completion_id, choices, n
        self.service_tier = terms.service_tier
        self.received = terms.received
        self._permit, self._deadline, self._binding = terms.permit, terms.deadline, terms.binding
        self._metrics, self._config, self._shadow, self._waiting = parts.metrics, parts.config, parts.shadow, parts.waiting

    @property
    def route(self) -> Route:
        """The route that the request runs under, or that it has while it waits."""
        return self._binding.route

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(choice.request.request_id for choice in self.choices)

    def rebind(self, route: Route) -> None:
        """The engine has given the waiting request another policy."""
        self._binding.route = route
        for choice in self.choices:
            choice.request = choice.request.under(route.policies)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices, in the order in which they come. Closing the generator early aborts running choices. The
        permit is closed before the client can read the end of the answer, so that its next request finds the places free.

        Raises the errors of admission and of the engine, and DeadlineExceeded.
        """
        metrics, permit = self._metrics, self._permit
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        permit.wait(sum(len(choice.request.prompt_ids) for choice in self.choices), self._deadline)
        self._waiting.add(self)
        tasks = [asyncio.create_task(_follow(choice, queue)) for choice in self.choices]
        alarm = self._set_alarm(queue)
        running = len(tasks)  # choices whose end has not been counted
        bound = False  # whether the policy is settled, and the request counted under it
        try:
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if not bound:
                    bound = self._settle()
                choice = self.choices[item.index]
                choice.completion_tokens += choice.answer
                if item.first:
                    permit.started(len(choice.request.prompt_ids))
                if item.finish_reason is not None:
                    running -= 1
                    metrics.request_success.labels(item.finish_reason, self.route.policy.name).inc()
                    self._shadow.finished(choice.request, choice.output_ids)
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            logger.info("aborted: the client left", extra={"completion_id": self.completion_id})
            metrics.request_success.labels(FinishReason.ABORT.value, self.route.policy.name).inc(running)
            raise
        finally:
            if not bound:
                self._settle()
            if alarm is not None:
                alarm.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their errors came through the queue
            permit.close()

    def _settle(self) -> bool:
        """The request has begun, or has ended in the queue. Its policy does not change any more."""
        self._waiting.remove(self)
        self._metrics.policy_requests.labels(self.route.requested, self.route.policy.name, self.route.reason).inc()
        return True

    def _set_alarm(self, queue: "asyncio.Queue[Delta | Exception]") -> asyncio.TimerHandle | None:
        if self._deadline is None:
            return None
        late = DeadlineExceeded("the answer was not finished before the request's deadline")
        return asyncio.get_running_loop().call_at(self._deadline, queue.put_nowait, late)

    @property
    def usage(self) -> dict[str, Any]:
        """The number of tokens so far. A prompt with several choices counts once."""
        firsts = self.choices[:: self.n]
        prompt = sum(len(choice.request.prompt_ids) for choice in firsts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
        }

    @property
    def routing(self) -> dict[str, Any]:
        """The answer's `routing` object, about all choices so far."""
        return routing_object(self.route, self._config, self.choices)


def make_generation(
    completion_id: str,
    prompts: Sequence[Prompt],
    fields: GenerationFields,
    max_tokens: int | None,
    default_max_tokens: int | None,
    terms: Terms,
    grammar: Grammar | None,
    parts: GenerationParts,
    tool_parser: Callable[[], ToolParser] | None = None,
) -> Generation:
    """Check lengths and token ids, and build the choices.

    `max_tokens`: from the request. `default_max_tokens`: used if the request has none; None: the rest of the context.
    `tool_parser`: makes the parser of one choice's calls. Raises BadRequest, ContextLengthExceeded.
    """
    limits = parts.engine.limits
    asked = fields.routing_trace
    trace = None if asked is None else Trace.PROMPT if asked.prompt else Trace.OUTPUT
    choices: list[Choice] = []
    if terms.route.most_policies > limits.max_policies:
        message = f"routing.phases: may need at most {limits.max_policies} different policies on this server"
        raise BadRequest(message, param="routing.phases")
    for prompt in prompts:
        room = check_length(prompt.ids, max_tokens, limits.max_model_len, prompt.param)
        check_ids(prompt.ids, limits.vocab_size, prompt.param)
        tokens = min(default_max_tokens or room, room) if max_tokens is None else max(max_tokens, 1)
        prompt_logprobs = None if prompt.echo is None else fields.num_logprobs
        sampling = make_sampling(fields, tokens, prompt_logprobs, limits.vocab_size)
        for choice in range(fields.n):
            index = len(choices)
            request = GenerationRequest(
                request_id=f"{completion_id}-{index}",
                prompt_ids=tuple(prompt.ids),
                sampling=replace(
                    sampling,
                    seed=choice_seed(sampling.seed, choice),
                    constraint=None if grammar is None else grammar.start(),
                ),
                policy=terms.route.policy,
                priority=terms.priority,
                cache_salt=fields.cache_salt,
                flow=terms.flow,
                trace=trace,
                later=_later_phases(terms.route, parts.tokenizer),
            )
            text = AnswerText(fields.stop, None if tool_parser is None else tool_parser())
            choices.append(Choice(index, request, text, parts.engine, parts.tokenizer, prompt.echo, answer=max_tokens != 0))
    return Generation(completion_id, terms, choices, fields.n, parts)


def _later_phases(route: Route, tokenizer: Tokenizer) -> LaterPhases | None:
    if len(route.phases) < 2:
        return None
    first, *later = route.phases
    ends = [phase.until for phase in route.phases[:-1] if phase.until is not None and phase.until != PREFILL]
    watch = PhaseEnds(ends, tokenizer.token_bytes) if ends else None
    return LaterPhases(tuple(phase.route.policy for phase in later), after_prompt=first.until == PREFILL, watch=watch)


def make_echo(prompt_ids: Sequence[int], decoder: TokenDecoder) -> Echo:
    """An incomplete last character of the prompt is left to the answer."""
    detokenizer = Detokenizer(decoder)
    text, offsets = "", []
    for token_id in prompt_ids:
        offsets.append(len(text))
        text += detokenizer.push(token_id)
    return Echo(text, tuple(offsets))


async def _follow(choice: Choice, queue: "asyncio.Queue[Delta | Exception]") -> None:
    try:
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                queue.put_nowait(delta)
    except Exception as error:  # the reader of the queue raises it again
        queue.put_nowait(error)
