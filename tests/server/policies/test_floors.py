"""No decision of automatic control takes a phase below its floor, or changes one that insists: neither for the queue, nor for a
deadline, nor while the request waits."""

import asyncio
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from server.api.admission import Admission
from server.api.requests.pressure import meet_deadline, under_pressure
from server.errors import QueueFull
from server.policies.load_meter import Queue
from server.policies.route import Route
from server.policies.store import PolicyStore
from server.policies.targets import Ask, AtAccuracy, Automatic, InPhases, Named, Objective, PhaseTarget
from server.policies.tiers import Tier
from tests.server.serving import make_store

SHARE = st.floats(0, 1)
TARGETS = st.sampled_from([Automatic(), Named("full"), Named("quality"), Named("fast")]) | st.builds(AtAccuracy, SHARE)
PHASES = st.lists(st.builds(PhaseTarget, TARGETS, st.just("x"), st.none() | SHARE), min_size=1, max_size=4)


@dataclass
class Pressure:
    """In the place of `Admission`. `share`: how full the queue is. An answer takes as many seconds as its price."""

    share: float
    meter: Any = field(default_factory=lambda: SimpleNamespace(wait_seconds=lambda queue: 1.0))

    @property
    def queue(self) -> Queue:
        return Queue(in_flight=round(100 * self.share), waiting_tokens=0, batch=0, places=100)

    def answer_seconds(self, price: float, token_limit: int | None) -> float:
        return price

    def refuse(self, error: QueueFull) -> None:
        raise error


async def admitted(store: PolicyStore, route: Route, pressure: Pressure, seconds: float | None) -> Route:
    """The route as admission lets it in. Raises QueueFull."""
    admission = cast(Admission, pressure)
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    return under_pressure(meet_deadline(route, deadline, None, store, admission), Tier(), 0, store, admission)


@given(
    floor=SHARE,
    phases=PHASES,
    at_arrival=SHARE,
    queue=SHARE,
    seconds=st.none() | SHARE,
    knob=st.lists(SHARE, min_size=1, max_size=4),
)
def test_no_decision_takes_a_phase_below_its_floor_or_changes_one_that_insists(
    floor: float, phases: list[PhaseTarget], at_arrival: float, queue: float, seconds: float | None, knob: list[float]
) -> None:
    store = make_store(Automatic(Objective(itl_ms=1.0, min_accuracy=floor)))
    asked = [store.resolve(Ask(phase.target, "body", "routing")) for phase in phases]  # at accuracy 1, without a condition
    store.auto_accuracy = max(at_arrival, floor)
    route = store.resolve(Ask(InPhases(tuple(phases)), "body", "routing"))
    insists = any(part.floor is None for part in route.parts)
    with suppress(QueueFull) if insists else nullcontext():  # only a request that insists is refused
        route = asyncio.run(admitted(store, route, Pressure(queue), seconds))
    routes = [route]
    for accuracy in knob:
        store.auto_accuracy = max(accuracy, floor)
        routes.append(store.followed(routes[-1]))
    for each in routes:
        assert each.requested == "phases" and len(each.parts) == len(phases)
        first = each.parts[0]
        assert (each.policy, each.accuracy, each.reason) == (first.policy, first.accuracy, first.reason)
        for part, phase, own, at_first in zip(each.parts, phases, asked, route.parts, strict=True):
            assert at_first.reason in ("auto", "body") or part == at_first, "what the queue or a deadline has decided stays"
            assert part.accuracy is not None and own.accuracy is not None
            if isinstance(phase.target, Automatic) or phase.min_accuracy is not None:
                assert min(max(floor, phase.min_accuracy or 0.0), own.accuracy) <= part.accuracy <= own.accuracy
            else:
                assert (part.policy, part.accuracy, part.reason) == (own.policy, own.accuracy, "body")
