"""The headline's law under every choice that an analyst could have made and defended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ray.laws import gates
from scaling_ray.laws.forms import PARAMS_CELLS, POWER_FLOOR
from scaling_ray.laws.judge import Fitted, judge, parameter
from scaling_ray.laws.points import Rows, at_cells, points_of, where


def choices_of(columns: Mapping[str, Any], rows: Rows, baselines: Sequence[str]) -> list[dict[str, Any]]:
    """The headline's law under every choice an analyst could have made and defended; then each D separately."""
    counts = np.unique(rows["cells"])[::-1] if "cells" in rows else np.array([])
    if counts.size >= gates.MIN_CELL_COUNTS:
        form, largest, suffix = PARAMS_CELLS, None, ", all numbers of cells"
    else:
        largest = float(counts[0]) if counts.size else None
        form, suffix = POWER_FLOOR, "" if largest is None else f", {largest:,.0f} cells"
    base = at_cells(rows, largest)
    smallest, biggest = float(np.min(base["params"])), float(np.max(base["params"]))
    # Name -> the runs; a baseline taken as a point is shown, but is not a choice that anybody should defend.
    with_baselines = "baseline sizes taken as points" + suffix
    table = {"sizes without baselines" + suffix: base}
    if baselines:
        everyone = at_cells(points_of(columns, ())[0], largest)
        if len(everyone["loss"]) > len(base["loss"]):
            table[with_baselines] = everyone
    table["without the smallest size" + suffix] = where(base, base["params"] > smallest)
    table["without the largest size" + suffix] = where(base, base["params"] < biggest)
    if "params_without_embedding" in base:
        counted = base["params_without_embedding"]
        if np.all(np.isfinite(counted)) and np.all(counted > 0):
            table["parameters counted without the gene embedding" + suffix] = base | {"params": counted}
    for name, title in (("validation_loss", "best validation loss"), ("final_loss", "final validation loss")):
        if name in base and "final_loss" in base and np.all(base[name] > 0):
            swapped = base | {"loss": base[name]}
            if not np.array_equal(base[name], base["loss"]):
                table[title + suffix] = swapped
                table[f"{title}, without the smallest size" + suffix] = where(swapped, base["params"] > smallest)
    done = []
    for name, chosen in table.items():
        if len(chosen["loss"]):
            fit = judge(form, chosen, [], thorough=False)
            done.append(_choice(name, fit, defensible=name != with_baselines))
    for cells in counts if form is PARAMS_CELLS else counts[1:]:
        fit = judge(POWER_FLOOR, at_cells(rows, float(cells)), [], thorough=False)
        done.append(_choice(f"sizes without baselines, {cells:,.0f} cells alone", fit, defensible=False))
    return done


def _choice(name: str, fit: Fitted, *, defensible: bool = True) -> dict[str, Any]:
    floor = str(fit.form.floor)
    none = {"value": None, "low": None, "high": None, "closed": False, "at_bound": False}
    none |= {"delta_low": None, "delta_high": None}
    return {
        "name": name,
        "defensible": defensible,
        "form": fit.form.name,
        "n_sizes": int(fit.points.distinct("params").size),
        "n_runs": fit.points.n_runs,
        "alpha": parameter(fit, "alpha") if fit.parameters else none,
        "c": parameter(fit, floor) if fit.parameters else none,
    }
