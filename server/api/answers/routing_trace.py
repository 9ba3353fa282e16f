"""Routing traces in answers: the experts that ran for each token of a choice."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ladimo.model.config import ModelConfig
from ladimo.policy import RoutingPolicy
from server.api.fields.completions import RoutingTraceField
from server.engine.messages import RoutingTrace
from server.engine.request import TokenExperts


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The parts of one choice's trace in their order, joined. There is at least one part."""
    return RoutingTrace(
        tokens=tuple(experts for trace in traces for experts in trace.tokens),
        prompt=traces[0].prompt,
        recomputed=traces[-1].recomputed,
    )


def without_answer(trace: RoutingTrace) -> RoutingTrace:
    """The trace for max_tokens 0, where the drawn token is not shown. The pass that drew it is the last pass of the prompt."""
    return RoutingTrace((), None if trace.prompt is None else trace.prompt + trace.tokens, trace.recomputed)


@dataclass(frozen=True, slots=True)
class TraceWriter:
    """Writes the traces of one request. `layers`: the numbers of the expert layers. `places`: the most experts that a token may
    run in a layer. `dtype`: the dtype of packed arrays; None: lists are written."""

    layers: Sequence[int]
    places: int
    dtype: np.dtype[Any] | None

    @classmethod
    def of(cls, asked: RoutingTraceField | None, policies: Sequence[RoutingPolicy], config: ModelConfig) -> "TraceWriter":
        """`policies`: those of the request's phases."""
        places = most = 0
        for rule, layer in (
            (rule, layer) for policy in policies for rule, layer in zip(policy.layers, config.layers, strict=True)
        ):
            if rule is not None and layer is not None:
                allowed = layer.num_experts if rule.experts is None else len(rule.experts)
                places, most = max(places, min(rule.top_k, allowed)), max(most, layer.num_experts)
        packed = asked is not None and asked.format == "base64"
        # The largest number of the dtype is padding, so no expert may have it.
        dtype = np.dtype(np.uint8 if most <= np.iinfo(np.uint8).max else "<u2") if packed else None
        return cls(config.moe_layer_indices, places, dtype)

    def write(self, trace: RoutingTrace, first: bool, last: bool) -> dict[str, Any]:
        """A choice's `routing_trace`, or the part in one chunk. `first`, `last`: whether this is the choice's first or last
        chunk, which have the fields that are sent once."""
        wire: dict[str, Any] = {"layers": self.layers} if first else {}
        if trace.prompt is not None:
            wire["prompt"] = self._tokens(trace.prompt)
        wire["tokens"] = self._tokens(trace.tokens)
        if last and trace.recomputed:
            wire["recomputed"] = trace.recomputed
        return wire

    def _tokens(self, tokens: Sequence[TokenExperts]) -> object:
        if self.dtype is None:
            return tokens
        ran = list(chain.from_iterable(tokens))  # by token and layer
        counts = np.fromiter(map(len, ran), np.int64, len(ran))
        packed = np.full((len(ran), self.places), np.iinfo(self.dtype).max, self.dtype)
        packed[np.arange(self.places) < counts[:, None]] = list(chain.from_iterable(ran))
        return {
            "dtype": "uint8" if self.dtype.itemsize == 1 else "uint16",
            "shape": [len(tokens), len(self.layers), self.places],
            "data": b64encode(packed.tobytes()).decode(),
        }
