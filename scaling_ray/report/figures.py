"""Pictures as SVG text: no drawing library, no fonts or scripts from elsewhere, colours that follow light and dark.

Coordinates are pixels of the view box. Every line carries its label at its right end; labels that would overlap are
moved apart. A figure is drawn for a given width instead of being scaled, so that letters keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from scaling_ray.report.svg import GREY, INK, LETTER, LINE_HEIGHT, open_svg, plain, power_of_ten, short, text, ticks

Prediction = tuple[float, float, float | None, float | None]
"""Where it is, the value, and both ends of its interval (None where it has none)."""


@dataclass(frozen=True)
class Series:
    """One labelled line: its points (x, y), and hollow points beside it that are not part of the line.

    ``bars`` are predictions of what was measured since (x, predicted, low, high), drawn hollow where they belong;
    ``forecasts`` are predictions of what nobody has measured, drawn filled.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = INK
    hollow: Sequence[tuple[float, float]] = ()
    curve: Sequence[tuple[float, float]] = ()  # drawn thin and dashed, without points
    bars: Sequence[Prediction] = ()
    forecasts: Sequence[Prediction] = ()
    marks: Sequence[tuple[float, float]] = ()  # diamonds where they are, such as a minimum
    joined: bool = True  # a line through the means of equal x


@dataclass(frozen=True)
class Level:
    """A horizontal line: a baseline or a floor."""

    label: str
    y: float
    colour: str = GREY


