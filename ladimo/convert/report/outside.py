"""The report's sections on measurements of other commands: comparison of methods, decoding speed, tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar
from xml.etree.ElementTree import Element

from ladimo.checkpoint import read_json
from ladimo.convert.report.charts import PALETTE, Axis, Point, Series, line_chart, standalone
from ladimo.convert.report.document import Figure, Section, Table
from ladimo.convert.report.record import Comparison, Report, Score, Speed
from ladimo.convert.report.words import percent
from ladimo.convert.typed import build

Entry = TypeVar("Entry", Comparison, Speed)

THROUGHPUT_CONDITIONS = ("cpu", "gpu", "device", "dtype", "threads", "prompt_tokens", "generated_tokens")


def read_comparison(path: Path) -> list[dict[str, Any]]:
    """The key "comparison" of report.json, from a benchmark's JSON: a list, or an object with the list under "comparison".

    Each entry must have the fields of `Comparison`; other fields are dropped. Raises ValueError with the names of the file and
    the first wrong field.
    """
    raw = read_json(path)
    entries = raw.get("comparison") if isinstance(raw, dict) else raw
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: comparison: must be a list with at least one entry")
    return [asdict(checked(Comparison, entry, f"{path}: comparison[{number}]")) for number, entry in enumerate(entries)]


def read_throughput(path: Path) -> dict[str, Any]:
    """The key "throughput" of report.json, from the JSON of `loadtests.engine_bench`: its decode rows and their conditions.

    Raises ValueError with the names of the file and the first wrong field.
    """
    raw = read_json(path)
    results = raw.get("results") if isinstance(raw, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path}: results: must be a list with at least one entry")
    rows = [
        asdict(checked(Speed, entry, f"{path}: results[{number}]"))
        for number, entry in enumerate(results)
        if not (isinstance(entry, Mapping) and entry.get("measure", "decode") != "decode")
    ]
    return {"conditions": {name: raw[name] for name in THROUGHPUT_CONDITIONS if raw.get(name)}, "results": rows}


def checked(kind: type[Entry], raw: object, where: str) -> Entry:
    """A record with finite numbers of at least 0. Raises ValueError with the name of the first wrong field."""
    entry = build(kind, raw, where, closed=False)
    for item in fields(kind):
        value = getattr(entry, item.name)
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"{where}.{item.name}: must be a number of at least 0, got {value!r}")
    return entry


def tasks_section(report: Report) -> Section | None:
    tasks = report.tasks
    if not tasks:
        return None
    names = list(dict.fromkeys(entry.policy for task in tasks for entry in task.policies))
    rows = []
    for task in tasks:
        scores = {entry.policy: entry for entry in task.policies} | ({"dense": task.dense} if task.dense else {})
        cells = [_score(scores[name]) if name in scores else "" for name in ["dense", *names]]
        rows.append([task.task, f"{task.items:,}", *cells])
    return Section("Tasks", ["Accuracy ± its standard error."], [Table(["task", "items", "dense", *names], rows)])


def _score(score: Score) -> str:
    return percent(score.accuracy) + ("" if score.stderr is None else f" ± {percent(score.stderr)}")


def comparison_section(report: Report) -> Section | None:
    entries = report.comparison
    if not entries:
        return None
    targets = sorted({entry.target for entry in entries}, reverse=True)
    runs = dict.fromkeys((entry.tokens, entry.method) for entry in entries)
    found = {
        (entry.tokens, entry.method, entry.target): f"{entry.perplexity_ratio:.4f} ± {entry.spread:.4f}" for entry in entries
    }
    rows = [[name, f"{tokens:,}", *(found.get((tokens, name, target), "") for target in targets)] for tokens, name in runs]
    header = ["method", "tokens", *(f"{percent(target)} active" for target in targets)]
    table = Table(header, rows, "Perplexity / dense by budget, ± half the distance between the best and the worst seed.")
    text = "Methods on the same model, tokens and evaluation text. Bars reach from the best seed to the worst."
    return Section("Against other methods", [text], [*map(Figure, comparison_panels(entries)), table])


def comparison_panels(entries: Sequence[Comparison]) -> list[Element]:
    """Charts of the perplexity ratio by active parameters, one for each number of tokens. Each method has a line, with the
    spread of its seeds. All charts have the same axes and colours."""
    methods = list(dict.fromkeys(entry.method for entry in entries))
    ratios = [entry.perplexity_ratio + sign * entry.spread for entry in entries for sign in (-1, 1)]
    x_values = [100 * entry.active_parameters_ratio for entry in entries]
    x_axis = Axis("active parameters", unit="%", low=min(x_values), high=max(x_values))
    y_axis = Axis("perplexity / dense", log=max(ratios) > 2 * min(ratios), low=min(1.0, *ratios), high=max(ratios))
    panels = []
    for tokens in sorted({entry.tokens for entry in entries}):
        series = []
        for number, method in enumerate(methods):
            own = [entry for entry in entries if entry.method == method and entry.tokens == tokens]
            points = [_comparison_point(entry) for entry in sorted(own, key=lambda entry: entry.active_parameters_ratio)]
            series.append(Series(method, points, PALETTE[number % len(PALETTE)]))
        panels.append(line_chart(f"Converted with {tokens:,} tokens", series, x_axis, y_axis, guides=[(1.0, "dense")]))
    return panels


def comparison_chart(title: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """The content of an SVG file with `comparison_panels`. entries: as in report.json."""
    return standalone(title, comparison_panels([build(Comparison, entry, closed=False) for entry in entries]))


def _comparison_point(entry: Comparison) -> Point:
    x, y, spread, seeds = 100 * entry.active_parameters_ratio, entry.perplexity_ratio, entry.spread, entry.seeds
    hint = f"{x:.1f}% active: {y:.4f} ± {spread:.4f} over {seeds} seed{'s' * (seeds != 1)}"
    return Point(x, y, hint, spread=spread)


def throughput_section(report: Report) -> Section | None:
    measured = report.throughput
    if not measured:
        return None
    costs = {entry.policy: entry.active_parameters_ratio for entry in report.policies} | {"dense": 1.0}
    results = [entry for entry in measured.results if entry.policy in costs]
    dense = {entry.batch: entry.tokens_per_second for entry in results if entry.policy == "dense"}
    series = []
    for batch in sorted(dense):
        own = [entry for entry in results if entry.batch == batch]
        points = [
            Point(100 * costs[entry.policy], entry.tokens_per_second / dense[batch],
                  f"{entry.policy}: {entry.tokens_per_second:,.1f} tokens/s",
                  entry.policy if batch == min(dense) else "")
            for entry in own
        ]  # fmt: skip
        series.append(Series(f"batch {batch}", sorted(points, key=lambda point: point.x)))
    chart = line_chart(
        "Decoding speed", series, Axis("active parameters", unit="%"), Axis("speed / dense model"), guides=[(1.0, "dense")]
    )
    rows = [[e.policy, str(e.batch), f"{e.tokens_per_second:,.1f}", percent(costs[e.policy])] for e in results]
    conditions = ", ".join(f"{name} {value}" for name, value in measured.conditions.items())
    table = Table(["policy", "batch", "tokens / s", "active"], rows)
    return Section("Speed", [conditions], [Figure(chart, "The dense model in the same engine is 1.", table)])
