"""A sweep's directory in; ``report.html``, ``report.json``, ``fit.json`` and figures as SVG and PNG out.

The page is one file without outside requests. Its numbers are those of ``report.json``; both are rebuilt to the byte
from the same directory. Neither Ray, torch nor MLflow is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_ray.errors import BadInput
from scaling_ray.laws import fit_table
from scaling_ray.report.beside import compare
from scaling_ray.report.page import render
from scaling_ray.report.pictures import draw_pictures
from scaling_ray.report.raster import png_of
from scaling_ray.report.runs import (
    Run,
    clean,
    is_point,
    read_curve,
    read_manifest,
    read_mlflow_link,
    read_plan,
    read_runs,
    read_spec,
)
from scaling_ray.report.summary import summarise
from scaling_ray.report.svg import standalone
from scaling_ray.results.foreign import read_table
from scaling_ray.storage import output_directory, write_atomic, write_json


class _Read(NamedTuple):
    """What one sweep's directory holds, fitted and summarised."""

    report: dict[str, Any]
    fits: list[tuple[int, dict[str, Any]]]
    runs: list[Run]
    curves: dict[str, list[dict[str, Any]]]


def build_report(
    sweep_dir: Path | str,
    out: Path | str,
    *,
    beside: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the report of a sweep and return the path of its page.

    Args:
        sweep_dir: holds results.parquet and shards_manifest.json; spec.toml, plan.json and runs/ where there.
        out: created if needed; files in it of the same names are replaced, each at once.
        beside: another sweep's directory, of the other recipe: the two are laid side by side.
        progress: called with one line per step.

    Raises:
        BadInput: no such sweep, or a needed file, column or key is missing.
    """
    say = progress or (lambda line: None)
    found = _read(Path(sweep_dir), say)
    report = found.report
    report["beside"] = None if beside is None else compare(report, _read(Path(beside), say).report)
    say("drawing")
    pictures = draw_pictures(found.runs, found.fits, found.curves)
    out = output_directory(out)
    (out / "figures").mkdir(exist_ok=True)
    for picture in pictures:
        write_atomic(out / "figures" / f"{picture.name}.svg", standalone(picture.wide))
        write_atomic(out / "figures" / f"{picture.name}.png", png_of(picture.wide))
    fits, fit = found.fits, found.fits[0][1]
    fit_file = fit if len(fits) == 1 else fit | {"cohorts": {f"genes={genes}": other for genes, other in fits}}
    write_json(out / "fit.json", clean(fit_file))
    report = clean(report)
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", render(report, pictures, clean(fits)))
    return out / "report.html"


def _read(sweep_dir: Path, say: Callable[[str], None]) -> _Read:
    runs = read_runs(sweep_dir)
    manifest = read_manifest(sweep_dir)
    spec, plan = read_spec(sweep_dir), read_plan(sweep_dir)
    runs = [
        run | {"number": number, "mlflow_link": read_mlflow_link(sweep_dir, run["run_id"])}
        for number, run in enumerate(runs, start=1)
    ]
    curves = {run["run_id"]: read_curve(sweep_dir, run["run_id"]) for run in runs}
    say(f"fitting laws to {sum(1 for run in runs if is_point(run))} finished runs")
    fits = _fit_cohorts(sweep_dir, runs, say)
    report = summarise(sweep_dir.resolve(), spec, runs, manifest, fits[0][1], fits[0][0], curves, plan)
    return _Read(report, fits, runs, curves)


def _fit_cohorts(sweep_dir: Path, runs: Sequence[Run], say: Callable[[str], None]) -> list[tuple[int, dict[str, Any]]]:
    """One fit per number of genes, that with the most runs first: a loss over other genes is another loss."""
    counts: dict[int, int] = {}
    for run in runs:
        counts[run["genes"]] = counts.get(run["genes"], 0) + is_point(run)
    order = sorted(counts, key=lambda genes: (-counts[genes], genes))
    columns = read_table(sweep_dir)
    fits = []
    for genes in order:
        chosen = [i for i, value in enumerate(columns["genes"]) if value == genes]
        part = {n: v if n == "columns_used" else [v[i] for i in chosen] for n, v in columns.items()}
        try:
            fits.append((genes, fit_table(part, progress=say)))
        except BadInput as error:
            fits.append((genes, _nothing_to_fit(str(error))))
    return fits


def _nothing_to_fit(reason: str) -> dict[str, Any]:
    head: dict[str, Any] = {"verdict": "refused", "reasons": [f"there is nothing to fit ({reason})"]}
    head |= {"settles": ["runs that finish"], "form": "power_floor", "formula": "L = a P^-alpha + c", "cells": None}
    empty: dict[str, Any] = {
        name: [] for name in ("choices", "fits", "leave_one_out", "held_out_largest", "excluded", "notes")
    }
    blank = {"budgets": [], "reason": "there is nothing to fit"}
    empty |= {"next_steps": [], "compute_optimal": blank, "iso_flop": blank | {"growth": None}}
    empty |= {"planted_floor": None, "units": {"names": {}, "conditional_on": None, "by_cell": []}}
    return {"format": 2, "headline": head, **empty, "baselines": {"by_cells": [], "sizes": []}, "points": {"runs": 0}}
