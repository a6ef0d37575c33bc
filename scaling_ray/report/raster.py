"""A figure as PNG, for slides and for readers that show no SVG: light, twice its size, always with the same font.

The font is the DejaVu Sans that comes with matplotlib, a dependency of MLflow (found without importing it), so that
a rebuild is the same to the byte whatever fonts the machine has; without it the machine's fonts are used.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import resvg_py

from scaling_ray.report.svg import LIGHT, STYLE

ZOOM = 2.0


def png_of(svg: str) -> bytes:
    """The PNG file of a figure; ``svg`` as :mod:`figures` draws it, without a style of its own."""
    head, body = svg.split(">", 1)
    fonts = _fonts()
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=f"{head}><style>{_plain_style()}</style>{body}",
            background="#ffffff",
            zoom=ZOOM,
            font_files=fonts,
            skip_system_fonts=bool(fonts),
            font_family="DejaVu Sans",
            sans_serif_family="DejaVu Sans",
        )
    )


def _plain_style() -> str:
    """The style without what a rasteriser does not know: variables and media queries."""
    style = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\}", "", STYLE)
    style = re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found.group(1)], style)
    style = re.sub(r"--\w+:[^;}]*;?", "", style)
    return re.sub(r"font-family:[^;]*;font-size:13px", 'font-family:"DejaVu Sans";font-size:11.5px', style)


def _fonts() -> list[str]:
    found = find_spec("matplotlib")
    places = list(found.submodule_search_locations or []) if found else []
    folders = [Path(place) / "mpl-data" / "fonts" / "ttf" for place in places]
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    return [str(folder / name) for folder in folders for name in names if (folder / name).is_file()]
