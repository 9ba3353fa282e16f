"""Requests that wait take the accuracy of the moment they begin, as far as they allow automatic control to choose it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.api.waiting import WaitingRequests
from server.engine.messages import Rebinding, Rebound
from server.policies.controller import Control
from server.policies.route import Route
from server.policies.store import PolicyStore
from server.policies.targets import Ask, AtAccuracy, Automatic, InPhases, Named, Objective, PhaseTarget
from tests.server.serving import ADMIN, Parts, make_store, serving

SHARE = st.floats(0, 1)
TARGETS = st.sampled_from([Automatic(), Named("full"), Named("quality")]) | st.builds(AtAccuracy, SHARE)
IN_PHASES = st.builds(
    InPhases, st.lists(st.builds(PhaseTarget, TARGETS, st.just("x"), st.none() | SHARE), min_size=1, max_size=4).map(tuple)
)
ASKS = st.one_of(
    st.none(),
    st.builds(Ask, st.just(Automatic()), st.just("body"), st.just("routing"), st.none() | SHARE),
    st.builds(Ask, st.sampled_from([Named("full"), Named("quality")]), st.just("body"), st.just("routing"), st.none() | SHARE),
    st.builds(Ask, st.builds(AtAccuracy, SHARE), st.sampled_from(["body", "tier"]), st.just("routing"), st.none() | SHARE),
    st.builds(Ask, IN_PHASES, st.just("body"), st.just("routing")),
)


@dataclass(eq=False)
class Request:
    number: int
    ask: Ask | None
    route: Route
    changes: int = 0

    @property
    def request_ids(self) -> tuple[str, ...]:
        return (f"r{self.number}",)

    def rebind(self, route: Route) -> None:
        self.route = route
        self.changes += 1


def parts(ask: Ask | None) -> Sequence[Ask | PhaseTarget | None]:
    """What is asked for each phase; without phases, for the whole request."""
    return ask.target.phases if ask is not None and isinstance(ask.target, InPhases) else (ask,)


@given(
    floor=SHARE, asks=st.lists(ASKS, max_size=8), knob=st.lists(SHARE, min_size=1, max_size=6), begun=st.sets(st.integers(0, 7))
)
def test_one_decision_gives_each_of_them_its_accuracy_once_and_never_less_than_its_floor(
    floor: float, asks: list[Ask | None], knob: list[float], begun: set[int]
) -> None:
    """`begun`: those of which the engine says that they have begun."""
    store = make_store(Automatic(Objective(itl_ms=1.0, min_accuracy=floor)))
    sent: list[Sequence[Rebinding]] = []
    waiting = WaitingRequests(store, sent.append)
    requests = [Request(number, ask, store.resolve(ask)) for number, ask in enumerate(asks)]
    first = [request.route for request in requests]
    for request in requests:
        waiting.add(request)
    for accuracy in knob:
        store.auto_accuracy = max(accuracy, floor)
        sent.clear()
        before = [request.changes for request in requests]
        waiting.follow()
        waiting.follow()  # the engine has not replied yet: nothing is asked for twice
        assert len(sent) <= 1
        for changes in sent:
            assert len({each.request_ids for each in changes}) == len(changes)
            waiting.rebound(Rebound(tuple(int(each.request_ids[0][1:]) not in begun for each in changes)))
        for request, route, earlier in zip(requests, first, before, strict=True):
            assert request.changes <= earlier + 1
            if request.number in begun:
                assert request.route == route
                continue
            assert request.route == store.resolve(request.ask), "as if it had come now"
            for part, before_all, asked in zip(request.route.parts, route.parts, parts(request.ask), strict=True):
                if not (asked is None or isinstance(asked.target, Automatic) or asked.min_accuracy is not None):
                    assert part == before_all
                    continue
                least = 0.0 if asked is None else asked.min_accuracy or 0.0
                most = 1.0 if part.own is None else part.own.accuracy
                assert part.accuracy is not None and min(max(floor, least), most) <= part.accuracy <= most


def one_waiting(store: PolicyStore) -> tuple[WaitingRequests, Request, list[Sequence[Rebinding]]]:
    sent: list[Sequence[Rebinding]] = []
    waiting, request = WaitingRequests(store, sent.append), Request(0, None, store.resolve())
    waiting.add(request)
    return waiting, request, sent


def test_a_request_that_is_refused_is_asked_for_again_until_it_has_begun() -> None:
    store = make_store(Automatic(Objective(itl_ms=1.0)))
    waiting, request, sent = one_waiting(store)
    store.auto_accuracy = 0.0
    waiting.follow()
    waiting.rebound(Rebound((False,)))
    assert request.route.accuracy == 1
    waiting.follow()
    assert len(sent) == 2
    waiting.remove(request)
    waiting.rebound(Rebound((True,)))  # its client left in the meantime
    assert (request.route.accuracy, len(waiting)) == (1, 0)
    waiting.follow()
    assert len(sent) == 2


def test_without_automatic_control_they_keep_their_routes() -> None:
    store = make_store(Automatic(Objective(itl_ms=1.0)))
    waiting, _, sent = one_waiting(store)
    store.auto_accuracy = 0.0
    store.state = store.set_default({"policy": "quality"})
    waiting.follow()
    assert not sent


def test_requests_of_the_canary_follow_up_to_its_accuracy() -> None:
    store = make_store(Automatic(Objective(itl_ms=1.0, min_accuracy=0.2)))
    store.commit(store.set_canary({"policy": "quality", "share": 1.0}))
    route = store.canary_route("a request", "default")
    assert route is not None and (route.policy.name, route.reason, route.follows) == ("quality", "canary", True)
    store.auto_accuracy = 0.2
    assert (low := store.followed(route)).policy.name == "fast" and (low.accuracy, low.reason) == (0.2, "auto")
    store.auto_accuracy = 1.0
    assert store.followed(low) == route


async def test_answers_headers_and_metrics_tell_of_the_policy_that_ran(tmp_path: Path) -> None:
    still = Control(interval_seconds=0.01, react_seconds=1e9, dwell_seconds=1e9)
    async with serving(tmp_path, Parts(max_queue=20, control=still), max_num_seqs=1) as server:
        body = {"auto": {"itl_ms": 1e6, "min_accuracy": 0.2}}
        assert (await server.client.put("/admin/routing/default", json=body, headers=ADMIN)).status_code == 200
        await server.until(lambda: server.services.automatic_control.status() is not None)
        server.runner.gate.clear()
        running = asyncio.create_task(server.complete("a", max_tokens=2))
        await server.until(lambda: len(server.services.waiting) == 1)
        asked: list[dict[str, Any]] = [
            {},
            {"n": 2},
            {"stream": True, "routing_trace": True},
            {"routing": {"policy": "auto", "min_accuracy": 0.7}},
            {"routing": {"policy": "quality", "min_accuracy": 0.0}},
            {"routing": "full"},
            {"service_tier": "priority"},
        ]
        tasks = []
        for fields in asked:
            fields = {"prompt": "a", "max_tokens": 2, **fields}
            tasks.append(asyncio.create_task(server.client.post("/v1/completions", json=fields)))
            await server.until(lambda: server.services.admission.in_flight == len(tasks) + 1 + (len(tasks) > 1))
        await server.until(lambda: len(server.services.waiting) == 6)
        server.services.store.auto_accuracy = 0.2
        await server.until(lambda: bool(server.services.waiting._asked))  # the engine is in its first step
        server.runner.gate.set()
        assert (await running)["routing"]["policy"] == "full"
        replies = [await task for task in tasks]
        found = [("text/event-stream" in reply.headers["Content-Type"]) or reply.json()["routing"] for reply in replies]
        told = [route if route is True else (route["policy"], route["accuracy"], route["reason"]) for route in found]
        assert told == [
            ("fast", 0.2, "auto"),
            ("fast", 0.2, "auto"),
            True,
            ("quality", 0.7, "auto"),
            ("fast", 0.2, "auto"),
            ("full", 1.0, "body"),
            ("full", 1.0, "tier"),
        ]
        headers = [reply.headers["X-Routing-Policy"] for reply in replies]
        assert headers == ["fast", "fast", "fast", "quality", "fast", "full", "full"]
        assert '"policy":"fast","version"' in replies[2].text
        await server.idle()
        samples = await server.metrics()
        counted = {key: value for key, value in samples.items() if key.startswith("ladimo_policy_requests_total")}
        assert sum(counted.values()) == 8
        assert counted['ladimo_policy_requests_total{reason="auto",requested="default",served="fast"}'] == 3
        assert counted['ladimo_policy_requests_total{reason="auto",requested="quality",served="fast"}'] == 1
        assert counted['ladimo_policy_requests_total{reason="auto",requested="default",served="full"}'] == 1
        assert samples['ladimo_request_success_total{finish_reason="length",policy="fast"}'] == 5
