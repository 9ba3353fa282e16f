"""Shadow quality: what the policies cost in accuracy on the traffic of this server.

A sample of finished answers is computed again under accuracy 1, when the engine has nothing else to do. Only sums by policy are
kept. Tokens stay in memory until their replay, and are never written anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.async_engine import AsyncEngine
from server.engine.messages import Replay, Replayed
from server.engine.request import GenerationRequest
from server.metrics import Metrics
from server.policies.sampling import in_share
from server.policies.store import PolicyStore


@dataclass(slots=True)
class _Sums:
    answers: int = 0
    tokens: int = 0
    agreeing: int = 0
    kl: float = 0.0


class ShadowQuality:
    """`share`: of the finished answers that can be compared; 0 turns it off."""

    def __init__(self, engine: AsyncEngine, store: PolicyStore, metrics: Metrics, share: float) -> None:
        self._engine, self._store, self._metrics, self.share = engine, store, metrics, share
        self._sums: dict[str, _Sums] = {}  # by policy version

    def finished(self, request: GenerationRequest, output_ids: Sequence[int]) -> None:
        """Take a finished answer, and have it replayed if it is in the sample.

        These are left out: answers of accuracy 1 itself, answers in phases, answers that are too long for a replay, and answers
        under a batch budget, which depend on the rest of their batch.
        """
        policy, reference = request.policy, self._store.most_accurate
        tokens = len(request.prompt_ids) + len(output_ids)
        if (
            output_ids
            and in_share(request.request_id, self.share, "shadow")
            and policy.version != reference.version
            and request.later is None
            and not policy.has_batch_budget
            and tokens <= self._engine.limits.max_replay_tokens
        ):
            self._engine.replay(Replay(request.prompt_ids, tuple(output_ids), policy, reference))

    def record(self, replayed: Replayed) -> None:
        """Take the result of a replay."""
        sums = self._sums.setdefault(replayed.version, _Sums())
        sums.answers += 1
        sums.tokens += replayed.tokens
        sums.agreeing += replayed.agreeing
        sums.kl += replayed.kl
        self._metrics.record_replay(replayed)

    def figures(self, version: str) -> dict[str, Any] | None:
        """What is known of a policy version since the start; None if none of its answers was replayed."""
        sums = self._sums.get(version)
        if sums is None:
            return None
        agreement, kl = sums.agreeing / sums.tokens, sums.kl / sums.tokens
        return {"answers": sums.answers, "tokens": sums.tokens, "next_token_agreement": agreement, "kl": kl}

    def status(self) -> dict[str, Any] | None:
        """The figures of all policies by name; None while it is off."""
        if not self.share:
            return None
        known = {name: self.figures(policy.version) for name, policy in self._store.policies().items()}
        return {"share": self.share, "policies": {name: figures for name, figures in known.items() if figures is not None}}
