"""What the headline rests on, run by run: residuals of its form, and the same fit without a part of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scaling_ray.report.runs import Run, is_baseline, is_point


def headline_fit(fit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of ``fits`` that the headline speaks of: its form, its cells, least squares; None without estimates."""
    head = fit["headline"]
    for entry in fit["fits"]:
        same = (entry["form"], entry["cells"]) == (head["form"], head["cells"])
        if same and entry.get("estimator") == "least_squares" and entry["parameters"]:
            return dict(entry)
    return None


def law_of(parameters: Mapping[str, Any], params: float, cells: float | None) -> float:
    """Loss of L = a P^-alpha + c or L = E + a/P^alpha + b/D^beta at one size and number of cells."""
    value = {name: float(parameter["value"]) for name, parameter in parameters.items()}
    floor = value["E"] + value["b"] * float(cells or 1) ** -value["beta"] if "E" in value else value.get("c", 0.0)
    return floor + value["a"] * params ** -value["alpha"]


def residuals(runs: Sequence[Run], fit: Mapping[str, Any], genes: int) -> list[dict[str, Any]]:
    """Test loss less the headline form's value for each run that it was fitted to, whatever the verdict."""
    entry = headline_fit(fit)
    if entry is None:
        return []
    at = fit["headline"]["cells"]
    found = []
    for run in runs:
        fitted = is_point(run) and run["genes"] == genes and not is_baseline(run) and run["test_mse"] is not None
        if fitted and at in (None, run["cells"]):
            law = law_of(entry["parameters"], run["params"], run["cells"])
            cell = {"run_id": run["run_id"], "params": run["params"], "cells": run["cells"]}
            found.append(cell | {"predicted": law, "residual": run["test_mse"] - law})
    return found


def leave_one_out(fit: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Per exponent or floor of the headline's form: its estimate and interval without each size or number of cells."""
    head = fit["headline"]
    sizes = {float(run["params"]): run["size"] for run in runs}
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in fit["leave_one_out"]:
        if (entry["form"], entry["cells"]) != (head["form"], head["cells"]):
            continue
        ((axis, left_out),) = entry["left_out"].items()
        name = sizes.get(left_out, f"{left_out:,.0f} parameters") if axis == "params" else f"D = {left_out:,.0f}"
        for parameter in ("alpha", "beta", "E", "c"):
            if parameter in entry["parameters"]:
                row = {"without": name, "axis": axis, "left_out": left_out} | entry["parameters"][parameter]
                found.setdefault(parameter, []).append(row)
    return found
