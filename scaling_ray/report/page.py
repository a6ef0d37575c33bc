"""The page ``report.html``: the template filled, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from scaling_ray.report import svg
from scaling_ray.report.pictures import Picture
from scaling_ray.report.words import WORDS, anchor, term

NOT_SHOWN = (
    # A size's shape, and what the grid asked for: the specification has them.
    *("width", "layers", "heads", "feedforward", "cells_requested", "donors", "umi_fraction"),
    # Further counts and bits of a run, and how it was carried out.
    *(
        "masked_genes_seen",
        "best_cells_seen",
        "baseline_per_gene_bits",
        "precision",
        "engine",
        "worker_counts",
        "lr_check_ratio",
    ),
)
"""Columns of results.parquet that the page leaves to ``report.json``, which has all of every run."""


def render(report: dict[str, Any], pictures: Sequence[Picture], fits: Mapping[int, dict[str, Any]]) -> str:
    """The page: ``report.json``'s content, the pictures, and genes -> fit per cohort, in the template."""
    drawn = [
        picture._asdict() | {"wide": Markup(picture.wide), "narrow": Markup(picture.narrow)}  # noqa: S704 - own SVG, escaped where drawn
        for picture in pictures
    ]
    template = _environment().get_template("template.html")
    return template.render(
        r=report,
        pictures=drawn,
        fits=fits,
        numbers={run["run_id"]: run["number"] for run in report["runs"]},
        residual={entry["run_id"]: entry["residual"] for entry in report["residuals"]},
        figure_style=Markup(svg.STYLE),  # noqa: S704
        words=WORDS,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"term": term, "anchor": anchor}
    environment.filters |= {
        "number": _number,
        "span": _span,
        "percent": _percent,
        "count": _count,
        "rate": _rate,
        "power": _power,
    }
    return environment


def _number(value: Any, digits: int = 4) -> str:
    """A loss or a parameter for reading: ``digits`` significant digits, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == 0:
        return "0"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 1
    return f"{value:,.{min(decimals, 6)}f}"


def _span(parameter: dict[str, Any], low: str = "low", high: str = "high") -> str:
    """An interval for reading; an open end is said."""
    ends = [parameter.get(low), parameter.get(high)]
    if ends == [None, None]:
        return "open"
    if ends[0] is None:
        return f"below {_number(ends[1], 3)} (open)"
    if ends[1] is None:
        return f"above {_number(ends[0], 3)} (open)"
    return f"{_number(ends[0], 3)} to {_number(ends[1], 3)}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
