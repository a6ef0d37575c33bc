"""From a table of runs to ``fit.json``: the verdict first, then what it rests on.

``fit_table`` is the one public way in. What it fits is decided by the shape of the table and not by the outcome:
with at least three numbers of cells the headline is L(P, D), otherwise L(P) with a floor at the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaling_ray.laws import gates, optimum, units
from scaling_ray.laws.choices import choices_of
from scaling_ray.laws.elbow import FORMULA as ELBOW_FORMULA
from scaling_ray.laws.elbow import find_elbow
from scaling_ray.laws.estimators import HUBER, LEAST_SQUARES, MODERATED, huber_log, moderated
from scaling_ray.laws.forms import (
    CELLS_LOG,
    CONSTANT,
    PARAMS_CELLS,
    POWER,
    POWER_FLOOR,
    POWER_FLOOR_FLOPS,
    POWER_FLOPS,
)
from scaling_ray.laws.judge import Fitted, headline_parameter, judge, parameter
from scaling_ray.laws.points import Rows, at_cells, points_of, size_table, where
from scaling_ray.laws.refits import Refit, hold_out_largest

FORMAT = 2
MANY_CELL_COUNTS = 12
CONDITIONAL_ON = (
    "Intervals are 95% F-profiles over the noise between seeds, conditional on this split: the held-out donors, "
    "genes and masks stay as they are. The headline interval is the widest of the profile and of the fits that leave "
    "one size (or one number of cells) out."
)
AICC_NOTE = (
    "AICc compares shapes of the same cells, counts sizes and not rows, and never rescues an exponent that a gate "
    "refuses."
)


def fit_table(
    columns: Mapping[str, Any], *, baselines: Sequence[str] = ("XXS",), progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Fit laws to a table of runs and judge them; the result is the content of ``fit.json``.

    Args:
        columns: name -> values (R,), one entry per run. Needed: ``params`` and ``loss``. Read where there: ``cells``
            (unique training cells), ``seed``, ``size``, ``width``, ``genes``, ``params_without_embedding``,
            ``baseline`` (loss of the gene means on the same cells and masks), ``gaussian``, ``attainable``, ``bound``,
            ``bound_z``, ``validation_loss`` and ``final_loss``, ``undertrained``, ``lr_at_edge``, ``status``,
            ``role``, and whatever must not differ within one law (recipe, objective, schedule, budget, ...).
        baselines: names of sizes that are baselines and never points; a size of width 1 always is one.
        progress: called with one line before each fit.

    Raises:
        BadInput: a needed column is missing, columns differ in length, or a number is none.
    """
    say = progress or (lambda line: None)
    rows, excluded, diverged = points_of(columns, baselines)
    n_points = len(rows["loss"])
    d_values = np.unique(rows["cells"]) if "cells" in rows else np.array([])
    notes = _notes(rows)
    protocol = gates.protocol_gates(rows) + gates.diverged_gate(diverged)

    fitted: list[tuple[float | None, Fitted]] = []
    for cells in _counts_to_fit(rows, d_values):
        here = at_cells(rows, cells)
        for form in (CONSTANT, POWER, POWER_FLOOR):
            say(f"fitting {form.formula}" + ("" if cells is None else f" at {cells:,.0f} cells"))
            fitted.append((cells, judge(form, here, gates.protocol_gates(here) + gates.diverged_gate(diverged))))
    if d_values.size >= 2:
        say(f"fitting {PARAMS_CELLS.formula}")
        fitted.append((None, judge(PARAMS_CELLS, rows, protocol)))
    say("fitting the declared choices")
    choices = choices_of(columns, rows, baselines)
    chosen = len(fitted) - 1
    if d_values.size == 2:
        chosen -= 1  # two numbers of cells do not carry a term of their own
    cells, head = fitted[chosen]
    disagreement = gates.choices_gate(
        [c["alpha"] for c in choices if c["defensible"] and c["n_sizes"] >= gates.MIN_SIZES]
    )
    head = replace(head, shut=[*head.shut, *disagreement])
    fitted[chosen] = (cells, head)
    here = at_cells(rows, cells)
    say("fitting the other shapes and estimators")
    shapes = _in_compute(rows, d_values, protocol) + _against_cells(rows, d_values, protocol)
    entries = _with_aicc(fitted) + [_entry(at, fit) for at, fit in shapes]
    entries += [elbow for at, fit in fitted if (elbow := _elbow(at, fit)) is not None]
    entries += _other_estimators(cells, head, here)
    steps = optimum.next_steps(head)
    return {
        "format": FORMAT,
        "headline": _headline(cells, head),
        "choices": choices,
        "fits": entries,
        "baselines": _baselines(rows, columns, baselines),
        "leave_one_out": [_refit(at, fit, refit) for at, fit in fitted for refit in fit.refits],
        "held_out_largest": _held_out(head, here),
        "next_steps": steps,
        "compute_optimal": optimum.compute_optimal(head, here),
        "iso_flop": optimum.iso_flop(rows),
        "planted_floor": _planted_floor(head, here),
        "units": units.size_units(rows),
        "points": {"runs": n_points, "sizes": size_table(rows), "cells": [float(d) for d in d_values]},
        "excluded": excluded,
        "notes": [CONDITIONAL_ON, AICC_NOTE, *notes],
        "columns_used": dict(columns.get("columns_used", {name: name for name in columns})),
    }


