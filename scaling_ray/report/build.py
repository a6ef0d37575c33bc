"""A sweep's files in; ``report.html``, ``report.json``, ``fit.json`` and figures as SVG and PNG out.

The page is one file without outside requests. Its numbers are those of ``report.json``; both are rebuilt to the byte
from the same files. Neither Ray, torch nor MLflow is needed; sweep and report may each lie on a disk or on S3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scaling_ray.report.beside import compare
from scaling_ray.report.page import render
from scaling_ray.report.pictures import draw_pictures
from scaling_ray.report.raster import png_of
from scaling_ray.report.summary import summarise
from scaling_ray.report.svg import standalone
from scaling_ray.report.sweep import Sweep, read_sweep
from scaling_ray.results.cohorts import fit_cohorts, fit_document
from scaling_ray.results.sweep_files import write_json
from scaling_ray.storage import Place, open_place

Where = Path | str | Place


class _Told(NamedTuple):
    """One sweep: its files, its fits by number of genes, the same as fit.json, and what its report says."""

    sweep: Sweep
    fits: dict[int, dict[str, Any]]
    document: dict[str, Any]
    report: dict[str, Any]


def build_report(
    sweep: Where, out: Where, *, beside: Where | None = None, progress: Callable[[str], None] | None = None
) -> str:
    """Write the report of a sweep and return the path or URI of its page, which is written last.

    Args:
        sweep: a directory or ``s3://`` prefix with results.parquet and shards_manifest.json; spec.toml, plan.json and
            runs/ are read where they are there.
        out: where the report goes; files of the same names are replaced, each at once.
        beside: another sweep, of the other recipe: the two are laid side by side.
        progress: called with one line per step.

    Raises:
        BadInput: no such sweep, or a needed file, column or key is missing.
    """
    say = progress or (lambda line: None)
    told = _tell(sweep, say)
    other = None if beside is None else _tell(beside, say).report
    report = told.report | {"beside": None if other is None else compare(told.report, other)}
    say("drawing")
    pictures = draw_pictures(told.sweep, told.fits, report["unit"])
    place = open_place(out)
    for picture in pictures:
        place.write(f"figures/{picture.name}.svg", standalone(picture.wide).encode())
        place.write(f"figures/{picture.name}.png", png_of(picture.wide))
    write_json(place, "fit.json", told.document)
    write_json(place, "report.json", report)
    place.write("report.html", render(report, pictures, told.fits).encode())
    return f"{place}/report.html"


def _tell(source: Where, say: Callable[[str], None]) -> _Told:
    sweep = read_sweep(source)
    say(f"fitting laws to {sum(row.is_finished for row in sweep.rows)} finished runs")
    fits = fit_cohorts(sweep.rows, say)
    return _Told(sweep, fits, fit_document(fits), summarise(sweep, fits))
