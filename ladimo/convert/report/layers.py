"""The report's sections on layers: the share that runs, the damage of a conversion, the table of layers."""

from collections.abc import Callable, Sequence

from ladimo.convert.report.charts import Axis, Bar, Cell, Point, Series, bar_chart, heatmap, line_chart
from ladimo.convert.report.document import Column, Figure, MethodView, Section, Table
from ladimo.convert.report.record import Layer, Policy, Profile, Report
from ladimo.convert.report.words import percent


def parameters_section(report: Report, view: MethodView) -> Section:
    """The share of each layer that runs, as the method shows it, or else the rules of the policies."""
    text, figure = view.parameters or rules_figure(report)
    return Section("Where the parameters go", [text], [figure, *view.sensitivity])


def rules_figure(report: Report) -> tuple[str, Figure]:
    policies, rows = report.policies, [str(index) for index in range(report.num_hidden_layers)]
    columns = [entry.policy for entry in policies]
    if any(entry.bytes_ratio is not None for entry in policies):
        return _bits_figure(policies, rows)
    most = max((count or 0.0 for entry in policies for count in entry.experts_per_token), default=0.0) or 1.0
    cells = [[_rule_cell(entry, layer, most) for entry in policies] for layer in range(len(rows))]
    numbers = [[row, *(_rule_text(entry, layer) for entry in policies)] for layer, row in enumerate(rows)]
    chart = heatmap("Rule per layer and policy", columns, rows, cells, "layer")
    text = "The rule of each layer under each policy. The stronger the colour, the more experts run per token."
    return text, Figure(chart, numbers=Table(["layer", *columns], numbers))


def _bits_figure(policies: Sequence[Policy], rows: list[str]) -> tuple[str, Figure]:
    """The rules of a nested model."""

    def cell(entry: Policy, layer: int) -> Cell | None:
        rule = entry.rules[layer]
        if rule is None:
            return None
        text = f"{rule.bits or 'all'}{'' if rule.refine is None else ' +'}"
        return Cell((rule.bits or 16) / 16, text, f"layer {layer}, {entry.policy}: {entry.rule_names[layer]}")

    columns = [entry.policy for entry in policies]
    cells = [[cell(entry, layer) for entry in policies] for layer in range(len(rows))]
    numbers = [[row, *(entry.rule_names[layer] for entry in policies)] for layer, row in enumerate(rows)]
    chart = heatmap("Bits of the FFN per layer and policy", columns, rows, cells, "layer")
    text = (
        "How many bits of each layer's FFN a token reads under each policy. +: it reads the neurons that matter to it at 8 "
        "bits. The numbers name the bits of the attention, too."
    )
    return text, Figure(chart, numbers=Table(["layer", *columns], numbers))


def _rule_cell(entry: Policy, layer: int, most: float) -> Cell:
    count = entry.experts_per_token[layer]
    hint = f"layer {layer}, {entry.policy}: {_rule_text(entry, layer)}"
    return Cell(1.0 if count is None else count / most, entry.rule_names[layer], hint)


def _rule_text(entry: Policy, layer: int) -> str:
    name, count = entry.rule_names[layer], entry.experts_per_token[layer]
    return name if count is None else f"{name}: {count:.2f}"


def layers_section(report: Report, view: MethodView) -> Section:
    alone = sensitivity_figure(report)
    return Section("Layers", [], [*([alone] if alone else []), *view.layers, layer_table(report, view.columns)])


