"""Routing traces in answers: the experts that ran for each token of a choice, and what it refined."""

from base64 import b64encode
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ladimo.model.config import ModelConfig
from server.api.fields.completions import RoutingTraceField
from server.engine.messages import RoutingTrace
from server.engine.request import TokenRouting
from server.policies.route import Binding


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The parts of one choice's trace in their order, joined. There is at least one part."""
    return RoutingTrace(
        tokens=tuple(token for trace in traces for token in trace.tokens),
        prompt=traces[0].prompt,
        recomputed=traces[-1].recomputed,
    )


def without_answer(trace: RoutingTrace) -> RoutingTrace:
    """The trace for max_tokens 0, where the drawn token is not shown. The pass that drew it is the last pass of the prompt."""
    return RoutingTrace((), None if trace.prompt is None else trace.prompt + trace.tokens, trace.recomputed)


class TraceWriter:
    """Writes the traces of one request, as packed arrays or as lists. Its policies are read when the first trace is written,
    because they may change while the request waits."""

    def __init__(self, asked: RoutingTraceField | None, binding: Binding, config: ModelConfig) -> None:
        self._packed = asked is not None and asked.format == "base64"
        self._binding, self._config = binding, config

    @cached_property
    def _places(self) -> int:
        """The most experts that a token may run in a layer, under the policy of any phase."""
        pairs = (
            (rule, layer)
            for policy in self._binding.route.policies
            for rule, layer in zip(policy.layers, self._config.layers, strict=True)
            if rule is not None and layer is not None
        )
        allowed = (min(rule.top_k, layer.num_experts if rule.experts is None else len(rule.experts)) for rule, layer in pairs)
        return max(allowed, default=0)

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        """Of packed arrays. Its largest number is padding, so no expert may have it."""
        return np.dtype(np.uint8 if self._config.max_num_experts <= np.iinfo(np.uint8).max else "<u2")

    def write(self, trace: RoutingTrace, first: bool, last: bool) -> dict[str, Any]:
        """A choice's `routing_trace`, or the part in one chunk. `first`, `last`: whether this is the choice's first or last
        chunk, which have the fields that are sent once."""
        wire: dict[str, Any] = {"layers": self._config.moe_layer_indices} if first else {}
        if first and self._config.nested_bits:
            wire["refinable"] = self._refinable
        if trace.prompt is not None:
            wire["prompt"] = self._experts(trace.prompt)
            if self._config.nested_bits:
                wire["prompt_refined"] = self._refined(trace.prompt)
        wire["tokens"] = self._experts(trace.tokens)
        if self._config.nested_bits:
            wire["refined"] = self._refined(trace.tokens)
        if last and trace.recomputed:
            wire["recomputed"] = trace.recomputed
        return wire

    @property
    def _refinable(self) -> list[int]:
        """The neurons of each expert layer, and the words of the output head."""
        layers = filter(None, self._config.layers)
        return [*(layer.num_experts * layer.moe_intermediate_size for layer in layers), self._config.vocab_size]

    def _experts(self, tokens: Sequence[TokenRouting]) -> object:
        if not self._packed:
            return [token.experts for token in tokens]
        ran = [experts for token in tokens for experts in token.experts]  # by token and layer
        counts = np.fromiter(map(len, ran), np.int64, len(ran))
        packed = np.full((len(ran), self._places), np.iinfo(self._dtype).max, self._dtype)
        packed[np.arange(self._places) < counts[:, None]] = list(chain.from_iterable(ran))
        return _array(packed.reshape(len(tokens), len(self._config.moe_layer_indices), self._places))

    def _refined(self, tokens: Sequence[TokenRouting]) -> object:
        counts = [token.refined for token in tokens]
        if not self._packed:
            return counts
        return _array(np.array(counts, "<u4").reshape(len(tokens), len(self._refinable)))


def _array(numbers: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": f"uint{8 * numbers.itemsize}", "shape": list(numbers.shape), "data": b64encode(numbers.tobytes()).decode()}
