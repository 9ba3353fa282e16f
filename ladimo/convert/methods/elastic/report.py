"""The part of method elastic in a report: widths, damage, the possible gain of routing, and the training of substitutes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ladimo.convert.report.charts import Axis, Cell, Point, Series, heatmap, line_chart
from ladimo.convert.report.document import Column, Figure, MethodView, Table
from ladimo.convert.report.record import Report
from ladimo.convert.report.words import curve, curve_table, percent
from ladimo.convert.typed import build


@dataclass(frozen=True, slots=True)
class KlPoint:
    step: int
    kl: float
    holdout: float | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """layer_errors: by layer, the error before and after, if it was distilled layer by layer."""

    policy: str
    target: float
    widths: list[int]
    routed: list[int] = field(default_factory=list)
    curve: list[KlPoint] = field(default_factory=list)
    layer_errors: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ElasticPart:
    budgets: list[Budget]
    experts: int
    stored_ratio: float


@dataclass(frozen=True, slots=True)
class Ordering:
    """Holdout errors by number of experts n. errors: with n fixed experts, repaired. oracle_errors: with the best n experts of
    each token, not repaired."""

    errors: dict[str, float]
    oracle_errors: dict[str, float] = field(default_factory=dict)
    ridge: float | None = None


@dataclass(frozen=True, slots=True)
class ElasticLayer:
    """damage: nats by number of experts. damage_measured: the numbers of experts with a measured damage; None: all of them."""

    layer: int
    damage: dict[str, float]
    nested: Ordering
    damage_measured: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ElasticRecord:
    elastic: ElasticPart
    layers: list[ElasticLayer]


def elastic_view(report: Report) -> MethodView:
    """The method's part of the report. Raises ValueError with the name of the first wrong field."""
    record = build(ElasticRecord, report.raw, closed=False)
    budgets = record.elastic.budgets
    figures = [_oracle(record.layers), _distillation(budgets), _layer_errors(budgets)]
    return MethodView(
        lead=[
            f"One checkpoint serves every budget. It stores {record.elastic.stored_ratio:.2f} times the dense model's "
            f"parameters."
        ],
        parameters=_widths(record.elastic, report.num_hidden_layers),
        sensitivity=[_damage(record.layers)] if record.layers else [],
        layers=[figure for figure in figures[:1] if figure is not None],
        training=[figure for figure in figures[1:] if figure is not None],
        columns=[
            Column("error, half the experts", {one.layer: f"{half:.4f}" for one in record.layers if (half := _half(one))}),
            Column("ridge", {one.layer: f"{one.nested.ridge:.2g}" for one in record.layers if one.nested.ridge is not None}),
        ],
    )


