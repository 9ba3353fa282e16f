"""The server's parts, and the dependencies that give each route those that it uses."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from ladimo.model.config import ModelConfig
from server.api.admission import Admission, Permit
from server.api.answers.answering import AnswerParts, Tracing
from server.api.answers.generation import GenerationParts
from server.api.policy_changes import PolicyChanges
from server.api.requests.terms import FairQueueing, RequestRules
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.policies.controller import Control
from server.policies.store import PolicyStore
from server.text.language import Language

# Well below Prometheus's scrape timeout: a server whose engine hangs must be able to say so.
SCRAPE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Services:
    """Built once, before the application. No route sees all of it.

    `created`: Unix seconds of the server's start. `frontier_batch`: the batch size whose frontier the knob walks.
    `request_timeout`: seconds that a request may take at most (None: any). `strict_fields`: unknown fields are errors.
    `telemetry` None: requests are not traced.
    `fair_queueing`: who takes turns where requests wait.
    `stall_timeout`: seconds that one engine step may take before the server no longer counts as alive.
    `comment_seconds`: a stream that has nothing to send for so long, at its beginning too, sends a comment.
    `scrape_seconds`: how long /metrics waits for the engine's counters.
    `control`: when automatic control moves the knob.

    `admin_lock`: one admin action at a time, since each builds on the state that the last one left.
    """

    engine: AsyncEngine
    admission: Admission
    store: PolicyStore
    language: Language
    metrics: Metrics
    config: ModelConfig
    model_name: str
    frontier_batch: int = 1
    request_timeout: float | None = None
    strict_fields: bool = False
    telemetry: Tracing | None = None
    fair_queueing: FairQueueing = "key"
    stall_timeout: float = 120.0
    comment_seconds: float = 10.0
    scrape_seconds: float = SCRAPE_SECONDS
    control: Control = Control()
    created: int = field(default_factory=lambda: int(time.time()))
    admin_lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def _part(find: Callable[[Services], object]) -> Any:
    async def part(request: Request) -> object:
        return find(cast(Services, request.app.state.services))

    return Depends(part)


EngineDep = Annotated[AsyncEngine, _part(lambda services: services.engine)]
AdmissionDep = Annotated[Admission, _part(lambda services: services.admission)]
StoreDep = Annotated[PolicyStore, _part(lambda services: services.store)]
LanguageDep = Annotated[Language, _part(lambda services: services.language)]
MetricsDep = Annotated[Metrics, _part(lambda services: services.metrics)]
ConfigDep = Annotated[ModelConfig, _part(lambda services: services.config)]
ModelNameDep = Annotated[str, _part(lambda services: services.model_name)]
CreatedDep = Annotated[int, _part(lambda services: services.created)]
FrontierBatchDep = Annotated[int, _part(lambda services: services.frontier_batch)]
StallTimeoutDep = Annotated[float, _part(lambda services: services.stall_timeout)]
ScrapeSecondsDep = Annotated[float, _part(lambda services: services.scrape_seconds)]


async def _permit(admission: AdmissionDep) -> AsyncIterator[Permit]:
    """Closed when the answer has been sent, and when anything goes wrong before."""
    with closing(Permit(admission)) as permit:
        yield permit


PermitDep = Annotated[Permit, Depends(_permit)]

RequestRulesDep = Annotated[
    RequestRules,
    _part(lambda s: RequestRules(s.store, s.model_name, s.request_timeout, s.strict_fields, s.fair_queueing)),
]
GenerationPartsDep = Annotated[
    GenerationParts, _part(lambda s: GenerationParts(s.engine, s.language.tokenizer, s.metrics, s.config))
]
AnswerPartsDep = Annotated[AnswerParts, _part(lambda s: AnswerParts(s.metrics, s.telemetry, s.comment_seconds))]
PolicyChangesDep = Annotated[
    PolicyChanges, _part(lambda s: PolicyChanges(s.store, s.engine, s.admission, s.metrics, s.admin_lock))
]