def sensitivity_figure(report: Report) -> Figure | None:
    dense = report.holdout_dense_perplexity
    layers = [(layer, layer.converted_alone_perplexity) for layer in report.layers if layer.converted_alone_perplexity]
    if not layers or not dense:
        return None
    bars = []
    for layer, perplexity in layers:
        rise = 100 * (perplexity / dense - 1)
        kept = "" if layer.converted else ", stays dense"
        bars.append(Bar(rise, f"layer {layer.layer}: {rise:+.2f}% perplexity{kept}", faint=not layer.converted))
    every = -(-len(bars) // 16)
    names = [(number + 0.5, str(layer.layer)) for number, (layer, _) in enumerate(layers) if number % every == 0]
    chart = bar_chart("Sensitivity: one layer converted at a time", bars, "layer", Axis("rise in perplexity", unit="%"), names)
    return Figure(chart, "Perplexity on the holdout with only that layer converted. Grey layers stay dense.")


def layer_table(report: Report, columns: Sequence[Column]) -> Table:
    """A table with a row per layer. Columns without values are left out."""
    dense = report.holdout_dense_perplexity

    def alone(layer: Layer) -> float | None:
        return layer.converted_alone_perplexity / dense if layer.converted_alone_perplexity and dense else None

    def of_profile(read: Callable[[Profile], float]) -> Callable[[Layer], float | None]:
        return lambda layer: None if layer.profile is None else read(layer.profile)

    def busiest(profile: Profile) -> float:
        return max(profile.load) * len(profile.load)

    common = [
        column("perplexity / dense, alone", ".4f", report.layers, alone),
        column("error before", ".3f", report.layers, lambda layer: layer.initial_error),
        column("error after", ".3f", report.layers, lambda layer: layer.error),
        column("best weight", ".3f", report.layers, of_profile(lambda profile: profile.mean_best_weight)),
        column("TOP1 error, own weight", ".3f", report.layers, of_profile(lambda profile: profile.kept_error)),
        column("TOP1 error, weight 1", ".3f", report.layers, of_profile(lambda profile: profile.one_error)),
        column("busiest expert / even", ".2f", report.layers, of_profile(busiest)),
    ]
    seconds = column("seconds", ".1f", report.layers, lambda layer: layer.seconds)
    shown = [one for one in [*common, *columns, seconds] if one.cells]
    rows = [
        [str(layer.layer), "yes" if layer.converted else "no", *(one.cells.get(layer.layer, "") for one in shown)]
        for layer in report.layers
    ]
    return Table(["layer", "converted", *(one.title for one in shown)], rows)


def column(title: str, form: str, layers: Sequence[Layer], value: Callable[[Layer], float | None]) -> Column:
    found = {layer.layer: value(layer) for layer in layers}
    return Column(title, {index: format(number, form) for index, number in found.items() if number is not None})


def depth_section(report: Report) -> Section | None:
    entries = report.depth
    if not entries:
        return None
    hints = [
        f"{entry.converted} layers: {entry.perplexity_ratio:.4f} × perplexity, "
        f"{percent(entry.active_parameters_ratio)} active, {percent(entry.next_token_agreement)} same next token"
        for entry in entries
    ]
    shares = {"active parameters": "active_parameters_ratio", "same next token": "next_token_agreement"}
    lines = [
        Series(
            name, [Point(entry.converted, 100 * getattr(entry, key), hint) for entry, hint in zip(entries, hints, strict=True)]
        )
        for name, key in shares.items()
    ]
    damage = [Point(entry.converted, entry.perplexity_ratio, hint) for entry, hint in zip(entries, hints, strict=True)]
    x_axis = Axis("converted layers, least damaging first", whole=True)
    kept = line_chart("Cost and agreement", lines, x_axis, Axis("of the dense model", unit="%"))
    lost = line_chart("Loss of accuracy", [Series("perplexity", damage)], x_axis, Axis("perplexity / dense"))
    rows = [
        [str(entry.converted), percent(entry.active_parameters_ratio), f"{entry.perplexity_ratio:.4f}"]
        + [percent(entry.next_token_agreement), ", ".join(map(str, entry.layers))]
        for entry in entries
    ]
    table = Table(["converted", "active", "perplexity / dense", "same next token", "layers"], rows)
    text = "Each point is measured with so many layers converted, each under its rule in policy full."
    return Section("How many layers", [text], [Figure(lost), Figure(kept), table])
