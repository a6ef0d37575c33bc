"""A sweep's directory in; ``report.html``, ``report.json``, ``fit.json`` and ``figures/*.svg`` out.

The page is one file without outside requests. Its numbers are those of ``report.json``; both are rebuilt to the byte
from the same directory. Neither Ray, torch nor MLflow is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.laws import fit_table
from scaling_ray.report import figures
from scaling_ray.report.page import render
from scaling_ray.report.pictures import draw_pictures
from scaling_ray.report.runs import Run, clean, is_point, read_curve, read_manifest, read_runs, read_spec
from scaling_ray.report.summary import summarise
from scaling_ray.storage import output_directory, write_atomic, write_json
from scaling_ray.tables import read_table


def build_report(sweep_dir: Path | str, out: Path | str, *, progress: Callable[[str], None] | None = None) -> Path:
    """Write the report of a sweep and return the path of its page.

    Args:
        sweep_dir: holds results.parquet and shards_manifest.json; spec.toml, plan.json and runs/ where there.
        out: created if needed; files in it of the same names are replaced, each at once.
        progress: called with one line per step.

    Raises:
        BadInput: no such sweep, or a needed file, column or key is missing.
    """
    say = progress or (lambda line: None)
    sweep_dir = Path(sweep_dir)
    runs = read_runs(sweep_dir)
    manifest = read_manifest(sweep_dir)
    spec = read_spec(sweep_dir)
    curves = {run["run_id"]: read_curve(sweep_dir, run["run_id"]) for run in runs}
    say(f"fitting laws to {sum(1 for run in runs if is_point(run))} finished runs")
    fits = _fit_cohorts(sweep_dir, runs, say)
    fit = fits[0][1]
    primary = fits[0][0]
    report = summarise(sweep_dir.resolve().name, spec, runs, manifest, fit, primary, curves)
    say("drawing")
    pictures = draw_pictures(runs, fits, curves)
    out = output_directory(out)
    (out / "figures").mkdir(exist_ok=True)
    for picture in pictures:
        write_atomic(out / "figures" / f"{picture.name}.svg", figures.standalone(picture.wide))
    fit_file = fit if len(fits) == 1 else fit | {"cohorts": {f"genes={genes}": other for genes, other in fits}}
    write_json(out / "fit.json", clean(fit_file))
    report = clean(report)
    write_json(out / "report.json", report)
    page = render(report, pictures, clean(fits))
    write_atomic(out / "report.html", page)
    return out / "report.html"


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