def _headline(cells: float | None, fit: Fitted) -> dict[str, Any]:
    head: dict[str, Any] = {
        "verdict": fit.verdict,
        "reasons": [shut.reason for shut in fit.shut],
        "settles": _unique(shut.settles for shut in fit.shut),
        "form": fit.form.name,
        "formula": fit.form.formula,
        "cells": cells,
    }
    if fit.verdict == "supported":
        head["parameters"] = {name: headline_parameter(fit, name) for name in fit.form.parameters}
    return head


def _counts_to_fit(rows: Rows, d_values: np.ndarray) -> Sequence[float | None]:
    """Numbers of cells that get laws of size of their own; of very many, those with sizes enough for an exponent."""
    if not d_values.size:
        return [None]
    if d_values.size <= MANY_CELL_COUNTS:
        return [float(d) for d in d_values]
    sizes = {d: np.unique(rows["params"][rows["cells"] == d]).size for d in d_values}
    return [float(d) for d in d_values if sizes[d] >= gates.MIN_SIZES][-MANY_CELL_COUNTS:]


def _in_compute(rows: Rows, d_values: np.ndarray, protocol: Sequence[gates.Shut]) -> list[tuple[float | None, Fitted]]:
    """The laws of size again, with exact FLOPs as the axis: the sizes at the largest number of cells."""
    largest = float(d_values[-1]) if d_values.size else None
    here = at_cells(rows, largest)
    if "flops" not in here or not np.all(np.isfinite(here["flops"]) & (here["flops"] > 0)):
        return []
    # Early stopping gives each seed FLOPs of its own; runs of a size share their mean, so that seeds show the noise.
    flops = np.array([np.mean(here["flops"][here["params"] == p]) for p in here["params"]])
    return [(largest, judge(form, here | {"flops": flops}, protocol)) for form in (POWER_FLOPS, POWER_FLOOR_FLOPS)]


def _against_cells(
    rows: Rows, d_values: np.ndarray, protocol: Sequence[gates.Shut]
) -> list[tuple[float | None, Fitted]]:
    """Loss against the logarithm of the cells, for the largest size."""
    if d_values.size < gates.MIN_CELL_COUNTS:
        return []
    here = where(rows, rows["params"] == np.max(rows["params"]))
    return [(None, judge(CELLS_LOG, here, protocol))]


def _with_aicc(fitted: Sequence[tuple[float | None, Fitted]]) -> list[dict[str, Any]]:
    """Entries with AICc and its distance to the best shape of the same cells."""
    entries = []
    for at, fit in fitted:
        rivals = [f.aicc for other, f in fitted if other == at and f.points.n_runs == fit.points.n_runs]
        lowest = min((value for value in rivals if value is not None), default=None)
        own = fit.aicc
        distance = None if own is None or lowest is None else own - lowest
        entries.append(_entry(at, fit) | {"aicc": own, "delta_aicc": distance})
    return entries


def _elbow(cells: float | None, fit: Fitted) -> dict[str, Any] | None:
    """The law that stops at a break, beside the smooth one; shown, and never an answer."""
    if fit.form.name != POWER_FLOOR.name or fit.best is None:
        return None
    found = find_elbow(fit.points, fit.best, fit.problem.freedom)
    if found is None:
        return None
    values = {"alpha": found.alpha, "P0": found.break_params, "c": found.floor, "a": found.coefficient}
    blank = {"low": None, "high": None, "closed": False, "at_bound": False, "delta_low": None, "delta_high": None}
    reason = "shown for comparison: a law that breaks has as many parameters as most ladders have sizes"
    return _entry(cells, fit) | {
        "form": "elbow",
        "formula": ELBOW_FORMULA,
        "parameters": {name: {"value": value} | blank for name, value in values.items()},
        "verdict": "refused",
        "reasons": [reason],
        "settles": [],
        "rss": found.misfit_rss + fit.points.replicate_rss,
        "r2": None,
        "better_than_smooth_p": found.p,
        "aicc": None,
        "delta_aicc": None,
    }


