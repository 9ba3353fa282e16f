"""An engine core driven step by step, with captured decode steps: graphs on a CUDA device, steps run again elsewhere."""

from pathlib import Path
from typing import Any

import torch

from ladimo.checkpoint import read_config
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.graphs.cuda_graphs import GraphCapturer, Rerun
from server.engine.messages import Command, ExpertSnapshot, ReadExperts, Report, StepStats, Submit, TokenEvent
from server.engine.request import GenerationRequest, SamplingParams


class Driver:
    """An engine core and what came out of it, by request. `after_step` may send commands between two steps."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[str, list[int]] = {}
        self.events: list[TokenEvent] = []
        self.steps: list[StepStats] = []

    def handle(self, command: Command) -> Report | None:
        return self.core.handle(command)

    def submit(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.tokens[request.request_id] = []
            assert self.handle(Submit(request)) is None

    def step(self) -> None:
        result = self.core.step()
        self.steps.append(result.stats)
        for event in result.events:
            assert event.token_id is not None
            self.events.append(event)
            self.tokens[event.request_id].append(event.token_id)

    def run(self) -> dict[str, list[int]]:
        for _ in range(5000):
            if not self.core.has_work:
                return self.tokens
            self.step()
        raise AssertionError("the engine does not come to an end")

    @property
    def buckets(self) -> list[int | None]:
        """Of the steps that only decoded: the graph that was replayed."""
        return [step.cuda_graph_bucket for step in self.steps if step.decode_tokens and not step.prefill_tokens]


def graph_core(
    model: MoeTransformer,
    config: EngineConfig,
    backend: GraphCapturer | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> EngineCore:
    """An engine whose decode steps are replayed; on CPU by running them again, on a CUDA device as graphs."""
    on_device = model.model.embed_tokens.weight.device.type == "cuda"
    return assemble_core(model, config, eos_token_ids, None if on_device else backend or Rerun())


def assert_idle(core: EngineCore) -> None:
    """Nothing is held any more: no block, no policy row, nothing in flight."""
    scheduler = core._scheduler
    assert not core.has_work and core._flight is None
    scheduler.blocks.check([])
    assert scheduler.blocks.usage_ratio == 0
    assert all(row is None or row.users == 0 for row in core._table._rows)


def snapshot(core: EngineCore) -> ExpertSnapshot:
    read = core.handle(ReadExperts(0))
    assert isinstance(read, ExpertSnapshot)
    return read


def null_block_is_finite(core: EngineCore) -> bool:
    cache = core._runner.kv_cache  # type: ignore[attr-defined]
    return bool(torch.isfinite(cache.k[:, 0]).all() and torch.isfinite(cache.v[:, 0]).all())


def rules(directory: Path, name: str, **rule: Any) -> RoutingPolicy:
    """A policy with the same rule in every expert layer."""
    layers = read_config(directory).layers
    return RoutingPolicy(name, "", tuple(None if layer is None else LayerRule(**rule) for layer in layers))


def eight_policies(directory: Path) -> list[RoutingPolicy]:
    """Of every kind that a row of the table can say, for a checkpoint of four experts."""
    return [
        rules(directory, "k1", top_k=1),
        rules(directory, "k2", top_k=2),
        rules(directory, "k3", top_k=3),
        rules(directory, "k4", top_k=4),
        rules(directory, "mass", top_k=4, mass=0.6),
        rules(directory, "floor", top_k=4, floor=0.2, renormalize=False),
        rules(directory, "subset", top_k=2, experts=(1, 3)),
        rules(directory, "one", top_k=1, renormalize=False),
    ]


def random_prompts(count: int) -> list[list[int]]:
    """Byte tokens, of 7 to 60 places."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (7 + 5 * i % 54,), generator=generator).tolist() for i in range(count)]


def mixed_requests(directory: Path, count: int) -> list[GenerationRequest]:
    """Every policy, and every way to draw: greedy, random, narrowed, penalised, biased, with log-probabilities."""
    policies = eight_policies(directory)
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"temperature": 0.7, "logit_bias": ((65, 4.0), (66, -3.0))},
        {"temperature": 0.0, "logprobs": 2},
    ]
    made = []
    for index, prompt in enumerate(random_prompts(count)):
        sampling = SamplingParams(max_tokens=5 + 3 * index % 11, ignore_eos=True, seed=index, **ways[index % 8])
        made.append(GenerationRequest(f"r{index}", tuple(prompt), sampling, policies[(index * 3) % 8]))
    return made
