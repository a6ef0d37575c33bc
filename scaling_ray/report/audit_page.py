"""The audit as files: ``audit.json`` and one self-contained page, ``audit.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from scaling_ray.laws.audit import audit
from scaling_ray.storage import output_directory, write_atomic, write_json

_LEFT, _RIGHT, _ROW = 330, 640, 26  # pixels
_LOW, _HIGH = 0.0, 0.8


def build_audit(out: Path | str, published: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write audit.json and audit.html into ``out``; the page's path and the audit's content come back.

    Raises:
        BadInput: the published tables are not to be found, or ``out`` cannot be written.
    """
    found = audit(published)
    out = output_directory(out)
    write_json(out / "audit.json", found)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("audit.html").render(a=found, picture=Markup(_picture(found)), span=_span)  # noqa: S704
    write_atomic(out / "audit.html", page)
    return out / "audit.html", found


def _span(parameter: dict[str, Any]) -> str:
    low, high = parameter["low"], parameter["high"]
    return f"{'open' if low is None else f'{low:.3f}'} to {'open' if high is None else f'{high:.3f}'}"


def _picture(found: dict[str, Any]) -> str:
    """Alpha and its interval for each choice, as SVG that takes its colours from the page."""
    choices = [*found["choices"][1:], found["choices"][0]]
    height = _ROW * len(choices) + 34

    def x(value: float) -> float:
        return _LEFT + (min(max(value, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW) * (_RIGHT - _LEFT)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_RIGHT + 20} {height}" role="img">']
    parts.append("<title>alpha under each declared choice</title>")
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8):
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 24}" stroke="var(--rule)"/>'
            f'<text class="soft" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:.1f}</text>'
        )
    for i, choice in enumerate(choices):
        y, alpha = 18 + _ROW * i, choice["alpha"]
        name = choice["name"] if len(choice["name"]) < 54 else choice["name"][:52] + "…"
        own = choice["estimator"] == "least_squares"
        colour = "var(--mark)" if own else "var(--bad)"
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if own:
            low, high = alpha["low"], alpha["high"]
            ends = (x(_LOW if low is None else low), x(_HIGH if high is None else high))
            parts.append(f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{colour}" stroke-width="2" fill="none"/>')
            if high is None:
                parts.append(f'<path d="M{ends[1] - 5:.1f} {y - 4}l6 4l-6 4" stroke="{colour}" fill="none"/>')
        parts.append(f'<circle cx="{x(alpha["value"]):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    return "".join([*parts, "</svg>"])
