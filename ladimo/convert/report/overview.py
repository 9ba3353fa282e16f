"""The beginning of a report: the summary, the frontiers and the policies."""

from collections.abc import Sequence

from ladimo.convert.policies.choose import NAMED
from ladimo.convert.report.charts import FAINT, Point, Series, line_chart
from ladimo.convert.report.document import Figure, Section, Table, Tile
from ladimo.convert.report.record import Policy, Report
from ladimo.convert.report.words import covering, duration, percent, source_name

LIMITS = (1.01, 1.03, 1.05, 1.1, 1.2)  # the perplexity ratios for which quality guards are shown


def lead(report: Report) -> list[str]:
    ordered = sorted(report.policies, key=lambda entry: entry.cost)
    converted, depth = sum(layer.converted for layer in report.layers), report.num_hidden_layers
    tokens = sum(count for split, count in report.conditions.tokens.items() if split != "evaluation")
    cheapest, best = ordered[0], min(ordered, key=lambda entry: entry.perplexity_ratio)
    text = [
        f"{converted} of the {depth} layers of {source_name(report)} were converted by method {report.method.name}, "
        f"with {tokens:,} tokens of text and {duration(report.conditions.training_seconds)} of fitting. "
        f"The most accurate policy needs {percent(best.cost)} of the dense model's {best.cost_name} per token and has "
        f"{best.perplexity_ratio:.3f} times its perplexity. The cheapest one needs {percent(cheapest.cost)} and has "
        f"{cheapest.perplexity_ratio:.3f} times its perplexity."
    ]
    limit = report.recipe.get("max_perplexity_ratio") or 1.03
    within = cheapest_within(report.policies, limit)
    text.append(
        f"Within {100 * (limit - 1):.3g}% of the dense perplexity the cheapest measured policy is {within.policy}, which "
        f"saves {percent(1 - within.cost)} of the {within.cost_name}."
        if within
        else f"No measured policy stays within {100 * (limit - 1):.3g}% of the dense perplexity."
    )
    return text


def tile(entry: Policy) -> Tile:
    notes = [f"{entry.perplexity_ratio:.3f} × the dense perplexity"]
    if entry.next_token_agreement is not None:
        notes.append(f"{percent(entry.next_token_agreement)} same next token")
    return Tile(entry.policy, percent(entry.cost), [f"of the {entry.cost_name}", *notes])


def frontier_section(report: Report) -> Section:
    points, policies = report.frontier.points, {entry.policy: entry for entry in report.policies}
    batches = sorted({point.batch for point in points})
    everything = [point_of(entry) for entry in report.policies]
    cost = report.policies[0].cost_name
    x_axis = covering(cost, [point.x for point in everything], "%")
    y_axis = covering("perplexity / dense", [1.0, *(point.y for point in everything)])
    figures = []
    for batch in batches:
        own = [point.policy for point in points if point.batch == batch]
        own.sort(key=lambda name: policies[name].cost)
        series = [
            Series("frontier", [point_of(policies[name], name if name in NAMED else "") for name in own]),
            Series("beaten", [point_of(entry) for name, entry in policies.items() if name not in own], FAINT, line=False),
        ]
        chart = line_chart(
            f"Frontier at batch {batch}", [one for one in series if one.points], x_axis, y_axis, guides=[(1.0, "dense model")]
        )
        caption = (
            f"No policy that reads fewer {cost} for one token is as accurate as a policy of the frontier."
            if batch == 1
            else f"No policy that reads fewer {cost} for {batch} tokens together is as accurate as a policy of the frontier. "
            "Policies that refine neurons are left out, because they save no time in batches."
        )
        figures.append(Figure(chart, caption))
    asked = report.recipe.get("max_perplexity_ratio")
    rows = []
    for limit in sorted({*LIMITS, *([asked] if asked else [])}):
        found = cheapest_within(report.policies, limit)
        name = f"{limit:g}{' (asked for)' if limit == asked else ''}"
        rows.append([name, *([found.policy, *figures_of(found)] if found else ["none", "", "", "", ""])])
    header = ["perplexity / dense at most", "cheapest policy", cost, "perplexity / dense", "same next token", "KL (nats)"]
    guard = Table(header, rows, "Quality guards: the cheapest measured policy within a limit.")
    text = "Each point is a policy, measured end to end on the evaluation text. Grey policies are not on this frontier."
    return Section("Cost and accuracy", [text], [*figures, guard])


def policies_section(report: Report) -> Section:
    batches: dict[str, list[str]] = {entry.policy: [] for entry in report.policies}
    for point in report.frontier.points:
        batches[point.policy].append(str(point.batch))
    rows = [
        [entry.policy, percent(entry.cost), f"{entry.perplexity:.3f}", *figures_of(entry)[1:]]
        + [
            optional_percent(cost)
            for cost in (entry.prefill_operations_ratio, entry.prefill_time_ratio, entry.batch_bytes_ratio)
        ]
        + [", ".join(batches[entry.policy]) or "no", entry.description]
        for entry in report.policies
    ]
    header = [
        "policy",
        report.policies[0].cost_name,
        "perplexity",
        "perplexity / dense",
        "same next token",
        "KL (nats)",
        "prefill operations",
        "prefill time",
        "bytes of a batch of 32",
        "frontier of batch",
        "rules",
    ]
    text = (
        f"The dense model's perplexity on the same text is {report.source.perplexity:.3f}. Prefill operations are the "
        "multiply-adds of a token of a prompt. What several tokens of a batch read counts once. Both are relative to the dense "
        "model, with the output head."
    )
    costs = report.conditions.prefill_costs
    if costs is not None:
        text += (
            f" Prefill time was computed from the time of a multiply-add in a prompt's step on {costs.processor}: "
            f"{costs.bits8:.2f} of that with {costs.dtype} weights at 8 bits, {costs.bits4:.2f} at 4 bits, and "
            f"{costs.refined:.2f} more with a refined row. A server finds its own with --frontier-batch prefill."
        )
    return Section("Policies", [text], [Table(header, rows)])


def optional_percent(share: float | None) -> str:
    """Reports that were measured by an earlier version lack some shares."""
    return "" if share is None else percent(share)


def point_of(entry: Policy, label: str = "") -> Point:
    cost, ratio = 100 * entry.cost, entry.perplexity_ratio
    return Point(cost, ratio, f"{entry.policy}: {cost:.1f}% {entry.cost_name}, {ratio:.4f} × the dense perplexity", label)


def cheapest_within(policies: Sequence[Policy], limit: float) -> Policy | None:
    within = [entry for entry in policies if entry.perplexity_ratio <= limit]
    return min(within, key=lambda entry: (entry.cost, entry.perplexity_ratio), default=None)


def figures_of(entry: Policy) -> list[str]:
    agreement, kl = entry.next_token_agreement, entry.kl
    return [
        percent(entry.cost),
        f"{entry.perplexity_ratio:.3f}",
        "" if agreement is None else percent(agreement),
        "" if kl is None else f"{kl:.4f}",
    ]
