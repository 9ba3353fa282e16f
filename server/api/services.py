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
from server.api.automatic_control import AutomaticControl
from server.api.policy_changes import PolicyChanges, Share
from server.api.requests.terms import FairQueueing, RequestRules
from server.api.shadow import ShadowQuality
from server.api.waiting import WaitingRequests
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.policies.store import PolicyStore
from server.text.language import Language

# Well below Prometheus's scrape timeout, so that a server whose engine hangs can still answer.
SCRAPE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Services:
    """All parts of the server. It is built once, before the application. A route gets only the parts that it uses.

    `created`: Unix seconds of the server's start.
    `frontier_batch`: the batch size of the frontier from which an accuracy chooses, or "prefill".
    `request_timeout`: seconds that a request may take; None: no limit.
    `strict_fields`: unknown fields are errors.
    `telemetry`: None if requests are not traced.
    `fair_queueing`: who takes turns while requests wait.
    `stall_timeout`: seconds that one engine step may take before the server no longer counts as alive.
    `comment_seconds`: a stream sends a comment after so many seconds without an event.
    `scrape_seconds`: how long /metrics waits for the engine's counters.
    `shadow`: compares policies on finished answers.
    `waiting`: the requests that take each new accuracy while they wait.
    `automatic_control`: sets the accuracy while the default is automatic.
    `share_policies`: makes a change of the policies on several servers; None if this server is alone.
    `admin_lock`: allows one admin action at a time, because each builds on the state that the last one left.
    """

    engine: AsyncEngine
    admission: Admission
    store: PolicyStore
    language: Language
    metrics: Metrics
    automatic_control: AutomaticControl
    shadow: ShadowQuality
    waiting: WaitingRequests
    config: ModelConfig
    model_name: str
    frontier_batch: int | str = 1
    request_timeout: float | None = None
    strict_fields: bool = False
    telemetry: Tracing | None = None
    fair_queueing: FairQueueing = "key"
    stall_timeout: float = 120.0
    comment_seconds: float = 10.0
    scrape_seconds: float = SCRAPE_SECONDS
    share_policies: Share | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    admin_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def policy_changes(self) -> PolicyChanges:
        return PolicyChanges(self.store, self.engine, self.admission, self.metrics, self.admin_lock, self.share_policies)


def _part(find: Callable[[Services], object]) -> Any:
    async def part(request: Request) -> object:
        return find(cast(Services, request.app.state.services))

    return Depends(part)


EngineDep = Annotated[AsyncEngine, _part(lambda services: services.engine)]
AdmissionDep = Annotated[Admission, _part(lambda services: services.admission)]
StoreDep = Annotated[PolicyStore, _part(lambda services: services.store)]
LanguageDep = Annotated[Language, _part(lambda services: services.language)]
AutomaticControlDep = Annotated[AutomaticControl, _part(lambda services: services.automatic_control)]
ShadowDep = Annotated[ShadowQuality, _part(lambda services: services.shadow)]
MetricsDep = Annotated[Metrics, _part(lambda services: services.metrics)]
ConfigDep = Annotated[ModelConfig, _part(lambda services: services.config)]
ModelNameDep = Annotated[str, _part(lambda services: services.model_name)]
CreatedDep = Annotated[int, _part(lambda services: services.created)]
FrontierBatchDep = Annotated[int | str, _part(lambda services: services.frontier_batch)]
StallTimeoutDep = Annotated[float, _part(lambda services: services.stall_timeout)]
ScrapeSecondsDep = Annotated[float, _part(lambda services: services.scrape_seconds)]


async def _permit(admission: AdmissionDep) -> AsyncIterator[Permit]:
    """Yields a permit. It is closed after the answer has been sent, or after an error."""
    with closing(Permit(admission)) as permit:
        yield permit


PermitDep = Annotated[Permit, Depends(_permit)]

RequestRulesDep = Annotated[
    RequestRules,
    _part(lambda s: RequestRules(s.store, s.model_name, s.request_timeout, s.strict_fields, s.fair_queueing)),
]
GenerationPartsDep = Annotated[
    GenerationParts, _part(lambda s: GenerationParts(s.engine, s.language.tokenizer, s.metrics, s.config, s.shadow, s.waiting))
]
AnswerPartsDep = Annotated[AnswerParts, _part(lambda s: AnswerParts(s.metrics, s.telemetry, s.comment_seconds))]
PolicyChangesDep = Annotated[PolicyChanges, _part(lambda services: services.policy_changes)]
