"""GET /v1/routing, and the admin routes that change policies and the default."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from ladimo.policy import FrontierPoint, RoutingPolicy
from server.api.fields.routing import CanaryJson, DefaultJson, PolicyBody, PolicyJson, RollbackBody
from server.api.http.bodies import JsonRoute
from server.api.policy_changes import PolicyChanges
from server.api.services import AdmissionDep, AutomaticControlDep, FrontierBatchDep, PolicyChangesDep, ShadowDep, StoreDep
from server.api.shadow import ShadowQuality
from server.errors import PreconditionFailed
from server.policies.route import Route
from server.policies.state import State
from server.policies.store import PolicyStore
from server.policies.targets import Ask

router = APIRouter(route_class=JsonRoute)
admin = APIRouter(prefix="/admin", route_class=JsonRoute)
audit_log = logging.getLogger("server.audit")


@router.get("/v1/routing")
async def routing(
    store: StoreDep, frontier_batch: FrontierBatchDep, automatic: AutomaticControlDep, shadow: ShadowDep
) -> dict[str, Any]:
    """The default, the service tiers, the policies with their versions and figures, and the frontier for `accuracy`.

    `automatic_control`: its last decision and its latest changes; null while it is off. `signals` are what it looks at, each
    over its target.

    `prefill_costs`: with the frontier for prompts, what a multiply-add of a prompt takes at each number of bits, and on which
    processor this was measured; otherwise null.

    `shadow`: what replays of finished answers say about the policies; null while nothing is replayed.
    """
    frontier = store.frontier
    return {
        "default": _default(store),
        "service_tiers": {
            name: tier.to_dict() | _now(store.resolve(tier.ask, controlled=tier.controlled))
            for name, tier in store.tiers.items()
        },
        "policies": [_describe(policy, store) for policy in store.policies().values()],
        "frontier": None if frontier is None else [_point(point, store) for point in frontier.points],
        "frontier_batch": frontier_batch,
        "prefill_costs": None if store.form_costs is None else store.form_costs.to_dict(),
        "automatic_control": automatic.status(),
        "canary": _canary_state(store, shadow)["canary"],
        "shadow": shadow.status(),
    }


@router.get("/v1/routing/policies/{name}", responses={200: {"model": PolicyBody}})
async def policy(name: str, response: Response, store: StoreDep) -> dict[str, Any]:
    """One policy, in the form in which PUT takes it. The header `ETag` is its version, for `If-Match`."""
    found = store.get(name)
    response.headers["ETag"] = _etag(found)
    return _describe(found, store)


@admin.put("/routing/policies/{name}")
async def put_policy(
    name: str,
    body: PolicyJson,
    request: Request,
    response: Response,
    changes: PolicyChangesDep,
    if_match: Annotated[str | None, Header(description="The policy replaces only the version with this ETag.")] = None,
    if_none_match: Annotated[str | None, Header(description="`*`: the policy is stored only if its name is free.")] = None,
) -> dict[str, Any]:
    async with changes.lock:
        old = changes.store.policies().get(name)
        _check_preconditions(old, if_match, if_none_match)
        await changes.commit(changes.store.put(name, body))
        new = changes.store.get(name)
        response.headers["ETag"] = _etag(new)
        versions = {"old_version": None if old is None else old.version, "new_version": new.version}
        _audit(request, "put policy", policy=name, **versions)
    return {"name": name, "version": new.version, "previous_version": versions["old_version"]}


@admin.delete("/routing/policies/{name}")
async def delete_policy(name: str, request: Request, changes: PolicyChangesDep) -> dict[str, Any]:
    async with changes.lock:
        old = changes.store.get(name)
        await changes.commit(changes.store.remove(name))
        left = changes.store.policies().get(name)
        version = None if left is None else left.version
        _audit(request, "delete policy", policy=name, old_version=old.version, new_version=version)
    return {"name": name, "deleted": True, "version": version}


@admin.put("/routing/default")
async def put_default(body: DefaultJson, request: Request, changes: PolicyChangesDep) -> dict[str, Any]:
    async with changes.lock:
        return await _change_default(changes.store.set_default(body), "put default", request, changes)


@admin.post("/routing/rollback")
async def roll_back(request: Request, changes: PolicyChangesDep, body: RollbackBody | None = None) -> dict[str, Any]:
    """Return to the previous default. The answer says what this changed.

    `restored_policy`: an old version was stored again under its name. `newer_policy`: the policy has a newer version by now,
    which stays and is now the default. `restore_policy` in the body stores the old version instead.
    """
    async with changes.lock:
        store = changes.store
        back = store.roll_back(body is not None and body.restore_policy)
        restored = newer = None
        if back.restored is not None:
            replaced = store.policies().get(back.restored.name)
            restored = {
                "name": back.restored.name,
                "version": back.restored.version,
                "replaced_version": None if replaced is None else replaced.version,
            }
        if back.skipped is not None:
            name = back.skipped.name
            newer = {"name": name, "version": store.get(name).version, "old_version": back.skipped.version}
        facts = {"restored_policy": restored, "newer_policy": newer}
        return await _change_default(back.state, "roll back", request, changes, facts) | facts


@admin.get("/routing/canary")
async def canary(store: StoreDep, shadow: ShadowDep) -> dict[str, Any]:
    """The canary and the default that it may replace. `canary` is null if there is none."""
    return _canary_state(store, shadow)


@admin.put("/routing/canary")
async def put_canary(body: CanaryJson, request: Request, changes: PolicyChangesDep, shadow: ShadowDep) -> dict[str, Any]:
    """Run a share of the requests that leave the choice to the server under a candidate. Replaces the canary before."""
    async with changes.lock:
        await changes.commit(changes.store.set_canary(body))
        return _canary_changed(request, "put canary", changes.store, shadow)


@admin.post("/routing/canary/promote")
async def promote_canary(request: Request, changes: PolicyChangesDep) -> dict[str, Any]:
    """Make the canary the default. A rollback of the default brings the old one back."""
    async with changes.lock:
        return await _change_default(changes.store.promote_canary(), "promote canary", request, changes)


@admin.post("/routing/canary/rollback")
async def end_canary(request: Request, changes: PolicyChangesDep, shadow: ShadowDep) -> dict[str, Any]:
    """End the canary. The default stays."""
    async with changes.lock:
        await changes.commit(changes.store.end_canary())
        return _canary_changed(request, "roll back canary", changes.store, shadow)


@admin.post("/drain")
async def drain(request: Request, admission: AdmissionDep) -> dict[str, Any]:
    """Accept no more requests. Running requests finish. The process runs until it gets a signal."""
    admission.draining = True
    _audit(request, "drain")
    return {"draining": True, "running": admission.in_flight}


async def _change_default(
    state: State, action: str, request: Request, changes: PolicyChanges, facts: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """`facts`: further entries for the audit log."""
    store = changes.store
    old, before = store.resolve(), store.state.default.to_dict()
    seconds = await changes.commit(state, swap=True)
    new = store.resolve()
    _audit(
        request,
        action,
        policy=new.policy.name,
        old_version=old.policy.version,
        new_version=new.policy.version,
        previous_default=before,
        default=store.state.default.to_dict(),
        **facts,
    )
    return {"default": _default(store), "previous_default": {"target": before} | _now(old), "swap_seconds": seconds}


def _default(store: PolicyStore) -> dict[str, Any]:
    """The default as it was set, and the policy that it means now."""
    return {"target": store.state.default.to_dict(), **_now(store.resolve())}


def _canary_state(store: PolicyStore, shadow: ShadowQuality) -> dict[str, Any]:
    running = store.state.canary
    described = None
    if running is not None:
        route = store.resolve(Ask(running.target, "canary", "canary"))
        quality = shadow.figures(route.policy.version)
        described = {"target": running.target.to_dict(), "share": running.share, **_now(route), "shadow": quality}
    return {"canary": described, "default": _default(store)}


def _canary_changed(request: Request, action: str, store: PolicyStore, shadow: ShadowQuality) -> dict[str, Any]:
    state, running = _canary_state(store, shadow), store.state.canary
    _audit(request, action, canary=None if running is None else running.to_dict(), default=store.state.default.to_dict())
    return state


def _now(route: Route) -> dict[str, Any]:
    return {"policy": route.policy.name, "version": route.policy.version, "accuracy": route.accuracy}


def _figures(point: FrontierPoint, store: PolicyStore) -> dict[str, Any]:
    return point.to_dict() | point.token_costs(store.config)


def _point(point: FrontierPoint, store: PolicyStore) -> dict[str, Any]:
    assert store.frontier is not None
    return _figures(point, store) | {"accuracy": store.frontier.position(point.policy)}


def _describe(policy: RoutingPolicy, store: PolicyStore) -> dict[str, Any]:
    """A policy's content, its version, source and figures."""
    own = store.checkpoint.get(policy.name) == policy
    point = store.frontier.find(policy.name) if own and store.frontier is not None else None
    return policy.to_dict() | {
        "version": policy.version,
        "source": "stored" if policy.name in store.state.stored else "checkpoint",
        "accuracy": store.position(policy),
        "figures": None if point is None else _figures(point, store),
    }


def _etag(policy: RoutingPolicy) -> str:
    return f'"{policy.version}"'


def _check_preconditions(policy: RoutingPolicy | None, if_match: str | None, if_none_match: str | None) -> None:
    """Check If-Match and If-None-Match (RFC 9110, 13.1). Raises PreconditionFailed."""
    if if_match is not None and not _matches(if_match, policy):
        now = "there is none" if policy is None else f"it is {policy.version}"
        raise PreconditionFailed(f"If-Match: the policy has another version by now; {now}", param="If-Match")
    if if_none_match is not None and _matches(if_none_match, policy):
        raise PreconditionFailed("If-None-Match: there is such a policy", param="If-None-Match")


def _matches(tags: str, policy: RoutingPolicy | None) -> bool:
    return policy is not None and any(tag.strip() in ("*", _etag(policy)) for tag in tags.split(","))


def _audit(request: Request, action: str, **facts: str | Mapping[str, Any] | None) -> None:
    client = None if request.client is None else request.client.host
    text = " ".join(f"{name}={value}" for name, value in facts.items())
    extra = {"client": client, "action": action, **facts}
    audit_log.info("%s %s", action, text, extra=extra)
