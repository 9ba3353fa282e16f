"""Changes of the policies and of the default: first in the engine, then in the store."""

import asyncio
import time
from dataclasses import dataclass

from server.api.admission import Admission
from server.engine.async_engine import AsyncEngine, EngineState
from server.metrics import Metrics
from server.policies.state import State
from server.policies.store import PolicyStore


@dataclass(frozen=True, slots=True)
class PolicyChanges:
    """`lock` must be held during a change, because each change builds on the state that the last one left."""

    store: PolicyStore
    engine: AsyncEngine
    admission: Admission
    metrics: Metrics
    lock: asyncio.Lock

    async def commit(self, state: State, swap: bool = False) -> float:
        """Make the policies of the new default and of the canary resident in the engine, then make `state` current.

        Returns the seconds that the engine took.

        Raises EngineDead, Loading or PolicyTableFull. Then nothing has changed.
        """
        store, metrics = self.store, self.metrics
        if self.engine.state is not EngineState.READY:
            error = self.admission.unavailable()
            assert error is not None
            raise error
        route = store.resolve(state=state)
        swap = swap or route.policy != store.resolve().policy
        started = time.monotonic()
        try:
            await self.engine.activate(store.resident(state))
            seconds = time.monotonic() - started
            await asyncio.to_thread(store.commit, state)
        except Exception:
            if swap:
                metrics.policy_swaps.labels("failed").inc()
            raise
        if swap:
            metrics.policy_swaps.labels("ok").inc()
            metrics.policy_swap_duration.observe(seconds)
        show_policies(store, metrics)
        return seconds


def show_policies(store: PolicyStore, metrics: Metrics) -> None:
    """Update the metrics of routing."""
    route, canary = store.resolve(), store.state.canary
    versions = {name: policy.version for name, policy in store.policies().items()}
    floor = None if store.objective is None else store.objective.min_accuracy
    metrics.show_policies(versions, route.policy.name, route.accuracy, floor)
    metrics.canary_share.set(0 if canary is None else canary.share)