def _other_estimators(cells: float | None, head: Fitted, rows: Rows) -> list[dict[str, Any]]:
    """The headline's law by moderated weights (with gates and intervals) and by Huber on the log loss (values)."""
    if head.best is None:
        return []
    weighted = judge(
        head.form, rows, head.shut, thorough=False, points=moderated(head.points), only=head.form.parameters
    )
    entries = [_entry(cells, weighted) | {"estimator": MODERATED}]
    axes = {axis: rows[axis] for axis in head.form.axes}
    values = huber_log(head.problem, axes, rows["loss"], head.best)
    blank = {"low": None, "high": None, "closed": False, "at_bound": False, "delta_low": None, "delta_high": None}
    reason = "shown for comparison: this estimator has no interval here"
    huber = {
        "estimator": HUBER,
        "parameters": {name: {"value": value} | blank for name, value in values.items()},
        "verdict": "refused",
        "reasons": [reason],
        "settles": [],
        "rss": None,
        "r2": None,
    }
    return [*entries, _entry(cells, head) | huber]


def _planted_floor(head: Fitted, rows: Rows) -> dict[str, Any] | None:
    """Whether the planted attainable floor contradicts the law's: a floor of the law may not lie below it."""
    if "attainable" not in rows or head.form.floor is None:
        return None
    attainable = float(np.nanmean(rows["attainable"]))
    if head.verdict != "supported":
        return {"attainable": attainable, "verdict": "refused", "covered": None, "above": None}
    interval = head.widest(head.form.floor)
    above = interval.high is not None and attainable > interval.high
    found = {"attainable": attainable, "verdict": "supported", "covered": not interval.excludes(attainable)}
    return found | {"above": above, "low": interval.low, "high": interval.high}


def _entry(cells: float | None, fit: Fitted) -> dict[str, Any]:
    points = fit.points
    rss = fit.best.rss if fit.best else None
    total = float(np.sum(points.runs * (points.loss - np.average(points.loss, weights=points.runs)) ** 2))
    total += points.replicate_rss
    return {
        "form": fit.form.name,
        "formula": fit.form.formula,
        "estimator": LEAST_SQUARES,
        "cells": cells,
        "n_sizes": int(points.distinct("params").size) if "params" in points.axes else None,
        "n_cells": int(points.distinct("cells").size) if "cells" in points.axes else None,
        "n_runs": points.n_runs,
        "parameters": {name: parameter(fit, name) for name in fit.parameters},
        "verdict": fit.verdict,
        "reasons": [shut.reason for shut in fit.shut],
        "settles": _unique(shut.settles for shut in fit.shut),
        "rss": rss,
        "r2": 1.0 - rss / total if rss is not None and total > 0 else None,
        "noise_sd": float(np.sqrt(points.replicate_rss / points.replicate_freedom))
        if points.replicate_freedom
        else None,
        "effect_p": dict(fit.tests.effect_p),
        "lack_of_fit_p": fit.tests.lack_of_fit_p,
    }


def _refit(cells: float | None, fit: Fitted, refit: Refit) -> dict[str, Any]:
    return {
        "form": fit.form.name,
        "cells": cells,
        "left_out": {refit.axis: refit.left_out},
        "parameters": {
            name: {"value": refit.values[name], "low": refit.intervals[name].low, "high": refit.intervals[name].high}
            for name in refit.values
        },
    }


def _held_out(fit: Fitted, rows: Rows) -> list[dict[str, Any]]:
    axes = {axis: rows[axis] for axis in fit.form.axes}
    return [
        {
            "form": fit.form.name,
            "params": held.params,
            "cells": held.cells,
            "observed": held.observed,
            "predicted": held.predicted,
            "low": held.low,
            "high": held.high,
            "covered": held.covered,
        }
        for held in hold_out_largest(fit.form, axes, rows["loss"])
    ]


def _baselines(rows: Rows, columns: Mapping[str, Any], baselines: Sequence[str]) -> dict[str, Any]:
    """Mean loss of each baseline over the runs that have it, and of the sizes that are baselines."""
    names = {"baseline": "gene_mean", "gaussian": "shrunk_gaussian", "attainable": "attainable_floor", "bound": "bound"}
    found: dict[str, Any] = {"by_cells": []}
    for cells in [float(d) for d in np.unique(rows["cells"])] if "cells" in rows else [None]:
        here = at_cells(rows, cells)
        entry: dict[str, Any] = {"cells": cells}
        for name, title in names.items():
            values = here[name][np.isfinite(here[name])] if name in here else np.array([])
            entry[title] = float(np.mean(values)) if values.size else None
        found["by_cells"].append(entry)
    everyone = points_of(columns, ())[0] if baselines else rows
    mask = ~np.isin(everyone["params"], rows["params"])
    found["sizes"] = size_table(where(everyone, mask)) if np.any(mask) else []
    return found


def _notes(rows: Rows) -> list[str]:
    notes = []
    if "max_cells_seen" in rows and len(np.unique(rows["max_cells_seen"])) > 1:
        notes.append(
            "The budget of cells seen follows the size (or the data): it is part of the protocol, and the law is a law "
            "of this protocol and not of size alone."
        )
    if "lr" in rows and len(np.unique(rows["lr"])) > 1:
        notes.append("The learning rate was chosen per size or data and is part of the protocol.")
    return notes


def _unique(lines: Any) -> list[str]:
    return list(dict.fromkeys(lines))
