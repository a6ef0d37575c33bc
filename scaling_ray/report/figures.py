"""Pictures as SVG text: no drawing library, no fonts or scripts from elsewhere, colours that follow light and dark.

Coordinates are pixels of the view box. Every line carries its label at its right end; labels that would overlap are
moved apart. A figure is drawn for a given width instead of being scaled, so that letters keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

PALETTE = 6
_LIGHT = "--ink:#1b2330;--soft:#5b6675;--rule:#e3e7ec;"
_LIGHT += "--c0:#1f5fa8;--c1:#b04d06;--c2:#1b7448;--c3:#84389c;--c4:#a32c46;--c5:#4d5968"
_DARK = "--ink:#e8ecf2;--soft:#a3aebd;--rule:#2c3542;"
_DARK += "--c0:#7db4f7;--c1:#f2a765;--c2:#68d29b;--c3:#d6a1ea;--c4:#f790a5;--c5:#b7c1ce"
_FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
STYLE = (
    f".fig{{{_LIGHT};font-family:{_FONTS};font-size:13px;fill:var(--ink)}}"
    f"@media (prefers-color-scheme:dark){{.fig{{{_DARK}}}}}@media print{{.fig{{{_LIGHT}}}}}"
    ".fig .soft{fill:var(--soft)}.fig .name{font-weight:600}.fig .grid{stroke:var(--rule);stroke-width:1}"
    ".fig .axis{stroke:var(--soft);stroke-width:1}.fig .lead{stroke:var(--soft);stroke-width:.75;fill:none}"
    ".fig .level{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:6 4;fill:none}"
)
STYLE += "".join(
    f".fig .l{i}{{stroke:var(--c{i});fill:none}}.fig .p{i}{{fill:var(--c{i})}}"
    f".fig .o{i}{{stroke:var(--c{i});fill:none;stroke-width:1.5}}"
    for i in range(PALETTE)
)

_LINE_HEIGHT = 15.0
_LETTER = 7.0  # mean width of a letter at 13 px


@dataclass(frozen=True)
class Series:
    """One labelled line: its points (x, y), and hollow points beside it that are not part of the line."""

    label: str
    points: Sequence[tuple[float, float]]
    hollow: Sequence[tuple[float, float]] = ()
    curve: Sequence[tuple[float, float]] = ()  # drawn thin and dashed, without points


@dataclass(frozen=True)
class Level:
    """A horizontal line: a baseline or a floor."""

    label: str
    y: float


@dataclass(frozen=True)
class Chart:
    """What to draw: loss against a logarithmic axis."""

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
    names = [s.label for s in chart.series] + [level.label for level in chart.levels]
    right = min(max(len(name) for name in names) * _LETTER + 22, 0.36 * width)
    left, top, bottom = 58.0, 16.0, 62.0 if chart.x_names else 46.0
    x_low, x_high = _log_span([x for x, _ in points])
    ys = [y for _, y in points] + [level.y for level in chart.levels]
    ticks = _ticks(min(ys), max(ys), 5 if height < 360 else 7)
    pad = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def across(x: float) -> float:
        return left + (math.log10(x) - x_low) / (x_high - x_low) * (width - left - right)

    def down(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    end, base = width - right, height - bottom
    parts = [_open(chart.title, width, height)]
    for tick in ticks:
        if not y_low <= tick <= y_high:
            continue
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4.5, _plain(tick, ticks), "soft", "end"))
    decades = range(math.ceil(x_low - 1e-9), math.floor(x_high + 1e-9) + 1)
    crowded = len(decades) * 34 > end - left
    for decade in decades:
        x = across(10.0**decade)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{base:.1f}"/>')
        if not crowded or decade % 2 == 0:
            parts.append(_text(x, base + 17, _power(decade), "soft", "middle"))
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{end:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>')
    parts += _names_below(chart.x_names, across, base)
    parts.append(_text((left + end) / 2, height - 8, chart.x_label, "soft", "middle"))
    middle = (top + base) / 2
    parts.append(
        f'<text class="soft" text-anchor="middle" transform="translate(15 {middle:.1f}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>"
    )
    labels: list[tuple[float, str, str, float]] = []
    for level in chart.levels:
        y = down(level.y)
        parts.append(f'<path class="level" d="M{left:.1f} {y:.1f}H{end:.1f}"/>')
        labels.append((y, level.label, "soft", end))
    for i, series in enumerate(chart.series):
        colour = i % PALETTE
        means = _means(series.points)
        if series.curve:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in series.curve if y_low <= y <= y_high)
            parts.append(f'<polyline class="l{colour}" stroke-width="1.25" stroke-dasharray="2 3" points="{path}"/>')
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in means)
        parts.append(f'<polyline class="l{colour}" stroke-width="2.25" stroke-linejoin="round" points="{path}"/>')
        for x, y in series.points:
            parts.append(
                f'<circle class="p{colour}" fill-opacity=".75" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.2"/>'
            )
        for x, y in series.hollow:
            parts.append(f'<circle class="o{colour}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.6"/>')
        last = means[-1] if means else series.hollow[-1]
        labels.append((down(last[1]), series.label, f"p{colour} name", across(last[0])))
    parts += _labels(labels, end, top, base)
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True)
class Panel:
    """One small picture of a set: curves of (x, y), each with the index of its colour."""

    title: str
    curves: Sequence[tuple[int, Sequence[tuple[float, float]]]]


def small_multiples(
    title: str, panels: Sequence[Panel], legend: Sequence[tuple[int, str]], x_label: str, y_label: str, width: int
) -> str:
    """Panels side by side, all with the same vertical axis, as one ``<svg>``; empty text without any curve."""
    points = [p for panel in panels for _, curve in panel.curves for p in curve]
    if not points:
        return ""
    columns = max(1, min(len(panels), width // 230))
    rows = math.ceil(len(panels) / columns)
    left, top, head, foot, gap = 58.0, 30.0, 22.0, 22.0, 16.0
    panel_width = (width - left - 12 - gap * (columns - 1)) / columns
    panel_height = 132.0
    height = top + rows * (head + panel_height + foot) + 26
    ys = [y for _, y in points]
    ticks = _ticks(min(ys), max(ys), 4)
    pad = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad
    parts = [_open(title, width, round(height))]
    x = left
    for colour, label in legend:
        parts.append(
            f'<line class="l{colour % PALETTE}" stroke-width="2.5" x1="{x:.1f}" x2="{x + 18:.1f}" y1="13" y2="13"/>'
        )
        parts.append(_text(x + 24, 17.5, label, "", "start"))
        x += 24 + len(label) * _LETTER + 18
    for i, panel in enumerate(panels):
        x0 = left + (i % columns) * (panel_width + gap)
        y0 = top + (i // columns) * (head + panel_height + foot) + head
        longest = max((x for _, curve in panel.curves for x, _ in curve), default=1.0)
        parts.append(_text(x0, y0 - 7, panel.title, "name", "start"))
        for tick in ticks:
            if not y_low <= tick <= y_high:
                continue
            y = y0 + (y_high - tick) / (y_high - y_low) * panel_height
            parts.append(f'<line class="grid" x1="{x0:.1f}" x2="{x0 + panel_width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if i % columns == 0:
                parts.append(_text(x0 - 8, y + 4.5, _plain(tick, ticks), "soft", "end"))
        for colour, curve in panel.curves:
            path = " ".join(
                f"{x0 + x / longest * panel_width:.1f},{y0 + (y_high - y) / (y_high - y_low) * panel_height:.1f}"
                for x, y in curve
            )
            parts.append(
                f'<polyline class="l{colour % PALETTE}" stroke-width="1.5" stroke-opacity=".85" points="{path}"/>'
            )
        parts.append(_text(x0, y0 + panel_height + 16, "0", "soft", "start"))
        parts.append(_text(x0 + panel_width, y0 + panel_height + 16, _short(longest), "soft", "end"))
    parts.append(_text(left, height - 8, f"{y_label}, against {x_label}", "soft", "start"))
    parts.append("</svg>")
    return "".join(parts)


def standalone(svg: str) -> str:
    """The same figure as a file of its own: with its style, and a page colour behind it."""
    if not svg:
        return ""
    paper = "svg.fig{background:#fff}@media (prefers-color-scheme:dark){svg.fig{background:#12171f}}"
    head, body = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{STYLE}{paper}</style>{body}\n'


def _open(title: str, width: int, height: int) -> str:
    label = escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fig" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
    )


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _labels(labels: Sequence[tuple[float, str, str, float]], end: float, top: float, base: float) -> list[str]:
    """Labels at the right end, pushed apart, with a thin lead to the line where they had to move."""
    placed = sorted(labels)
    heights = [y for y, *_ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LINE_HEIGHT)
    limit = base - 2
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - _LINE_HEIGHT
    parts = []
    for (y, label, css, x), place in zip(placed, heights, strict=True):
        if x < end or abs(place - y) > 1:
            parts.append(f'<path class="lead" d="M{x + 5:.1f} {y:.1f}L{max(end, x + 5) + 4:.1f} {place:.1f}"/>')
        parts.append(_text(end + 12, max(place, top) + 4.5, label, css, "start"))
    return parts


def _names_below(names: Sequence[tuple[float, str]], across: Callable[[float], float], base: float) -> list[str]:
    """Names of positions on the axis, left out where they would run into the one before."""
    parts, free_from = [], -math.inf
    for x, name in sorted(names):
        place, half = across(x), len(name) * _LETTER / 2
        if place - half > free_from:
            parts.append(_text(place, base + 34, name, "name", "middle"))
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


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that span low..high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _plain(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _power(decade: int) -> str:
    raised = str(decade).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{raised}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
