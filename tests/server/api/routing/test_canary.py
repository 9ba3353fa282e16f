"""The canary: a share of the requests that leave the choice to the server, the same ones every time."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.policies.canary import Canary
from server.policies.targets import Automatic, Named, Objective
from tests.server.fakes import fake_policy
from tests.server.serving import ADMIN, Parts, Server, make_store, serving

SHARE = 0.3
KINDS = ("default", "auto")


async def put_canary(server: Server, **body: Any) -> httpx.Response:
    return await server.client.put("/admin/routing/canary", json=body, headers=ADMIN)


async def post(server: Server, action: str) -> httpx.Response:
    return await server.client.post(f"/admin/routing/canary/{action}", headers=ADMIN)


async def routing(server: Server, request_id: str, **fields: Any) -> dict[str, Any]:
    """The answer's routing object; asserts that the header agrees with it."""
    body = {"prompt": "a", "max_tokens": 1, **fields}
    reply = await server.client.post("/v1/completions", json=body, headers={"X-Request-Id": request_id})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["routing"]
    assert reply.headers["X-Routing-Policy"] == found["policy"]
    return found


def some_ids(server: Server) -> tuple[str, str]:
    """An id that the canary takes, and one that it leaves."""
    canary = server.services.store.state.canary
    assert canary is not None
    ids = [f"id-{number}" for number in range(100)]
    return next(each for each in ids if canary.takes(each)), next(each for each in ids if not canary.takes(each))


def test_the_share_is_kept_and_the_same_ids_are_taken() -> None:
    ids = [f"request {number}" for number in range(4000)]
    small, large = Canary(Named("fast"), 0.1), Canary(Named("fast"), 0.5)
    taken = [each for each in ids if small.takes(each)]
    assert len(taken) / len(ids) == pytest.approx(0.1, abs=0.02)
    assert all(large.takes(each) for each in taken)
    assert sum(map(large.takes, ids)) / len(ids) == pytest.approx(0.5, abs=0.03)
    assert all(Canary(Named("fast"), 1).takes(each) for each in ids)
    other = Canary(Named("quality"), 0.1)
    assert sum(map(other.takes, taken)) / len(taken) == pytest.approx(0.1, abs=0.06), "not always the same clients"


