"""Small SVG charts without outside resources.

Text, axes and grid have the page's colour (`currentColor`). The palette has enough contrast on white and on near-black. So
charts need no themes. Each mark shows its numbers when the pointer is over it. `standalone` makes a file of charts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ladimo.convert.report.markup import element, to_xml

WIDTH, PLOT_HEIGHT = 440.0, 210.0
LEFT, RIGHT, BOTTOM = 58.0, 16.0, 40.0
LETTER = 6.4  # the approximate width of a letter at 12 px
ACCENT, FAINT = "#3b6fd4", "#7a828c"
PALETTE = (ACCENT, "#d2601e", "#2b9348", "#9b59d0", "#d6394c", "#13869a", "#9c6b3f", FAINT)
RAMP = ((59, 111, 212), (160, 75, 184), (217, 84, 43))  # colours from the first item of an order to the last
SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-3.6 -3.6h7.2v7.2h-7.2z", "M0 -5L5 0L0 5L-5 0z", "M0 -4.6L4.8 3.8H-4.8z")


@dataclass(frozen=True, slots=True)
class Axis:
    """log: a logarithmic axis, without points at or below zero. unit: written behind each tick. low, high: a range that the
    axis must include. whole: ticks at whole numbers only."""

    label: str
    log: bool = False
    unit: str = ""
    low: float = math.inf
    high: float = -math.inf
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """hint: shown in place of the numbers when the pointer is over the point. label: written beside the point if there is room.
    spread: half the length of an error bar."""

    x: float
    y: float
    hint: str = ""
    label: str = ""
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Series:
    """colour: None: the next one of the palette. line: whether the points are joined by a line."""

    name: str
    points: Sequence[Point]
    colour: str | None = None
    line: bool = True


@dataclass(frozen=True, slots=True)
class Bar:
    value: float
    hint: str = ""
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """share: the strength of the colour, from 0 (none) to 1."""

    share: float
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    ordinal: bool = False,
    guides: Sequence[tuple[float, str]] = (),
) -> Element:
    """Lines with markers. ordinal: the colours of the series follow their order. guides: dashed horizontal lines."""
    shown = [
        Series(s.name, [p for p in s.points if not (x_axis.log and p.x <= 0 or y_axis.log and p.y <= 0)], s.colour, s.line)
        for s in series
    ]
    styles = [
        (one.colour or (ramp(number / max(1, len(shown) - 1)) if ordinal else PALETTE[number % len(PALETTE)]), number)
        for number, one in enumerate(shown)
    ]
    legend, top = _legend([(one.name, *style) for one, style in zip(shown, styles, strict=True)], ordinal)
    points = [point for one in shown for point in one.points]
    y_values = [value for p in points for value in (p.y - p.spread, p.y + p.spread) if not (y_axis.log and value <= 0)]
    x_scale = _scale([p.x for p in points], x_axis, LEFT, WIDTH - RIGHT)
    y_scale = _scale([*y_values, *(value for value, _ in guides)], y_axis, top + PLOT_HEIGHT, top)
    parts = [*legend, *_axes(x_axis, y_axis, x_scale, y_scale)]
    for value, text in guides:
        y = y_scale(value)
        parts.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", stroke=FAINT, stroke_dasharray="4 3"))
        parts.append(_text(LEFT + 4, y - 4, text, "start", opacity=0.75))
    taken = [(x_scale(p.x) - 5, y_scale(p.y) - 5, 10.0, 10.0) for p in points]
    taken += [(LEFT + 4, y_scale(value) - 15, len(text) * LETTER, 13.0) for value, text in guides]
    size = 1.0 if len(shown) <= 8 else 0.6
    markers, labels = [], []
    for one, (colour, number) in zip(shown, styles, strict=True):
        placed = [(x_scale(p.x), y_scale(p.y), p) for p in one.points]
        if one.line and len(placed) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in placed)
            parts.append(element("path", _hint(one.name), d=path, fill="none", stroke=colour, stroke_width=1 + size))
        for x, y, point in placed:
            if point.spread:
                ends = [y_scale(max(point.y + sign * point.spread, y_scale.low)) for sign in (-1, 1)]
                bar = f"M{x - 3:.1f} {ends[0]:.1f}h6m-3 0V{ends[1]:.1f}m-3 0h6"
                parts.append(element("path", d=bar, fill="none", stroke=colour, stroke_width=1.2))
            hint = point.hint or f"{_number(point.x)}{x_axis.unit}: {_number(point.y)}{y_axis.unit}"
            markers.append(_marker(x, y, colour, 0 if ordinal else number, f"{one.name}, {hint}" if one.name else hint, size))
            labels += _label(x, y, point.label, taken)
    return _svg(title, WIDTH, top + PLOT_HEIGHT + BOTTOM, [*parts, *markers, *labels])


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    x_label: str,
    y_axis: Axis,
    x_ticks: Sequence[tuple[float, str]] = (),
    marks: Iterable[tuple[float, str]] = (),
) -> Element:
    """Bars of equal width that start at zero. x_ticks, marks: positions, counted in bars from the left, with their texts. Marks
    are dashed vertical lines. Without ticks, the bars are numbered."""
    top, step = 34.0, (WIDTH - LEFT - RIGHT) / max(1, len(bars))
    y_scale = _scale([0.0, *(bar.value for bar in bars)], y_axis, top + PLOT_HEIGHT, top)
    every = math.ceil(len(bars) * 22 / (WIDTH - LEFT - RIGHT))
    parts = _frame(x_label, y_axis, y_scale)
    for place, text in x_ticks or [(number + 0.5, str(number)) for number in range(0, len(bars), every)]:
        parts.append(_text(LEFT + place * step, top + PLOT_HEIGHT + 15, text, "middle", opacity=0.75))
    parts.append(element("path", d=f"M{LEFT} {y_scale(0.0):.1f}H{WIDTH - RIGHT}", stroke="currentColor", stroke_opacity=0.5))
    for number, bar in enumerate(bars):
        ends = sorted((y_scale(0.0), y_scale(bar.value)))
        parts.append(
            element(
                "rect",
                _hint(bar.hint or _number(bar.value)),
                x=LEFT + (number + 0.08) * step,
                y=ends[0],
                width=0.84 * step,
                height=ends[1] - ends[0],
                fill=FAINT if bar.faint else ACCENT,
            )
        )
    for number, (place, text) in enumerate(marks):
        x = LEFT + place * step
        parts.append(element("path", d=f"M{x:.1f} {top}V{top + PLOT_HEIGHT}", stroke=PALETTE[1], stroke_dasharray="4 3"))
        parts.append(_text(x + 4, top + 12 + 14 * number, text, "start"))
    return _svg(title, WIDTH, top + PLOT_HEIGHT + BOTTOM, parts)


def heatmap(
    title: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Cell | None]], corner: str = ""
) -> Element:
    """A cell for each row and column, with its colour behind its text. None: an empty cell. corner: the title of the rows."""
    texts = [cell.text for line in cells for cell in line if cell]
    cell_width = max(24.0, max(map(len, [*columns, *texts]), default=0) * LETTER + 10)
    left, top, height = max(map(len, [corner, *rows]), default=0) * LETTER + 16, 48.0, 22.0
    width = max(left + len(columns) * cell_width + 8, len(title) * 8.0 + 16)
    parts = [_text(8, top - 8, corner, "start", opacity=0.75)]
    for number, name in enumerate(columns):
        parts.append(_text(left + (number + 0.5) * cell_width, top - 8, name, "middle", opacity=0.75))
    for row, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = top + row * height
        parts.append(_text(left - 8, y + 15, name, "end", opacity=0.75))
        for column, cell in enumerate(line):
            if cell is None:
                continue
            x, share = left + column * cell_width, min(max(cell.share, 0.0), 1.0)
            box = element(
                "rect",
                x=x + 1,
                y=y + 1,
                width=cell_width - 2,
                height=height - 2,
                rx=3,
                fill=ACCENT,
                fill_opacity=0.06 + 0.49 * share,
            )
            parts.append(
                element("g", _hint(cell.hint or cell.text), box, _text(x + cell_width / 2, y + 15, cell.text, "middle"))
            )
    return _svg(title, width, top + len(rows) * height + 8, parts)


def standalone(title: str, charts: Sequence[Element]) -> str:
    """The content of an SVG file with charts side by side under a title, light or dark as the reader's system asks."""
    style = "svg{color:#1c1e21;background:#fff}@media (prefers-color-scheme:dark){svg{color:#e6e8eb;background:#14161a}}"
    parts, x, height = [element("style", style)], 0.0, 0.0
    for chart in charts:
        width = float(chart.get("width", 0))
        chart.set("x", f"{x:.4g}")
        chart.set("y", "28")
        x, height = x + width, max(height, float(chart.get("height", 0)))
        parts.append(chart)
    root = _svg(title, x, height + 28, parts)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    return to_xml(root)


