"""Builds the parts of the server and runs them under uvicorn. The first signal drains the server, the second ends it at
once."""

import asyncio
import gc
import logging
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

import ladimo
from ladimo.checkpoint import read_config, read_frontier, read_policies, resolve_directory, stored_dtype
from ladimo.model.config import ModelConfig
from ladimo.model.cpu.build import abandon
from ladimo.model.quantization import find_format
from ladimo.policy import PREFILL, Frontier, RoutingPolicy
from ladimo.prefill import FormCosts, prefill_frontier
from server.api.admission import Admission
from server.api.automatic_control import AutomaticControl
from server.api.http.http_protocol import bounded_http
from server.api.services import Services
from server.api.shadow import ShadowQuality
from server.api.waiting import WaitingRequests
from server.app import Access, create_app, drain
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.messages import Rebound, Replayed, StepStats
from server.errors import ServiceError
from server.metrics import MAX_EXPERT_SERIES, Metrics
from server.policies.controller import Control
from server.policies.load_meter import LoadMeter
from server.policies.store import PolicyStore
from server.settings import ServerSettings
from server.text.language import Language
from server.text.tokenizer import Tokenizer
from server.text.tool_dialects import DIALECTS, ToolDialect, detect_dialect

if TYPE_CHECKING:  # an optional extra
    from server.telemetry import Telemetry

logger = logging.getLogger(__name__)

# Python's default is 5 ms. The event loop, for example while it renders /metrics, could delay the next step that long.
SWITCH_SECONDS = 0.0005
# After draining no request is left. A client that does not read its last bytes is waited for at most this long.
CLOSE_SECONDS = 5


def launch(settings: ServerSettings, sockets: Sequence[socket.socket]) -> int:
    """Serve on listening sockets until a signal comes. Returns the exit code: 0 after a drain, 1 after a failure.

    The engine thread may still be loading, or hang in a step. The process must then end without waiting for it.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        services = build_services(settings)
    except (ValueError, ServiceError, OSError) as error:
        print(f"ladimo-server: {error}", file=sys.stderr)
        return 1
    return _Run(settings, services).run(sockets)


class _Run:
    """One run of the server and its outcome."""

    def __init__(self, settings: ServerSettings, services: Services) -> None:
        self._settings, self._services = settings, services
        self._failed = False
        if settings.insecure_admin and not settings.is_loopback:
            logger.warning("--insecure-admin is ignored: %s is not a loopback address", settings.host)
        app = create_app(services, access_of(settings), on_ready=self._ready, on_dead=self._dead)
        self._server = _Server(app, settings, self._drain)

    def run(self, sockets: Sequence[socket.socket]) -> int:
        try:
            self._server.run(list(sockets))
        except SystemExit:  # uvicorn raises it if the application did not start
            return 1
        finally:
            abandon()
        return int(self._failed or not self._server.started)

    async def _drain(self) -> None:
        await drain(self._services.engine, self._services.admission, self._settings.shutdown_timeout)
        self._server.should_exit = True

    def _dead(self, error: BaseException) -> None:
        self._failed = True
        self._server.should_exit = True
        if isinstance(error, ValueError):  # the model or an option cannot be served
            print(f"ladimo-server: {error}", file=sys.stderr)
        else:
            logger.critical("the engine died: %s", error, exc_info=error)

    def _ready(self) -> None:
        # All objects made so far stay alive. If the garbage collector visited them again, it would hold up all streams for 0.1
        # s.
        gc.collect()
        gc.freeze()
        address = f"http://{self._server.address}"
        body = '{"prompt": "def main(", "max_tokens": 64, "routing": {"accuracy": 0.5}}'
        if self._services.store.frontier is None:
            body = '{"prompt": "def main(", "max_tokens": 64}'
        key = " -H 'Authorization: Bearer KEY'" if self._settings.api_key else ""
        print(f"\n  page  {address}/", flush=True)
        print(
            f"  try   curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}\n",
            flush=True,
        )


class _Server(uvicorn.Server):
    def __init__(self, app: ASGIApp, settings: ServerSettings, drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_http(settings.header_timeout, settings.send_timeout),
                timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # any number of seconds will do
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=settings.trusted_proxies,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._begin_drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    @property
    def address(self) -> str:
        """The host and port that are bound, as HOST:PORT."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal. uvicorn's own handler would close the listening socket at once and raise the signal
        again."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # requests that are cut off from now on are no errors
        else:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._begin_drain())


def access_of(settings: ServerSettings) -> Access:
    """Who may call a server with these settings."""
    return Access(
        api_keys=[key.get_secret_value() for key in settings.api_key],
        admin_key=None if settings.admin_key is None else settings.admin_key.get_secret_value(),
        open_admin=settings.insecure_admin and settings.is_loopback,
        allow_origins=settings.allow_origin,
        max_body_bytes=settings.max_body_bytes,
        body_timeout=settings.body_timeout,
    )


