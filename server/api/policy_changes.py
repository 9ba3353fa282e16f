"""Changes of the policies and of the default: first in the engine, then in the store."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.api.admission import Admission
from server.engine.async_engine import AsyncEngine, EngineState
from server.metrics import Metrics
from server.policies.state import State
from server.policies.store import PolicyStore

# Makes a state current on several servers, this one included, or on none.
Share = Callable[[State], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class PolicyChanges:
    """`lock` must be held during a change, because each change builds on the state that the last one left.

    `share`: if several servers have the same policies, makes a change on all of them.
    """

    store: PolicyStore
    engine: AsyncEngine
    admission: Admission
    metrics: Metrics
    lock: asyncio.Lock
    share: Share | None = None

    async def commit(self, state: State, swap: bool = False) -> float:
        """Make `state` current. Returns the seconds until all engines had its policies.

        Raises EngineDead, Loading or PolicyTableFull, and what `share` raises. Then nothing has changed.
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
            if self.share is None:
                seconds = await self.install(state)
            else:
                await self.share(state)
                seconds = time.monotonic() - started
        except Exception:
            if swap:
                metrics.policy_swaps.labels("failed").inc()
            raise
        if swap:
            metrics.policy_swaps.labels("ok").inc()
            metrics.policy_swap_duration.observe(seconds)
        return seconds

    async def prepare(self, state: State) -> None:
        """Make the policies of both the present state and `state` resident in the engine, so that `install` cannot fail.

        Raises EngineDead or PolicyTableFull. Then the present state's policies are resident as before.
        """
        wanted = [*self.store.resident(), *self.store.resident(state)]
        await self.engine.activate(list(dict.fromkeys(wanted)))

    async def install(self, state: State) -> float:
        """Make the policies of the default and of the canary resident in the engine, then make `state` current here.

        Returns the seconds that the engine took. Raises EngineDead or PolicyTableFull. Then nothing has changed.
        """
        started = time.monotonic()
        await self.engine.activate(self.store.resident(state))
        seconds = time.monotonic() - started
        await asyncio.to_thread(self.store.commit, state)
        show_policies(self.store, self.metrics)
        return seconds


def show_policies(store: PolicyStore, metrics: Metrics) -> None:
    """Update the metrics of routing."""
    route, canary = store.resolve(), store.state.canary
    versions = {name: policy.version for name, policy in store.policies().items()}
    floor = None if store.objective is None else store.objective.min_accuracy
    metrics.show_policies(versions, route.policy.name, route.accuracy, floor)
    metrics.canary_share.set(0 if canary is None else canary.share)
