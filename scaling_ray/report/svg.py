"""Parts of every figure: colours that follow light and dark, text, ticks, and the figure as a file of its own.

No drawing library, no fonts or scripts from elsewhere. Coordinates are pixels of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

SHADES = 12
"""Shades of each family of colours, from the smallest value to the largest."""
CELLS, SIZES, BUDGETS, INK, GREY = "d", "s", "b", "e", "g"
"""What a colour means, on the whole page: numbers of training cells, sizes, budgets of FLOPs, a law, what is beside."""


def _ramp(first: tuple[int, int, int], last: tuple[int, int, int]) -> tuple[str, ...]:
    """SHADES colours from one to another, as hexadecimal text."""
    mixed = [[round(a + (b - a) * i / (SHADES - 1)) for a, b in zip(first, last, strict=True)] for i in range(SHADES)]
    return tuple(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in mixed)


# Ends are chosen so that every shade can be read as text on its paper (contrast of 4.5 and more).
_RAMPS = {
    CELLS: _ramp((48, 120, 190), (8, 28, 66)),
    SIZES: _ramp((180, 80, 148), (60, 14, 48)),
    BUDGETS: _ramp((30, 128, 122), (4, 44, 42)),
}
_DARK_RAMPS = {
    CELLS: _ramp((92, 146, 206), (214, 233, 252)),
    SIZES: _ramp((198, 112, 172), (248, 216, 236)),
    BUDGETS: _ramp((58, 158, 150), (205, 240, 236)),
}


def _variables(base: str, ramps: Mapping[str, tuple[str, ...]]) -> str:
    return base + "".join(f";--{name}{i}:{colour}" for name, ramp in ramps.items() for i, colour in enumerate(ramp))


_LIGHT = _variables("--ink:#1b2330;--soft:#5b6675;--rule:#e3e7ec", _RAMPS)
_DARK = _variables("--ink:#e8ecf2;--soft:#a3aebd;--rule:#2c3542", _DARK_RAMPS)
_FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
STYLE = (
    f".fig{{{_LIGHT};font-family:{_FONTS};font-size:13px;fill:var(--ink)}}"
    f"@media (prefers-color-scheme:dark){{.fig{{{_DARK}}}}}@media print{{.fig{{{_LIGHT}}}}}"
    ".fig .soft{fill:var(--soft)}.fig .name{font-weight:600}.fig .grid{stroke:var(--rule);stroke-width:1}"
    ".fig .axis{stroke:var(--soft);stroke-width:1}.fig .lead{stroke:var(--soft);stroke-width:.75;fill:none}"
    ".fig .level{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:6 4;fill:none}"
)
_COLOURS = {f"{family}{i}": f"{family}{i}" for family in (CELLS, SIZES, BUDGETS) for i in range(SHADES)}
_COLOURS |= {INK: "ink", GREY: "soft"}
STYLE += "".join(
    f".fig .l{name}{{stroke:var(--{colour});fill:none}}.fig .p{name}{{fill:var(--{colour})}}"
    f".fig .o{name}{{stroke:var(--{colour});fill:none;stroke-width:1.5}}"
    for name, colour in _COLOURS.items()
)
STYLE += ".fig .band{fill:var(--soft);fill-opacity:.16}"
LIGHT = dict(part.split(":", 1) for part in _LIGHT.removeprefix("--").split(";--"))
"""Names of colours, without their dashes, to colours on white."""
PAPER = "svg.fig{background:#fff}@media (prefers-color-scheme:dark){svg.fig{background:#12171f}}"

LINE_HEIGHT = 15.0
LETTER = 7.0  # mean width of a letter at 13 px


def standalone(svg: str) -> str:
    """The same figure as a file of its own: with its style, and a page colour behind it."""
    if not svg:
        return ""
    head, body = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{STYLE}{PAPER}</style>{body}\n'


def shades(family: str, values: Sequence[float]) -> dict[float, str]:
    """A colour for each value, lightest for the lowest: the same on every chart that is given the same values."""
    known = sorted(set(values))
    last = max(len(known) - 1, 1)
    # Few values are spread over the ramp; more than there are shades share some.
    return {value: f"{family}{round(i * (SHADES - 1) / last)}" for i, value in enumerate(known)}


def open_svg(title: str, width: int, height: int) -> str:
    """The opening tag of a figure, with its title for those who do not see it."""
    label = escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fig" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
    )


def text(x: float, y: float, words: str, css: str, anchor: str) -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that span low..high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def plain(value: float, marks: Sequence[float]) -> str:
    """A tick as a number with the digits that its step needs."""
    step = marks[1] - marks[0]
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def power_of_ten(decade: int) -> str:
    """Ten to an integer power, raised."""
    raised = str(decade).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{raised}"


def short(value: float) -> str:
    """A large number with k, M, G or T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
