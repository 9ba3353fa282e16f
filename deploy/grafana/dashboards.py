"""`python -m deploy.grafana.dashboards` writes dashboards/*.json: Service, Experts, Policies.

Grafana's foundation SDK writes the JSON. The SDK is typed, and it is generated from Grafana's own schema with each release;
grafanalib is written by hand. If a panel may be empty on a healthy server, its description says when.
"""

from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.panels import (
    ITL,
    POLICY,
    TTFT,
    gauge,
    graph,
    heat,
    label_choice,
    make_board,
    mean,
    number,
    quantile,
    quantiles,
    rate,
    value_choice,
    with_rows,
    within,
)
from deploy.grafana.policies import policies

DIRECTORY = Path(__file__).parent / "dashboards"
OBJECTIVES = {"ttft_objective": ("0.25", "0.5", "1.0", "2.5", "5.0"), "itl_objective": ("0.01", "0.025", "0.05", "0.1", "0.2")}
SERVER_ERRORS = 'code=~"internal_error|unavailable|engine_dead|deadline_exceeded"'


def service() -> dashboard.Dashboard:
    errors = rate("ladimo_request_failures_total", where=SERVER_ERRORS)
    board = make_board("Service", "ladimo-service", "Traffic, latency, objectives and saturation.")
    board.with_variable(value_choice("ttft_objective", "First token within (s)", OBJECTIVES["ttft_objective"], "1.0"))
    board.with_variable(value_choice("itl_objective", "Token gap within (s)", OBJECTIVES["itl_objective"], "0.1"))
    no_cache = "Empty without lookups: no prompts, or no prefix cache."
    return with_rows(
        board,
        {
            "Now": [
                number("Answers", rate("ladimo_request_success_total"), "reqps"),
                number("Tokens generated", rate("ladimo_generation_tokens_total"), "tok/s"),
                number("First token, p95", quantile(0.95, TTFT), "s"),
                number("Between tokens, p95", quantile(0.95, ITL), "s"),
                number("Server errors", f"{errors} / ({errors} + {rate('ladimo_request_success_total')})", "percentunit"),
                number("In flight", f"sum ({gauge('ladimo_requests_in_flight')})"),
                number("KV cache used", f"max ({gauge('ladimo_kv_cache_usage_ratio')})", "percentunit"),
                number("Servers up", 'sum (up{job="ladimo"})', text="Answering scrapes."),
            ],
            "Traffic": [
                graph(
                    "Answers by finish reason",
                    [(rate("ladimo_request_success_total", "finish_reason"), "{{finish_reason}}")],
                    "reqps",
                    stack=True,
                ),
                graph(
                    "Tokens",
                    [(rate("ladimo_generation_tokens_total"), "generated"), (rate("ladimo_prompt_tokens_total"), "prompt")],
                    "tok/s",
                ),
                graph(
                    "Failures by code",
                    [(rate("ladimo_request_failures_total", "code") + " > 0", "{{code}}")],
                    "reqps",
                    "Empty while nothing fails.",
                    stack=True,
                ),
                graph(
                    "Refused before they began",
                    [(rate("ladimo_admission_rejections_total", "reason"), "{{reason}}")],
                    "reqps",
                    "Empty until the first refusal.",
                    stack=True,
                ),
                graph("Prompt tokens of a request", quantiles("ladimo_request_prompt_tokens")),
                graph("Generated tokens of a request", quantiles("ladimo_request_generation_tokens")),
            ],
            "Latency": [
                graph("First token", quantiles(TTFT), "s"),
                graph("Between tokens", quantiles(ITL), "s"),
                graph("Whole request", quantiles("ladimo_e2e_request_latency_seconds"), "s"),
                graph("In the queue", quantiles("ladimo_request_queue_time_seconds"), "s"),
                graph("Mean per token of a request", quantiles("ladimo_request_time_per_output_token_seconds"), "s"),
                graph("First token by policy, p95", [(quantile(0.95, TTFT, "policy"), "{{policy}}")], "s"),
                heat("First token", rate(f"{TTFT}_bucket", "le"), "s"),
                heat("Between tokens", rate(f"{ITL}_bucket", "le"), "s"),
            ],
            "Objectives": [
                graph(
                    "First tokens in time",
                    [(within(TTFT, "ttft_objective"), "all"), (within(TTFT, "ttft_objective", "policy"), "{{policy}}")],
                    "percentunit",
                    width=12,
                ),
                graph(
                    "Token gaps in time",
                    [(within(ITL, "itl_objective"), "all"), (within(ITL, "itl_objective", "policy"), "{{policy}}")],
                    "percentunit",
                    width=12,
                ),
            ],
            "Saturation": [
                graph(
                    "Sequences",
                    [
                        (f"sum ({gauge('ladimo_requests_running')})", "running"),
                        (f"sum ({gauge('ladimo_requests_waiting')})", "waiting"),
                        (f"sum ({gauge('ladimo_requests_in_flight')})", "in flight"),
                    ],
                    text="Running and waiting: at the last step. In flight: counted by the HTTP layer.",
                ),
                graph("KV cache used", [(gauge("ladimo_kv_cache_usage_ratio"), "{{instance}}")], "percentunit"),
                graph("Preemptions", [(rate("ladimo_preemptions_total", "instance"), "{{instance}}")], "cps"),
                graph(
                    "Prefix cache hits",
                    [(f"{rate('ladimo_prefix_cache_hits_total')} / {rate('ladimo_prefix_cache_queries_total')}", "hits")],
                    "percentunit",
                    no_cache,
                ),
                graph("Engine step by phase, p95", [(quantile(0.95, "ladimo_engine_step_seconds", "phase"), "{{phase}}")], "s"),
                graph(
                    "Tokens per step",
                    [
                        (mean("ladimo_step_tokens"), "mean"),
                        (quantile(0.95, "ladimo_step_tokens"), "p95"),
                        (gauge("ladimo_step_prompt_tokens_limit"), "prompts at most, {{instance}}"),
                    ],
                ),
                graph(
                    "Share of time in steps",
                    [(rate("ladimo_engine_step_seconds_sum", "instance"), "{{instance}}")],
                    "percentunit",
                    "1 when the engine is never idle.",
                ),
                graph(
                    "Time since the engine loop last ran", [(gauge("ladimo_engine_heartbeat_age_seconds"), "{{instance}}")], "s"
                ),
                graph(
                    "Graph replays and misses",
                    [
                        (rate("ladimo_cuda_graph_replays_total", "bucket"), "replay, bucket {{bucket}}"),
                        (rate("ladimo_cuda_graph_misses_total"), "miss"),
                        (rate("ladimo_cuda_graph_captures_total"), "capture"),
                    ],
                    "cps",
                    "Empty without CUDA graphs, but for misses and captures, which are then 0.",
                ),
                graph("CPU", [(rate("process_cpu_seconds_total", "instance"), "{{instance}}")], "short", "Cores in use."),
                graph("Memory", [(gauge("process_resident_memory_bytes"), "{{instance}}")], "bytes"),
                graph(
                    "Garbage collections",
                    [(rate("python_gc_collections_total", "generation"), "generation {{generation}}")],
                    "cps",
                ),
            ],
        },
    )


