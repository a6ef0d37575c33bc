"""The audit as files: ``audit.json`` and one self-contained page, ``audit.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from scaling_ray.laws.audit import audit
from scaling_ray.report.forest import Estimate, draw_forest
from scaling_ray.report.svg import STYLE
from scaling_ray.results.sweep_files import write_json
from scaling_ray.storage import open_place

WIDE, NARROW = 920, 328  # pixels: a desktop column, a phone


def build_audit(out: Path | str, published: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Write audit.json and audit.html into ``out`` (a directory or ``s3://``); the page's path and the audit's content.

    Raises:
        BadInput: the published tables are not to be found, or ``out`` cannot be written.
    """
    found = audit(published)
    place = open_place(out)
    write_json(place, "audit.json", found)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {"wide": _picture(found, WIDE), "narrow": _picture(found, NARROW)}
    style = Markup(STYLE)  # noqa: S704 - a constant
    page = environment.get_template("audit.html").render(a=found, picture=pictures, figure_style=style, span=_span)
    place.write("audit.html", page.encode())
    return f"{place}/audit.html", found


def _span(parameter: dict[str, Any]) -> str:
    low, high = parameter["low"], parameter["high"]
    return f"{'open' if low is None else f'{low:.3f}'} to {'open' if high is None else f'{high:.3f}'}"


def _picture(found: dict[str, Any], width: int) -> Markup:
    """Alpha and its interval for each choice, over the range that all of them together support."""
    rows = [
        Estimate(
            c["name"],
            c["alpha"]["value"],
            c["alpha"]["low"],
            c["alpha"]["high"],
            alone=c["estimator"] != "least_squares",
        )
        for c in [*found["choices"][1:], found["choices"][0]]
    ]
    span = found["supported"]["alpha"]
    drawn = draw_forest("alpha under each declared choice", "alpha", rows, width, band=(span["low"], span["high"]))
    return Markup(drawn)  # noqa: S704 - own SVG, escaped where drawn
