"""The page of a load test: figures, and plots of load, latency and knob over time."""

from collections.abc import Mapping, Sequence
from typing import Any

from ladimo.convert.report.charts import Axis, Point, Series, line_chart, standalone
from ladimo.convert.report.document import Document, Figure, Section, Table, Tile
from ladimo.convert.report.page import to_page
from loadtests.load.figures import percentile, show, table

BINS = 40


def page(record: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> str:
    """The HTML page of a record of `load_test`, or of two."""
    runs = [record] if other is None else [record, other]
    figures = record["figures"]
    header = ["figure", record["name"]] + ([] if other is None else [other["name"], "ratio"])
    tiles = [
        Tile("inside the objectives", _percent(figures["good_share"]), ["of all requests that were not cancelled"]),
        Tile("goodput", show(figures["request_goodput"]), ["requests per second"]),
        Tile("mean accuracy", show(figures["mean_accuracy"]), [f"lowered: {_percent(figures['degraded_share'])}"]),
        Tile("p90 to the first token", show(figures["p90_ttft_ms"]), ["ms"]),
    ]
    conditions = [[name, show(value)] for name, value in record["conditions"].items()]
    sections = [
        Section("Over time", _notes(record), [Figure(chart) for chart in _charts(runs)]),
        Section(
            "Figures",
            ["The names are those of vllm bench serve. Latencies count from the time at which a request was due."],
            [Table(header, table(figures, None if other is None else other["figures"]))],
        ),
        *(
            [Section("The burst alone", [], [Table(["figure", record["name"]], table(record["burst_figures"]))])]
            if record.get("burst_figures")
            else []
        ),
        Section("Conditions", [], [Table(["condition", "value"], conditions)]),
    ]
    return to_page(Document(f"Load test: {record['name']}", [record["command"]], tiles, sections))


def plot(record: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> str:
    """The plots of the page alone, as an SVG file."""
    return standalone(f"Load test: {record['model']}", _charts([record] if other is None else [record, other]))


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    seconds = Axis("seconds since the start", unit=" s", low=0.0)
    several = len(runs) > 1

    def named(run: Mapping[str, Any], name: str) -> str:
        return f"{run['name']}: {name}" if several else name

    load, first, token, knob, kept = [], [], [], [], []
    for run in runs:
        bins = run["timeline"]
        load.append(Series(named(run, "arrivals"), [Point(b["at"], b["arrivals_per_second"]) for b in bins]))
        load.append(Series(named(run, "completed"), [Point(b["at"], b["completed_per_second"]) for b in bins]))
        first.append(Series(named(run, "p90"), _points(bins, "p90_ttft_ms")))
        token.append(Series(named(run, "p90"), _points(bins, "p90_tpot_ms")))
        kept.append(Series(named(run, "share"), _points(bins, "good_share")))
        knob.append(Series(named(run, "given, mean"), _points(bins, "mean_accuracy")))
        settings = _corners([Point(each["at"], each["accuracy"]) for each in run["knob"] if each["accuracy"] is not None])
        if settings:
            knob.append(Series(named(run, "default"), settings))
    return [
        line_chart("Load", load, seconds, Axis("requests per second", low=0.0)),
        line_chart("Accuracy", knob, seconds, Axis("accuracy", low=0.0, high=1.0)),
        line_chart("Time to the first token", first, seconds, Axis("ms", log=True)),
        line_chart("Time per output token", token, seconds, Axis("ms", low=0.0)),
        line_chart("Inside the objectives", kept, seconds, Axis("share", low=0.0, high=1.0)),
    ]


def timeline(outcomes: Sequence[Any], good: Sequence[bool], seconds: float) -> list[dict[str, Any]]:
    """Figures by the time at which requests were due, in BINS parts. `good`: whether each met its objectives."""
    width = max(seconds / BINS, 0.25)
    bins: list[dict[str, Any]] = []
    for number in range(int(seconds / width) + 1):
        begin, end = number * width, (number + 1) * width
        chosen = [(one, met) for one, met in zip(outcomes, good, strict=True) if begin <= one.due < end]
        if not chosen:
            continue
        done = [one for one, _ in chosen if one.completed]
        stayed = [met for one, met in chosen if not one.cancelled]
        given = [one.accuracy for one in done if one.accuracy is not None]
        bins.append(
            {
                "at": begin + width / 2,
                "arrivals_per_second": len(chosen) / width,
                "completed_per_second": sum(begin <= one.ended < end and one.completed for one in outcomes) / width,
                "p90_ttft_ms": _milliseconds([one.ttft for one in done if one.ttft is not None]),
                "p90_tpot_ms": _milliseconds([one.tpot for one in done if one.tpot is not None]),
                "good_share": sum(stayed) / len(stayed) if stayed else None,
                "mean_accuracy": sum(given) / len(given) if given else None,
            }
        )
    return bins


def _corners(points: Sequence[Point]) -> list[Point]:
    """Without the points that lie between two of the same height."""
    last = len(points) - 1
    return [
        point
        for number, point in enumerate(points)
        if number in (0, last) or not points[number - 1].y == point.y == points[number + 1].y
    ]


def _points(bins: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [Point(each["at"], each[name]) for each in bins if each[name] is not None]


def _milliseconds(values: Sequence[float]) -> float | None:
    value = percentile(values, 90)
    return None if value is None else 1000 * value


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _notes(record: Mapping[str, Any]) -> list[str]:
    missed = ", ".join(f"{name} at most {value:g} ms" for name, value in record["objectives"].items() if value is not None)
    return [f"Objectives: {missed or 'none'}. Points are the requests that were due at that time."]
