"""Routing traces of nested models: what each token refined, in torch, in the compiled step and from graphs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ladimo.checkpoint import load_model, read_config, read_policies
from ladimo.policy import RoutingPolicy
from server.engine.build import assemble_core, build_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.messages import RoutingTrace
from server.engine.request import GenerationRequest, SamplingParams, Trace
from tests.factories import make_nested
from tests.server.engine.graphs import Driver, graph_core, random_prompts, snapshot

CONFIG = EngineConfig(device="cpu", block_size=4, max_num_seqs=8, max_step_tokens=24, max_model_len=96)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nested(tmp_path_factory.mktemp("nested"), num_experts=2, dense_layers=[1], num_hidden_layers=3)


@pytest.fixture(scope="module")
def policies(nested: Path) -> list[RoutingPolicy]:
    """One that refines neurons and words, one that refines words, and one that reads everything at 8 bits."""
    known = read_policies(nested, read_config(nested))
    layers = tuple(rule and replace(rule, refine=1.0) for rule in known["fast"].layers)
    return [
        replace(known["fast"], name="neurons", layers=layers, head_refine=2.0),
        replace(known["fast"], name="words", head_refine=2.0),
        known["quality"],
    ]


def traced(core: EngineCore, policies: list[RoutingPolicy]) -> dict[str, list[RoutingTrace]]:
    """The traces of one request per policy, prompts included, by the policy's name. All run together."""
    driver = Driver(core)
    sampling = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    for policy, prompt in zip(policies, random_prompts(len(policies)), strict=True):
        driver.submit(GenerationRequest(policy.name, tuple(prompt), sampling, policy, trace=Trace.PROMPT))
    driver.run()
    traces: dict[str, list[RoutingTrace]] = {policy.name: [] for policy in policies}
    for event in driver.events:
        assert event.trace is not None
        traces[event.request_id].append(event.trace)
    return traces


@pytest.mark.parametrize("engine", ["torch", "compiled", "graphs"])
def test_the_counters_are_the_sum_of_what_the_traces_tell(nested: Path, policies: list[RoutingPolicy], engine: str) -> None:
    if engine == "compiled":
        core = build_core(nested, CONFIG)
    else:
        model = load_model(nested, torch.float32, torch.device("cpu"))
        core = assemble_core(model, CONFIG) if engine == "torch" else graph_core(model, CONFIG)
    traces = traced(core, policies)
    counted = snapshot(core).refined
    assert counted is not None
    for name, parts in traces.items():
        assert len(parts) == 9 and parts[0].prompt is not None
        tokens = [*parts[0].prompt, *(token for part in parts for token in part.tokens)]
        refined = [token.refined for token in tokens]
        assert all(numbers is not None and len(numbers) == 3 for numbers in refined)  # two expert layers and the head
        sums = [sum(numbers) for numbers in zip(*filter(None, refined), strict=True)]
        layers = counted.get(name, [[0]] * 4)
        assert sums == [sum(layers[place]) for place in (0, 2, 3)]
        assert [bool(total) for total in sums] == {
            "neurons": [True, True, True],
            "words": [False, False, True],
            "quality": [False, False, False],
        }[name]
    assert len({token.refined for part in traces["neurons"] for token in part.tokens}) > 1  # each token chooses for itself


def test_graphs_tell_what_torch_tells(nested: Path, policies: list[RoutingPolicy]) -> None:
    model = load_model(nested, torch.float32, torch.device("cpu"))
    assert traced(graph_core(model, CONFIG), policies) == traced(assemble_core(model, CONFIG), policies)


def test_other_models_tell_of_experts_alone(moe_dir: Path) -> None:
    known = read_policies(moe_dir, read_config(moe_dir))
    model = load_model(moe_dir, torch.float32, torch.device("cpu"))
    for core in (assemble_core(model, CONFIG), graph_core(model, CONFIG)):
        (parts,) = traced(core, [known["full"]]).values()
        assert all(token.experts and token.refined is None for part in parts for token in part.tokens)
