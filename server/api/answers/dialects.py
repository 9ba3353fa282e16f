"""Dialects: the forms in which the endpoints write answers and the chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.api.answers.generation import Delta, Generation
from server.api.answers.logprobs import chat_logprobs, text_logprobs
from server.api.answers.routing_trace import TraceWriter
from server.api.fields.completions import StreamOptions
from server.api.http.streaming import DONE, sse
from server.errors import ServiceError
from server.text.answer_text import CallDelta
from server.text.tokenizer import Tokenizer


class Dialect(ABC):
    """Writes the answer of one endpoint, whole or as the events of a stream. Each request has its own object."""

    id: str
    operation: str  # OpenTelemetry's name for the endpoint's operation

    @abstractmethod
    def answer(self, wholes: Sequence[Delta], generation: Generation) -> dict[str, Any]:
        """The whole answer. `wholes`: for each choice, its deltas joined."""

    def begin(self) -> list[bytes]:
        """The events of a stream before the first delta."""
        return []

    @abstractmethod
    def events(self, delta: Delta, generation: Generation) -> list[bytes]:
        """The events of a stream for one delta."""

    @abstractmethod
    def end(self, generation: Generation) -> list[bytes]:
        """The events after the last delta."""

    @abstractmethod
    def fail(self, error: ServiceError) -> list[bytes]:
        """The events of an error, which replace all remaining events."""


class ChoicesDialect(Dialect):
    """The common part of both completion endpoints: objects with a list of choices, and chunks of the same form.

    The chunk in which the last choice ends has the routing object. A chunk with the usage follows, if it is asked for.
    """

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(
        self, model: str, service_tier: str, options: StreamOptions | None, tokenizer: Tokenizer, traces: TraceWriter
    ) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._model, self._tokenizer, self._created = model, tokenizer, int(time.time())
        self._service_tier = service_tier
        self._options = options or StreamOptions.model_validate({})
        self._traces = traces
        self._ended = 0

    def answer(self, wholes: Sequence[Delta], generation: Generation) -> dict[str, Any]:
        choices = [self.choice(whole) | self._trace(whole) for whole in wholes]
        return self._envelope(self.object, choices) | {"usage": generation.usage, "routing": generation.routing}

    def events(self, delta: Delta, generation: Generation) -> list[bytes]:
        chunks = self.chunks(delta)
        self._ended += delta.finish_reason is not None
        if self._ended == len(generation.choices):
            chunks[-1]["routing"] = generation.routing
        if self._options.include_usage:
            for chunk in chunks:
                chunk["usage"] = generation.usage if self._options.continuous_usage_stats else None
        return [sse(chunk) for chunk in chunks]

    def end(self, generation: Generation) -> list[bytes]:
        if not self._options.include_usage:
            return [DONE]
        return [sse(self.chunk([]) | {"usage": generation.usage, "routing": generation.routing}), DONE]

    def fail(self, error: ServiceError) -> list[bytes]:
        return [sse(error.to_dict()), DONE]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One or more chunks for a delta."""
        return [self.chunk([delta])]

    def chunk(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        choices = [self.chunk_choice(delta) | self._trace(delta) for delta in deltas]
        return self._envelope(self.chunk_object, choices)

    def _trace(self, delta: Delta) -> dict[str, Any]:
        if delta.trace is None:
            return {}
        last = delta.finish_reason is not None
        return {"routing_trace": self._traces.write(delta.trace, delta.first, last)}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "service_tier": self._service_tier,
            "choices": choices,
        }

    @abstractmethod
    def choice(self, whole: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def chunk_choice(self, delta: Delta) -> dict[str, Any]: ...


class TextDialect(ChoicesDialect):
    operation = "text_completion"
    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, whole: Delta) -> dict[str, Any]:
        logprobs = text_logprobs(whole.tokens, self._tokenizer) if whole.tokens else None
        return {"index": whole.index, "text": whole.text, "logprobs": logprobs, "finish_reason": whole.finish_reason}

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return self.choice(delta)


class ChatDialect(ChoicesDialect):
    """`tools`: whether there may be calls. Then a chunk without text has no `content`; otherwise its `content` is empty."""

    operation = "chat"
    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        service_tier: str,
        options: StreamOptions | None,
        tokenizer: Tokenizer,
        traces: TraceWriter,
        tools: bool = False,
    ) -> None:
        super().__init__(model, service_tier, options, tokenizer, traces)
        self._tools = tools

    def choice(self, whole: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": whole.text}
        if whole.calls:
            message |= {"content": whole.text or None, "tool_calls": [_call(call) for call in whole.calls]}
        return self._choice(whole, "message", message)

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The finish reason comes in a separate chunk with an empty delta."""
        if delta.finish_reason is None:
            return [self.chunk([delta])]
        said = replace(delta, finish_reason=None)
        trace = None if delta.trace is None else replace(delta.trace, tokens=(), prompt=None)
        end = Delta(delta.index, "", delta.finish_reason, first=False, trace=trace)
        return [self.chunk([each]) for each in ((said, end) if _says_something(said) else (end,))]

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"} if delta.first else {}
        if delta.finish_reason is None and (delta.text or not self._tools):
            message["content"] = delta.text
        if delta.calls:
            message["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.calls]
        return self._choice(delta, "delta", message)

    def _choice(self, delta: Delta, name: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = chat_logprobs(delta.tokens, self._tokenizer) if delta.tokens else None
        return {"index": delta.index, name: message, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _says_something(delta: Delta) -> bool:
    return bool(delta.first or delta.text or delta.calls or delta.tokens or delta.trace is not None)


def _call(call: CallDelta) -> dict[str, Any]:
    """A call, or in a stream an addition to it."""
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"function": function}
    return {"id": call.id, "type": "function", "function": {"name": call.name, **function}}
