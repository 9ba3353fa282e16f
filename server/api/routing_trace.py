"""Routing traces on the wire: the experts behind each token of a choice."""

from collections.abc import Sequence
from typing import Any

from server.engine.messages import RoutingTrace


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One after another, as they came; there is at least one."""
    return RoutingTrace(
        tokens=tuple(experts for trace in traces for experts in trace.tokens),
        prompt=traces[0].prompt,
        recomputed=traces[-1].recomputed,
    )


def without_answer(trace: RoutingTrace) -> RoutingTrace:
    """Of a prompt whose one drawn token is not shown: the pass that drew it is the prompt's last."""
    return RoutingTrace((), None if trace.prompt is None else trace.prompt + trace.tokens, trace.recomputed)


def wire_trace(trace: RoutingTrace, layers: Sequence[int], first: bool, last: bool) -> dict[str, Any]:
    """A choice's `routing_trace`, or its part in one chunk: what is said once comes with the `first` or the `last` chunk."""
    wire: dict[str, Any] = {"layers": layers} if first else {}
    if trace.prompt is not None:
        wire["prompt"] = trace.prompt
    wire["tokens"] = trace.tokens
    if last and trace.recomputed:
        wire["recomputed"] = trace.recomputed
    return wire
