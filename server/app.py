"""The ASGI application, made from its parts. HTTP answers at once; the engine loads in the meantime."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import ladimo
from server.api.admission import Admission
from server.api.fields.completions import ErrorBody
from server.api.http.bodies import JsonBodies
from server.api.http.failures import to_service_error
from server.api.http.middleware import HeadAsGet, Keys, PlainPaths, RequestContext
from server.api.policy_changes import show_policies
from server.api.routes import completions, ops, pages, responses, routing
from server.api.services import Services
from server.engine.async_engine import AsyncEngine, EngineState
from server.errors import statuses
from server.policies.store import PolicyStore

logger = logging.getLogger(__name__)

ROUTERS = (completions.router, responses.router, routing.router, routing.admin, ops.router, pages.router)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call the server, and how much they may send. `open_admin`: /admin needs no key. `allow_origins`: sites whose
    pages may call from a browser. `body_timeout`: seconds in which a client must have sent a body."""

    api_keys: Sequence[str] = ()
    admin_key: str | None = None
    open_admin: bool = False
    allow_origins: Sequence[str] = ()
    max_body_bytes: int = 8 * 2**20
    body_timeout: float = 60.0


def create_app(
    services: Services,
    access: Access = Access(),
    on_ready: Callable[[], None] = lambda: None,
    on_dead: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """Build the ASGI application.

    `on_ready` is called when the engine accepts requests. `on_dead` is called when the engine could not start, and when a step
    has failed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(_run_engine(services.engine, services.store, on_ready, on_dead)),
            asyncio.create_task(services.automatic_control.run()),
        ]
        try:
            yield
        finally:
            if services.engine.state is EngineState.LOADING:
                tasks[0].cancel()  # an engine that is still loading cannot be stopped, so do not wait for it
            else:
                await services.engine.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            services.language.tokenizer.close()
            if services.telemetry is not None:
                await asyncio.to_thread(services.telemetry.close)

    app = FastAPI(
        title="LaDiMo",
        version=ladimo.__version__,
        description="OpenAI-style completions, each request under its own routing policy.",
        lifespan=lifespan,
        responses={"default": {"model": ErrorBody, "description": "An error"}},
        docs_url=None,  # FastAPI's own page loads scripts from other servers; `pages` serves one that does not
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            *_cors(access.allow_origins),
            Middleware(PlainPaths),
            Middleware(
                RequestContext,
                default_policy=lambda: services.store.resolve().policy.name,
                on_failure=lambda error: services.metrics.request_failures.labels(error.code).inc(),
            ),
            Middleware(Keys, api_keys=access.api_keys, admin_key=access.admin_key, open_admin=access.open_admin),
            Middleware(HeadAsGet),
            Middleware(JsonBodies, max_bytes=access.max_body_bytes, timeout_seconds=access.body_timeout),
        ],
        exception_handlers={HTTPException: _to_context, RequestValidationError: _to_context},
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    show_policies(services.store, services.metrics)
    services.metrics.requests_in_flight.set_function(lambda: services.admission.in_flight)
    services.metrics.heartbeat_age.set_function(lambda: services.engine.heartbeat_age)
    for code in statuses():
        services.metrics.request_failures.labels(code)
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """The CORS middleware, if any. It is the outermost one, so that a web page can read its errors, too."""
    if not origins:
        return []
    exposed = ["X-Request-Id", "X-Routing-Policy", "Retry-After"]
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=exposed,
        )
    ]


async def drain(engine: AsyncEngine, admission: Admission, timeout_seconds: float) -> None:
    """Refuse new requests and wait until the running ones end. After `timeout_seconds` the rest ends with an error."""
    admission.draining = True
    logger.info("draining: %d sequences to finish", admission.in_flight)
    try:
        async with asyncio.timeout(timeout_seconds):
            await admission.wait_idle()
    except TimeoutError:
        logger.warning("shutdown timeout: %d sequences are cut off", admission.in_flight)
        await engine.stop()
        await admission.wait_idle()


async def _to_context(request: Request, error: Exception) -> Response:
    """Pass the framework's errors on to RequestContext, which renders all errors."""
    raise to_service_error(error)


async def _run_engine(
    engine: AsyncEngine, store: PolicyStore, on_ready: Callable[[], None], on_dead: Callable[[BaseException], None]
) -> None:
    """Start the engine. Call `on_ready` when it is ready and `on_dead` when it dies."""
    try:
        await engine.start()
        await engine.activate(store.resident())
    except Exception as error:
        on_dead(error)
        return
    on_ready()
    cause = await engine.wait_dead()
    if cause is not None:
        on_dead(cause)
