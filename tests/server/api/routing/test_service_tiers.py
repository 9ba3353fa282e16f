"""`service_tier`: cheap or fast by OpenAI's own field."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ladimo.policy import Frontier, RoutingPolicy
from server.launch import build_services
from server.policies.store import PolicyStore
from server.policies.targets import Automatic, Named, Objective
from server.policies.tiers import FLEX_PRIORITY, PRIORITY_PRIORITY, Tier, parse_tiers
from server.settings import read_settings
from tests.server.fakes import fake_policy
from tests.server.serving import ADMIN, CONFIG, Parts, events, frontier, make_store, policies, serving

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize(
    ("tier", "served", "policy", "reason", "priority"),
    [
        (None, "default", "balanced", "default", 0),
        ("auto", "default", "balanced", "default", 0),
        ("default", "default", "balanced", "default", 0),
        ("flex", "flex", "fast", "tier", FLEX_PRIORITY),
        ("priority", "priority", "full", "tier", PRIORITY_PRIORITY),
    ],
)
async def test_a_tier_chooses_policy_and_priority_and_the_answer_says_so(
    tmp_path: Path, path: str, body: dict[str, Any], tier: str | None, served: str, policy: str, reason: str, priority: int
) -> None:
    async with serving(tmp_path, Parts(default=Named("balanced"))) as server:
        seen = server.watch_requests()
        reply = await server.client.post(path, json=body | {"service_tier": tier})
        answer = reply.json()
        assert reply.headers["X-Routing-Policy"] == policy
        assert (answer["service_tier"], answer["routing"]["policy"], answer["routing"]["reason"]) == (served, policy, reason)
        streamed = await server.client.post(path, json=body | {"service_tier": tier, "stream": True})
        chunks = events(streamed.text)
        assert {chunk["service_tier"] for chunk in chunks} == {served}
        assert chunks[-1]["routing"]["policy"] == policy
        assert {(request.policy.name, request.priority) for request in seen.values()} == {(policy, priority)}
        requested = policy if reason == "tier" else "default"
        sample = f'ladimo_policy_requests_total{{reason="{reason}",requested="{requested}",served="{policy}"}}'
        assert (await server.metrics())[sample] == 2


@pytest.mark.parametrize(
    ("choice", "headers", "model"),
    [({"routing": "quality"}, {}, None), ({}, {"X-Routing-Policy": "quality"}, None), ({}, {}, "tiny:quality")],
)
async def test_a_request_s_own_choices_win_over_the_tier_s_each_for_itself(
    tmp_path: Path, choice: dict[str, Any], headers: dict[str, str], model: str | None
) -> None:
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        body = TEXT | choice | {"service_tier": "flex", "model": model}
        for priority in (None, 0, -3):
            reply = await server.client.post("/v1/completions", json=body | {"priority": priority}, headers=headers)
            answer = reply.json()
            assert (answer["service_tier"], answer["routing"]["policy"]) == ("flex", "quality")
            assert answer["routing"]["reason"] != "tier"
        own = await server.complete("a", max_tokens=1, service_tier="flex", priority=0)
        assert own["routing"]["policy"] == "fast"
        assert [request.priority for request in seen.values()] == [FLEX_PRIORITY, 0, -3, 0]


async def test_a_waiting_priority_request_goes_before_older_ones(tmp_path: Path) -> None:
    async with serving(tmp_path, max_num_seqs=1) as server:
        order = server.watch_requests()
        server.runner.gate.clear()
        names = {}

        async def ask(tier: str) -> None:
            names[(await server.complete("a", max_tokens=2, service_tier=tier))["id"]] = tier

        tasks = []
        for number, tier in enumerate(["default", "flex", "default", "priority"]):
            tasks.append(asyncio.create_task(ask(tier)))
            await server.submitted(number + 1)
        server.runner.gate.set()
        await asyncio.gather(*tasks)
        served = [names[request_id.rpartition("-")[0]] for request_id in order]
        assert served[1:] == ["priority", "default", "flex"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_tier_that_is_not_offered_is_refused(tmp_path: Path, path: str) -> None:
    body = TEXT if path == "/v1/completions" else CHAT
    async with serving(tmp_path, Parts(tiers=parse_tiers({"batch": {"accuracy": 0.5, "priority": 3}}))) as server:
        for tier in ("flex", "priority", "scale"):
            reply = await server.client.post(path, json=body | {"service_tier": tier})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"], error["code"]) == (400, "service_tier", "invalid_request")
            assert "auto, default, batch" in error["message"]
        reply = await server.client.post(path, json=body | {"service_tier": "batch"})
        assert reply.json()["service_tier"] == "batch"
        assert reply.json()["routing"] | {"accuracy": 0.5, "reason": "tier"} == reply.json()["routing"]


async def test_the_map_is_shown_and_keeps_its_policies(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(tiers={"mini": Tier(Named("fast"), 7), "late": Tier(None, 9)})) as server:
        page = (await server.client.get("/v1/routing")).json()
        shown = {name: (tier["target"], tier["priority"], tier["policy"]) for name, tier in page["service_tiers"].items()}
        assert shown == {
            "auto": (None, 0, "full"),
            "default": (None, 0, "full"),
            "mini": ({"policy": "fast"}, 7, "fast"),
            "late": (None, 9, "full"),
        }


async def test_a_policy_that_a_tier_needs_cannot_be_removed(tmp_path: Path) -> None:
    first = make_store(directory=tmp_path)
    first.commit(first.put("mine", fake_policy("mine", 3).to_dict()))
    async with serving(tmp_path, Parts(directory=tmp_path, tiers={"flex": Tier(Named("mine"))})) as server:
        reply = await server.client.delete("/admin/routing/policies/mine", headers=ADMIN)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "policy_in_use")
        assert "flex" in reply.json()["error"]["message"]
        assert (await server.complete("a", max_tokens=1, service_tier="flex"))["routing"]["policy"] == "mine"


async def test_automatic_control_leaves_a_named_tier_alone(tmp_path: Path) -> None:
    tiers = {"mini": Tier(None, 3)}
    async with serving(tmp_path, Parts(default=Automatic(Objective(itl_ms=10.0)), tiers=tiers)) as server:
        server.services.store.auto_accuracy = 0.0

        async def accuracy(**fields: Any) -> tuple[float, str]:
            routing = (await server.complete("a", max_tokens=1, **fields))["routing"]
            return routing["accuracy"], routing["reason"]

        lowered = {"accuracy": 1.0, "min_accuracy": 0.0}
        assert await accuracy() == await accuracy(service_tier="auto") == (0.0, "auto")
        assert await accuracy(service_tier="auto", routing=lowered) == (0.0, "auto")
        for tier in ("default", "mini"):
            assert await accuracy(service_tier=tier) == (1.0, "default")
            assert await accuracy(service_tier=tier, routing=lowered) == (1.0, "body")
            assert (await accuracy(service_tier=tier, routing="auto"))[0] == 1.0


def test_the_default_map_follows_what_there_is() -> None:
    def flex(checkpoint: dict[str, RoutingPolicy], curve: Frontier | None) -> str:
        store = PolicyStore(CONFIG, checkpoint, curve)
        return store.resolve(store.tier("flex").ask).policy.name

    points = tuple(point for point in frontier().points if point.policy != "fast")
    without_fast = {name: policy for name, policy in policies().items() if name != "fast"}
    assert flex(policies(), frontier()) == "fast"
    assert flex(without_fast, Frontier(points)) == "balanced"  # the cheapest of the frontier
    assert flex({"full": fake_policy("full")}, None) == "full"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be a map"),
        ({"flex": "fast"}, "flex: must be a map"),
        ({"flex": {"policy": "fast", "accuracy": 1}}, "flex: name either"),
        ({"flex": {"policy": "auto"}}, "flex.policy: must be the name"),
        ({"flex": {"accuracy": 2}}, "flex.accuracy: must be a number between 0 and 1"),
        ({"flex": {"polcy": "fast"}}, "flex.polcy: unknown field"),
        ({"flex": {"priority": 1.5}}, "flex.priority: must be a whole number"),
        ({"flex": {"priority": True}}, "flex.priority: must be a whole number"),
        ({"auto": {}}, "auto: always means"),
        ({"default": {"policy": "fast"}}, "default: always means"),
        ({"A tier": {}}, "cannot name a tier"),
    ],
)
def test_bad_maps_are_refused(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tiers(raw)


def test_a_map_comes_from_flag_environment_or_file_and_is_checked_at_start(
    tmp_path: Path, moe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"flex": Tier(Named("fast"), 4)}
    text = '{"flex": {"policy": "fast", "priority": 4}}'
    (tmp_path / "settings.toml").write_text('[service-tiers.flex]\npolicy = "fast"\npriority = 4\n')
    assert read_settings(["m", "--service-tiers", text]).service_tiers == expected
    assert read_settings(["m", "--config", str(tmp_path / "settings.toml")]).service_tiers == expected
    assert read_settings(["m"]).service_tiers is None
    monkeypatch.setenv("LADIMO_SERVICE_TIERS", text)
    assert read_settings(["m"]).service_tiers == expected
    for wrong in ("{", '{"flex": 1}', "[]"):
        with pytest.raises(ValueError, match=r"^--service-tiers \(or LADIMO_SERVICE_TIERS\): [^\n]*$"):
            read_settings(["m", "--service-tiers", wrong])
    missing = read_settings([str(moe_dir), "--service-tiers", '{"flex": {"policy": "gone"}}'])
    with pytest.raises(ValueError, match=r"^the service tier 'flex' cannot be served: [^\n]*'gone'[^\n]*$"):
        build_services(missing)
