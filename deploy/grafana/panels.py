"""Queries and panels in the form our dashboards use, over Grafana's foundation SDK."""

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE = 'instance=~"$instance"'
POLICY = 'policy=~"$policy"'
TTFT, ITL = "ladimo_time_to_first_token_seconds", "ladimo_inter_token_latency_seconds"

Query = tuple[str, str]  # expression and legend
Panel = Any  # the SDK's panel builders have no common base with these methods


def rate(metric: str, by: str = "", where: str = "", window: str = "$__rate_interval") -> str:
    selector = ", ".join(part for part in (WHERE, where) if part)
    clause = f" by ({by})" if by else ""
    return f"sum{clause} (rate({metric}{{{selector}}}[{window}]))"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', f'le, {by}' if by else 'le', where)})"


def mean(metric: str, by: str = "") -> str:
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def within(metric: str, objective: str, by: str = "") -> str:
    """Share of observations not above a bucket's bound, which a variable of the dashboard names."""
    in_time = f'le="${objective}"'
    return f"{rate(f'{metric}_bucket', by, in_time)} / {rate(f'{metric}_count', by)}"


def gauge(metric: str, where: str = "") -> str:
    return f"{metric}{{{', '.join(part for part in (WHERE, where) if part)}}}"


def quantiles(metric: str) -> list[Query]:
    return [(quantile(q, metric), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)]


def graph(
    title: str, queries: Sequence[Query], unit: str = "short", text: str = "", width: int = 8, stack: bool = False
) -> Panel:
    panel = _with(timeseries.Panel(), title, queries, text, width).unit(unit).min(0).fill_opacity(20 if stack else 5)
    return panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)) if stack else panel


def number(title: str, expr: str, unit: str = "short", text: str = "", width: int = 3) -> Panel:
    return _with(stat.Panel(), title, [(expr, "")], text, width).unit(unit).height(4)


def heat(
    title: str, expr: str, unit: str, text: str = "", legend: str = "{{le}}", rows: bool = False, width: int = 12
) -> Panel:
    """Cumulative buckets as a heatmap over time, or, with `rows`, one row per series."""
    shape = prometheus_models.PromQueryFormat.TIME_SERIES if rows else prometheus_models.PromQueryFormat.HEATMAP
    colour = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Viridis").steps(64)
    panel = _with(heatmap.Panel(), title, [(expr, legend)], text, width, shape).calculate(False).color(colour)
    return panel.cell_values(heatmap.CellValues().unit(unit)) if rows else panel.y_axis(heatmap.YAxisConfig().unit(unit))


def timeline(title: str, queries: Sequence[Query], text: str = "", width: int = 12) -> Panel:
    return _with(statetimeline.Panel(), title, queries, text, width)


def listing(title: str, expr: str, text: str = "", width: int = 12) -> Panel:
    """The labels and value of every series now."""
    panel = _with(table.Panel(), title, [], text, width)
    return panel.with_target(_target(expr, "", prometheus_models.PromQueryFormat.TABLE).instant())


def _with(
    panel: Panel,
    title: str,
    queries: Sequence[Query],
    text: str,
    width: int,
    shape: prometheus_models.PromQueryFormat = prometheus_models.PromQueryFormat.TIME_SERIES,
) -> Panel:
    panel.title(title).description(text).datasource(SOURCE).span(width).height(8)
    for index, (expr, legend) in enumerate(queries):
        panel.with_target(_target(expr, legend, shape).ref_id(chr(ord("A") + index)))
    return panel


def _target(expr: str, legend: str, shape: prometheus_models.PromQueryFormat) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).format(shape).datasource(SOURCE)


def make_board(title: str, uid: str, text: str) -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    return (
        dashboard.Dashboard(f"LaDiMo {title}")
        .uid(uid)
        .description(text)
        .tags(["ladimo"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("LaDiMo").type(models.DashboardLinkType.DASHBOARDS).tags(["ladimo"]).keep_time(True))
        .with_variable(source)
        .with_variable(label_choice("instance", "ladimo_build_info", "Server", everything=True))
        .annotation(
            dashboard.AnnotationQuery()
            .name("Swaps of the default policy")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("purple")
            .expr(f"sum by (instance, result) (increase(ladimo_policy_swaps_total{{{WHERE}}}[$__interval])) > 0")
        )
    )


def label_choice(label: str, metric: str, title: str, everything: bool) -> dashboard.QueryVariable:
    """A variable with the values of a label; `everything` offers and begins with all of them."""
    variable = (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query({"query": f"label_values({metric}, {label})", "refId": label})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NUMERICAL_ASC)
        .multi(True)
        .include_all(True)
    )
    if everything:
        variable.all_value(".*")
    return variable.current(models.VariableOption(selected=True, text="All", value="$__all"))


def value_choice(name: str, title: str, values: Sequence[str], chosen: str) -> dashboard.CustomVariable:
    current = models.VariableOption(selected=True, text=chosen, value=chosen)
    return dashboard.CustomVariable(name).label(title).values(",".join(values)).current(current)


def with_rows(board: dashboard.Dashboard, rows: dict[str, Sequence[Panel]]) -> dashboard.Dashboard:
    for title, panels in rows.items():
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    return board
