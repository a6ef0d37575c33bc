"""Two sweeps of the same question side by side: the recipe as published, and as corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What is laid side by side: of the best run, of each setting at the largest number of cells.
_BEST = "run_id size cells test_loss baseline_loss gaussian_loss attainable_loss ratio_to_gaussian gain_bits".split()
_SETTING = "size params genes done test_loss baseline_loss gain_bits".split()


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both sides, the one that ran as published first, sizes matched by name, and what may not be compared."""
    sides = sorted((_side(first), _side(second)), key=lambda one: "published" not in one["recipe"])
    recipes = [", ".join(one["recipe"]) for one in sides]
    notes = []
    if recipes[0] != recipes[1]:
        notes.append(
            "The two normalise differently, so their losses are in different units: compare gains in bits and the "
            "ratio to the shrunk Gaussian, never one loss with the other."
        )
    if sides[0]["data_hash"] != sides[1]["data_hash"]:
        notes.append("They were trained on different shards, so held-out cells and genes differ too.")
    return {"sides": sides, "sizes": _matched(sides), "notes": notes}


def _side(report: dict[str, Any]) -> dict[str, Any]:
    """One column of the comparison, out of a report's content."""
    best = report["best"]
    largest = max((setting["cells"] or 0 for setting in report["settings"]), default=0)
    at_largest = [s for s in report["settings"] if (s["cells"] or 0) == largest and s["done"]]
    supported = report["verdict"] != "refused"
    return {
        "name": report["name"],
        "recipe": report["protocol"]["recipe"],
        "unit": report["unit"],
        "verdict": report["verdict"],
        "sentence": report["sentence"],
        "parameters": report["headline"]["parameters"] if supported else None,
        "best": None if best is None else {key: best[key] for key in _BEST},
        "split_by": report["data"]["split_by"],
        "data_hash": report["data"]["data_hash"],
        "runs_done": report["counts"]["runs"]["done"],
        "leak_test": report["leak_test"],
        "largest_cells": largest or None,
        "sizes": [{key: setting[key] for key in _SETTING} for setting in at_largest],
    }


def _matched(sides: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = sorted({(setting["params"], setting["size"]) for one in sides for setting in one["sizes"]})
    table = []
    for params, size in keys:
        pair = [next((s for s in one["sizes"] if (s["params"], s["size"]) == (params, size)), None) for one in sides]
        table.append({"size": size, "params": params, "sides": pair})
    return table
