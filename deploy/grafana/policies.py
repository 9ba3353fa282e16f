"""The dashboard of policies: the default and the knob, the canary, requests by policy, and what accuracy costs."""

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.panels import ITL, WHERE, gauge, graph, listing, make_board, quantile, rate, timeline, with_rows

SHADOW_WINDOW = "1h"  # few answers are compared, so a shorter one would show noise


def policies() -> dashboard.Dashboard:
    board = make_board(
        "Policies", "ladimo-policies", "The default and the accuracy over time; requests, tokens and latency by policy."
    )
    knob, floor = gauge("ladimo_routing_accuracy"), gauge("ladimo_routing_accuracy_floor")
    is_default = gauge("ladimo_policy_info", 'default="true"')
    no_shadow = "Empty while no answers are compared."
    return with_rows(
        board,
        {
            "Default": [
                timeline(
                    "Default policy",
                    [(f"sum by (policy, version) ({is_default})", "{{policy}} {{version}}")],
                    "The policy of requests that choose none.",
                ),
                graph(
                    "Knob",
                    [(knob, "accuracy {{instance}}"), (floor, "floor {{instance}}")],
                    "percentunit",
                    "The accuracy is NaN off the frontier. The floor is NaN while automatic control is off.",
                    width=12,
                ),
                graph(
                    "Signals of automatic control",
                    [(gauge("ladimo_slo_controller_signal_ratio"), "{{signal}} {{instance}}")],
                    "percentunit",
                    "Each over its target; above 100% the accuracy falls. Empty while it is off.",
                    width=12,
                ),
                graph(
                    "Changes by automatic control",
                    [(rate("ladimo_slo_controller_changes_total", "direction, cause"), "{{direction}}: {{cause}}")],
                    "cps",
                    "What made it change the accuracy.",
                    width=12,
                ),
                graph("Swaps", [(rate("ladimo_policy_swaps_total", "result"), "{{result}}")], "cps", width=12),
                graph(
                    "Swap duration, p95",
                    [(quantile(0.95, "ladimo_policy_swap_duration_seconds"), "p95")],
                    "s",
                    "Empty while nothing is swapped.",
                    width=12,
                ),
            ],
            "Canary and shadow quality": [
                graph(
                    "Share of the canary",
                    [(gauge("ladimo_canary_share"), "{{instance}}")],
                    "percentunit",
                    "Of the requests that leave the choice to the server; 0 without a canary.",
                ),
                graph(
                    "Requests of the canary",
                    [(rate("ladimo_policy_requests_total", "served", 'reason="canary"'), "{{served}}")],
                    "reqps",
                    "Empty until a canary has run.",
                ),
                graph(
                    "Answers compared",
                    [(rate("ladimo_shadow_answers_total", "policy"), "{{policy}}")],
                    "cps",
                    "Finished answers that idle servers have computed again under accuracy 1 (--shadow-share).",
                    stack=True,
                ),
                graph(
                    "Same token as accuracy 1",
                    [(_per_shadow_token("ladimo_shadow_agreeing_tokens_total"), "{{policy}}")],
                    "percentunit",
                    f"How often the most likely token is the same, over {SHADOW_WINDOW}. {no_shadow}",
                    width=12,
                ),
                graph(
                    "KL divergence from accuracy 1",
                    [(_per_shadow_token("ladimo_shadow_kl_nats_total"), "{{policy}}")],
                    "short",
                    f"Nats per token, over {SHADOW_WINDOW}. {no_shadow}",
                    width=12,
                ),
            ],
            "Requests": [
                graph(
                    "Requests by policy that served",
                    [(rate("ladimo_policy_requests_total", "served"), "{{served}}")],
                    "reqps",
                    stack=True,
                ),
                graph(
                    "Requests by what decided",
                    [(rate("ladimo_policy_requests_total", "reason"), "{{reason}}")],
                    "reqps",
                    "body, header, model: the client's choice; auto: automatic control; queue, deadline: lowered, not refused.",
                    stack=True,
                ),
                graph(
                    "Tokens by policy", [(rate("ladimo_generation_tokens_total", "policy"), "{{policy}}")], "tok/s", stack=True
                ),
                listing(
                    "Asked for, served, why",
                    f"sum by (requested, served, reason) (increase(ladimo_policy_requests_total{{{WHERE}}}[$__range]))",
                    "Requests in the time shown.",
                ),
                listing("Policies", f"max by (policy, version, default) ({gauge('ladimo_policy_info')})"),
            ],
            "Accuracy given, latency gained": [
                graph("Knob", [(knob, "accuracy {{instance}}")], "percentunit"),
                graph("Between tokens, p95", [(quantile(0.95, ITL), "p95")], "s"),
                graph(
                    "Active parameters of what was served",
                    [
                        (
                            f"sum (rate(ladimo_generation_tokens_total{{{WHERE}}}[$__rate_interval])"
                            f" * on (instance, policy) ladimo_active_parameters_ratio{{{WHERE}}})"
                            f" / {rate('ladimo_generation_tokens_total')}",
                            "mean over tokens",
                        )
                    ],
                    "percentunit",
                ),
                graph("Between tokens by policy, p95", [(quantile(0.95, ITL, "policy"), "{{policy}}")], "s"),
                graph(
                    "Whole request by policy, p95",
                    [(quantile(0.95, "ladimo_e2e_request_latency_seconds", "policy"), "{{policy}}")],
                    "s",
                ),
                graph(
                    "Active parameters by policy",
                    [(f"avg by (policy) ({gauge('ladimo_active_parameters_ratio')})", "{{policy}}")],
                    "percentunit",
                ),
            ],
        },
    )


def _per_shadow_token(metric: str) -> str:
    """Divided by the tokens of the answers that were computed again, by policy."""
    tokens = rate("ladimo_shadow_tokens_total", "policy", window=SHADOW_WINDOW)
    return f"{rate(metric, 'policy', window=SHADOW_WINDOW)} / {tokens}"
