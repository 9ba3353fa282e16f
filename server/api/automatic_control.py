"""Runs the controller: shows it the load, applies what it decides, and tells operators about it."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from server.api.admission import Admission
from server.api.policy_changes import show_policies
from server.api.waiting import WaitingRequests
from server.metrics import Metrics
from server.policies.controller import Control, Controller, Decision
from server.policies.load_meter import LoadMeter
from server.policies.store import PolicyStore
from server.policies.targets import Objective

MAX_CHANGES = 50

logger = logging.getLogger(__name__)


class AutomaticControl:
    """While the default is automatic, moves the accuracy of the store, and that of the requests that wait. `changes`: the
    latest changes, oldest first."""

    def __init__(
        self,
        store: PolicyStore,
        metrics: Metrics,
        meter: LoadMeter,
        admission: Admission,
        waiting: WaitingRequests,
        timing: Control,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._metrics, self._meter, self._admission = store, metrics, meter, admission
        self._waiting, self._timing, self._clock = waiting, timing, clock
        self._objective: Objective | None = None
        self._controller = Controller(clock(), timing, store.price_at)
        self._last: Decision | None = None
        self.changes: deque[Decision] = deque(maxlen=MAX_CHANGES)

    async def run(self) -> None:
        """Decide again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._timing.interval_seconds)
            self.decide()

    def decide(self) -> None:
        """Take one decision. Does nothing while automatic control is off or the engine is not ready."""
        objective, now = self._store.objective, self._clock()
        queue = self._admission.queue
        if objective is None or queue is None:
            self._objective = self._last = None
            self._metrics.show_signals({})
            return
        if objective != self._objective:  # switched on, or new targets: begin with accuracy 1
            self._objective, self._controller = objective, Controller(now, self._timing, self._store.price_at)
            self._store.auto_accuracy = 1.0
        load = self._meter.load(queue, now, self._controller.changed_at, self._store.price_at)
        before = self._controller.accuracy
        decision = self._last = self._controller.decide(objective, load, now)
        self._metrics.controller_decisions.labels(decision.direction).inc()
        self._metrics.show_signals(decision.signals)
        if decision.direction != "hold":
            self._change(decision, before)
        self._waiting.follow()

    def _change(self, decision: Decision, before: float) -> None:
        """Apply a change from the accuracy `before`, and tell of it."""
        self._store.auto_accuracy = decision.accuracy
        self.changes.append(decision)
        self._metrics.controller_changes.labels(decision.direction, decision.cause).inc()
        policy = self._store.resolve().policy.name
        facts = {name: round(value, 3) for name, value in decision.signals.items()}
        logger.info(
            "automatic control: accuracy %.2f to %.2f, policy %s, because of %s; signals over targets: %s",
            *(before, decision.accuracy, policy, decision.cause, facts),
            extra={"direction": decision.direction, "cause": decision.cause, "accuracy": decision.accuracy, "signals": facts},
        )
        show_policies(self._store, self._metrics)

    def status(self) -> dict[str, Any] | None:
        """What operators see of it, with ages in seconds; None while it is off."""
        if self._last is None:
            return None
        now = self._clock()
        return {**_describe(self._last, now), "changes": [_describe(change, now) for change in self.changes]}


def _describe(decision: Decision, now: float) -> dict[str, Any]:
    return {
        "direction": decision.direction,
        "accuracy": decision.accuracy,
        "cause": decision.cause,
        "seconds_ago": round(now - decision.at, 3),
        "signals": {name: round(value, 4) for name, value in decision.signals.items()},
    }
