"""The headline's law under every choice that an analyst could have made and defended."""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_ray.laws import gates
from scaling_ray.laws.entries import NO_INTERVAL, parameter
from scaling_ray.laws.forms import POWER_FLOOR, Form
from scaling_ray.laws.law import Fitted, fit_law
from scaling_ray.laws.points import Selected, at_cells, where

MOST_ALONE = 12


def declared_choices(runs: Selected, form: Form, cells: float | None) -> list[dict[str, Any]]:
    """Entries of ``choices``: the headline's law under each choice, then each number of cells separately.

    Args:
        runs: the table.
        form: the headline's law.
        cells: the number of cells that it is fitted at; all where None.
    """
    rows = runs.points
    if form.axes == ("cells",):
        return []
    counts = np.unique(rows["cells"])[::-1] if "cells" in rows else np.array([])
    largest = cells
    suffix = ", all numbers of cells" if largest is None and counts.size > 1 else ""
    suffix += "" if largest is None else f", {largest:,.0f} cells"
    base, everyone = at_cells(rows, largest), at_cells(runs.everyone, largest)
    smallest, biggest = float(np.min(base["params"])), float(np.max(base["params"]))
    # Name -> the runs; an anchor taken as a point is shown, but is not a choice that anybody should defend.
    with_anchors = "anchor sizes taken as points" + suffix
    table = {"anchor sizes left out" + suffix: base}
    if len(everyone["loss"]) > len(base["loss"]):
        table[with_anchors] = everyone
    table["without the smallest size" + suffix] = where(base, base["params"] > smallest)
    table["without the largest size" + suffix] = where(base, base["params"] < biggest)
    if "params_without_embedding" in base:
        counted = base["params_without_embedding"]
        if np.all(np.isfinite(counted)) and np.all(counted > 0):
            table["parameters counted without the gene embedding" + suffix] = {**base, "params": counted}
    for name, title in (("val_loss", "best validation loss"), ("final_val_loss", "final validation loss")):
        if name in base and "final_val_loss" in base and np.all(base[name] > 0):
            swapped = {**base, "loss": base[name]}
            if not np.array_equal(base[name], base["loss"]):
                table[title + suffix] = swapped
                table[f"{title}, without the smallest size" + suffix] = where(swapped, base["params"] > smallest)
    done = []
    for name, chosen in table.items():
        if len(chosen["loss"]):
            done.append(_choice(name, fit_law(form, chosen, thorough=False), defensible=name != with_anchors))
    for count in [float(count) for count in counts if count != largest][:MOST_ALONE]:
        at_count = at_cells(rows, count)
        if np.unique(at_count["params"]).size < gates.MIN_SIZES - 1:
            continue
        alone = fit_law(POWER_FLOOR, at_count, thorough=False)
        done.append(_choice(f"anchor sizes left out, {count:,.0f} cells alone", alone, defensible=False))
    return done


def _choice(name: str, law: Fitted, *, defensible: bool) -> dict[str, Any]:
    unknown = {"value": None} | NO_INTERVAL
    return {
        "name": name,
        "defensible": defensible,
        "form": law.form.name,
        "n_sizes": int(law.points.distinct("params").size),
        "n_runs": law.points.n_runs,
        "alpha": parameter(law, "alpha") if law.parameters else unknown,
        "c": parameter(law, str(law.form.floor)) if law.parameters else unknown,
    }
