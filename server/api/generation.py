"""One HTTP request as the engine's sequences: checked, admitted, followed to their ends, accounted for.

prepare -> Generation -> deltas() -> completions.py renders them, streamed or whole
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.api.schemas import GenerationFields
from server.api.services import Services
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from server.errors import BadRequest, ContextLengthExceeded
from server.policies.store import Route
from server.text.detokenizer import Detokenizer, StopStrings

logger = logging.getLogger(__name__)

# Division by anything smaller overflows fp32 logits, and the outcome is the greedy one anyway.
SMALLEST_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Delta:
    """What one generated token added to the choice `index`; the last one has a finish reason."""

    index: int
    text: str
    finish_reason: str | None


class Choice:
    """One sequence and its text so far."""

    def __init__(self, index: int, request: GenerationRequest, stops: Sequence[str], services: Services) -> None:
        self.index, self.request = index, request
        self.completion_tokens = 0
        self.experts_per_token: tuple[float | None, ...] = ()
        self.finish_reason: str | None = None
        self._engine = services.engine
        self._detokenizer = Detokenizer(services.tokenizer.decode, request.prompt_ids)
        self._stops = StopStrings(stops)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._engine.generate(self.request)) as events:
            async for event in events:
                assert event.token_id is not None
                self.completion_tokens += 1
                self.experts_per_token = event.experts_per_token
                piece = self._detokenizer.push(event.token_id)
                if event.finished is not None:
                    piece += self._detokenizer.flush()
                text, stopped = self._stops.push(piece)
                if stopped:
                    self._engine.finish(self.request.request_id)
                    self.finish_reason = FinishReason.STOP.value
                elif event.finished is not None:
                    text += self._stops.flush()
                    self.finish_reason = event.finished.finish_reason.value
                yield Delta(self.index, text, self.finish_reason)
                if stopped:
                    return


class Generation:
    """The choices of one HTTP request under one route. `deltas` may be run once."""

    def __init__(self, completion_id: str, route: Route, choices: Sequence[Choice], services: Services) -> None:
        self.completion_id, self.route, self.choices = completion_id, route, choices
        self._services = services

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The choices' deltas as they come. Holds the permit; closing the generator early aborts what still runs.

        Raises what admission and the engine raise.
        """
        metrics, policy = self._services.metrics, self.route.policy.name
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        with self._services.admission.permit(len(self.choices)):
            metrics.policy_requests.labels(self.route.requested, policy, self.route.reason).inc()
            tasks = [asyncio.create_task(_follow(choice, queue)) for choice in self.choices]
            try:
                running = len(tasks)
                while running:
                    item = await queue.get()
                    if isinstance(item, Exception):
                        raise item
                    if item.finish_reason is not None:
                        running -= 1
                        metrics.request_success.labels(item.finish_reason, policy).inc()
                    yield item
            except (GeneratorExit, asyncio.CancelledError):
                logger.info("aborted: the client left", extra={"completion_id": self.completion_id})
                aborted = sum(choice.finish_reason is None for choice in self.choices)
                metrics.request_success.labels(FinishReason.ABORT.value, policy).inc(aborted)
                raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)  # their errors came through the queue

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(choice.request.prompt_ids) for choice in self.choices)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    @property
    def routing(self) -> dict[str, Any]:
        """The answer's `routing` object. Experts per token and active parameters are measured, over all choices."""
        config = self._services.config
        weights = [len(choice.request.prompt_ids) + choice.completion_tokens for choice in self.choices]
        measured = tuple(
            None
            if config.layers[layer] is None
            else _mean([choice.experts_per_token[layer] for choice in self.choices], weights)
            for layer in range(config.num_hidden_layers)
        )
        layers = [experts for experts in measured if experts is not None]
        return {
            "policy": self.route.policy.name,
            "version": self.route.policy.version,
            "accuracy": self.route.accuracy,
            "active_parameters_ratio": config.active_parameters_ratio(measured),
            "experts_per_token": sum(layers) / len(layers) if layers else None,
            "reason": self.route.reason,
        }


def make_generation(
    completion_id: str,
    prompts: Sequence[Sequence[int]],
    fields: GenerationFields,
    max_tokens: int | None,
    default_max_tokens: int | None,
    route: Route,
    services: Services,
    param: str,
) -> Generation:
    """Check lengths and ids and build the choices. `max_tokens` is what the client asked for; `default_max_tokens` None means
    the rest of the context. `param` names the prompt in errors. Raises BadRequest, ContextLengthExceeded."""
    limits = services.engine.limits
    choices = []
    for index, prompt in enumerate(prompts):
        name = f"{param}[{index}]" if len(prompts) > 1 else param
        room = limits.max_model_len - len(prompt)
        if not prompt:
            raise BadRequest(f"{name}: must not be empty", param=name)
        if room < 1:
            raise ContextLengthExceeded(
                f"{name}: has {len(prompt)} tokens; the context is {limits.max_model_len} tokens, one of them for the answer",
                param=name,
            )
        if max_tokens is not None and max_tokens > room:
            raise ContextLengthExceeded(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the context of {limits.max_model_len} tokens",
                param="max_tokens",
            )
        _check_ids(prompt, limits.vocab_size, name)
        tokens = max_tokens or min(default_max_tokens or room, room)
        sampling = _sampling(fields, tokens, limits.vocab_size)
        request = GenerationRequest(f"{completion_id}-{index}", tuple(prompt), sampling, route.policy)
        choices.append(Choice(index, request, fields.stop, services))
    return Generation(completion_id, route, choices, services)


async def _follow(choice: Choice, queue: "asyncio.Queue[Delta | Exception]") -> None:
    try:
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                queue.put_nowait(delta)
    except Exception as error:  # raised again by whoever reads the queue
        queue.put_nowait(error)


def _sampling(fields: GenerationFields, max_tokens: int, vocab_size: int) -> SamplingParams:
    _check_ids(fields.stop_token_ids, vocab_size, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.temperature if fields.temperature >= SMALLEST_TEMPERATURE else 0.0,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        seed=None if fields.seed is None else fields.seed % 2**63,
        ignore_eos=fields.ignore_eos,
        stop_token_ids=frozenset(fields.stop_token_ids),
    )


def _check_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise BadRequest(f"{param}: token id {max(token_ids)} is not below the vocabulary's size {vocab_size}", param=param)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float:
    return sum((value or 0.0) * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
