"""Charts: every number is drawn where it belongs, named, legible on light and dark, and well formed."""

import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ladimo.convert.report.charts import (
    PALETTE,
    Axis,
    Bar,
    Cell,
    Point,
    Series,
    bar_chart,
    heatmap,
    line_chart,
    ramp,
    ticks,
)
from ladimo.convert.report.outside import comparison_chart, comparison_panels
from ladimo.convert.report.record import Comparison

ENTRIES: list[dict[str, Any]] = [
    {"method": method, "tokens": tokens, "target": target, "active_parameters_ratio": target}
    | {"perplexity_ratio": 1 + cost * (1 - target), "spread": 0.02, "seeds": 3}
    for method, cost in (("elastic", 0.1), ("a < b & c", 0.4))
    for tokens in (100_000, 1_000_000)
    for target in (0.9, 0.8, 0.7)
]
finite = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-200)


def places(chart: Element) -> dict[str, tuple[float, float]]:
    """The points of a line chart by their hints."""
    found = {}
    for path in chart.iter("path"):
        if path.get("class") == "point":
            x, y = re.findall(r"-?[\d.]+", path.get("transform", ""))[:2]
            found[path.findtext("title", "")] = (float(x), float(y))
    return found


def labels(chart: Element) -> list[str]:
    return [text.text or "" for text in chart.iter("text")]