def experts() -> dashboard.Dashboard:
    board = make_board("Experts", "ladimo-experts", "Which experts run, how evenly, and what that costs.")
    board.with_variable(label_choice("layer", "ladimo_expert_load_imbalance", "Layer", everything=False))
    board.with_variable(label_choice("policy", "ladimo_policy_info", "Policy", everything=True))
    aggregate = "Empty without series per expert (--expert-metrics)."
    chosen = f'{POLICY}, layer=~"$layer"'
    share = (
        f"{rate('ladimo_expert_tokens_total', 'expert', chosen)}"
        f" / on () group_left () {rate('ladimo_expert_tokens_total', '', chosen)}"
    )
    load = rate("ladimo_expert_tokens_total", "layer, policy, expert", POLICY)
    policy_load = rate("ladimo_expert_tokens_total", "layer, policy", POLICY)
    judged = "Only the experts that a policy may choose count."
    since_start = f"{judged} Mean over all policies, weighted by their tokens."
    return with_rows(
        board,
        {
            "Activation": [
                heat(
                    "Share of choices by expert, layer $layer",
                    share,
                    "percentunit",
                    f"One row per expert that a chosen policy may choose. {aggregate}",
                    "{{expert}}",
                    rows=True,
                )
                .repeat("layer")
                .max_per_row(3),
            ],
            "Balance": [
                graph(
                    "Busiest expert over the mean",
                    [
                        (
                            f"max by (layer) (max by (layer, policy) ({load}) / avg by (layer, policy) ({load}))",
                            "layer {{layer}}",
                        )
                    ],
                    text=f"1 is even. {judged} The most uneven one is shown. {aggregate}",
                ),
                graph(
                    "Busiest expert over the mean, since start",
                    [(f"max by (layer) ({gauge('ladimo_expert_load_imbalance')})", "layer {{layer}}")],
                    text=f"1 is even. {since_start}",
                ),
                graph(
                    "Evenness, since start",
                    [(f"min by (layer) ({gauge('ladimo_expert_load_entropy_ratio')})", "layer {{layer}}")],
                    "percentunit",
                    f"Entropy of the load over that of an even load. {since_start}",
                ),
                graph(
                    "Experts never used since start",
                    [(f"max by (layer) ({gauge('ladimo_experts_never_used')})", "layer {{layer}}")],
                    text="Of those that a policy with traffic may choose.",
                ),
                graph(
                    "Experts unused lately",
                    [
                        (
                            f"count by (layer, policy) ({load} == 0 and on (layer, policy) {policy_load} > 0)",
                            "layer {{layer}}, {{policy}}",
                        )
                    ],
                    text=f"Of those that a policy with traffic may choose. Empty while all are used. {aggregate}",
                ),
                graph(
                    "Choices",
                    [(rate("ladimo_expert_tokens_total", "layer", POLICY), "layer {{layer}}")],
                    "cps",
                    aggregate,
                    stack=True,
                ),
            ],
            "Work": [
                graph(
                    "Distinct experts per step, mean",
                    [(mean("ladimo_layer_distinct_experts_per_step", "layer"), "layer {{layer}}")],
                    text="The memory traffic of the weights grows with this number.",
                ),
                graph(
                    "Distinct experts per step, p95",
                    [(quantile(0.95, "ladimo_layer_distinct_experts_per_step", "layer"), "layer {{layer}}")],
                ),
                graph(
                    "Experts per token by policy, mean over layers",
                    [(f"avg by (policy) ({gauge('ladimo_layer_experts_per_token', POLICY)})", "{{policy}}")],
                ),
                graph(
                    "Experts per token by layer",
                    [
                        (
                            f"avg by (layer, policy) ({gauge('ladimo_layer_experts_per_token', chosen)})",
                            "layer {{layer}}, {{policy}}",
                        )
                    ],
                    width=12,
                ),
                graph(
                    "Active parameters by policy",
                    [(f"avg by (policy) ({gauge('ladimo_active_parameters_ratio', POLICY)})", "{{policy}}")],
                    "percentunit",
                    "Divided by those of the dense model, measured since start.",
                    width=12,
                ),
            ],
            "Nested weights": [
                graph(
                    "Weight bytes per step",
                    [(f"{rate('ladimo_weight_bytes_total')} / {rate('ladimo_step_tokens_count')}", "mean")],
                    "bytes",
                    "A step reads each plane once, for all its tokens. 0 if the weights are not nested.",
                    width=12,
                ),
                graph(
                    "Refined neurons",
                    [(rate("ladimo_refined_total", "layer", POLICY), "layer {{layer}}")],
                    "cps",
                    f"Neurons, and words of the output head, that tokens read at 8 bits instead of 4. {aggregate}",
                    stack=True,
                    width=12,
                ),
            ],
        },
    )


def render() -> dict[str, str]:
    """The JSON of every dashboard by file name."""
    boards = {"service.json": service(), "experts.json": experts(), "policies.json": policies()}
    return {name: JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n" for name, board in boards.items()}


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in render().items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")
