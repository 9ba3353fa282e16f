"""GET /v1/routing, and the admin routes that change policies and the default."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from ladimo.policy import FrontierPoint
from server.api.bodies import JsonRoute
from server.api.services import Services, ServicesDep
from server.engine.async_engine import EngineState
from server.policies.store import Route, State

router = APIRouter(route_class=JsonRoute)
admin = APIRouter(prefix="/admin", route_class=JsonRoute)
audit_log = logging.getLogger("server.audit")

JsonObject = Annotated[dict[str, Any], Body()]


@router.get("/v1/routing")
async def routing(services: ServicesDep) -> dict[str, Any]:
    """The default, the service tiers, the policies with their versions and figures, and the frontier that the knob walks."""
    store = services.store
    points = () if store.frontier is None else store.frontier.points
    figures = {point.policy: point for point in points}
    return {
        "default": _default(services),
        "service_tiers": {
            name: tier.to_dict() | _now(store.resolve(tier.ask, controlled=tier.controlled))
            for name, tier in store.tiers.items()
        },
        "policies": [
            {
                "name": name,
                "version": policy.version,
                "description": policy.description,
                "source": "stored" if name in store.state.stored else "checkpoint",
                "accuracy": store.position(policy),
                "figures": figures[name].to_dict() if name in figures and store.checkpoint[name] == policy else None,
                "layers": policy.to_dict()["layers"],
            }
            for name, policy in store.policies().items()
        ],
        "frontier": None if store.frontier is None else [_point(point, services) for point in points],
        "frontier_batch": services.frontier_batch,
    }


@admin.put("/routing/policies/{name}")
async def put_policy(name: str, body: JsonObject, request: Request, services: ServicesDep) -> dict[str, Any]:
    async with services.admin_lock:
        old = services.store.policies().get(name)
        state = services.store.put(name, body)
        await _commit(state, services)
        new = services.store.get(name)
        versions = {"old_version": None if old is None else old.version, "new_version": new.version}
        _audit(request, "put policy", policy=name, **versions)
    return {"name": name, "version": new.version, "previous_version": versions["old_version"]}


@admin.delete("/routing/policies/{name}")
async def delete_policy(name: str, request: Request, services: ServicesDep) -> dict[str, Any]:
    async with services.admin_lock:
        old = services.store.get(name)
        await _commit(services.store.remove(name), services)
        left = services.store.policies().get(name)
        version = None if left is None else left.version
        _audit(request, "delete policy", policy=name, old_version=old.version, new_version=version)
    return {"name": name, "deleted": True, "version": version}


@admin.put("/routing/default")
async def put_default(body: JsonObject, request: Request, services: ServicesDep) -> dict[str, Any]:
    async with services.admin_lock:
        return await _change_default(services.store.set_default(body), "put default", request, services)


@admin.post("/routing/rollback")
async def roll_back(request: Request, services: ServicesDep) -> dict[str, Any]:
    async with services.admin_lock:
        return await _change_default(services.store.roll_back(), "roll back", request, services)


@admin.post("/drain")
async def drain(request: Request, services: ServicesDep) -> dict[str, Any]:
    """Stop admitting; what runs finishes. The process stays until it is told to end."""
    services.admission.draining = True
    _audit(request, "drain")
    return {"draining": True, "running": services.admission.in_flight}


async def _change_default(state: State, action: str, request: Request, services: Services) -> dict[str, Any]:
    old = services.store.resolve()
    seconds = await _commit(state, services, swap=True)
    new = services.store.resolve()
    _audit(
        request,
        action,
        policy=new.policy.name,
        old_version=old.policy.version,
        new_version=new.policy.version,
        default=services.store.state.default.to_dict(),
    )
    return {"default": _default(services), "swap_seconds": seconds}


async def _commit(state: State, services: Services, swap: bool = False) -> float:
    """Have the engine keep the new default resident, then make the state current. Returns the engine's seconds.

    Nothing has changed when this raises EngineDead, Loading or PolicyTableFull.
    """
    store, metrics = services.store, services.metrics
    if services.engine.state is not EngineState.READY:
        error = services.admission.unavailable()
        assert error is not None
        raise error
    route = store.resolve(state=state)
    swap = swap or route.policy != store.resolve().policy
    started = time.monotonic()
    try:
        await services.engine.activate([route.policy])
        seconds = time.monotonic() - started
        await asyncio.to_thread(store.commit, state)
    except Exception:
        if swap:
            metrics.policy_swaps.labels("failed").inc()
        raise
    if swap:
        metrics.policy_swaps.labels("ok").inc()
        metrics.policy_swap_duration.observe(seconds)
    show_policies(services)
    return seconds


def show_policies(services: Services) -> None:
    """Bring the routing gauges up to date."""
    store = services.store
    route = store.resolve()
    versions = {name: policy.version for name, policy in store.policies().items()}
    floor = None if store.objective is None else store.objective.min_accuracy
    services.metrics.show_policies(versions, route.policy.name, route.accuracy, floor)


def _default(services: Services) -> dict[str, Any]:
    """The default as it was set, and what it means now."""
    store = services.store
    return {"target": store.state.default.to_dict(), **_now(store.resolve())}


def _now(route: Route) -> dict[str, Any]:
    return {"policy": route.policy.name, "version": route.policy.version, "accuracy": route.accuracy}


def _point(point: FrontierPoint, services: Services) -> dict[str, Any]:
    assert services.store.frontier is not None
    return {**point.to_dict(), "accuracy": services.store.frontier.position(point.policy)}


def _audit(request: Request, action: str, **facts: str | Mapping[str, Any] | None) -> None:
    client = None if request.client is None else request.client.host
    text = " ".join(f"{name}={value}" for name, value in facts.items())
    extra = {"client": client, "action": action, **facts}
    audit_log.info("%s %s", action, text, extra=extra)
