"""PromQL as the dashboards and alerts use it: which expressions there are, and what they read."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import CollectorRegistry

from deploy.grafana.dashboards import render
from deploy.metrics_page import declarations
from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
VARIABLES = {
    "$__rate_interval": "10s",
    "$__interval": "10s",
    "$__range": "60s",
    "$ttft_objective": "1.0",
    "$itl_objective": "0.1",
    "$instance": ".*",
    "$policy": ".*",
    "$layer": "0",
}
TARGET_LABELS = {"job", "instance"}


@dataclass(frozen=True)
class Query:
    """`where`: the dashboard and panel, or the rule. `empty`: when the panel says that it has no data."""

    where: str
    expr: str
    empty: bool


@cache
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_queries() -> list[Query]:
    return [Query(rule.get("alert") or rule["record"], rule["expr"], "alert" in rule) for rule in rules()]


def dashboard_queries() -> Iterator[Query]:
    """Every panel's, with a value for each variable."""
    for name, text in render().items():
        board = json.loads(text)
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Query(f"{name}: {panel['title']}", fill(target["expr"]), "Empty" in panel.get("description", ""))
        for annotation in board["annotations"]["list"]:
            yield Query(f"{name}: {annotation['name']}", fill(annotation["expr"]), True)
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
                yield Query(f"{name}: ${variable['name']}", f"count by ({label}) ({metric})", False)


def fill(expr: str) -> str:
    for name in sorted(VARIABLES, key=len, reverse=True):
        expr = expr.replace(name, VARIABLES[name])
    assert "$" not in expr, expr
    return expr


@cache
def exported() -> Mapping[str, set[str]]:
    """Series by name, with the labels they carry once scraped: ours, the process's, Prometheus's own and the recorded ones."""
    series = {"up": TARGET_LABELS}
    for metric in declarations():
        labels = {*metric.labels, *TARGET_LABELS}
        if metric.type == "histogram":
            series[f"{metric.name}_bucket"] = {*labels, "le"}
            series[f"{metric.name}_sum"] = series[f"{metric.name}_count"] = labels
        else:
            series[metric.name] = labels
    for family in Metrics(CollectorRegistry(), {}, lambda experts: 1.0).registry.collect():
        for sample in family.samples:
            series.setdefault(sample.name, {*sample.labels, *TARGET_LABELS})
    for rule in rules():
        if "record" in rule:
            series[rule["record"]] = {"job"}
    return series


@cache
def bounds() -> Mapping[str, set[float]]:
    """The bounds of a histogram's buckets, by its name."""
    return {metric.name: set(metric.buckets) for metric in declarations()}


def complaints(expr: str) -> list[str]:
    """What is wrong with an expression: series or labels that nobody exports, bounds that no bucket has."""
    found = []
    for node in _nodes(promql_parser.parse(expr)):
        if isinstance(node, promql_parser.VectorSelector):
            name = str(node.name)
            labels = exported().get(name)
            if labels is None:
                found.append(f"{name} is not exported")
                continue
            for matcher in node.matchers.matchers:
                if matcher.name not in labels:
                    found.append(f"{name} has no label {matcher.name}")
                if matcher.name == "le" and float(matcher.value) not in bounds()[name.removesuffix("_bucket")]:
                    found.append(f"{name} has no bucket {matcher.value}")
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            read = {str(child.name) for child in _nodes(node.expr) if isinstance(child, promql_parser.VectorSelector)}
            known = {label for name in read for label in exported().get(name, set())}
            found += [f"{label} is no label of {', '.join(read)}" for label in node.modifier.labels if label not in known]
    return found


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    match node:
        case promql_parser.MatrixSelector():
            yield from _nodes(node.vector_selector)
        case promql_parser.Call():
            for argument in node.args:
                yield from _nodes(argument)
        case promql_parser.BinaryExpr():
            yield from _nodes(node.lhs)
            yield from _nodes(node.rhs)
        case (
            promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr()
        ):
            yield from _nodes(node.expr)
