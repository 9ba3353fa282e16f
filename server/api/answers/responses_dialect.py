"""The dialect of /v1/responses: an answer is one object, or a stream of events that build it."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.answers.dialects import Dialect
from server.api.answers.generation import Delta, Generation
from server.api.answers.logprobs import ScoredToken, chat_logprobs
from server.api.answers.routing_trace import TraceWriter, joined
from server.api.fields.responses import ResponsesRequest
from server.api.http.streaming import sse
from server.engine.messages import RoutingTrace
from server.engine.request import FinishReason
from server.errors import BadRequest, QueueFull, ServiceError
from server.text.answer_text import CallDelta
from server.text.tokenizer import Tokenizer

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


class ResponsesDialect(Dialect):
    """`_output` has the items of the response so far. The last item is open while more of it may come. A whole answer is built
    in the same way, from a single delta."""

    operation = "chat"

    def __init__(
        self, body: ResponsesRequest, model: str, service_tier: str, tokenizer: Tokenizer, traces: TraceWriter
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._body, self._tokenizer, self._service_tier = body, tokenizer, service_tier
        self._created, self._model = int(time.time()), model
        self._trace_writer, self._traces = traces, list[RoutingTrace]()
        self._output: list[dict[str, Any]] = []
        self._open = False
        self._sequence = 0
        self._finish_reason: str | None = None
        self._unsaid: tuple[ScoredToken, ...] = ()  # tokens whose text has not come yet

    def answer(self, wholes: Sequence[Delta], generation: Generation) -> dict[str, Any]:
        (whole,) = wholes
        self.events(whole, generation)
        self._close_last()
        return self._ended(generation)

    def begin(self) -> list[bytes]:
        response = self._response(IN_PROGRESS)
        return [self._event(name, response=response) for name in ("response.created", "response.in_progress")]

    def events(self, delta: Delta, generation: Generation) -> list[bytes]:
        self._finish_reason = delta.finish_reason
        if delta.trace is not None:
            self._traces.append(delta.trace)
        self._unsaid += delta.tokens
        events = self._say(delta.text) if delta.text else []
        for call in delta.calls:
            events += self._call(call)
        return events

    def end(self, generation: Generation) -> list[bytes]:
        events = self._close_last()
        response = self._ended(generation)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def fail(self, error: ServiceError) -> list[bytes]:
        """The response so far, and then the error in this server's form, for which OpenAI's clients raise an exception."""
        for item in self._output[-1:] if self._open else ():
            item["status"] = INCOMPLETE
        kind = "invalid_prompt" if isinstance(error, BadRequest) else "server_error"
        kind = "rate_limit_exceeded" if isinstance(error, QueueFull) else kind
        described = error.to_dict()
        response = self._response(FAILED) | {"error": {"code": kind, "message": described["error"]["message"]}}
        flat = {name: described["error"][name] for name in ("message", "code", "param")}
        return [self._event("response.failed", response=response), self._event("error", **flat, **described)]

    # Items

    def _say(self, text: str) -> list[bytes]:
        """Add text to the open message. If there is none, begin one."""
        events = [] if self._open_type == "message" else [*self._close(), *self._begin_message()]
        (part,) = self._output[-1]["content"]
        logprobs = chat_logprobs(self._unsaid, self._tokenizer)["content"]
        self._unsaid = ()
        part["text"] += text
        part["logprobs"] += logprobs
        return [*events, self._event("response.output_text.delta", **self._part_place(), delta=text, logprobs=logprobs)]

    def _call(self, call: CallDelta) -> list[bytes]:
        """Add to the open call, or begin a new one. Items for calls have no field for log-probabilities."""
        self._unsaid = ()
        events = [] if call.name is None else [*self._close(), *self._begin_call(call.id, call.name)]
        if call.arguments:
            self._output[-1]["arguments"] += call.arguments
            delta = self._event("response.function_call_arguments.delta", **self._item_place(), delta=call.arguments)
            events.append(delta)
        return events

    def _begin_message(self) -> list[bytes]:
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": IN_PROGRESS}
        added = self._add(item | {"content": []})
        self._output[-1]["content"].append(part)
        return [added, self._event("response.content_part.added", **self._part_place(), part=part)]

    def _begin_call(self, call_id: str | None, name: str) -> list[bytes]:
        item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call_id, "name": name}
        return [self._add(item | {"arguments": "", "status": IN_PROGRESS})]

    def _add(self, item: dict[str, Any]) -> bytes:
        self._output.append(item)
        self._open = True
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, cut: bool = False) -> list[bytes]:
        """Close the open item, if there is one. `cut`: it is incomplete."""
        if not self._open:
            return []
        if self._unsaid and self._open_type == "message":
            return [*self._say(""), *self._close(cut)]
        item = self._output[-1]
        item["status"] = INCOMPLETE if cut else COMPLETED
        self._open = False
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._item_place(), **said)]
        else:
            (part,) = item["content"]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **self._part_place(), **said),
                self._event("response.content_part.done", **self._part_place(), part=part),
            ]
        return [*events, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    def _close_last(self) -> list[bytes]:
        """Close the last item at the end of the answer. A response has at least one item."""
        events = [] if self._output else self._begin_message()
        return [*events, *self._close(self._cut)]

    # Parts of events

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        event = sse({"type": kind, **fields, "sequence_number": self._sequence}, kind)
        self._sequence += 1
        return event

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _part_place(self) -> dict[str, Any]:
        return self._item_place() | {"content_index": 0}

    @property
    def _open_type(self) -> str | None:
        return self._output[-1]["type"] if self._open else None

    @property
    def _cut(self) -> bool:
        return self._finish_reason == FinishReason.LENGTH.value

    def _ended(self, generation: Generation) -> dict[str, Any]:
        trace = {}
        if self._traces:
            trace = {"routing_trace": self._trace_writer.write(joined(self._traces), first=True, last=True)}
        response = self._response(INCOMPLETE if self._cut else COMPLETED)
        return response | {"usage": _usage(generation.usage), "routing": generation.routing, **trace}

    def _response(self, status: str) -> dict[str, Any]:
        body, choice = self._body, self._body.tool_choice
        form = None if body.text is None else body.text.format
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self._model,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": self._service_tier,
            "background": False,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if form is None else form.to_dict(), "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.to_dict() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata,
        }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """The usage with this endpoint's names. There are no explicit writes to a cache, and no separate reasoning."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
