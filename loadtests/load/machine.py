"""One machine without HTTP: the server's own engine, admission and automatic control, over real steps or over simulated ones.

A simulated step takes the time that the learned step costs say, in virtual time. All else is the code that serves.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from prometheus_client import CollectorRegistry

from ladimo.model.backends.torch_backend import CPU_STEP_BYTES
from loadtests.load.client import Outcome
from loadtests.load.workload import Planned
from server.api.admission import Admission
from server.api.automatic_control import AutomaticControl
from server.api.requests.pressure import under_pressure
from server.api.waiting import WaitingRequests
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.batch import Batch, tokens_by_policy
from server.engine.build import step_limits
from server.engine.config import EngineConfig, EngineLimits
from server.engine.core import EngineCore
from server.engine.messages import Rebind, Rebinding, Rebound, Submit
from server.engine.model_runner import BatchOutput, Drawn
from server.engine.policy_table import PolicyTable
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.scheduler import Scheduler
from server.errors import QueueFull
from server.metrics import Metrics
from server.policies.controller import Control
from server.policies.costs import StepCosts
from server.policies.load_meter import LoadMeter
from server.policies.route import Route
from server.policies.store import PolicyStore
from server.policies.targets import AUTO
from server.policies.tiers import FIXED


class Clock(Protocol):
    """Seconds since some time."""

    def __call__(self) -> float: ...

    def wait_until(self, at: float) -> None: ...


class RealClock:
    def __call__(self) -> float:
        return time.monotonic()

    def wait_until(self, at: float) -> None:
        time.sleep(max(0.0, at - time.monotonic()))


class VirtualClock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait_until(self, at: float) -> None:
        self.now = max(self.now, at)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What HTTP adds to the steps, in seconds: for each request, and for each token that is sent."""

    request: float = 0.0
    token: float = 0.0


NO_OVERHEAD = Overhead()


class SimulatedRunner:
    """Draws nothing of use, and takes the time that the costs say. `price`: of a policy by name."""

    graph_captures = 0

    def __init__(
        self, costs: StepCosts, price: Callable[[str], float], clock: VirtualClock, num_layers: int, overhead: Overhead
    ) -> None:
        self._costs, self._price, self._clock, self._num_layers = costs, price, clock, num_layers
        self._overhead = overhead

    def graph_bucket(self, batch: Batch) -> int | None:
        return None

    def launch(self, batch: Batch) -> Callable[[], BatchOutput]:
        rows, tokens = (self._by_price(tokens_by_policy(runs)) for runs in (batch.decode_runs, batch.prefill_runs))
        seconds = self._costs.mixed_seconds(rows, tokens) + self._overhead.token * len(batch.drawing)
        seconds += self._overhead.request * sum(sequence.num_computed == 0 for sequence, _ in batch.prefill)
        size = len(batch.scheduled)
        output = BatchOutput(
            drawn=[Drawn(0) for _ in batch.drawing],
            expert_counts=[[0] * self._num_layers for _ in range(size)],
            refined_rows=[0] * size,
            prompt_logprobs=[[] for _ in range(size)],
            routing=[[] for _ in range(size)],
        )

        def wait() -> BatchOutput:
            self._clock.wait_until(self._clock() + seconds)
            return output

        return wait

    def _by_price(self, tokens: dict[str, int]) -> dict[float, int]:
        prices: dict[float, int] = {}
        for name, count in tokens.items():
            prices[self._price(name)] = prices.get(self._price(name), 0) + count
        return prices