@dataclass(frozen=True)
class Chart:
    """A chart to draw: loss against a logarithmic axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    x_names: Sequence[tuple[float, str]] = field(default=())


def draw(chart: Chart, width: int, height: int) -> str:
    """The chart as one ``<svg>`` element, ``width`` x ``height`` pixels; empty text without any point."""
    points = [p for s in chart.series for p in (*s.points, *s.hollow)]
    if not points:
        return ""
    bars = [bar for s in chart.series for bar in (*s.bars, *s.forecasts)]
    names = [s.label for s in chart.series] + [level.label for level in chart.levels]
    right = min(max([12, *(len(name) for name in names)]) * LETTER + 16 if any(names) else 20, 0.38 * width)
    top, bottom = 16.0, 62.0 if chart.x_names else 46.0
    x_low, x_high = _log_span([x for x, _ in points] + [x for x, *_ in bars])
    ys = [y for _, y in points] + [level.y for level in chart.levels]
    reach = max(ys) - min(ys)  # a wide prediction may not squeeze the measured losses: it is cut at the frame
    ends = [y for _, *three in bars for y in three if y is not None] + [y for s in chart.series for _, y in s.marks]
    ys += [min(max(y, min(ys) - 0.35 * reach), max(ys) + 0.35 * reach) for y in ends]
    marks = ticks(min(ys), max(ys), 5 if height < 360 else 7)
    left = max(58.0, 32.0 + LETTER * max(len(plain(mark, marks)) for mark in marks))
    pad = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def across(x: float) -> float:
        return left + (math.log10(x) - x_low) / (x_high - x_low) * (width - left - right)

    def down(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    end, base = width - right, height - bottom
    parts = [open_svg(chart.title, width, height)]
    for tick in marks:
        if not y_low <= tick <= y_high:
            continue
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 8, y + 4.5, plain(tick, marks), "soft", "end"))
    for value, label in _log_marks(x_low, x_high, end - left):
        x = across(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{base:.1f}"/>')
        parts.append(text(x, base + 17, label, "soft", "middle"))
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{end:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>')
    parts += _names_below(chart.x_names, across, base)
    parts.append(text((left + end) / 2, height - 8, chart.x_label, "soft", "middle"))
    middle = (top + base) / 2
    parts.append(
        f'<text class="soft" text-anchor="middle" transform="translate(15 {middle:.1f}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>"
    )
    labels: list[tuple[float, str, str, float]] = []
    for level in chart.levels:
        y = down(level.y)
        line = f"M{left:.1f} {y:.1f}H{end:.1f}"
        parts.append(f'<path class="l{level.colour}" stroke-width="1.4" stroke-dasharray="6 4" d="{line}"/>')
        labels.append((y, level.label, "soft" if level.colour == GREY else f"p{level.colour}", end))
    for series in chart.series:
        colour = series.colour
        means = _means(series.points)
        if series.curve:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in series.curve if y_low <= y <= y_high)
            parts.append(f'<polyline class="l{colour}" stroke-width="1.25" stroke-dasharray="2 3" points="{path}"/>')
        if series.joined:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in means)
            parts.append(f'<polyline class="l{colour}" stroke-width="2.25" stroke-linejoin="round" points="{path}"/>')
        for x, y in series.points:
            parts.append(
                f'<circle class="p{colour}" fill-opacity=".75" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.2"/>'
            )
        for x, y in series.hollow:
            parts.append(f'<circle class="o{colour}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.6"/>')
        for bar in series.bars:
            parts.append(_bar(bar, colour, across(bar[0]), down, top, base))
        for bar in series.forecasts:
            parts.append(_bar(bar, colour, across(bar[0]), down, top, base, filled=True))
        for x, y in series.marks:
            parts.append(_bar((x, y, None, None), colour, across(x), down, top, base))
        last = means[-1] if means else series.hollow[-1]
        if series.label:
            labels.append(
                (down(last[1]), series.label, f"p{colour} name", across(last[0]) if series.joined else math.inf)
            )
    parts += _labels(labels, end, top, base)
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True)
class Panel:
    """One small picture of a set: curves of (x, y), each with its colour."""

    title: str
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]


def small_multiples(
    title: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str]], x_label: str, y_label: str, width: int
) -> str:
    """Panels side by side, all with the same vertical axis, as one ``<svg>``; empty text without any curve."""
    points = [p for panel in panels for _, curve in panel.curves for p in curve]
    if not points:
        return ""
    columns = max(1, min(len(panels), width // 230))
    rows = math.ceil(len(panels) / columns)
    left, top, head, foot, gap = 58.0, 30.0, 22.0, 30.0, 16.0
    panel_width = (width - left - 12 - gap * (columns - 1)) / columns
    panel_height = 132.0
    height = top + rows * (head + panel_height + foot) + 26
    ys = [y for _, y in points]
    marks = ticks(min(ys), max(ys), 4)
    pad = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad
    parts = [open_svg(title, width, round(height))]
    x = left
    for colour, label in legend:
        parts.append(f'<line class="l{colour}" stroke-width="2.5" x1="{x:.1f}" x2="{x + 18:.1f}" y1="13" y2="13"/>')
        parts.append(text(x + 24, 17.5, label, "", "start"))
        x += 24 + len(label) * LETTER + 18
    for i, panel in enumerate(panels):
        x0 = left + (i % columns) * (panel_width + gap)
        y0 = top + (i // columns) * (head + panel_height + foot) + head
        longest = max((x for _, curve in panel.curves for x, _ in curve), default=1.0)
        parts.append(text(x0, y0 - 7, panel.title, "name", "start"))
        for tick in marks:
            if not y_low <= tick <= y_high:
                continue
            y = y0 + (y_high - tick) / (y_high - y_low) * panel_height
            parts.append(f'<line class="grid" x1="{x0:.1f}" x2="{x0 + panel_width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if i % columns == 0:
                parts.append(text(x0 - 8, y + 4.5, plain(tick, marks), "soft", "end"))
        for colour, curve in panel.curves:
            path = " ".join(
                f"{x0 + x / longest * panel_width:.1f},{y0 + (y_high - y) / (y_high - y_low) * panel_height:.1f}"
                for x, y in curve
            )
            parts.append(f'<polyline class="l{colour}" stroke-width="1.5" stroke-opacity=".85" points="{path}"/>')
        parts.append(text(x0, y0 + panel_height + 16, "0", "soft", "start"))
        parts.append(text(x0 + panel_width, y0 + panel_height + 16, short(longest), "soft", "end"))
    parts.append(text(left, height - 8, f"{y_label}, against {x_label}", "soft", "start"))
    parts.append("</svg>")
    return "".join(parts)


def _labels(labels: Sequence[tuple[float, str, str, float]], end: float, top: float, base: float) -> list[str]:
    """Labels at the right end, pushed apart, with a thin lead to the line where they had to move."""
    placed = sorted(labels)
    heights = [y for y, *_ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LINE_HEIGHT)
    limit = base - 2
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LINE_HEIGHT
    parts = []
    for (y, label, css, x), place in zip(placed, heights, strict=True):
        if x < end or (x == end and abs(place - y) > 1):
            parts.append(f'<path class="lead" d="M{x + 5:.1f} {y:.1f}L{max(end, x + 5) + 4:.1f} {place:.1f}"/>')
        parts.append(text(end + 12, max(place, top) + 4.5, label, css, "start"))
    return parts


def _bar(
    bar: Prediction,
    colour: str,
    x: float,
    down: Callable[[float], float],
    top: float,
    base: float,
    *,
    filled: bool = False,
) -> str:
    """A prediction at its place: a diamond, and its interval where it has one, cut at the frame."""
    _, value, low, high = bar

    def inside(y: float) -> float:
        return min(max(down(y), top), base)

    y = inside(value)
    path = diamond = f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
    if low is not None and high is not None:
        path = f"M{x:.1f} {inside(high):.1f}V{y - 5:.1f}M{x:.1f} {y + 5:.1f}V{inside(low):.1f}" + path
        for edge in (low, high):
            if top < down(edge) < base:
                path += f"M{x - 4:.1f} {down(edge):.1f}h8"
    drawn = f'<path class="o{colour}" d="{path}"/>'
    return drawn + (f'<path class="p{colour}" d="{diamond}"/>' if filled else "")


def _log_marks(low: float, high: float, room: float) -> list[tuple[float, str]]:
    """Positions and labels of a logarithmic axis from 10^low to 10^high: decades, or 1, 2, 5 of a short one."""
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    if len(decades) > 2:
        step = 2 if len(decades) * 34 > room else 1
        return [(10.0**decade, power_of_ten(decade)) for decade in decades if decade % step == 0]
    for multiples in ((1, 2, 5), (1, 3), (1, 5), (1,), range(1, 10)):
        fine = [m * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for m in multiples]
        fine = [value for value in fine if low <= math.log10(value) <= high]
        if 2 <= len(fine) <= room / 42:
            break
    return [(value, short(value)) for value in fine]


def _names_below(names: Sequence[tuple[float, str]], across: Callable[[float], float], base: float) -> list[str]:
    """Names of positions on the axis, left out where they would run into the one before."""
    parts, free_from = [], -math.inf
    for x, name in sorted(names):
        place, half = across(x), len(name) * (LETTER + 1.2) / 2  # bold
        if place - half > free_from:
            parts.append(text(place, base + 34, name, "name", "middle"))
            free_from = place + half + 4
    return parts


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(by_x.items())]


def _log_span(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.06 * (high - low), 0.15)
    return low - pad, high + pad
