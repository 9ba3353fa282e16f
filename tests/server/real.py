"""A whole server over a real checkpoint, on a socket."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from anyio.from_thread import start_blocking_portal

import ladimo
from server.api.http.http_protocol import HEADER_SECONDS, SEND_SECONDS, bounded_http
from server.app import Access, create_app
from server.engine.async_engine import EngineState
from server.launch import build_services
from server.settings import read_settings

ROOT = Path(ladimo.__file__).parents[1]
DEMO = ROOT / "ladimo" / "demo" / "model"


def find_model() -> Path:
    """SmolLM2 where LADIMO_SMOLLM2 or models/smollm2 has it, the demo's dense model elsewhere."""
    named = os.environ.get("LADIMO_SMOLLM2")
    places = [*([Path(named)] if named else []), ROOT / "models" / "smollm2", DEMO]
    return next(path for path in places if (path / "config.json").is_file())


@asynccontextmanager
async def serving_model(model: Path, *flags: str, access: Access | None = None) -> AsyncIterator[str]:
    """The address of a server of the checkpoint, run on CPU with the given flags; its model's name is "model"."""
    settings = read_settings([str(model), "--device", "cpu", "--served-model-name", "model", *flags])
    services = build_services(settings)
    died: list[BaseException] = []
    app = create_app(services, access or Access(), on_dead=died.append)
    http = bounded_http(HEADER_SECONDS, SEND_SECONDS)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            http=http,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )
    task = asyncio.create_task(server.serve())
    try:
        while not server.started or services.engine.state is EngineState.LOADING:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
    assert not died


@contextmanager
def model_served(model: Path, *flags: str, access: Access | None = None) -> Iterator[str]:
    """`serving_model` on a thread, for tests whose client blocks: a browser, curl. It needs no process of its own."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving_model(model, *flags, access=access)) as address,
    ):
        yield address
