"""What the routes work with. Built once by the application, handed to routes as a dependency."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, cast

from fastapi import Depends, Request

from ladimo.model.config import ModelConfig
from server.api.admission import Admission
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.policies.store import PolicyStore
from server.text.grammar import GrammarCompiler
from server.text.tokenizer import Tokenizer
from server.text.tool_dialects import PLAIN_JSON, ToolDialect


class Tracing(Protocol):
    """What makes a span of every generation: `server.telemetry`, where its extra is installed and configured."""

    def follow(self, generation: Any, operation: str, fields: Any, headers: Mapping[str, str]) -> AsyncGenerator[Any, None]:
        """The deltas of a `Generation` whose request had these `GenerationFields` and headers."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """`created`: Unix seconds of the server's start. `frontier_batch`: the batch size whose frontier the knob walks.
    `request_timeout`: seconds that a request may take at most (None: any). `strict_fields`: unknown fields are errors.
    `tool_dialect`: how the model writes calls of tools.
    `telemetry` None: requests are not traced.
    `fair_queueing`: who takes turns where requests wait.
    `stall_timeout`: seconds that one engine step may take before the server no longer counts as alive.
    `comment_seconds`: a stream that has nothing to send for so long, at its beginning too, sends a comment.

    `admin_lock`: one admin action at a time, since each builds on the state that the last one left.
    """

    engine: AsyncEngine
    admission: Admission
    store: PolicyStore
    tokenizer: Tokenizer
    grammars: GrammarCompiler
    metrics: Metrics
    config: ModelConfig
    model_name: str
    tool_dialect: ToolDialect = PLAIN_JSON
    frontier_batch: int = 1
    request_timeout: float | None = None
    strict_fields: bool = False
    telemetry: Tracing | None = None
    fair_queueing: Literal["key", "user", "none"] = "key"
    stall_timeout: float = 120.0
    comment_seconds: float = 10.0
    created: int = field(default_factory=lambda: int(time.time()))
    admin_lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]
