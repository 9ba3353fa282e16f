"""Which policy a request runs under, how operators change that, and that running requests do not notice."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from ladimo.checkpoint import read_config
from server.app import Access
from server.policies.targets import AtAccuracy, Named
from tests.server.fakes import fake_policy
from tests.server.real import serving_model
from tests.server.serving import ADMIN, CONFIG, MODEL, TOP_K, Parts, Server, events, frontier, policies, serving, serving_http


async def put_default(server: Server, **target: Any) -> httpx.Response:
    return await server.client.put("/admin/routing/default", json=target, headers=ADMIN)


@pytest.mark.parametrize(
    ("body", "headers", "model", "policy", "reason"),
    [
        ("fast", {"X-Routing-Policy": "balanced"}, f"{MODEL}:quality", "fast", "body"),
        ({"policy": "fast"}, {}, None, "fast", "body"),
        ({"accuracy": 0}, {"X-Routing-Accuracy": "1"}, None, "fast", "body"),
        (None, {"X-Routing-Policy": "balanced"}, f"{MODEL}:quality", "balanced", "header"),
        (None, {"X-Routing-Accuracy": "0.4"}, f"{MODEL}:quality", "balanced", "header"),
        (None, {}, f"{MODEL}:quality", "quality", "model"),
        (None, {}, MODEL, "full", "default"),
        (None, {}, None, "full", "default"),
        ("auto", {"X-Routing-Policy": "fast"}, None, "full", "auto"),
    ],
)
async def test_precedence_and_the_measured_answer(
    tmp_path: Path, body: object, headers: dict[str, str], model: str | None, policy: str, reason: str
) -> None:
    async with serving(tmp_path) as server:
        prompts: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ]
        for path, prompt in prompts:
            fields = {**prompt, "max_tokens": 3, "routing": body, "model": model}
            reply = await server.client.post(path, json=fields, headers=headers)
            routing = reply.json()["routing"]
            top_k = float(TOP_K[policy])
            assert reply.headers["x-routing-policy"] == policy
            assert (routing["policy"], routing["reason"]) == (policy, reason)
            assert routing["version"] == policies()[policy].version
            assert routing["experts_per_token"] == top_k
            assert routing["active_parameters_ratio"] == CONFIG.active_parameters_ratio((top_k, None, top_k))


async def test_accuracy_is_what_was_asked_or_the_place_on_the_frontier(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        asked = await server.complete(max_tokens=1, routing={"accuracy": 0.5})
        assert (asked["routing"]["policy"], asked["routing"]["accuracy"]) == ("balanced", 0.5)
        named = await server.complete(max_tokens=1, routing="balanced")
        assert named["routing"]["accuracy"] == pytest.approx(1 / 3)
        await server.client.put("/admin/routing/policies/mine", json=fake_policy("mine", 3).to_dict(), headers=ADMIN)
        mine = await server.complete(max_tokens=1, routing="mine")
        assert (mine["routing"]["policy"], mine["routing"]["accuracy"]) == ("mine", None)


async def test_a_running_stream_keeps_its_version_and_the_next_request_gets_the_new_one(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        before = await server.complete("a", max_tokens=40)
        other_full = fake_policy("full", 1, "another version")
        release = server.hold_after(3)
        text = ""
        async with server.client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 40, "stream": True}
        ) as reply:
            async for piece in reply.aiter_text():
                if not text:
                    path = "/admin/routing/policies/full"
                    stored = asyncio.create_task(server.client.put(path, json=other_full.to_dict(), headers=ADMIN))
                    swapped = asyncio.create_task(put_default(server, policy="fast"))
                    await asyncio.sleep(0.05)
                    release.set()
                    assert (await stored).status_code == 200
                    assert (await swapped).json()["default"]["policy"] == "fast"
                text += piece
        chunks = events(text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == before["choices"][0]["text"]
        assert chunks[-1]["routing"] == before["routing"]
        after = await server.complete("a", max_tokens=8)
        assert (after["routing"]["policy"], after["routing"]["experts_per_token"]) == ("fast", 1.0)
        renewed = await server.complete("a", max_tokens=8, routing="full")
        assert renewed["routing"]["version"] == other_full.version != before["routing"]["version"]
        assert renewed["routing"]["experts_per_token"] == 1.0


async def test_routing_page_lists_policies_and_frontier(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        routing = (await server.client.get("/v1/routing")).json()
        assert routing["default"] == {
            "target": {"policy": "full"},
            "policy": "full",
            "version": policies()["full"].version,
            "accuracy": 1.0,
        }
        assert {p["name"]: p["version"] for p in routing["policies"]} == {n: p.version for n, p in policies().items()}
        assert [point["policy"] for point in routing["frontier"]] == list(TOP_K)
        assert [point["accuracy"] for point in routing["frontier"]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
        figures = {policy["name"]: policy["figures"] for policy in routing["policies"]}
        for point, measured in zip(routing["frontier"], frontier().points, strict=True):
            costs = measured.token_costs(CONFIG)
            assert costs["prefill_operations_ratio"] == CONFIG.operations_ratio(measured.experts_per_token)
            # The output head counts, too, so the ratio is nearer to 1.
            assert abs(costs["prefill_operations_ratio"] - 1) < abs(measured.active_parameters_ratio - 1)
            assert costs.items() <= point.items()
            assert costs.items() <= figures[point["policy"]].items()


async def test_policies_are_stored_overridden_and_removed(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        client = server.client
        first = await client.put(
            "/admin/routing/policies/mine", json={"layers": fake_policy("x", 1).to_dict()["layers"]}, headers=ADMIN
        )
        assert first.json() == {"name": "mine", "version": fake_policy("mine", 1).version, "previous_version": None}
        second = await client.put("/admin/routing/policies/mine", json=fake_policy("mine", 2).to_dict(), headers=ADMIN)
        assert second.json()["previous_version"] == first.json()["version"]
        assert (await server.complete(max_tokens=1, routing="mine"))["routing"]["experts_per_token"] == 2.0
        assert f"{MODEL}:mine" in [m["id"] for m in (await client.get("/v1/models")).json()["data"]]

        assert (await put_default(server, policy="mine")).status_code == 200
        in_use = await client.delete("/admin/routing/policies/mine", headers=ADMIN)
        assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "policy_in_use")
        await put_default(server, policy="full")
        assert (await client.delete("/admin/routing/policies/mine", headers=ADMIN)).status_code == 200
        assert (await client.delete("/admin/routing/policies/mine", headers=ADMIN)).status_code == 404
        gone = await client.post("/v1/completions", json={"prompt": "a", "routing": "mine"})
        assert gone.json()["error"]["code"] == "unknown_policy"

        assert (await client.delete("/admin/routing/policies/fast", headers=ADMIN)).status_code == 409
        await client.put("/admin/routing/policies/fast", json=fake_policy("fast", 3).to_dict(), headers=ADMIN)
        assert (await server.complete(max_tokens=1, routing="fast"))["routing"]["experts_per_token"] == 3.0
        # The knob serves the versions that were measured.
        assert (await server.complete(max_tokens=1, routing={"accuracy": 0}))["routing"]["experts_per_token"] == 1.0
        restored = await client.delete("/admin/routing/policies/fast", headers=ADMIN)
        assert restored.json()["version"] == policies()["fast"].version


LAYER = {"top_k": 2}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "other", "layers": [LAYER, None, LAYER]}, "name"),
        ({"layers": [LAYER, None]}, "layers"),
        ({}, "layers"),
        ({"layers": [LAYER, LAYER, LAYER]}, "layers[1]"),
        ({"layers": [None, None, LAYER]}, "layers[0]"),
        ({"layers": [{"top_k": 0}, None, LAYER]}, "layers[0].top_k"),
        ({"layers": [LAYER, None, {"top_k": 5}]}, "layers[2].top_k"),
        ({"layers": [LAYER, None, {"top_k": 1, "mass": -1}]}, "layers[2].mass"),
        ({"layers": [LAYER, None, {"top_k": 1, "experts": [4]}]}, "layers[2].experts"),
        ({"layers": [LAYER, None, {"top_k": 1, "relative_floor": 1.5}]}, "layers[2].relative_floor"),
        ({"layers": [LAYER, None, {"top_k": 1, "colour": 1}]}, "layers[2].colour"),
        ({"colour": 1, "layers": []}, "colour"),
    ],
)
async def test_a_broken_policy_is_refused_with_its_first_wrong_field(tmp_path: Path, body: object, param: str) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.put("/admin/routing/policies/fast", json=body, headers=ADMIN)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_policy", param)
        assert server.services.store.state.stored == {}
        assert (await server.complete(max_tokens=1, routing="fast"))["routing"]["version"] == policies()["fast"].version


async def test_a_relative_floor_is_stored_shown_and_obeyed(moe_dir: Path) -> None:
    """At 1 only experts scored as high as the best one stay: one per token. At 0 the policy is the one without the field."""
    model_layers = read_config(moe_dir).layers

    def body(**fields: float) -> dict[str, Any]:
        return {"layers": [None if layer is None else {"top_k": 3, **fields} for layer in model_layers]}

    access = Access(open_admin=True)
    async with serving_model(moe_dir, access=access) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        versions, experts = {}, {}
        for floor in (None, 0, 0.5, 1):
            fields = {} if floor is None else {"relative_floor": floor}
            stored = await client.put("/admin/routing/policies/mine", json=body(**fields))
            versions[floor] = stored.json()["version"]
            asked = {"prompt": "hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "routing": "mine"}
            experts[floor] = (await client.post("/v1/completions", json=asked)).json()["routing"]["experts_per_token"]
        shown = {policy["name"]: policy for policy in (await client.get("/v1/routing")).json()["policies"]}["mine"]
        metrics = (await client.get("/metrics")).text
    assert versions[None] == versions[0] and len(set(versions.values())) == 3
    assert experts[None] == experts[0] == 3 and experts[1] == 1 and 1 < experts[0.5] < 3
    assert shown["version"] == versions[1]
    assert shown["layers"][0]["relative_floor"] == 1.0
    assert f'ladimo_policy_info{{default="false",policy="mine",version="{versions[1]}"}} 1.0' in metrics


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"policy": "nope"}, 404, "unknown_policy", "policy"),
        ({"accuracy": 2}, 400, "invalid_policy", "accuracy"),
        ({"accuracy": True}, 400, "invalid_policy", "accuracy"),
        ({}, 400, "invalid_policy", "default"),
        ({"policy": "fast", "accuracy": 1}, 400, "invalid_policy", "default"),
        ({"auto": {}}, 400, "invalid_policy", "auto.itl_ms"),
        ({"auto": {"itl_ms": 0}}, 400, "invalid_policy", "auto.itl_ms"),
        ({"auto": {"itl_ms": 5, "min_accuracy": 7}}, 400, "invalid_policy", "auto.min_accuracy"),
        ({"auto": {"itl_ms": 5, "speed": 7}}, 400, "invalid_policy", "auto.speed"),
    ],
)
async def test_a_broken_default_is_refused(tmp_path: Path, body: object, status: int, code: str, param: str) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.put("/admin/routing/default", json=body, headers=ADMIN)
        assert reply.status_code == status
        assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param)
        assert server.services.store.state.default == Named("full")


async def test_rollback_restores_default_and_version(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        nothing = await server.client.post("/admin/routing/rollback", headers=ADMIN)
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "no_previous_default")
        await server.client.put("/admin/routing/policies/mine", json=fake_policy("mine", 1).to_dict(), headers=ADMIN)
        old = (await put_default(server, policy="mine")).json()["default"]
        await server.client.put("/admin/routing/policies/mine", json=fake_policy("mine", 4).to_dict(), headers=ADMIN)
        assert (await server.complete(max_tokens=1))["routing"]["experts_per_token"] == 4.0
        back = await server.client.post("/admin/routing/rollback", headers=ADMIN)
        assert back.json()["default"] == old
        assert (await server.complete(max_tokens=1))["routing"]["experts_per_token"] == 1.0
        again = await server.client.post("/admin/routing/rollback", headers=ADMIN)
        assert again.json()["default"]["policy"] == "full"


async def test_stored_policies_and_default_survive_a_restart(tmp_path: Path) -> None:
    parts = Parts(directory=tmp_path / "state")
    async with serving(tmp_path, parts) as server:
        await server.client.put("/admin/routing/policies/mine", json=fake_policy("mine", 3).to_dict(), headers=ADMIN)
        await put_default(server, accuracy=0.4)
        await put_default(server, policy="mine")
    async with serving(tmp_path, parts) as server:
        assert (await server.complete(max_tokens=1))["routing"]["policy"] == "mine"
        await server.client.post("/admin/routing/rollback", headers=ADMIN)
        assert (await server.complete(max_tokens=1))["routing"]["accuracy"] == 0.4


async def test_a_full_policy_table_refuses_a_swap_and_keeps_a_request_waiting(tmp_path: Path) -> None:
    """The swap changes nothing; the request is answered once a row is free, or given up at its deadline."""
    async with serving(tmp_path, max_policies=2) as server:
        server.runner.gate.clear()
        held = [asyncio.create_task(server.complete(max_tokens=3, routing=name)) for name in ("full", "fast")]
        await server.submitted(2)
        swap = asyncio.create_task(put_default(server, policy="balanced"))
        asked = {"prompt": "a", "max_tokens": 3, "routing": "quality"}
        late = asyncio.create_task(server.client.post("/v1/completions", json=asked, headers={"X-Request-Timeout": "0.05"}))
        third = asyncio.create_task(server.client.post("/v1/completions", json=asked))
        engine = server.services.engine
        await server.until(lambda: len(engine._streams) >= 3 and len(engine._calls) == 1)  # all are in the mailbox
        assert (await late).status_code == 504
        server.runner.gate.set()
        refused, answered = await swap, await third
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "policy_table_full")
        assert (answered.status_code, answered.json()["routing"]["policy"]) == (200, "quality")
        assert [body["routing"]["policy"] for body in await asyncio.gather(*held)] == ["full", "fast"]
        assert server.services.store.state.default == Named("full")
        samples = await server.metrics()
        assert samples['ladimo_policy_swaps_total{result="failed"}'] == 1


async def test_automatic_default_is_followed_within_each_request_s_floor(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reply = await put_default(server, auto={"itl_ms": 1000, "min_accuracy": 0.1})
        assert reply.json()["default"]["target"] == {"auto": {"itl_ms": 1000.0, "ttft_ms": None, "min_accuracy": 0.1}}
        server.services.store.auto_accuracy = 0.34

        async def routed(routing: object) -> tuple[str, float, str]:
            answer = (await server.complete(max_tokens=1, routing=routing))["routing"]
            return answer["policy"], answer["accuracy"], answer["reason"]

        assert await routed(None) == ("balanced", 0.34, "auto")
        assert await routed("auto") == ("balanced", 0.34, "auto")
        assert await routed({"policy": "auto", "min_accuracy": 0.7}) == ("quality", 0.7, "auto")
        assert await routed({"accuracy": 1}) == ("full", 1.0, "body")
        assert await routed({"accuracy": 1, "min_accuracy": 0.7}) == ("quality", 0.7, "auto")
        assert await routed({"policy": "full", "min_accuracy": 0}) == ("balanced", 0.34, "auto")
        assert await routed({"policy": "fast", "min_accuracy": 0}) == ("fast", 0.0, "body")
        server.services.store.auto_accuracy = 0.0
        assert (await routed(None))[1] == 0.1


async def test_defaults_given_at_the_start(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(default=AtAccuracy(0.4))) as server:
        routing = (await server.complete(max_tokens=1))["routing"]
        assert (routing["policy"], routing["accuracy"], routing["reason"]) == ("balanced", 0.4, "default")


ADMIN_CALLS = [
    ("PUT", "/admin/routing/policies/mine"),
    ("DELETE", "/admin/routing/policies/mine"),
    ("PUT", "/admin/routing/default"),
    ("POST", "/admin/routing/rollback"),
    ("POST", "/admin/drain"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN_CALLS)
async def test_admin_routes_need_the_admin_key(tmp_path: Path, method: str, path: str) -> None:
    async with serving(tmp_path, Parts(access=Access(api_keys=["user-key"]))) as server:
        for key in ("user-key", "admin-key", ""):
            closed = await server.client.request(method, path, json={}, headers={"Authorization": f"Bearer {key}"})
            assert (closed.status_code, closed.json()["error"]["code"]) == (403, "admin_forbidden")
    async with serving(tmp_path, Parts(access=Access(api_keys=["user-key"], admin_key="admin-key"))) as server:
        for headers in ({}, {"Authorization": "Bearer user-key"}, {"Authorization": "Basic admin-key"}):
            wrong = await server.client.request(method, path, json={}, headers=headers)
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await server.client.request(method, path, json={}, headers=ADMIN)).status_code not in (401, 403)
        assert not server.services.admission.draining or path == "/admin/drain"


async def test_insecure_admin_is_open_to_this_machine_only(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(access=Access(open_admin=True))) as server:
        url, body = "/admin/routing/default", {"policy": "fast"}
        assert (await server.client.put(url, json=body)).status_code == 200
        same = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}
        assert (await server.client.put(url, json=body, headers=same)).status_code == 200
        for hostile in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
            assert (await server.client.put(url, json=body, headers=hostile)).status_code == 403


async def test_api_keys(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(access=Access(api_keys=["one", "two"], admin_key="admin-key"))) as server:
        client = server.client
        closed = [
            "/v1/models",
            "/v1/routing",
            "/tokenizer_info",
            "/version",
            "/openapi.json",
            "/nowhere",
            "//v1/models",
            "/v1/%2e/models",
        ]
        for path in closed:
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer three"}, {"Host": "x/health"}):
                reply = await client.get(path, headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
                assert reply.headers["www-authenticate"] == "Bearer"
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 401
        for path in ("/", "/health", "/health/live", "/health/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for key in ("one", "two", "admin-key"):
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200


async def test_admin_actions_are_audited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = (fake_policy("mine", top_k, "secret of the policy") for top_k in (1, 2))
    full, fast = policies()["full"].version, policies()["fast"].version
    async with serving(tmp_path) as server:

        async def act(method: str, path: str, body: object = None) -> None:
            reply = await server.client.request(method, f"/admin/{path}", json=body, headers=ADMIN)
            assert reply.status_code == 200, reply.text

        with caplog.at_level(logging.INFO, logger="server.audit"):
            await act("PUT", "routing/policies/mine", old.to_dict())
            await act("PUT", "routing/policies/mine", new.to_dict())
            await act("PUT", "routing/default", {"policy": "fast"})
            await act("POST", "routing/rollback")
            await act("DELETE", "routing/policies/mine")
            await act("POST", "drain")
            refused = await server.client.put("/admin/routing/default", json={"policy": "fast"})
            assert refused.status_code == 401
    facts = [vars(record) for record in caplog.records if record.name == "server.audit"]
    assert [(fact["action"], fact.get("old_version"), fact.get("new_version")) for fact in facts] == [
        ("put policy", None, old.version),
        ("put policy", old.version, new.version),
        ("put default", full, fast),
        ("roll back", fast, full),
        ("delete policy", new.version, None),
        ("drain", None, None),
    ]
    assert all(fact["client"] for fact in facts)
    assert "admin-key" not in caplog.text
