"""The part of methods tomoe and disp in a report: budgets, widths, and the curves of the training."""

from dataclasses import dataclass

from ladimo.convert.report.charts import Axis, Cell, heatmap, line_chart
from ladimo.convert.report.document import Figure, MethodView, Table
from ladimo.convert.report.record import Report
from ladimo.convert.report.words import curve, curve_table, percent
from ladimo.convert.typed import build


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    loss: float
    ratio: float
    union: float


@dataclass(frozen=True, slots=True)
class Budget:
    """widths: blocks that run per layer. ratio: share of active parameters. masked_ratio: the same before the widths were
    fitted to the budget. union: share of neurons that some expert holds."""

    policy: str
    target: float
    widths: list[int | None]
    ratio: float
    masked_ratio: float
    union: float


@dataclass(frozen=True, slots=True)
class MasksPart:
    budgets: list[Budget]
    experts: int
    curve: list[Point]


@dataclass(frozen=True, slots=True)
class MasksRecord:
    masks: MasksPart


def masks_view(report: Report) -> MethodView:
    """The method's part of the report. Raises ValueError with the name of the first wrong field."""
    part = build(MasksRecord, report.raw, closed=False).masks
    return MethodView(
        lead=["One set of weights serves every policy: each neuron is stored once, and policy full is the dense model."],
        parameters=_widths(part, report.num_hidden_layers),
        training=_training(part),
    )


def _widths(part: MasksPart, depth: int) -> tuple[str, Figure]:
    budgets = part.budgets
    most = max((width for budget in budgets for width in budget.widths if width is not None), default=1)
    columns = [budget.policy for budget in budgets]
    cells = [
        [
            Cell((budget.widths[layer] or 0) / most, _words(budget.widths[layer]), f"layer {layer}, {budget.policy}")
            for budget in budgets
        ]
        for layer in range(depth)
    ]
    rows = [
        [budget.policy, percent(budget.target), percent(budget.masked_ratio), percent(budget.ratio), percent(budget.union)]
        for budget in budgets
    ]
    text = "Blocks that a token runs in each layer. "
    text += "; ".join(
        f"{row[0]}: asked for {row[1]}, masks kept {row[2]}, policy {row[3]}, experts hold {row[4]}" for row in rows
    )
    numbers = Table(["layer", *columns], [[str(layer), *(cell.text for cell in line)] for layer, line in enumerate(cells)])
    chart = heatmap("Blocks per layer and budget", columns, [str(layer) for layer in range(depth)], cells, "layer")
    return f"{text}.", Figure(chart, numbers=numbers)


def _words(width: int | None) -> str:
    return "dense" if width is None else str(width)


def _training(part: MasksPart) -> list[Figure]:
    if not part.curve:
        return []
    loss = [curve("loss", {point.step: point.loss for point in part.curve})]
    shares = [
        curve("active parameters / budget", {point.step: point.ratio for point in part.curve}),
        curve("held by some expert", {point.step: point.union for point in part.curve}),
    ]
    return [
        Figure(
            line_chart("Mask training", loss, Axis("step"), Axis("loss, nats")),
            "The loss of the sampled masks on the training batches, without the penalties.",
            curve_table("curve", loss),
        ),
        Figure(
            line_chart("Budget and coverage", shares, Axis("step"), Axis("share")),
            "Sampled active parameters relative to the budget, and the share of neurons that some expert holds.",
            curve_table("curve", shares),
        ),
    ]