def luminance(colour: str) -> float:
    """WCAG 2.2: relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [*PALETTE, *(ramp(step / 10) for step in range(11))])
def test_colours_have_contrast_on_light_and_dark(colour: str) -> None:
    for background in ("#ffffff", "#1d2025"):
        lighter, darker = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3  # WCAG 1.4.11: graphical objects


def test_points_stand_in_proportion() -> None:
    chart = line_chart("t", [Series("s", [Point(0, 0, "a"), Point(1, 5, "b"), Point(2, 10, "c")])], Axis("x"), Axis("y"))
    (ax, ay), (bx, by), (cx, cy) = places(chart).values()
    assert bx == pytest.approx((ax + cx) / 2, abs=0.2)
    assert by == pytest.approx((ay + cy) / 2, abs=0.2)
    assert ax < cx
    assert ay > cy


def test_a_log_axis_leaves_out_what_it_cannot_show() -> None:
    points = [Point(1, 100, "a"), Point(2, 1, "b"), Point(3, 0.01, "c"), Point(4, 0, "zero")]
    chart = line_chart("t", [Series("s", points)], Axis("x"), Axis("y", log=True))
    found = places(chart)
    assert list(found) == ["s, a", "s, b", "s, c"]
    assert found["s, b"][1] == pytest.approx((found["s, a"][1] + found["s, c"][1]) / 2, abs=0.2)
    assert {"100", "1", "0.01"} <= set(labels(chart))


def test_an_ordered_family_is_coloured_by_its_order() -> None:
    series = [Series(f"layer {n}", [Point(0, n), Point(1, n)]) for n in range(32)]
    chart = line_chart("t", series, Axis("x"), Axis("y"), ordinal=True)
    assert len(places(chart)) == 64
    lines = [path.get("stroke") for path in chart.iter("path") if path.get("fill") == "none"]
    assert lines == [ramp(n / 31) for n in range(32)]
    assert [text for text in labels(chart) if text.startswith("layer")] == ["layer 0", "layer 16", "layer 31"]


def test_labels_never_cover_each_other() -> None:
    crowd = [Point(1 + n / 1000, 1, label=f"policy {n}") for n in range(20)]
    chart = line_chart("t", [Series("", crowd), Series("", [Point(9, 9, label="far")])], Axis("x"), Axis("y"))
    shown = [text for text in labels(chart) if text.startswith("policy")]
    assert 1 <= len(shown) < 20
    assert "far" in labels(chart)


def test_bars_start_at_zero() -> None:
    chart = bar_chart("bars", [Bar(2.0), Bar(-1.0), Bar(0.0, "none", faint=True)], "n", Axis("y"), marks=[(1.0, "here")])
    above, below, none = ({key: float(rect.get(key, 0)) for key in ("y", "height")} for rect in chart.iter("rect"))
    assert above["y"] + above["height"] == pytest.approx(below["y"], abs=0.2)
    assert above["height"] == pytest.approx(2 * below["height"], abs=0.2)
    assert none["height"] == pytest.approx(0, abs=0.1)
    assert "here" in labels(chart)


def test_heatmap_cells_hold_their_text() -> None:
    cells: list[list[Cell | None]] = [
        [Cell(0.0, "low"), Cell(1.0, "a rather long text", "all of it")],
        [None, Cell(2.0, "above")],
    ]
    chart = heatmap("a title that is wider than the cells are, by far, and some more", ["c", "d"], ["0", "1"], cells, "corner")
    assert len(list(chart.iter("rect"))) == 3
    opacities = [float(rect.get("fill-opacity", 0)) for rect in chart.iter("rect")]
    assert opacities[0] < opacities[1] == opacities[2] < 0.6  # so that the text in front stays legible
    assert {"low", "a rather long text", "above", "corner", "c", "d"} <= set(labels(chart))
    width, x = (
        float(chart.get("width", 0)),
        [float(rect.get("x", 0)) + float(rect.get("width", 0)) for rect in chart.iter("rect")],
    )
    assert max(x) <= width


@given(st.lists(st.tuples(finite, finite), max_size=8), st.booleans())
@example([(0.0, 1.0), (1.0, 1.0 + 2**-52)], True)  # values that differ by less than a margin between them can
def test_charts_of_any_numbers_are_well_formed(points: list[tuple[float, float]], log: bool) -> None:
    chart = line_chart(
        "t", [Series("s", [Point(x, y) for x, y in points])], Axis("x"), Axis("y", log=log), guides=[(1.0, "one")]
    )
    text = ElementTree.tostring(chart, encoding="unicode")
    assert "nan" not in text
    assert "inf" not in text
    assert len(places(chart)) <= len(points)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans(), st.booleans())
def test_ticks_are_few_and_within(low: float, span: float, log: bool, whole: bool) -> None:
    low = abs(low) + 1e-6 if log else low
    high = low + max(span, 1e-6 * abs(low))
    found = ticks(low, high, log, whole)
    assert len(found) <= 10
    assert whole or len(found) >= 2
    slack = 1e-6 * (high - low)
    assert all(low - slack <= value <= high + slack for value in found)
    assert all(first < second for first, second in itertools.pairwise(found))


def test_comparison_panels_share_axes_and_colours() -> None:
    panels = comparison_panels([Comparison(**entry) for entry in ENTRIES])
    assert [panel.get("aria-label") for panel in panels] == ["Converted with 100,000 tokens", "Converted with 1,000,000 tokens"]
    assert places(panels[0]) == places(panels[1])  # the made-up figures do not depend on the tokens
    assert len(places(panels[0])) == 6
    assert any("1.0100 ± 0.0200 over 3 seeds" in hint for hint in places(panels[0]))
    bars = [path.get("d", "") for path in panels[0].iter("path") if path.get("stroke-width") == "1.2"]
    assert len(bars) == 6
    ends = [[float(y) for y in re.match(r"M[\d.]+ ([\d.]+)h6m-3 0V([\d.]+)", bar).groups()] for bar in bars]  # type: ignore[union-attr]
    assert all(math.isclose(first[0] - first[1], ends[0][0] - ends[0][1], abs_tol=0.3) for first in ends)
    assert ends[0][0] > ends[0][1]


def test_a_comparison_is_a_file_of_its_own() -> None:
    text = comparison_chart("Methods & budgets", ENTRIES)
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    inner = root.findall(f"{svg}svg")
    assert len(inner) == 2
    assert float(inner[1].get("x", 0)) == float(inner[0].get("width", 0))
    assert float(root.get("width", 0)) == sum(float(chart.get("width", 0)) for chart in inner)
    assert "a < b & c" in "".join(root.itertext())
    assert not re.search(r"(href|src)=|url\(", text)
