"""Numbers, names and curves in the form of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ladimo.convert.progress import duration
from ladimo.convert.report.charts import Axis, Point, Series
from ladimo.convert.report.document import Table
from ladimo.convert.report.record import Report

__all__ = ["covering", "curve", "curve_table", "duration", "percent", "source_name"]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def source_name(report: Report) -> str:
    """The name of the source. An absolute path is cut to its last part, so the report does not show the user's directories."""
    name = Path(report.source.name)
    return name.name if name.is_absolute() else str(name)


def covering(label: str, values: Sequence[float], unit: str = "") -> Axis:
    """An axis over all values, so that neighbouring charts have the same axis."""
    return Axis(label, unit=unit, low=min(values), high=max(values))


def curve(name: str, values: Mapping[int, float]) -> Series:
    """A training curve: values by step."""
    return Series(name, [Point(step, value, f"step {step}: {value:.4g}") for step, value in values.items()])


def curve_table(what: str, series: Sequence[Series]) -> Table:
    steps = sorted({point.x for one in series for point in one.points})
    rows = []
    for one in series:
        values = {point.x: f"{point.y:.4g}" for point in one.points}
        rows.append([one.name, *(values.get(step, "") for step in steps)])
    return Table([what, *(f"step {step:g}" for step in steps)], rows)
