"""Estimates with their intervals, one row each, on one axis: choices, and fits that leave something out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaling_ray.report.svg import GREY, INK, LETTER, open_svg, plain, text, ticks

_ROW, _TALL_ROW = 26.0, 42.0  # pixels: label beside the row, label above it


@dataclass(frozen=True)
class Estimate:
    """One estimate: its name, value and 95% interval (an end that is None is open), and how it is drawn."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    soft: bool = False  # for comparison only
    alone: bool = False  # its estimator has no interval


def draw_forest(
    title: str,
    x_label: str,
    rows: Sequence[Estimate],
    width: int,
    *,
    band: tuple[float, float] | None = None,
    lines: Sequence[tuple[float, str]] = (),
) -> str:
    """The rows as one ``<svg>``; empty text without any value.

    ``band`` (low, high) is shaded behind them; ``lines`` (value, label) stand upright, and the axis reaches them.
    """
    known = [row for row in rows if row.value is not None]
    values = [v for row in known for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]
    values += list(band or ())
    values += [value for value, _ in lines] if values else []
    if not values:
        return ""
    above = width < 640
    row_height = _TALL_ROW if above else _ROW
    left = 14.0 if above else min(0.5 * width, max(len(row.label) for row in rows) * LETTER + 24)
    right, top, bottom = 18.0, 24.0 if lines else 8.0, 44.0
    height = round(top + row_height * len(rows) + bottom)
    low, high = min(values), max(values)
    # Intervals may be open or very wide: the axis ends at a few times the spread of the estimates.
    centre = [row.value for row in known if row.value is not None] + [*(band or ()), *(value for value, _ in lines)]
    spread = max(max(centre) - min(centre), 0.25 * abs(sum(centre) / len(centre)), 1e-9)
    low, high = max(low, min(centre) - 1.5 * spread), min(high, max(centre) + 1.5 * spread)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - right)

    base = top + row_height * len(rows)
    parts = [open_svg(title, width, height)]
    if band:
        parts.append(
            f'<rect class="band" x="{x(band[0]):.1f}" width="{max(1.5, x(band[1]) - x(band[0])):.1f}" y="{top:.1f}" '
            f'height="{base - top:.1f}"/>'
        )
    marks = ticks(low, high, 4 if above else 6)
    for mark in marks:
        if low <= mark <= high:
            parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{base:.1f}"/>')
            parts.append(text(x(mark), base + 16, plain(mark, marks), "soft", "middle"))
    for value, label in lines:
        parts.append(f'<path class="level" d="M{x(value):.1f} {top:.1f}V{base:.1f}"/>')
        parts.append(text(x(value), top - 8, label, "soft", "middle"))
    for i, row in enumerate(rows):
        y = top + row_height * i + (29.0 if above else 0.5 * row_height)
        if above:
            parts.append(
                text(left, y - 14, _fitted(row.label, width - left - right), "soft" if row.soft else "", "start")
            )
        else:
            parts.append(text(left - 12, y + 4.5, _fitted(row.label, left - 12), "soft" if row.soft else "", "end"))
        parts.append(_drawn(row, y, x, low, high))
    parts.append(text((left + width - right) / 2, height - 8, x_label, "soft", "middle"))
    return "".join([*parts, "</svg>"])


def _drawn(row: Estimate, y: float, x: Callable[[float], float], low: float, high: float) -> str:
    colour = GREY if row.alone or row.soft else INK
    if row.value is None:
        return text(x(low) + 4, y + 4.5, "no estimate", "soft", "start")
    dot = f'<circle class="p{colour}" cx="{x(row.value):.1f}" cy="{y:.1f}" r="4.2"/>'
    if row.alone:
        return dot
    ends = (low if row.low is None else row.low, high if row.high is None else row.high)
    path = f"M{x(ends[0]):.1f} {y:.1f}H{x(ends[1]):.1f}"
    # An arrow says that the interval goes on: open, or beyond the axis.
    path += f"M{x(low) + 5:.1f} {y - 4:.1f}l-5 4l5 4" if ends[0] <= low else f"M{x(ends[0]):.1f} {y - 4:.1f}v8"
    path += f"M{x(high) - 5:.1f} {y - 4:.1f}l5 4l-5 4" if ends[1] >= high else f"M{x(ends[1]):.1f} {y - 4:.1f}v8"
    bar = f'<path class="l{colour}" stroke-width="1.75" d="{path}"/>'
    return bar + dot


def _fitted(label: str, room: float) -> str:
    most = max(8, int(room / (LETTER + 0.2)))
    return label if len(label) <= most else label[: most - 1].rstrip() + "…"