def build_services(settings: ServerSettings) -> Services:
    """Build all parts of the server. The weights are loaded later, by the engine on its own thread.

    Raises ValueError for settings and files that cannot be used, UnknownPolicy and NoFrontier for a default that is not there.
    """
    assert settings.model is not None
    if settings.quantize is not None:
        find_format(settings.quantize)
    directory = resolve_directory(settings.model)
    config = read_config(directory)
    policies, form_costs = read_policies(directory, config), _form_costs(directory, config, settings)
    store = PolicyStore(
        config,
        policies,
        _frontier(directory, config, policies, settings, form_costs),
        settings.default_target,
        settings.policies_dir,
        settings.batch_budgets,
        settings.service_tiers,
        form_costs,
    )
    name = settings.served_model_name or given_name(settings.model)
    meter = LoadMeter(store.price)
    metrics = _build_metrics(config, name, exports_each_expert(settings.expert_metrics, config, len(store.policies())))

    def on_step(stats: StepStats) -> None:
        metrics.record(stats)
        meter.observe(stats, time.monotonic())

    def on_reject(code: str) -> None:
        metrics.admission_rejections.labels(code).inc()

    def on_replayed(replayed: Replayed) -> None:
        shadow.record(replayed)

    def on_rebound(reply: Rebound) -> None:
        waiting.rebound(reply)

    engine = AsyncEngine(
        partial(build_core, directory, _engine_config(settings)), on_step, on_replayed=on_replayed, on_rebound=on_rebound
    )
    shadow = ShadowQuality(engine, store, metrics, settings.shadow_share)
    waiting = WaitingRequests(store, engine.rebind)
    admission = Admission(engine, settings.max_queue, on_reject, meter, settings.max_queue_tokens)
    tokenizer = Tokenizer(directory, settings.allow_special_tokens)
    return Services(
        engine=engine,
        admission=admission,
        store=store,
        language=Language(tokenizer, _tool_dialect(settings, tokenizer), tokenizer.grammar_compiler(config.vocab_size)),
        metrics=metrics,
        automatic_control=AutomaticControl(store, metrics, meter, admission, waiting, Control()),
        shadow=shadow,
        waiting=waiting,
        config=config,
        model_name=name,
        frontier_batch=settings.frontier_batch,
        request_timeout=settings.request_timeout,
        strict_fields=settings.strict_fields,
        telemetry=_telemetry(settings, name),
        fair_queueing=settings.fair_queueing,
        stall_timeout=settings.stall_timeout,
    )


def _form_costs(directory: Path, config: ModelConfig, settings: ServerSettings) -> FormCosts | None:
    """What prompts cost at each number of bits on this machine, if an accuracy chooses by that."""
    if settings.frontier_batch != PREFILL or not config.nested_bits:
        return None
    from ladimo.prefill.measure import measure_form_costs  # other servers have no use for it

    return measure_form_costs(config, stored_dtype(directory), settings.device, settings.dtype)


def _frontier(
    directory: Path,
    config: ModelConfig,
    policies: Mapping[str, RoutingPolicy],
    settings: ServerSettings,
    form_costs: FormCosts | None,
) -> Frontier | None:
    frontier = read_frontier(directory)
    if frontier is None or settings.frontier_batch != PREFILL:
        return None if frontier is None else frontier.for_batch(settings.frontier_batch)
    return prefill_frontier(frontier, policies, config, form_costs)


def given_name(model: str) -> str:
    """The model's name: the last part of its path. Links are not followed: `models/prod` is always served as `prod`."""
    return Path(os.path.abspath(model)).name


def _tool_dialect(settings: ServerSettings, tokenizer: Tokenizer) -> ToolDialect:
    detected = detect_dialect(tokenizer.chat_template)
    dialect = detected if settings.tool_parser == "auto" else DIALECTS[settings.tool_parser]
    how = "the chat template shows tools" if tokenizer.template_knows_tools else "a built-in text describes tools"
    logger.info("%s to the model; its calls are read as %s", how, dialect.name)
    return dialect


def _telemetry(settings: ServerSettings, name: str) -> "Telemetry | None":
    if not settings.exports_traces:
        return None
    try:
        from server.telemetry import connect
    except ModuleNotFoundError as error:
        raise ValueError("traces need OpenTelemetry's SDK: pip install 'ladimo[otel]'") from error
    return connect(settings.otlp_endpoint, name)


def exports_each_expert(choice: Literal["auto", "full", "aggregate"], config: ModelConfig, num_policies: int) -> bool:
    """Whether to export a counter per layer, expert and policy.

    This is decided once, by the number of policies at the start, so that series do not come and go while the server runs.
    """
    if choice != "auto":
        return choice == "full"
    most = num_policies * sum(layer.num_experts for layer in config.layers if layer is not None)
    if most > MAX_EXPERT_SERIES:
        logger.info("%d series per expert are too many: figures per layer only, unless --expert-metrics full", most)
    return most <= MAX_EXPERT_SERIES


def _build_metrics(config: ModelConfig, name: str, per_expert: bool) -> Metrics:
    num_experts = {index: layer.num_experts for index, layer in enumerate(config.layers) if layer is not None}
    metrics = Metrics(CollectorRegistry(), num_experts, config.active_parameters_ratio, per_expert)
    metrics.build_info.labels(ladimo.__version__, platform.python_version(), torch.__version__).set(1)
    metrics.model_info.labels(name, str(config.num_hidden_layers), str(len(num_experts))).set(1)
    return metrics


def _engine_config(settings: ServerSettings) -> EngineConfig:
    return EngineConfig(**{field: getattr(settings, field) for field in EngineConfig.__dataclass_fields__})
