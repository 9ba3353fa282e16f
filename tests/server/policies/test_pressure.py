"""Under pressure: who allows less accuracy gets less instead of a refusal, and who does not learns what would be served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.policies.controller import Control
from server.policies.costs import StepCosts
from tests.server.serving import ADMIN, Parts, Server, make_store, serving

FLOOR = 0.3


@asynccontextmanager
async def pressed(
    tmp_path: Path, waiting: int, auto: bool = True, tier: str = "auto", ttft_ms: float | None = None
) -> AsyncIterator[Server]:
    """A server whose queue of 20 has so many sequences of a tier, and whose automatic control has gone down to 0.7. Its engine
    waits."""
    still = Control(interval_seconds=0.01, react_seconds=1e9, dwell_seconds=1e9)
    async with serving(tmp_path, Parts(max_queue=20, control=still), max_num_seqs=2) as server:
        if auto:
            body = {"auto": {"itl_ms": 1e6, "ttft_ms": ttft_ms, "min_accuracy": FLOOR}}
            assert (await server.client.put("/admin/routing/default", json=body, headers=ADMIN)).status_code == 200
            await server.until(lambda: server.services.automatic_control.status() is not None)
            server.services.store.auto_accuracy = 0.7
        server.runner.gate.clear()
        first = asyncio.create_task(server.complete("a", n=2, max_tokens=1))
        await server.submitted(2)
        rest = [asyncio.create_task(server.complete("a", n=1, max_tokens=1, service_tier=tier)) for _ in range(waiting)]
        await server.submitted(2 + waiting)
        yield server
        server.runner.gate.set()
        await asyncio.gather(first, *rest)


async def ask(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """The reply. Whatever waits is let go once the request is in the queue."""
    asked = server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields}, headers=headers or {})
    task = asyncio.create_task(asked)
    in_flight = server.services.admission.in_flight
    await server.until(lambda: task.done() or server.services.admission.in_flight > in_flight)
    if not task.done():
        server.runner.gate.set()
    return await task


def routed(reply: httpx.Response) -> tuple[str, float, str]:
    routing = reply.json()["routing"]
    return routing["policy"], routing["accuracy"], routing["reason"]


async def test_with_room_in_the_queue_the_controller_alone_decides(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=15) as server:
        assert routed(await ask(server)) == ("quality", 0.7, "auto")


async def test_in_a_nearly_full_queue_a_request_gets_what_it_allows(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=18) as server:
        assert routed(await ask(server)) == ("fast", FLOOR, "queue")
    async with pressed(tmp_path, waiting=18) as server:
        own = {"policy": "full", "min_accuracy": 0.5}
        assert routed(await ask(server, routing=own)) == ("balanced", 0.5, "queue")


async def test_a_request_that_insists_is_told_what_would_be_served_and_that_is_served(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=18) as server:
        for fields in ({"routing": "full"}, {"routing": {"accuracy": 0.9}}, {"service_tier": "default"}):
            reply = await ask(server, **fields)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["accuracy"]) == (429, "queue_full", 0.7)
            assert int(reply.headers["retry-after"]) >= 1
        samples = await server.metrics()
        assert samples['ladimo_admission_rejections_total{reason="queue_full"}'] == 3
        assert (await ask(server, routing={"accuracy": error["accuracy"]})).status_code == 200


def routed_phases(reply: httpx.Response) -> list[tuple[str, float, str]]:
    return [(phase["policy"], phase["accuracy"], phase["reason"]) for phase in reply.json()["routing"]["phases"]]


def phases(first: Any, second: Any) -> dict[str, Any]:
    return {"phases": [{**first, "until": "c"}, second]}


AUTO, HALF = {"policy": "auto"}, {"policy": "full", "min_accuracy": 0.5}
FULL, QUALITY, FAST = {"policy": "full"}, {"policy": "quality"}, {"policy": "fast"}


async def test_in_a_nearly_full_queue_each_phase_gets_what_it_allows_and_one_that_insists_counts_for_all(
    tmp_path: Path,
) -> None:
    async with pressed(tmp_path, waiting=18) as server:
        for insists in (phases(AUTO, FULL), phases({"accuracy": 0.9}, AUTO)):
            reply = await ask(server, routing=insists)
            assert (reply.status_code, reply.json()["error"]["accuracy"]) == (429, 0.7)
        lowered = [("fast", FLOOR, "queue"), ("balanced", 0.5, "queue")]
        assert routed_phases(await ask(server, routing=phases(AUTO, HALF))) == lowered
    async with pressed(tmp_path, waiting=18) as server:
        mixed = [("quality", pytest.approx(2 / 3), "body"), ("fast", FLOOR, "queue")]
        assert routed_phases(await ask(server, routing=phases(QUALITY, AUTO))) == mixed
    async with pressed(tmp_path, waiting=18) as server:
        server.services.store.auto_accuracy = 1.0  # nothing is kept for those who accept less
        mixed = [("full", 1.0, "body"), ("fast", FLOOR, "queue")]
        assert routed_phases(await ask(server, routing=phases(FULL, AUTO))) == mixed


async def test_the_tier_that_goes_first_keeps_its_place_and_its_policy(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=18) as server:
        assert routed(await ask(server, service_tier="priority")) == ("full", 1.0, "tier")


async def test_without_automatic_control_nothing_is_lowered_or_kept(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=18, auto=False) as server:
        assert routed(await ask(server, routing={"policy": "full", "min_accuracy": 0.1})) == ("full", 1.0, "body")


async def test_a_full_queue_refuses_everybody_and_promises_nothing(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=20) as server:
        asked: list[dict[str, Any]] = [{}, {"routing": {"accuracy": 0}}]
        for fields in asked:
            reply = await ask(server, **fields)
            assert reply.status_code == 429 and "accuracy" not in reply.json()["error"]


def teach(server: Server) -> None:
    """A token takes as many seconds as its price, in any batch, and answers have 20 of them. A request that comes now waits for
    10 s, which is half of an answer."""
    meter = server.services.admission.meter
    meter.costs = StepCosts()
    for price in (0.5, 0.75, 1.0) * 4:
        for rows in (1, 2):
            meter.costs.observe({price: rows}, {}, price)
    meter._output.add(20.0)


# The whole answer takes 31 s under full, 29 under quality, 27 under balanced, 25 under fast.
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1000, ("quality", 0.7, "auto")),
        (28, ("balanced", pytest.approx(1 / 3), "deadline")),  # no less than is needed
        (15, ("fast", FLOOR, "deadline")),  # too late at any accuracy; it may turn out to be short
    ],
)
async def test_a_near_deadline_lowers_who_allows_it(tmp_path: Path, seconds: int, expected: tuple[str, float, str]) -> None:
    async with pressed(tmp_path, waiting=0) as server:
        teach(server)
        assert routed(await ask(server, {"X-Request-Timeout": str(seconds)}, max_tokens=30)) == expected


async def test_a_short_answer_meets_its_deadline(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=0) as server:
        teach(server)
        assert routed(await ask(server, {"X-Request-Timeout": "15"}, max_tokens=2)) == ("quality", 0.7, "auto")


async def test_who_insists_learns_at_which_accuracy_the_answer_would_be_in_time(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=0) as server:
        teach(server)
        late = {"X-Request-Timeout": "28"}
        reply = await ask(server, late, routing="full", max_tokens=30)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["accuracy"]) == (429, "queue_full", pytest.approx(1 / 3))
        assert int(reply.headers["retry-after"]) in (3, 4)
        assert routed(await ask(server, late, routing={"accuracy": error["accuracy"]}, max_tokens=30))[0] == "balanced"
    async with pressed(tmp_path, waiting=0) as server:  # too late at any accuracy: it runs, and may turn out to be short
        teach(server)
        assert routed(await ask(server, {"X-Request-Timeout": "15"}, routing="full", max_tokens=30))[0] == "full"


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (phases(AUTO, HALF), [("balanced", pytest.approx(1 / 3), "deadline"), ("balanced", 0.5, "deadline")]),
        (phases(FULL, AUTO), [("full", 1.0, "body"), ("balanced", pytest.approx(1 / 3), "deadline")]),
        (phases(FAST, FULL), [("fast", 0.0, "body"), ("full", 1.0, "body")]),  # in time, if the second phase is short
        (phases(QUALITY, FULL), pytest.approx(1 / 3)),
    ],
)
async def test_a_near_deadline_lowers_the_phases_that_allow_it(tmp_path: Path, routing: dict[str, Any], expected: Any) -> None:
    """`expected`: the phases, or the accuracy that the refusal names."""
    async with pressed(tmp_path, waiting=0) as server:
        teach(server)
        reply = await ask(server, {"X-Request-Timeout": "28"}, routing=routing, max_tokens=30)
        if isinstance(expected, list):
            assert routed_phases(reply) == expected
        else:
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["accuracy"]) == (429, "queue_full", expected)
            assert int(reply.headers["retry-after"]) in (1, 2)


def least_wait_ms(sequences: int) -> float:
    """So many of them wait until two at a time have made 20 tokens each, at the lowest price."""
    return 1000 * sequences * 10 * make_store(None).price_at(FLOOR)


@pytest.mark.parametrize(
    ("share", "fields", "expected"),
    [
        (1.2, {}, ("quality", 0.7, "auto")),
        (1.05, {}, ("fast", FLOOR, "queue")),
        (1.05, {"routing": "full"}, 0.7),
        (0.9, {}, None),
        (0.9, {"routing": "fast"}, None),
        (0.9, {"service_tier": "priority"}, ("full", 1.0, "tier")),
        (0.9, {"service_tier": "flex"}, ("fast", pytest.approx(0.0), "tier")),
        (0.9, {"priority": 1}, ("quality", 0.7, "auto")),
    ],
)
async def test_a_request_that_would_be_late_at_any_accuracy_is_refused_at_once(
    tmp_path: Path, share: float, fields: dict[str, Any], expected: Any
) -> None:
    """`share`: the target over the least wait. `expected`: the route, or the accuracy that the refusal names."""
    async with pressed(tmp_path, waiting=2, ttft_ms=share * least_wait_ms(3)) as server:
        teach(server)
        reply = await ask(server, **fields)
        if isinstance(expected, tuple):
            assert routed(reply) == expected
            return
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error.get("accuracy")) == (429, "queue_full", expected)
        assert int(reply.headers["retry-after"]) >= 1
        if expected is None:
            assert "at any accuracy" in error["message"]


async def test_requests_that_let_others_go_first_make_nobody_late(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=2, tier="flex", ttft_ms=1.2 * least_wait_ms(1)) as server:
        teach(server)
        assert server.services.admission.patient == 2
        assert routed(await ask(server)) == ("quality", 0.7, "auto")
        await server.idle()
        assert (server.services.admission.patient, server.services.admission.patient_tokens) == (0, 0)


async def test_while_the_costs_are_a_guess_nobody_is_refused(tmp_path: Path) -> None:
    async with pressed(tmp_path, waiting=2, ttft_ms=1.0) as server:
        server.services.admission.meter.costs = StepCosts()
        server.services.admission.meter.costs.observe({1.0: 2}, {}, 1.0)
        server.services.admission.meter._output.add(20.0)
        assert routed(await ask(server)) == ("quality", 0.7, "auto")
