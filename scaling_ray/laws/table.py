"""From a table of runs to ``fit.json``: the verdict first, then what it rests on.

``fit_table`` is the one public way in. What it fits is decided by the shape of the table and not by the outcome:
with at least three numbers of cells the headline is L(P, D), otherwise L(P) with a floor at the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.errors import BadInput
from scaling_ray.laws import gates
from scaling_ray.laws.columns import numbers
from scaling_ray.laws.fit import Points, Problem, Solution, gather
from scaling_ray.laws.forms import CONSTANT, PARAMS_CELLS, POWER, POWER_FLOOR, Form
from scaling_ray.laws.intervals import OPEN, Interval, profile
from scaling_ray.laws.refits import Refit, hold_out_largest, leave_one_out

ESTIMATOR = "least_squares"
FORMAT = 1
CONDITIONAL_ON = (
    "Intervals are 95% F-profiles over the noise between seeds, conditional on this split: the held-out donors, "
    "genes and masks stay as they are."
)

_NUMBERS: tuple[str, ...] = (
    "params",
    "params_without_embedding",
    "cells",
    "loss",
    "validation_loss",
    "final_loss",
    "flops",
    "width",
)
_NUMBERS += ("baseline", "gaussian", "attainable", "bound", "bound_z")

Rows = dict[str, NDArray]


@dataclass(frozen=True)
class _Fitted:
    """One form on one set of runs, with everything that was asked of it."""

    form: Form
    points: Points
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    at_bound: Mapping[str, bool]
    refits: Sequence[Refit]
    shut: Sequence[gates.Shut]
    tests: gates.Tests
    best: Solution | None

    @property
    def verdict(self) -> str:
        return gates.verdict(self.shut)


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
    rows, excluded, diverged = _points(columns, baselines)
    n_points = len(rows["loss"])
    d_values = np.unique(rows["cells"]) if "cells" in rows else np.array([])
    notes = _notes(rows)
    protocol = gates.protocol_gates(rows) + gates.diverged_gate(diverged)

    fitted: list[tuple[float | None, _Fitted]] = []
    cells_of_fit: list[float | None] = list(d_values) or [None]
    for cells in cells_of_fit:
        here = _at(rows, cells)
        for form in (CONSTANT, POWER, POWER_FLOOR):
            say(f"fitting {form.formula}" + ("" if cells is None else f" at {cells:,.0f} cells"))
            fitted.append((cells, _judge(form, here, gates.protocol_gates(here) + gates.diverged_gate(diverged))))
    if d_values.size >= 2:
        say(f"fitting {PARAMS_CELLS.formula}")
        fitted.append((None, _judge(PARAMS_CELLS, rows, protocol)))
    say("fitting the declared choices")
    choices = _choices(columns, rows, baselines)
    chosen = len(fitted) - 1
    if d_values.size == 2:
        chosen -= 1  # two numbers of cells do not carry a term of their own
    cells, head = fitted[chosen]
    disagreement = gates.choices_gate(
        [c["alpha"] for c in choices if c["defensible"] and c["n_sizes"] >= gates.MIN_SIZES]
    )
    head = replace(head, shut=[*head.shut, *disagreement])
    fitted[chosen] = (cells, head)
    return {
        "format": FORMAT,
        "headline": _headline(cells, head),
        "choices": choices,
        "fits": [_entry(at, fit) for at, fit in fitted],
        "baselines": _baselines(rows, columns, baselines),
        "leave_one_out": [_refit(at, fit, refit) for at, fit in fitted for refit in fit.refits],
        "held_out_largest": _held_out(head, _at(rows, cells)),
        "points": {"runs": n_points, "sizes": _size_table(rows), "cells": [float(d) for d in d_values]},
        "excluded": excluded,
        "notes": [CONDITIONAL_ON, *notes],
        "columns_used": dict(columns.get("columns_used", {name: name for name in columns})),
    }


def _points(columns: Mapping[str, Any], baselines: Sequence[str]) -> tuple[Rows, list[dict[str, Any]], int]:
    """The runs that are points of a law, what was left out and why, and how many of the grid diverged."""
    for name, meaning in (("params", "trainable parameters of each run"), ("loss", "its loss on held-out cells")):
        if name not in columns:
            raise BadInput(name, sorted(columns), f"the table needs a column {name}: {meaning}")
    names = [name for name in columns if name != "columns_used"]
    count = len(columns["loss"])
    for name in names:
        if len(columns[name]) != count:
            raise BadInput(name, len(columns[name]), f"has another number of rows than loss ({count})")
    everything = np.ones(count, dtype=bool)
    text = {name: np.array(["" if v is None else str(v) for v in columns[name]]) for name in names}
    excluded, keep, diverged = [], everything.copy(), 0

    def drop(mask: NDArray, reason: str) -> None:
        mask = mask & keep
        if np.any(mask):
            excluded.append({"reason": reason, "runs": int(mask.sum()), **_ids(text, mask)})
            keep[mask] = False

    if "role" in text:
        drop(np.isin(text["role"], ["rate"]), "learning-rate selection")
    if "status" in text:
        if "failure" in text:
            failed = keep & (text["status"] == "failed") & (text["failure"] == "diverged")
            diverged = int(failed.sum())
            drop(failed, "failed: diverged")
        for status in np.unique(text["status"][keep]):
            if status not in ("done", ""):
                drop(text["status"] == status, str(status))
    if "run_id" in text:
        ids, seen = np.unique(text["run_id"][keep], return_counts=True)
        if np.any(seen > 1):
            raise BadInput("run_id", str(ids[seen > 1][0]), "stands in the table more than once; keep one row per run")
    values = {name: numbers(columns, name, keep) for name in _NUMBERS if name in columns}
    drop(_is_baseline(values, text, baselines), "baseline size, never a point")
    for name in ("params", "loss", *(n for n in ("cells",) if n in values)):
        bad = np.flatnonzero(keep & ~(np.isfinite(values[name]) & (values[name] > 0)))
        if bad.size:
            shown = ", ".join(str(i + 1) for i in bad[:8]) + (", ..." if bad.size > 8 else "")
            what = f"row {shown}" if bad.size == 1 else f"rows {shown}"
            raise BadInput(name, str(columns[name][bad[0]]), f"{what}: must be a positive finite number")
    if not np.any(keep):
        raise BadInput("table", count, "no finished run is left that could be a point of a law")
    rows: Rows = {name: (values[name] if name in values else text[name])[keep] for name in names}
    for name in ("baseline", "gaussian", "attainable", "bound", "bound_z", "final_loss", "validation_loss"):
        if name in rows and not np.any(np.isfinite(rows[name])):
            del rows[name]
    return rows, excluded, diverged


def _is_baseline(values: Mapping[str, NDArray], text: Mapping[str, NDArray], baselines: Sequence[str]) -> NDArray:
    mask = np.zeros(len(values["loss"]), dtype=bool)
    if "size" in text:
        mask |= np.isin(text["size"], list(baselines))
    if "width" in values and baselines:
        mask |= values["width"] == 1
    return mask


def _ids(text: Mapping[str, NDArray], mask: NDArray) -> dict[str, Any]:
    if "run_id" in text:
        return {"run_ids": [str(v) for v in text["run_id"][mask]]}
    return {"rows": [int(i) + 1 for i in np.flatnonzero(mask)]}


def _at(rows: Rows, cells: float | None) -> Rows:
    if cells is None or "cells" not in rows:
        return rows
    mask = rows["cells"] == cells
    return {name: values[mask] for name, values in rows.items()}


def _judge(form: Form, rows: Rows, protocol: Sequence[gates.Shut], *, thorough: bool = True) -> _Fitted:
    """Fit a form to the runs in ``rows``; with ``thorough`` also its refits and gates."""
    axes = {axis: rows[axis] for axis in form.axes}
    points = gather(axes, rows["loss"])
    shut = list(gates.count_gates(form, points)) + list(protocol)
    empty = gates.Tests({}, None)
    logs = [np.log(values) for values in points.axes.values()]
    rank = np.linalg.matrix_rank(np.stack([np.ones(points.n_cells), *logs], axis=1))
    if points.n_cells < len(form.parameters) or rank < 1 + len(form.axes):
        shut.append(
            gates.Shut(
                f"{points.n_cells} cells of distinct {' and '.join(form.axes) or 'settings'} cannot fix the "
                f"{len(form.parameters)} parameters of {form.formula}",
                "further sizes" + (" crossed with further numbers of cells" if len(form.axes) > 1 else ""),
            )
        )
        return _Fitted(form, points, {}, {}, {}, [], shut, empty, None)
    problem = Problem(form, points)
    best = problem.search()
    parameters = {name: problem.value(best, name) for name in form.parameters}
    wanted = form.parameters if thorough else tuple(n for n in form.parameters if n in ("alpha", form.floor))
    intervals = {name: profile(problem, best, name) for name in wanted}
    at_bound = {name: best.at_search_edge(i) for i, name in enumerate(form.exponents)}
    refits: list[Refit] = []
    tests = empty
    if thorough and form.exponents:
        for exponent in form.exponents:
            refits += leave_one_out(form, axes, rows["loss"], exponent)
        tests = gates.f_tests(problem, best)
        shut += gates.fit_gates(problem, best, intervals, refits, tests)
    return _Fitted(form, points, parameters, intervals, at_bound, refits, shut, tests, best)


def _headline(cells: float | None, fit: _Fitted) -> dict[str, Any]:
    head: dict[str, Any] = {
        "verdict": fit.verdict,
        "reasons": [shut.reason for shut in fit.shut],
        "settles": _unique(shut.settles for shut in fit.shut),
        "form": fit.form.name,
        "formula": fit.form.formula,
        "cells": cells,
    }
    if fit.verdict == "supported":
        head["parameters"] = {name: _parameter(fit, name) | _widest(fit, name) for name in fit.form.parameters}
    return head


def _parameter(fit: _Fitted, name: str) -> dict[str, Any]:
    interval = fit.intervals.get(name, OPEN)
    return {
        "value": fit.parameters[name],
        "low": interval.low,
        "high": interval.high,
        "closed": interval.closed,
        "at_bound": fit.at_bound.get(name, False),
    }


def _widest(fit: _Fitted, name: str) -> dict[str, float | None]:
    """The union of the interval with those of the refits that left one size (or one number of cells) out."""
    found = [fit.intervals[name]] + [refit.intervals[name] for refit in fit.refits if name in refit.intervals]
    lows, highs = [i.low for i in found], [i.high for i in found]
    return {
        "widest_low": None if None in lows else min(low for low in lows if low is not None),
        "widest_high": None if None in highs else max(high for high in highs if high is not None),
    }


def _entry(cells: float | None, fit: _Fitted) -> dict[str, Any]:
    points = fit.points
    rss = fit.best.rss if fit.best else None
    total = float(np.sum(points.runs * (points.loss - np.average(points.loss, weights=points.runs)) ** 2))
    total += points.replicate_rss
    return {
        "form": fit.form.name,
        "formula": fit.form.formula,
        "estimator": ESTIMATOR,
        "cells": cells,
        "n_sizes": int(points.distinct("params").size) if "params" in points.axes else None,
        "n_cells": int(points.distinct("cells").size) if "cells" in points.axes else None,
        "n_runs": points.n_runs,
        "parameters": {name: _parameter(fit, name) for name in fit.parameters},
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


def _refit(cells: float | None, fit: _Fitted, refit: Refit) -> dict[str, Any]:
    return {
        "form": fit.form.name,
        "cells": cells,
        "left_out": {refit.axis: refit.left_out},
        "parameters": {
            name: {"value": refit.values[name], "low": refit.intervals[name].low, "high": refit.intervals[name].high}
            for name in refit.values
        },
    }


def _held_out(fit: _Fitted, rows: Rows) -> list[dict[str, Any]]:
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


def _choices(columns: Mapping[str, Any], rows: Rows, baselines: Sequence[str]) -> list[dict[str, Any]]:
    """The headline's law under every choice an analyst could have made and defended; then each D separately."""
    counts = np.unique(rows["cells"])[::-1] if "cells" in rows else np.array([])
    if counts.size >= gates.MIN_CELL_COUNTS:
        form, largest, where = PARAMS_CELLS, None, ", all numbers of cells"
    else:
        largest = float(counts[0]) if counts.size else None
        form, where = POWER_FLOOR, "" if largest is None else f", {largest:,.0f} cells"
    base = _at(rows, largest)
    smallest, biggest = float(np.min(base["params"])), float(np.max(base["params"]))
    # Name -> the runs; a baseline taken as a point is shown, but is not a choice that anybody should defend.
    with_baselines = "baseline sizes taken as points" + where
    table = {"sizes without baselines" + where: base}
    if baselines:
        everyone = _at(_points(columns, ())[0], largest)
        if len(everyone["loss"]) > len(base["loss"]):
            table[with_baselines] = everyone
    table["without the smallest size" + where] = _where(base, base["params"] > smallest)
    table["without the largest size" + where] = _where(base, base["params"] < biggest)
    if "params_without_embedding" in base:
        counted = base["params_without_embedding"]
        if np.all(np.isfinite(counted)) and np.all(counted > 0):
            table["parameters counted without the gene embedding" + where] = base | {"params": counted}
    for name, title in (("validation_loss", "best validation loss"), ("final_loss", "final validation loss")):
        if name in base and "final_loss" in base and np.all(base[name] > 0):
            swapped = base | {"loss": base[name]}
            if not np.array_equal(base[name], base["loss"]):
                table[title + where] = swapped
                table[f"{title}, without the smallest size" + where] = _where(swapped, base["params"] > smallest)
    done = []
    for name, chosen in table.items():
        if len(chosen["loss"]):
            fit = _judge(form, chosen, [], thorough=False)
            done.append(_choice(name, fit, defensible=name != with_baselines))
    for cells in counts if form is PARAMS_CELLS else counts[1:]:
        fit = _judge(POWER_FLOOR, _at(rows, float(cells)), [], thorough=False)
        done.append(_choice(f"sizes without baselines, {cells:,.0f} cells alone", fit, defensible=False))
    return done


