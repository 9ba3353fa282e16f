"""Metrics tell the truth: counters equal what happened, and every name of the contract that can be fed is there."""

import asyncio
import re
from pathlib import Path

from tests.server.serving import ADMIN, TOP_K, serving

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
        "preemptions",
        "engine_step_seconds",
        "step_tokens",
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
        assert "process_cpu_seconds_total" in text
        assert "_created" not in text
