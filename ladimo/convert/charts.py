"""Small SVG charts for the report: text in, text out, nothing loaded from anywhere."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 240, 56, 40
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str, labels: Sequence[str] = ()) -> str:
    """One polyline with markers per series. labels: texts beside the points of the first series."""
    points = [point for values in series.values() for point in values]
    if not points:
        return ""
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - 10)
        return across, 24 + (y_high - y) / (y_high - y_low) * (HEIGHT - 24 - BOTTOM)

    parts = [_axes(x_label, y_label)]
    for value, anchor in ((x_low, "start"), (x_high, "end")):
        parts.append(_text(place(value, y_low)[0], HEIGHT - BOTTOM + 14, f"{value:.4g}", anchor))
    parts += [_text(LEFT - 4, place(x_low, value)[1] + 4, f"{value:.4g}", "end") for value in (y_low, y_high)]
    for number, (name, values) in enumerate(series.items()):
        colour, placed = COLOURS[number % len(COLOURS)], [place(*point) for point in values]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed]
        if len(series) > 1:
            parts.append(_text(WIDTH - 10, 36 + 12 * number, name, "end", colour))
    for index, label in enumerate(labels):
        x, y = place(*next(iter(series.values()))[index])
        right = x < WIDTH * 0.7
        parts.append(_text(x + (5 if right else -5), y - 5, label, "start" if right else "end"))
    return _svg(title, parts)


def bar_chart(title: str, values: Sequence[float], x_range: tuple[str, str], y_label: str) -> str:
    """Equal bars from zero; x_range: labels of the two ends."""
    highest = max(values, default=0.0) or 1.0
    step = (WIDTH - LEFT - 10) / max(1, len(values))
    base = HEIGHT - BOTTOM
    parts = [_axes("", y_label), _text(LEFT - 4, 28, f"{highest:.3g}", "end"), _text(LEFT - 4, base + 4, "0", "end")]
    parts += [_text(LEFT, base + 14, x_range[0], "start"), _text(WIDTH - 10, base + 14, x_range[1], "end")]
    for number, value in enumerate(values):
        height = value / highest * (base - 24)
        x, y = LEFT + number * step, base - height
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.9:.1f}" height="{height:.1f}" fill="{COLOURS[0]}"/>')
    return _svg(title, parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(x_label: str, y_label: str) -> str:
    base, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM) / 2
    return (
        f'<path d="M{LEFT} 20V{base}H{WIDTH - 8}" fill="none" stroke="#888"/>'
        + _text((LEFT + WIDTH) / 2, HEIGHT - 8, x_label, "middle")
        + f'<g transform="rotate(-90 12 {middle})">{_text(12, middle, y_label, "middle")}</g>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    heading = _text(LEFT, 14, title, "start", "#000")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11" '
        f'role="img" aria-label="{escape(title)}">{heading}{"".join(parts)}</svg>'
    )