async def test_only_requests_that_leave_the_choice_are_taken(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        answer = (await put_canary(server, policy="fast", share=SHARE)).json()
        version = server.services.store.get("fast").version
        canary = {"target": {"policy": "fast"}, "share": SHARE, "policy": "fast", "version": version, "accuracy": 0.0}
        canary |= {"shadow": None}
        assert answer["canary"] == canary
        assert answer["default"]["policy"] == "full"
        assert (await server.client.get("/admin/routing/canary", headers=ADMIN)).json() == answer
        assert (await server.client.get("/v1/routing")).json()["canary"] == canary
        taken, left = some_ids(server)
        leaving: list[dict[str, Any]] = [{}, {"routing": "auto"}, {"service_tier": "auto"}]
        choosing: list[dict[str, Any]] = [
            {"routing": "quality"},
            {"routing": {"policy": "auto", "min_accuracy": 0.5}},
            {"model": "tiny:quality"},
            {"service_tier": "default"},
            {"service_tier": "priority"},
            {"routing": {"phases": [{"policy": "full"}]}},
        ]
        for fields in leaving:
            found = await routing(server, taken, **fields)
            assert (found["policy"], found["reason"]) == ("fast", "canary")
            found = await routing(server, left, **fields)
            assert (found["policy"], found["reason"] in ("default", "auto")) == ("full", True)
        for fields in choosing:
            assert (await routing(server, taken, **fields))["reason"] != "canary", fields
        metrics = await server.metrics()
        asked = {
            kind: metrics[f'ladimo_policy_requests_total{{reason="canary",requested="{kind}",served="fast"}}'] for kind in KINDS
        }
        assert asked == {"default": 2, "auto": 1}, "a metric says what was asked for, not who took the request"
        assert metrics["ladimo_canary_share"] == SHARE


async def test_promote_makes_it_the_default_and_a_rollback_of_the_default_undoes_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await put_canary(server, accuracy=0.5, share=SHARE)
        reply = (await post(server, "promote")).json()
        assert reply["default"]["target"] == {"accuracy": 0.5}
        assert reply["previous_default"]["policy"] == "full"
        assert (await server.client.get("/v1/routing")).json()["canary"] is None
        assert {(await routing(server, f"id-{n}"))["reason"] for n in range(8)} == {"default"}
        back = await server.client.post("/admin/routing/rollback", headers=ADMIN)
        assert back.json()["default"]["policy"] == "full"
        assert (await server.metrics())["ladimo_canary_share"] == 0


async def test_roll_back_ends_it_and_leaves_the_default(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(default=Named("quality"))) as server:
        await put_canary(server, policy="fast", share=1)
        assert (await routing(server, "x"))["policy"] == "fast"
        reply = (await post(server, "rollback")).json()
        assert (reply["canary"], reply["default"]["policy"]) == (None, "quality")
        assert (await routing(server, "x"))["policy"] == "quality"
        for action in ("promote", "rollback"):
            reply = await post(server, action)
            assert (reply.status_code, reply.json()["error"]["code"]) == (409, "no_canary")
        assert len(server.services.store.state.history) == 1, "the default has not changed since the start"


async def test_automatic_control_lowers_the_canary_as_it_lowers_the_default(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(default=Automatic(Objective(ttft_ms=1e6, min_accuracy=0.3)))) as server:
        store = server.services.store
        await put_canary(server, accuracy=0.7, share=1)
        assert (await routing(server, "x"))["accuracy"] == 0.7
        store.auto_accuracy = 0.5
        found = await routing(server, "x")
        assert (found["accuracy"], found["reason"]) == (0.5, "auto")
        store.auto_accuracy = 0.0
        assert (await routing(server, "x"))["accuracy"] == 0.3


async def test_it_survives_a_restart_and_its_policy_cannot_be_removed(tmp_path: Path) -> None:
    first = make_store(directory=tmp_path)
    first.commit(first.put("mine", fake_policy("mine", 3).to_dict()))
    async with serving(tmp_path, Parts(directory=tmp_path)) as server:
        await put_canary(server, policy="mine", share=0.25)
        reply = await server.client.delete("/admin/routing/policies/mine", headers=ADMIN)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "policy_in_use")
    again = make_store(directory=tmp_path)
    assert again.state.canary == Canary(Named("mine"), 0.25)
    assert [policy.name for policy in again.resident()] == ["full", "mine"]
    again.commit(again.promote_canary())
    assert make_store(directory=tmp_path).state.default == Named("mine")


async def test_both_policies_are_resident(tmp_path: Path) -> None:
    async with serving(tmp_path, max_policies=1) as server:
        reply = await put_canary(server, policy="fast", share=0.5)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "policy_table_full")
        assert server.services.store.state.canary is None


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "canary", "invalid_policy"),
        ({"policy": "fast"}, "canary", "invalid_policy"),
        ({"share": 0.5}, "canary", "invalid_policy"),
        ({"policy": "fast", "accuracy": 1, "share": 0.5}, "canary", "invalid_policy"),
        ({"auto": {"itl_ms": 5}, "share": 0.5}, "canary", "invalid_policy"),
        ({"policy": "fast", "share": 0}, "share", "invalid_policy"),
        ({"policy": "fast", "share": 1.5}, "share", "invalid_policy"),
        ({"policy": "fast", "share": True}, "share", "invalid_policy"),
        ({"policy": "auto", "share": 0.5}, "policy", "invalid_policy"),
        ({"accuracy": 2, "share": 0.5}, "accuracy", "invalid_policy"),
        ({"policy": "nobody", "share": 0.5}, "policy", "unknown_policy"),
    ],
)
async def test_a_wrong_canary_is_refused_by_name(tmp_path: Path, body: dict[str, Any], param: str, code: str) -> None:
    async with serving(tmp_path) as server:
        error = (await put_canary(server, **body)).json()["error"]
        assert (error["param"], error["code"]) == (param, code)


async def test_it_needs_the_admin_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for method, path in (("GET", ""), ("PUT", ""), ("POST", "/promote"), ("POST", "/rollback")):
            reply = await server.client.request(method, f"/admin/routing/canary{path}", json={"policy": "fast", "share": 1})
            assert reply.status_code == 401
