"""Two sweeps of the same question side by side: the recipe as published, and as corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What is laid side by side: of the report, of its best run, of its counts.
_BEST = ("run_id", "size", "cells", "test_mse", "baseline_mse", "gaussian_mse", "attainable_mse", "ratio_to_gaussian")


def side(report: dict[str, Any]) -> dict[str, Any]:
    """One column of the comparison, out of a report's content."""
    best = report["best"]
    largest = max((cell["cells"] or 0 for cell in report["cells"]), default=0)
    at_largest = [cell for cell in report["cells"] if (cell["cells"] or 0) == largest and cell["done"]]
    return {
        "name": report["name"],
        "recipe": report["protocol"]["recipe"],
        "verdict": report["verdict"],
        "sentence": report["sentence"],
        "parameters": report["headline"].get("parameters"),
        "best": None if best is None else {key: best[key] for key in _BEST} | {"gain_bits": best["gain_bits"]},
        "split_by": report["data"]["split_by"],
        "data_hash": report["data"]["data_hash"],
        "runs_done": report["counts"]["runs"].get("done", 0),
        "leak_test": report["leak_test"],
        "largest_cells": largest or None,
        "sizes": [
            {key: cell[key] for key in ("size", "params", "genes", "done", "test_mse", "baseline_mse", "gain_bits")}
            for cell in at_largest
        ],
    }


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both sides, the one that ran as published first, sizes matched by name, and what may not be compared."""
    sides = sorted((side(first), side(second)), key=lambda one: "published" not in one["recipe"])
    recipes = [", ".join(one["recipe"]) for one in sides]
    notes = []
    if recipes[0] != recipes[1]:
        notes.append(
            "The two normalise differently, so their losses are in different units: compare gains in bits and the "
            "ratio to the shrunk Gaussian, never one MSE with the other."
        )
    if sides[0]["data_hash"] != sides[1]["data_hash"]:
        notes.append("They were trained on different shards, so held-out cells and genes differ too.")
    return {"sides": sides, "sizes": _matched(sides), "notes": notes}


def _matched(sides: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = sorted({(cell["params"], cell["size"]) for one in sides for cell in one["sizes"]})
    table = []
    for params, size in keys:
        pair = [next((c for c in one["sizes"] if (c["params"], c["size"]) == (params, size)), None) for one in sides]
        table.append({"size": size, "params": params, "sides": pair})
    return table