def simulated_core(
    store: PolicyStore, costs: StepCosts, config: EngineConfig, clock: VirtualClock, overhead: Overhead = NO_OVERHEAD
) -> EngineCore:
    """An engine without a model, whose steps take as long as the costs say. Its KV cache has room for a full batch."""
    model = store.config
    max_model_len = config.max_model_len or model.max_position_embeddings
    num_blocks = config.max_num_seqs * -(-max_model_len // config.block_size) + 1
    blocks = BlockManager(num_blocks, config.block_size)
    limit, chunks = step_limits(config, model, CPU_STEP_BYTES)
    scheduler = Scheduler(blocks, config.max_num_seqs, limit, max_model_len, config.prefix_caching, chunks)
    table = PolicyTable(model, config.max_policies + 1, torch.device("cpu"))
    sizes = (max_model_len, config.max_num_seqs, num_blocks, config.block_size, model.vocab_size, config.max_policies)
    runner = SimulatedRunner(costs, store.price, clock, model.num_hidden_layers, overhead)
    return EngineCore(runner, scheduler, table, EngineLimits(*sizes), frozenset(), clock)


@dataclass(frozen=True, slots=True)
class _Ready:
    """What admission reads of an engine."""

    limits: EngineLimits
    state: EngineState = EngineState.READY


@dataclass(eq=False, slots=True)
class _Running:
    """An admitted request."""

    request_id: str
    route: Route
    outcome: Outcome

    @property
    def request_ids(self) -> tuple[str, ...]:
        return (self.request_id,)

    def rebind(self, route: Route) -> None:
        self.route = route

    def tell(self, store: PolicyStore) -> None:
        """The request has begun: write down its route."""
        route, outcome = self.route, self.outcome
        outcome.policy, outcome.accuracy, outcome.reason = route.policy.name, route.accuracy, route.reason
        outcome.bytes_ratio = store.price(route.policy.name)


class Machine:
    """Serves planned requests that leave the choice of the policy to the server. `store`: its own, with the default to use."""

    def __init__(self, core: EngineCore, store: PolicyStore, clock: Clock, max_queue: int) -> None:
        self._core, self._store, self._clock = core, store, clock
        self.meter = LoadMeter(store.price)
        engine = cast(AsyncEngine, _Ready(core.limits))
        self._admission = Admission(engine, max_queue, lambda code: None, self.meter, clock=clock)
        metrics = Metrics(CollectorRegistry(), {}, store.config.active_parameters_ratio)
        self._interval = Control().interval_seconds
        self._waiting = WaitingRequests(store, self._rebind)
        self._control = AutomaticControl(store, metrics, self.meter, self._admission, self._waiting, Control(), clock)

    def run(self, planned: Sequence[Planned]) -> list[Outcome]:
        """The outcomes, in order. Times are in seconds since the start."""
        start, waiting = self._clock(), list(planned)
        outcomes = [Outcome(each.routing.name, each.at) for each in planned]
        running: dict[str, _Running] = {}
        last: dict[str, float] = {}
        number, next_decision = 0, start
        while number < len(waiting) or self._core.has_work:
            now = self._clock()
            while number < len(waiting) and start + waiting[number].at <= now:
                request_id = f"r{number}"
                submitted = self._submit(request_id, waiting[number], outcomes[number], now - start)
                if submitted is not None:
                    running[request_id] = submitted
                number += 1
            if now >= next_decision:
                self._control.decide()
                next_decision = now + self._interval
            if not self._core.has_work:
                due = start + waiting[number].at if number < len(waiting) else next_decision
                self._clock.wait_until(min(due, next_decision))
                continue
            result = self._core.step()
            now = self._clock()
            self.meter.observe(result.stats, now)
            for event in result.events:
                request = running[event.request_id]
                outcome = request.outcome
                if outcome.first is None:
                    self._waiting.remove(request)
                    request.tell(self._store)
                    outcome.first = now - start
                    self._admission.give_back(0, outcome.prompt_tokens)
                else:
                    outcome.gaps.append(now - start - last[event.request_id])
                last[event.request_id] = outcome.ended = now - start
                outcome.output_tokens += 1
                if event.finished is not None:
                    self._admission.give_back(1, 0)
        return outcomes

    def _rebind(self, changes: Sequence[Rebinding]) -> None:
        reply = self._core.handle(Rebind(tuple(changes)))
        assert isinstance(reply, Rebound)
        self._waiting.rebound(reply)

    def _submit(self, request_id: str, request: Planned, outcome: Outcome, now: float) -> "_Running | None":
        outcome.sent = outcome.ended = now
        outcome.prompt_tokens = len(request.prompt)
        admission, places = self._admission, 0
        try:
            admission.take_places(1)
            places = 1
            route = under_pressure(self._store.resolve(), FIXED[AUTO], 0, self._store, admission)
            admission.take_room(len(request.prompt))
        except QueueFull as error:
            admission.give_back(places, 0)
            outcome.status, outcome.code = 429, error.code
            return None
        outcome.status = 200
        sampling = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        self._core.handle(Submit(GenerationRequest(request_id, tuple(request.prompt), sampling, route.policy)))
        running = _Running(request_id, route, outcome)
        self._waiting.add(running)
        return running
