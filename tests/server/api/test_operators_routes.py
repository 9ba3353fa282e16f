"""What operators send and get back: a policy read and stored again, rollback, and the description of both."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from ladimo.model.rule import RuleNumber
from ladimo.policy import RULE_FIELDS
from server.api.fields.routing import AccuracyDefault, AutomaticDefault, LayerRuleBody, NamedDefault, PolicyBody
from server.policies.content import MAX_DESCRIPTION
from tests.server.fakes import fake_policy
from tests.server.serving import ADMIN, TOP_K, Server, policies, serving


async def put(server: Server, name: str, body: object, **headers: str) -> httpx.Response:
    return await server.client.put(f"/admin/routing/policies/{name}", json=body, headers={**ADMIN, **headers})


async def put_default(server: Server, **target: Any) -> httpx.Response:
    return await server.client.put("/admin/routing/default", json=target, headers=ADMIN)


async def roll_back(server: Server, **body: Any) -> httpx.Response:
    return await server.client.post("/admin/routing/rollback", json=body or None, headers=ADMIN)


async def test_a_policy_that_was_read_can_be_stored_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        listed = {each["name"]: each for each in (await server.client.get("/v1/routing")).json()["policies"]}
        for name in TOP_K:
            reply = await server.client.get(f"/v1/routing/policies/{name}")
            read = reply.json()
            assert read == listed[name]
            assert reply.headers["etag"] == f'"{policies()[name].version}"'
            PolicyBody.model_validate(read)
            again = await put(server, name, read)
            assert again.json() == {"name": name, "version": read["version"], "previous_version": read["version"]}
            stored = (await server.client.get(f"/v1/routing/policies/{name}")).json()
            assert stored == read | {"source": "stored"}
        missing = await server.client.get("/v1/routing/policies/nope")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_policy")


async def test_an_edited_policy_keeps_nothing_of_what_only_the_server_says(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        read = (await server.client.get("/v1/routing/policies/fast")).json()
        changed = await put(server, "fast", read | {"layers": fake_policy("fast", 3).to_dict()["layers"]})
        assert changed.json()["version"] not in (read["version"], changed.json()["previous_version"])
        now = (await server.client.get("/v1/routing/policies/fast")).json()
        assert (now["source"], now["accuracy"], now["figures"]) == ("stored", None, None)


async def test_if_match_protects_what_somebody_else_stored(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        first, second, third = (fake_policy("mine", top_k).to_dict() for top_k in (1, 2, 3))
        too_early = await put(server, "mine", first, **{"If-Match": "*"})
        assert (too_early.status_code, too_early.json()["error"]["code"]) == (412, "precondition_failed")
        created = await put(server, "mine", first, **{"If-None-Match": "*"})
        tag = created.headers["etag"]
        assert tag == (await server.client.get("/v1/routing/policies/mine")).headers["etag"]
        assert (await put(server, "mine", third, **{"If-None-Match": "*"})).status_code == 412
        assert (await put(server, "mine", second, **{"If-Match": f'"other", {tag}'})).status_code == 200
        late = await put(server, "mine", third, **{"If-Match": tag})
        assert (late.status_code, late.json()["error"]["param"]) == (412, "If-Match")
        assert server.services.store.get("mine") == fake_policy("mine", 2)


@pytest.mark.parametrize("text", ["x" * (MAX_DESCRIPTION + 1), "a\nb", "\x1b[2J", "\x7f", "a\u2028b", "\x00"])
async def test_descriptions_have_a_limit_and_no_control_characters(tmp_path: Path, text: str) -> None:
    async with serving(tmp_path) as server:
        refused = await put(server, "mine", fake_policy("mine", 1, text).to_dict())
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_policy")
        assert refused.json()["error"]["param"] == "description"
        allowed = await put(server, "mine", fake_policy("mine", 1, "ü — " + "x" * (MAX_DESCRIPTION - 4)).to_dict())
        assert allowed.status_code == 200


async def test_rollback_does_not_undo_a_newer_put_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = fake_policy("mine", 1), fake_policy("mine", 4)
    async with serving(tmp_path) as server:
        await put(server, "mine", old.to_dict())
        await put_default(server, policy="mine")
        await put_default(server, policy="fast")
        await put(server, "mine", new.to_dict())
        with caplog.at_level(logging.INFO, logger="server.audit"):
            answer = (await roll_back(server)).json()
        assert answer["default"]["target"] == {"policy": "mine"}
        assert answer["default"]["version"] == new.version
        assert answer["previous_default"]["target"] == {"policy": "fast"}
        newer = {"name": "mine", "version": new.version, "old_version": old.version}
        assert (answer["restored_policy"], answer["newer_policy"]) == (None, newer)
        facts = vars(caplog.records[-1])
        assert (facts["action"], facts["newer_policy"], facts["restored_policy"]) == ("roll back", newer, None)
        assert (facts["previous_default"], facts["default"]) == ({"policy": "fast"}, {"policy": "mine"})
        assert server.services.store.get("mine") == new


async def test_rollback_restores_an_older_policy_when_asked(tmp_path: Path) -> None:
    old, new = fake_policy("mine", 1), fake_policy("mine", 4)
    async with serving(tmp_path) as server:
        await put(server, "mine", old.to_dict())
        await put_default(server, policy="mine")
        await put_default(server, policy="fast")
        await put(server, "mine", new.to_dict())
        wrong = await roll_back(server, restore_policy="yes")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "restore_policy")
        answer = (await roll_back(server, restore_policy=True)).json()
        restored = {"name": "mine", "version": old.version, "replaced_version": new.version}
        assert (answer["restored_policy"], answer["newer_policy"]) == (restored, None)
        assert server.services.store.get("mine") == old


async def test_rollback_undoes_what_changed_the_default_itself(tmp_path: Path) -> None:
    """A PUT over the policy that is the default, and the removal of one that was."""
    old, new = fake_policy("mine", 1), fake_policy("mine", 4)
    async with serving(tmp_path) as server:
        await put(server, "mine", old.to_dict())
        await put_default(server, policy="mine")
        await put(server, "mine", new.to_dict())
        answer = (await roll_back(server)).json()
        assert answer["restored_policy"] == {"name": "mine", "version": old.version, "replaced_version": new.version}
        await put_default(server, policy="fast")
        await server.client.delete("/admin/routing/policies/mine", headers=ADMIN)
        answer = (await roll_back(server)).json()
        assert answer["restored_policy"] == {"name": "mine", "version": old.version, "replaced_version": None}
        assert answer["default"]["version"] == old.version


async def test_a_checkpoints_policy_is_restored_as_the_checkpoints(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await put_default(server, policy="fast")
        await put(server, "fast", fake_policy("fast", 4).to_dict())
        answer = (await roll_back(server)).json()
        assert answer["restored_policy"]["version"] == policies()["fast"].version
        assert (await server.client.get("/v1/routing/policies/fast")).json()["source"] == "checkpoint"


async def test_the_api_page_describes_policies_and_defaults(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        page = (await server.client.get("/openapi.json")).json()

    def body(path: str) -> Mapping[str, Any]:
        schema: Mapping[str, Any] = page["paths"][path]["put"]["requestBody"]["content"]["application/json"]["schema"]
        return schema

    policy = body("/admin/routing/policies/{name}")["properties"]
    assert policy.keys() == PolicyBody.model_fields.keys()
    assert policy["layers"]["items"]["anyOf"][0] == {"$ref": "#/components/schemas/LayerRule"}
    kinds = [each["$ref"] for each in body("/admin/routing/default")["anyOf"]]
    assert kinds == [f"#/components/schemas/{kind}" for kind in ("NamedDefault", "AccuracyDefault", "AutomaticDefault")]
    rule = page["components"]["schemas"]["LayerRule"]["properties"]
    assert rule.keys() == RULE_FIELDS.keys() == {number.field for number in RuleNumber} | {"experts"}


LAYERS = fake_policy("x", 2).to_dict()["layers"]
RULE = next(layer for layer in LAYERS if layer is not None)
VALUES: tuple[object, ...] = (True, "1", -1, [], {}, 1.5, 1, 0, 0.5, None, 2**70)


@pytest.mark.parametrize(
    "change",
    [
        *({field: value} for field in RULE_FIELDS for value in VALUES),
        {"other": 1},
        {"experts": [0, 1]},
        {"experts": [0, -1]},
        {"experts": [True]},
    ],
)
async def test_the_description_of_a_rule_is_what_the_store_takes(tmp_path: Path, change: dict[str, Any]) -> None:
    """Whatever the number of layers and experts has no say in."""
    rule = {**RULE, **change}
    described = True
    try:
        LayerRuleBody.model_validate(rule)
    except ValidationError:
        described = False
    async with serving(tmp_path) as server:
        reply = await put(server, "mine", {"layers": [None if layer is None else rule for layer in LAYERS]})
    error = reply.json().get("error", {"message": ""})
    words = ("the layer has", "--batch-budgets", "this checkpoint's weights can be read at", "refine: needs 4 bits")
    depends_on_model = any(word in error["message"] for word in words)
    assert described == (reply.status_code == 200 or depends_on_model), error["message"]


@pytest.mark.parametrize(
    "target",
    [
        {"policy": "fast"},
        {"policy": 1},
        {"accuracy": 0.5},
        {"accuracy": 2},
        {"accuracy": True},
        {"accuracy": 1, "policy": "fast"},
        {},
        {"auto": {"itl_ms": 5}},
        {"auto": {"itl_ms": 5, "min_accuracy": 0.5}},
        {"auto": {"itl_ms": 0}},
        {"auto": {"ttft_ms": 5, "speed": 1}},
        {"auto": 1},
    ],
)
async def test_the_description_of_a_default_is_what_the_store_takes(tmp_path: Path, target: dict[str, Any]) -> None:
    described = True
    try:
        TypeAdapter(NamedDefault | AccuracyDefault | AutomaticDefault).validate_python(target)
    except ValidationError:
        described = False
    async with serving(tmp_path) as server:
        assert (await put_default(server, **target)).is_success == described
