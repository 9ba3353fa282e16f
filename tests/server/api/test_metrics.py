"""Metrics tell the truth: counters equal what happened, and every name of the contract that can be fed is there."""

import asyncio
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.engine.messages import ExpertSnapshot, StepStats
from server.expert_metrics import ExpertExposition
from server.exposition import Histogram as OurHistogram
from server.launch import exports_each_expert
from server.metrics import Metrics
from tests.server.fakes import FAKE_CONFIG
from tests.server.serving import ADMIN, TOP_K, Parts, sample_values, serving

LAYERS = (0, 2)  # layer 1 is dense
EXPERTS = 4


async def test_counters_equal_what_clients_saw(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        jobs = [("fast", 3), ("fast", 9), ("balanced", 5), ("quality", 1), ("full", 7), ("balanced", 16)]
        bodies = await asyncio.gather(*(server.complete("ab", max_tokens=n, routing=name) for name, n in jobs))
        assert (await server.client.post("/v1/completions", json={"prompt": ""})).status_code == 400
        samples = await server.metrics()
        for policy in TOP_K:
            usages = [body["usage"] for body, (name, _) in zip(bodies, jobs, strict=True) if name == policy]
            prompt, generated = (sum(u[key] for u in usages) for key in ("prompt_tokens", "completion_tokens"))
            label = f'policy="{policy}"'
            assert samples[f"ladimo_prompt_tokens_total{{{label}}}"] == prompt
            assert samples[f"ladimo_generation_tokens_total{{{label}}}"] == generated
            assert samples[f'ladimo_request_success_total{{finish_reason="length",{label}}}'] == len(usages)
            assert samples[f"ladimo_time_to_first_token_seconds_count{{{label}}}"] == len(usages)
            assert samples[f"ladimo_e2e_request_latency_seconds_count{{{label}}}"] == len(usages)
            assert samples.get(f"ladimo_inter_token_latency_seconds_count{{{label}}}", 0) == generated - len(usages)
            computed = prompt + generated - len(usages)  # the last token of each answer is never computed
            for layer in LAYERS:
                chosen = [
                    samples[f'ladimo_expert_tokens_total{{expert="{expert}",layer="{layer}",{label}}}']
                    for expert in range(EXPERTS)
                ]
                assert sum(chosen) == computed * TOP_K[policy]
                assert samples[f'ladimo_layer_experts_per_token{{layer="{layer}",{label}}}'] == TOP_K[policy]
            requests = f'ladimo_policy_requests_total{{reason="body",requested="{policy}",served="{policy}"}}'
            assert samples[requests] == len(usages)
        assert samples['ladimo_request_failures_total{code="invalid_request"}'] == 1
        assert samples["ladimo_requests_running"] == samples["ladimo_requests_waiting"] == 0
        tokens = sum(b["usage"]["total_tokens"] for b in bodies) - len(bodies)
        assert samples["ladimo_step_tokens_sum"] == tokens
        assert not any('layer="1"' in name for name in samples)


async def test_active_parameters_ratio_is_that_of_the_answers(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=5, routing="quality")
        samples = await server.metrics()
        assert samples['ladimo_active_parameters_ratio{policy="quality"}'] == body["routing"]["active_parameters_ratio"]
        assert samples['ladimo_expert_load_imbalance{layer="0"}'] == EXPERTS / TOP_K["quality"]


async def test_swaps_show_in_the_routing_metrics(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        before = await server.metrics()
        assert before["ladimo_routing_accuracy"] == 1
        (name,) = [name for name in before if name.startswith("ladimo_policy_info") and 'default="true"' in name]
        assert 'policy="full"' in name
        for target in ({"policy": "fast"}, {"accuracy": 0.4}):
            reply = await server.client.put("/admin/routing/default", json=target, headers=ADMIN)
            assert reply.status_code == 200
        await server.client.post("/admin/routing/rollback", headers=ADMIN)
        after = await server.metrics()
        assert after['ladimo_policy_swaps_total{result="ok"}'] == 3
        assert after["ladimo_policy_swap_duration_seconds_count"] == 3
        assert after["ladimo_routing_accuracy"] == 0
        (name,) = [name for name in after if name.startswith("ladimo_policy_info") and 'default="true"' in name]
        assert 'policy="fast"' in name


async def test_first_events_count_in_a_rate(tmp_path: Path) -> None:
    """Series whose labels are known stand at 0 before anything has happened."""
    async with serving(tmp_path) as server:
        samples = await server.metrics()
        for policy in TOP_K:
            assert samples[f'ladimo_generation_tokens_total{{policy="{policy}"}}'] == 0
            assert samples[f'ladimo_inter_token_latency_seconds_count{{policy="{policy}"}}'] == 0
            for reason in ("stop", "length", "tool_calls", "abort"):
                assert samples[f'ladimo_request_success_total{{finish_reason="{reason}",policy="{policy}"}}'] == 0
        for code in ("internal_error", "queue_full", "context_length_exceeded"):
            assert samples[f'ladimo_request_failures_total{{code="{code}"}}'] == 0
        assert samples['ladimo_policy_swaps_total{result="failed"}'] == 0
        assert samples['ladimo_slo_controller_decisions_total{direction="down"}'] == 0


async def test_a_stuck_engine_shows(tmp_path: Path) -> None:
    """What the engine says of itself stands still when a step hangs; what is counted at the door does not."""
    async with serving(tmp_path, Parts(scrape_seconds=0.05)) as server:
        server.runner.gate.clear()
        request = asyncio.create_task(server.complete("ab", max_tokens=4))
        await server.submitted(1)
        stuck = await server.metrics()
        assert stuck["ladimo_requests_in_flight"] == 1
        assert stuck["ladimo_requests_waiting"] == 0
        assert stuck["ladimo_engine_heartbeat_age_seconds"] >= 0.05
        server.release()
        await request
        assert (await server.metrics())["ladimo_requests_in_flight"] == 0


async def test_the_floor_of_automatic_control_shows(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        assert math.isnan((await server.metrics())["ladimo_routing_accuracy_floor"])
        target = {"auto": {"itl_ms": 50, "min_accuracy": 0.25}}
        assert (await server.client.put("/admin/routing/default", json=target, headers=ADMIN)).status_code == 200
        assert (await server.metrics())["ladimo_routing_accuracy_floor"] == 0.25


@pytest.mark.parametrize(
    ("choice", "num_experts", "exported"),
    [("auto", 312, True), ("auto", 313, False), ("full", 313, True), ("aggregate", 4, False)],
)
def test_counters_per_expert_are_the_default_while_they_are_few(
    choice: Literal["auto", "full", "aggregate"], num_experts: int, exported: bool
) -> None:
    """Two expert layers and eight policies: 2 x 312 x 8 = 4,992 series are few enough, 5,008 are not."""
    layers = tuple(layer and replace(layer, num_experts=num_experts) for layer in FAKE_CONFIG.layers)
    assert exports_each_expert(choice, replace(FAKE_CONFIG, layers=layers), 8) is exported


def test_aggregates_stay_without_series_per_expert() -> None:
    snapshot = ExpertSnapshot(
        1,
        expert_tokens={"a": [[30, 10, 0, 0], [0] * 4], "b": [[0, 10, 0, 0], [0] * 4]},
        reachable={"a": [[0, 1, 2, 3], []], "b": [[0, 1, 2, 3], []]},
        routed_tokens={"a": 30, "b": 10},
        distinct_experts=[[0, 3, 1, 0, 0], [0] * 5],
    )
    for per_expert in (True, False):
        metrics = Metrics(CollectorRegistry(), {0: 4}, lambda experts: 0.5, per_expert)
        value = sample_values(metrics.render(snapshot))
        assert any(name.startswith("ladimo_expert_tokens_total{") for name in value) is per_expert
        assert value['ladimo_layer_experts_per_token{layer="0",policy="a"}'] == 40 / 30
        assert value['ladimo_active_parameters_ratio{policy="b"}'] == 0.5
        assert value['ladimo_expert_load_imbalance{layer="0"}'] == 0.75 * 30 / 10 + 0.25 * 10 / 2.5
        assert value['ladimo_experts_never_used{layer="0"}'] == 2
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
        assert value['ladimo_expert_load_entropy_ratio{layer="0"}'] == pytest.approx(0.75 * entropy)
        assert value['ladimo_layer_distinct_experts_per_step_sum{layer="0"}'] == 5
        assert value['ladimo_layer_distinct_experts_per_step_bucket{layer="0",le="1.0"}'] == 3


def test_an_even_load_has_entropy_one_and_one_expert_zero() -> None:
    for counts, ratio in (([5, 5, 5, 5], 1.0), ([20, 0, 0, 0], 0.0)):
        metrics = Metrics(CollectorRegistry(), {0: 4}, lambda experts: 0.5)
        snapshot = ExpertSnapshot(1, {"a": [counts]}, {"a": [[0, 1, 2, 3]]}, {"a": 20}, [[0] * 5])
        value = sample_values(metrics.render(snapshot))
        assert value['ladimo_expert_load_entropy_ratio{layer="0"}'] == pytest.approx(ratio)


def test_a_policy_is_judged_by_the_experts_that_it_may_choose() -> None:
    """What masks leave out has no series and is neither unused nor uneven; what they allow and nobody chose is."""
    metrics = Metrics(CollectorRegistry(), {0: 8}, lambda experts: 0.5)
    static, one = [0, 0, 5, 5, 5, 0, 0, 0], [0, 0, 0, 0, 0, 3, 0, 0]
    counts = {"static": [static], "one": [one], "idle": [[0] * 8]}
    reachable = {"static": [[2, 3, 4]], "one": [[5]], "idle": [[0, 1]]}
    routed = {"static": 5, "one": 3}

    def value() -> dict[str, float]:
        return sample_values(metrics.render(ExpertSnapshot(1, counts, reachable, routed, [[0] * 9])))

    page = value()
    assert {
        policy: [
            expert
            for expert in range(8)
            if f'ladimo_expert_tokens_total{{expert="{expert}",layer="0",policy="{policy}"}}' in page
        ]
        for policy in counts
    } == {policy: experts for policy, (experts,) in reachable.items()}
    assert page['ladimo_expert_tokens_total{expert="4",layer="0",policy="static"}'] == 5
    assert page['ladimo_layer_experts_per_token{layer="0",policy="static"}'] == 3
    assert page['ladimo_expert_load_imbalance{layer="0"}'] == 1
    assert page['ladimo_expert_load_entropy_ratio{layer="0"}'] == pytest.approx(1)
    assert page['ladimo_experts_never_used{layer="0"}'] == 0

    # A new version may choose two more, one of which another policy has chosen.
    reachable["static"] = [[2, 3, 4, 5, 7]]
    page = value()
    assert page['ladimo_expert_tokens_total{expert="7",layer="0",policy="static"}'] == 0
    assert page['ladimo_expert_load_imbalance{layer="0"}'] == pytest.approx((5 * 5 / 3 + 3 * 1) / 8)
    entropy = math.log(3) / math.log(5)
    assert page['ladimo_expert_load_entropy_ratio{layer="0"}'] == pytest.approx((5 * entropy + 3 * 1) / 8)
    assert page['ladimo_experts_never_used{layer="0"}'] == 1


def test_refined_neurons_have_series_where_a_policy_refines() -> None:
    snapshot = ExpertSnapshot(
        call_id=0,
        expert_tokens={"fine": [[4]], "plain": [[2]]},
        reachable={"fine": [[0]], "plain": [[0]]},
        routed_tokens={"fine": 4, "plain": 2},
        distinct_experts=[[0, 4]],
        refined={"fine": [[3, 0], [0, 7]], "plain": [[0, 0], [0, 0]]},
    )
    for per_expert in (True, False):
        exposition = ExpertExposition({0: 1}, lambda experts: 1.0, per_expert)
        lines = [line for line in exposition.write(snapshot).splitlines() if line.startswith("ladimo_refined_total")]
        expected = [
            'ladimo_refined_total{group="0",layer="0",policy="fine"} 3.0',
            'ladimo_refined_total{group="1",layer="0",policy="fine"} 0.0',
            'ladimo_refined_total{group="0",layer="head",policy="fine"} 0.0',
            'ladimo_refined_total{group="1",layer="head",policy="fine"} 7.0',
        ]
        assert lines == (expected if per_expert else [])


def test_prefix_cache_figures_come_from_the_steps() -> None:
    metrics = Metrics(CollectorRegistry(), {}, lambda experts: 1.0)
    for hits in (3, 4):
        metrics.record(StepStats(0.1, 0, 0, 0, 0, 0.0, 0, prefix_cache_queries=10, prefix_cache_hits=hits))
    assert metrics.registry.get_sample_value("ladimo_prefix_cache_queries_total") == 20
    assert metrics.registry.get_sample_value("ladimo_prefix_cache_hits_total") == 7


async def test_declarations_say_what_is_exported(tmp_path: Path) -> None:
    """Types, labels and buckets of every sample, against a server that has done some of everything."""
    async with serving(tmp_path) as server:
        await asyncio.gather(*(server.complete("ab", max_tokens=9, routing=name) for name in TOP_K))
        text = (await server.client.get("/metrics")).text
        declared = {d.name.removesuffix("_total"): d for d in server.services.metrics.declarations}
        seen = set()
        for family in text_string_to_metric_families(text):
            if family.name.startswith("ladimo_"):
                declaration = declared[family.name]
                assert (family.type, family.documentation) == (declaration.type, declaration.help)
                for sample in family.samples:
                    seen.add(family.name)
                    assert set(sample.labels) - {"le"} == set(declaration.labels)
                bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
                assert not declaration.buckets or bounds == {*declaration.buckets, math.inf}
        unfed = {
            "ladimo_refined",
            "ladimo_cuda_graph_replays",
            "ladimo_admission_rejections",
            "ladimo_build_info",
            "ladimo_model_info",
        }
        assert seen == set(declared) - unfed


async def test_names_of_the_contract_are_declared(tmp_path: Path) -> None:
    names = {
        "requests_running",
        "requests_waiting",
        "request_success",
        "request_failures",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "prompt_tokens",
        "generation_tokens",
        "request_prompt_tokens",
        "request_generation_tokens",
        "admission_rejections",
        "kv_cache_usage_ratio",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "preemptions",
        "engine_step_seconds",
        "step_tokens",
        "cuda_graph_replays",
        "cuda_graph_misses",
        "cuda_graph_captures",
        "expert_tokens",
        "layer_experts_per_token",
        "layer_distinct_experts_per_step",
        "expert_load_imbalance",
        "active_parameters_ratio",
        "policy_info",
        "policy_swaps",
        "policy_swap_duration_seconds",
        "policy_requests",
        "routing_accuracy",
        "slo_controller_decisions",
        "build_info",
        "model_info",
    }
    async with serving(tmp_path) as server:
        text = (await server.client.get("/metrics")).text
        declared = {name.removesuffix("_total") for name in re.findall(r"# TYPE ladimo_(\w+) ", text)}
        assert names <= declared
        assert declared == {d.name.removeprefix("ladimo_").removesuffix("_total") for d in server.services.metrics.declarations}
        assert "process_cpu_seconds_total" in text
        assert "_created" not in text


class Parsed(Collector):
    """A page read back, for prometheus_client to write again."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))

    def collect(self) -> Iterable[Metric]:
        return self.families


def test_the_page_is_written_as_prometheus_client_writes_it() -> None:
    """Names, labels and their order, numbers, headers: byte by byte, and again after everything has changed."""
    metrics = Metrics(CollectorRegistry(), {0: 12, 3: 4}, lambda experts: 0.5)
    metrics.show_policies({"full": "abc", 'wild \\ "one"\n%s': "def"}, "full", 1.0)
    for turn in range(3):
        rows = [[turn * 10**expert for expert in range(12)] for _ in range(4)]
        routed = {"full": 7, 'wild \\ "one"\n%s': turn}
        reachable = dict.fromkeys(routed, [list(range(12)), [], [], list(range(4))])
        distinct = [[turn * n for n in range(13)] for _ in range(4)]
        snapshot = ExpertSnapshot(1, dict.fromkeys(routed, rows), reachable, routed, distinct)
        stats = StepStats(0.1, 4, 2, 1, 0, 0.5, 0, first_token_seconds=[("full", 0.1 * turn)])
        metrics.record(stats)
        text = metrics.render(snapshot)
        assert text == generate_latest(Parsed(text.decode()))
        assert metrics.render(None).count(b"\nladimo_") == text.count(b"\nladimo_")
    assert b'ladimo_expert_tokens_total{expert="11",layer="0",policy="full"} 2e+11\n' in text


def test_histograms_count_as_prometheus_client_counts() -> None:
    registry, bounds = CollectorRegistry(), (0.001, 0.5, 1, 2.5)
    theirs = [
        Histogram("a", "An a.", registry=registry, buckets=bounds),
        Histogram("b", "A b.", ["policy"], registry=registry, buckets=bounds),
    ]
    ours = [OurHistogram("a", "An a.", bounds), OurHistogram("b", "A b.", bounds, "policy")]

    def written() -> tuple[str, str]:
        return "".join(one.write() for one in ours), generate_latest(registry).decode()

    assert written()[0] == written()[1]
    for values in ((0.0, 0.001, 0.5), (0.50001, 1, 2.5, 3, math.inf), (1e-9,) * 3):
        for value in values:
            for one in (theirs[0], ours[0], theirs[1].labels("x"), ours[1].labels("x"), theirs[1].labels("y")):
                one.observe(value)
            ours[1].labels("y").observe(value)
        assert written()[0] == written()[1]