def _choice(name: str, fit: _Fitted, *, defensible: bool = True) -> dict[str, Any]:
    floor = str(fit.form.floor)
    none = {"value": None, "low": None, "high": None, "closed": False, "at_bound": False}
    return {
        "name": name,
        "defensible": defensible,
        "form": fit.form.name,
        "n_sizes": int(fit.points.distinct("params").size),
        "n_runs": fit.points.n_runs,
        "alpha": _parameter(fit, "alpha") if fit.parameters else none,
        "c": _parameter(fit, floor) if fit.parameters else none,
    }


def _where(rows: Rows, mask: NDArray) -> Rows:
    return {name: values[mask] for name, values in rows.items()}


def _baselines(rows: Rows, columns: Mapping[str, Any], baselines: Sequence[str]) -> dict[str, Any]:
    """Mean loss of each baseline over the runs that have it, and of the sizes that are baselines."""
    names = {"baseline": "gene_mean", "gaussian": "shrunk_gaussian", "attainable": "attainable_floor", "bound": "bound"}
    found: dict[str, Any] = {"by_cells": []}
    for cells in [float(d) for d in np.unique(rows["cells"])] if "cells" in rows else [None]:
        here = _at(rows, cells)
        entry: dict[str, Any] = {"cells": cells}
        for name, title in names.items():
            values = here[name][np.isfinite(here[name])] if name in here else np.array([])
            entry[title] = float(np.mean(values)) if values.size else None
        found["by_cells"].append(entry)
    everyone = _points(columns, ())[0] if baselines else rows
    mask = ~np.isin(everyone["params"], rows["params"])
    found["sizes"] = _size_table(_where(everyone, mask)) if np.any(mask) else []
    return found


def _size_table(rows: Rows) -> list[dict[str, Any]]:
    table = []
    for params in np.unique(rows["params"]):
        here = rows["params"] == params
        name = str(rows["size"][here][0]) if "size" in rows else None
        losses = rows["loss"][here]
        table.append(
            {"size": name, "params": float(params), "runs": int(here.sum()), "mean_loss": float(losses.mean())}
        )
    return table


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