def ramp(share: float) -> str:
    """The colour of an item at position `share` in [0, 1] of an order."""
    place = share * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    mixed = (a + (b - a) * (place - first) for a, b in zip(RAMP[first], RAMP[first + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def ticks(low: float, high: float, log: bool = False, whole: bool = False) -> list[float]:
    """About three to six round values within [low, high]."""
    if log:
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)):
            found = [step * power for power in powers for step in steps if low <= step * power <= high]
            if len(found) >= 3:
                every = math.ceil(len(found) / 7)
                return found[::every]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(
        factor for factor in (1, 2, 5) if factor == 1 or factor * step <= (high - low) / 3
    )  # the logarithm may round up
    step = max(step, 1.0) if whole else step
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    """A scale for all values and the axis's own range, with a margin. If the lowest value is zero, there is no lower margin."""
    held = [value for value in (*values, axis.low, axis.high) if math.isfinite(value)] or [1.0]
    low, high = min(held), max(held)
    apart = high - low > 1e-9 * max(abs(low), abs(high))  # closer values count as equal, and the scale is around them
    if axis.log:
        factor = (high / low) ** 0.05 if apart else 2.0
        return Scale(low / factor, high * factor, start, end, log=True)
    room = 0.05 * (high - low) if apart else max(0.5, 0.1 * abs(high))
    return Scale(low - room if low else 0.0, high + room, start, end)


def _axes(x_axis: Axis, y_axis: Axis, x_scale: Scale, y_scale: Scale) -> list[Element]:
    parts = _frame(x_axis.label, y_axis, y_scale)
    for value in ticks(x_scale.low, x_scale.high, x_scale.log, x_axis.whole):
        parts.append(_text(x_scale(value), y_scale.start + 15, _number(value) + x_axis.unit, "middle", opacity=0.75))
    return parts


def _frame(x_label: str, y_axis: Axis, y_scale: Scale) -> list[Element]:
    """The labels of the axes, and a horizontal line at each tick of the y axis."""
    middle, base = (y_scale.start + y_scale.end) / 2, y_scale.start
    turned = element("g", _text(0, 0, y_axis.label, "middle"), transform=f"translate(13 {middle:.1f}) rotate(-90)")
    parts = [_text((LEFT + WIDTH - RIGHT) / 2, base + 33, x_label, "middle"), turned]
    for value in ticks(y_scale.low, y_scale.high, y_scale.log, y_axis.whole):
        y = y_scale(value)
        parts.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", stroke="currentColor", stroke_opacity=0.13))
        parts.append(_text(LEFT - 6, y + 4, _number(value) + y_axis.unit, "end", opacity=0.75))
    parts.append(element("path", d=f"M{LEFT} {base:.1f}H{WIDTH - RIGHT}", stroke="currentColor", stroke_opacity=0.5))
    return parts


def _legend(entries: Sequence[tuple[str, str, int]], ordinal: bool) -> tuple[list[Element], float]:
    """The names with their colours and shapes, in rows under the title; and the y coordinate at which the plot begins."""
    named = [entry for entry in entries if entry[0]]
    if ordinal and len(named) > 4:
        named = [named[0], named[len(named) // 2], named[-1]]
    parts, x, y = [], LEFT, 36.0
    for name, colour, number in named:
        width = len(name) * LETTER + 28
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + 18
        parts += [_marker(x + 5, y - 4, colour, 0 if ordinal else number), _text(x + 14, y, name, "start")]
        x += width
    return parts, y + 16


def _marker(x: float, y: float, colour: str, shape: int, hint: str = "", size: float = 1.0) -> Element:
    # The wide transparent edge makes it easy to point at a small mark.
    return element(
        "path",
        *([_hint(hint)] if hint else []),
        class_="point" if hint else None,
        d=SHAPES[shape % len(SHAPES)],
        transform=f"translate({x:.1f} {y:.1f})" + (f" scale({size})" if size != 1 else ""),
        fill=colour,
        stroke="transparent",
        stroke_width=10,
    )


def _label(x: float, y: float, text: str, taken: list[tuple[float, float, float, float]]) -> list[Element]:
    """The text at the first free one of four positions beside a point, or nothing if none is free. taken: the boxes (x, y,
    width, height) that are in use."""
    width = len(text) * LETTER
    for left, base, anchor in (
        (x + 8, y - 6, "start"),
        (x - 8, y - 6, "end"),
        (x + 8, y + 15, "start"),
        (x - 8, y + 15, "end"),
    ):
        box = (left if anchor == "start" else left - width, base - 11, width, 13.0)
        inside = box[0] >= LEFT and box[0] + width <= WIDTH
        if text and inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return [_text(left, base, text, anchor)]
    return []


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _number(value: float) -> str:
    if 0 < abs(value) < 0.001:
        digits, _, power = f"{value:.3g}".partition("e")
        return f"{digits}e{int(power)}" if power else f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"


def _hint(text: str) -> Element:
    return element("title", text)


def _text(x: float, y: float, text: str, anchor: str, opacity: float | None = None) -> Element:
    return element("text", text, x=x, y=y, text_anchor=anchor, fill_opacity=opacity)


def _svg(title: str, width: float, height: float, parts: Sequence[Element]) -> Element:
    heading = element("text", title, x=8, y=16, font_size=13, font_weight=600)
    size = {"viewBox": f"0 0 {width:.4g} {height:.4g}", "width": width, "height": height}
    font = {"font_family": "system-ui, sans-serif", "font_size": 12, "fill": "currentColor"}
    return element("svg", heading, *parts, role="img", aria_label=title, **size, **font)