def _half(layer: ElasticLayer) -> float | None:
    return layer.nested.errors.get(str((len(layer.nested.errors) + 1) // 2))


def _widths(elastic: ElasticPart, depth: int) -> tuple[str, Figure]:
    budgets, experts, rows = elastic.budgets, elastic.experts, [str(index) for index in range(depth)]
    columns = [budget.policy for budget in budgets]
    cells = [[_width_cell(budget, layer, experts) for budget in budgets] for layer in range(depth)]
    table = Table(["layer", *columns], [[row, *(cell.text for cell in line)] for row, line in zip(rows, cells, strict=True)])
    targets = ", ".join(f"{budget.policy} {percent(budget.target)}" for budget in budgets)
    text = f"How many of a layer's {experts} experts each budget keeps. Active parameters asked for: {targets}."
    if any(budget.routed for budget in budgets):
        text += " An r marks routed layers. There, a router chooses so many experts for each token."
    return text, Figure(heatmap("Experts kept per layer and budget", columns, rows, cells, "layer"), numbers=table)


def _width_cell(budget: Budget, layer: int, experts: int) -> Cell:
    width, routed = budget.widths[layer], layer in budget.routed
    hint = f"layer {layer}, {budget.policy}: {width} of {experts} experts{', routed' * routed}"
    return Cell(width / experts, f"{width}r" if routed else str(width), hint)


def _damage(layers: Sequence[ElasticLayer]) -> Figure:
    widths = sorted({int(n) for layer in layers for n in layer.damage})
    series = [
        Series(f"layer {layer.layer}", [Point(n, layer.damage[str(n)]) for n in widths if str(n) in layer.damage])
        for layer in layers
    ]
    x_axis, y_axis = Axis("experts kept", whole=True), Axis("KL to dense, nats", log=True)
    chart = line_chart("Damage of one narrower layer", series, x_axis, y_axis, ordinal=True)
    rows = [[str(layer.layer), *(_damage_cell(layer, n) for n in widths)] for layer in layers]
    caption = (
        "Divergence from the dense model's predictions if only that layer is narrowed. The solver chooses by it. It is "
        "estimated from gradients. Widths marked * were measured, too, to correct the layer's estimates."
        if any(layer.damage_measured is not None for layer in layers)
        else "Divergence from the dense model's predictions if only that layer is narrowed. The solver chooses by it."
    )
    return Figure(chart, caption, Table(["layer", *map(str, widths)], rows))


def _damage_cell(layer: ElasticLayer, width: int) -> str:
    if str(width) not in layer.damage:
        return ""
    return f"{layer.damage[str(width)]:.2e}{'*' * (width in (layer.damage_measured or ()))}"


def _oracle(layers: Sequence[ElasticLayer]) -> Figure | None:
    known = [layer for layer in layers if layer.nested.oracle_errors]
    if not known:
        return None
    widths = sorted({int(n) for layer in known for n in layer.nested.oracle_errors})
    cells = [[_oracle_cell(layer, str(n)) for n in widths] for layer in known]
    rows = [str(layer.layer) for layer in known]
    chart = heatmap("Could routing pay? Oracle / static error", list(map(str, widths)), rows, cells, "layer · experts")
    ratios = [float(cell.text) for line in cells for cell in line if cell]
    caption = (
        "Error of an oracle that chooses each token's best experts, without repair, divided by the error of as many fixed, "
        f"repaired experts. Below 1 (coloured), routing could gain, though a real router gains less: "
        f"{sum(r < 1 for r in ratios)} of {len(ratios)} cases here."
    )
    numbers = Table(
        ["layer", *map(str, widths)],
        [[row, *(cell.text if cell else "" for cell in line)] for row, line in zip(rows, cells, strict=True)],
    )
    return Figure(chart, caption, numbers)


def _oracle_cell(layer: ElasticLayer, width: str) -> Cell | None:
    error, oracle = layer.nested.errors.get(width), layer.nested.oracle_errors.get(width)
    if not error or oracle is None:
        return None
    hint = f"layer {layer.layer}, {width} experts: oracle {oracle:.4f}, static {error:.4f}"
    return Cell(1 - oracle / error, f"{oracle / error:.2f}", hint)


def _distillation(budgets: Sequence[Budget]) -> Figure | None:
    trained = [budget for budget in budgets if budget.curve]
    if not trained:
        return None
    series = [curve(budget.policy, {point.step: point.kl for point in budget.curve}) for budget in trained]
    chart = line_chart("End-to-end distillation", series, Axis("step"), Axis("KL to dense, nats", log=True))
    ends = [(budget.policy, budget.curve[0].holdout, budget.curve[-1].holdout) for budget in trained]
    held = [f"{name} {before:.4f} to {after:.4f}" for name, before, after in ends if before and after]
    caption = "Divergence of each budget's predictions from the dense model's, on the training batches."
    caption += f" Held out: {', '.join(held)}." if held else ""
    return Figure(chart, caption, curve_table("budget", series))


def _layer_errors(budgets: Sequence[Budget]) -> Figure | None:
    """The errors of budgets that were distilled layer by layer."""
    trained = [budget for budget in budgets if budget.layer_errors]
    if not trained:
        return None
    series = [
        Series(budget.policy, [Point(int(layer), after) for layer, (_, after) in budget.layer_errors.items()])
        for budget in trained
    ]
    chart = line_chart("Layer by layer", series, Axis("layer"), Axis("error / variance", log=True))
    caption = (
        "The remaining difference between the student's hidden states and the dense model's after each layer, on held-out "
        "tokens after training. The table also has the difference before training."
    )
    rows = []
    for layer in sorted({int(layer) for budget in trained for layer in budget.layer_errors}):
        pairs = [budget.layer_errors.get(str(layer)) for budget in trained]
        rows.append([str(layer), *("-" if pair is None else f"{pair[0]:.4f} to {pair[1]:.4f}" for pair in pairs)])
    return Figure(chart, caption, Table(["layer", *(budget.policy for budget in trained)], rows))
