"""The report's section on training."""

from ladimo.convert.report.charts import Axis, line_chart
from ladimo.convert.report.document import Figure, MethodView, Section
from ladimo.convert.report.record import Report
from ladimo.convert.report.words import curve, curve_table


def training_section(report: Report, view: MethodView) -> Section | None:
    figures = [loss_figure(report), initialisation_figure(report)]
    shown = [*(figure for figure in figures if figure is not None), *view.training]
    return Section("Training", [], shown) if shown else None


def loss_figure(report: Report) -> Figure | None:
    trained = [layer for layer in report.layers if layer.curve]
    if not trained:
        return None
    series = []
    for layer in trained:
        start = {} if layer.initial_error is None else {0: layer.initial_error}
        series.append(curve(f"layer {layer.layer}", start | {point.step: point.holdout for point in layer.curve}))
    chart = line_chart("Loss of each layer", series, Axis("step"), Axis("error / variance", log=True), ordinal=True)
    caption = "Squared error on held-out tokens, divided by the variance of the FFN's output. 1 is as bad as its mean."
    return Figure(chart, caption, curve_table("layer", series))


def initialisation_figure(report: Report) -> Figure | None:
    found = report.initialisation
    if not found:
        return None
    series = [curve(name, {point.step: point.holdout for point in points}) for name, points in found.curves.items()]
    chart = line_chart("What the source's weights are worth", series, Axis("step"), Axis("error / variance", log=True))
    caption = (
        f"Layer {found.layer}, trained for {found.steps} steps from the split weights, and from random weights of the same "
        f"size. All else is the same."
    )
    return Figure(chart, caption, curve_table("start", series))
