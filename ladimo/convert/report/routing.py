"""The report's section on routing."""

from ladimo.convert.policies.choose import NAMED
from ladimo.convert.report.charts import Axis, Bar, Cell, bar_chart, heatmap
from ladimo.convert.report.document import Figure, Fold, Section, Table
from ladimo.convert.report.record import Layer, Profile, Report


def routing_section(report: Report) -> Section | None:
    routed = [(layer, layer.profile) for layer in report.layers if layer.profile and len(layer.profile.load) > 1]
    if not routed:
        return None
    most = max(len(profile.load) for _, profile in routed)
    even = [[share * len(profile.load) for share in profile.load] for _, profile in routed]
    highest = max(max(loads) for loads in even)
    cells: list[list[Cell | None]] = [
        [
            Cell(load / highest, f"{load:.2f}", f"layer {layer.layer}, expert {expert}: {load:.3f} × an even share")
            for expert, load in enumerate(loads)
        ]
        for (layer, _), loads in zip(routed, even, strict=True)
    ]
    rows, columns = [str(layer.layer) for layer, _ in routed], [str(expert) for expert in range(most)]
    load = heatmap("Load of each expert / an even share", columns, rows, cells, "layer · expert")
    numbers = Table(["layer", *columns], [[row, *(f"{x:.3f}" for x in loads)] for row, loads in zip(rows, even, strict=True)])
    figures = [_histogram(layer, profile, report) for layer, profile in routed if layer.converted]
    figures.append(Figure(load, "How often each expert is chosen under policy full. 1 is an even load.", numbers))
    dense = [_histogram(layer, profile, report) for layer, profile in routed if not layer.converted]
    folds = [Fold(f"The {len(dense)} layers that stay dense", dense)] if dense else []
    text = (
        "The weight of each token's best expert. The rules of the policies depend on it: near 1, one expert is enough; "
        "otherwise the number of experts depends on the token."
    )
    return Section("Routing", [text], [*figures, *folds])


def _histogram(layer: Layer, profile: Profile, report: Report) -> Figure:
    index, counts = layer.layer, profile.histogram
    bins, tokens = len(counts), sum(counts) or 1
    bars = [
        Bar(100 * count / tokens, f"{number / bins:.2f} to {(number + 1) / bins:.2f}: {count:,} tokens, {count / tokens:.1%}")
        for number, count in enumerate(counts)
    ]
    named = [entry for entry in report.policies if entry.policy in NAMED and layer.converted]
    marks: dict[float, str] = {}
    for entry in named:
        rule = entry.rules[index]
        if rule is not None and rule.mass is not None:
            place = bins * min(rule.mass, 1.0)
            marks[place] = f"{marks[place]}, {entry.policy}" if place in marks else entry.policy
    x_ticks = [(bins * share, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    chart = bar_chart(f"Layer {index}", bars, "weight of the best expert", Axis("tokens", unit="%"), x_ticks, marks.items())
    rules = " · ".join(f"{entry.policy} {entry.rule_names[index]}" for entry in named)
    return Figure(chart, f"Mean {profile.mean_best_weight:.3f}. {rules or 'Stays dense'}.", small=True)
