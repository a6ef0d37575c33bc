"""How laws are written into ``fit.json``: one entry per fit, its parameters, and the headline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_ray.laws.elbow import FORMULA as ELBOW_FORMULA
from scaling_ray.laws.elbow import find_elbow
from scaling_ray.laws.estimators import HUBER, LEAST_SQUARES, MODERATED, huber_log, moderated
from scaling_ray.laws.forms import POWER_FLOOR
from scaling_ray.laws.intervals import OPEN
from scaling_ray.laws.law import Fitted, fit_law
from scaling_ray.laws.points import Rows
from scaling_ray.laws.verdict import Judged, judge

NO_INTERVAL: dict[str, Any] = {"low": None, "high": None, "closed": False, "at_bound": False}
NO_INTERVAL |= {"delta_low": None, "delta_high": None}


def parameter(law: Fitted, name: str) -> dict[str, Any]:
    """Estimate, profile and Delta-t interval of one parameter."""
    interval, delta = law.intervals.get(name, OPEN), law.deltas.get(name, OPEN)
    return {
        "value": law.parameters[name],
        "low": interval.low,
        "high": interval.high,
        "closed": interval.closed,
        "at_bound": law.at_bound.get(name, False),
        "delta_low": delta.low,
        "delta_high": delta.high,
    }


def headline(cells: float | None, judged: Judged) -> dict[str, Any]:
    """The verdict; where it is supported the parameters, ``low``..``high`` the union of profile and refits."""
    head: dict[str, Any] = {
        "verdict": judged.verdict,
        "reasons": judged.reasons,
        "settles": judged.settles,
        "form": judged.law.form.name,
        "formula": judged.law.form.formula,
        "cells": cells,
    }
    if judged.verdict == "supported":
        head["parameters"] = {name: _headline_parameter(judged.law, name) for name in judged.law.form.parameters}
    return head


def _headline_parameter(law: Fitted, name: str) -> dict[str, Any]:
    own, shown = parameter(law, name), law.headline_interval(name)
    ends = {"low": shown.low, "high": shown.high, "closed": shown.closed}
    return own | ends | {"profile_low": own["low"], "profile_high": own["high"]}


def entry(cells: float | None, judged: Judged) -> dict[str, Any]:
    """One fit of ``fits``."""
    law = judged.law
    points = law.points
    rss = law.best.rss if law.best else None
    total = float(np.sum(points.runs * (points.loss - np.average(points.loss, weights=points.runs)) ** 2))
    total += points.replicate_rss
    return {
        "form": law.form.name,
        "formula": law.form.formula,
        "estimator": LEAST_SQUARES,
        "cells": cells,
        "n_sizes": int(points.distinct("params").size) if "params" in points.axes else None,
        "n_data_sizes": int(points.distinct("cells").size) if "cells" in points.axes else None,
        "n_runs": points.n_runs,
        "parameters": {name: parameter(law, name) for name in law.parameters},
        "verdict": judged.verdict,
        "reasons": judged.reasons,
        "settles": judged.settles,
        "rss": rss,
        "r2": 1.0 - rss / total if rss is not None and total > 0 else None,
        "noise_sd": float(np.sqrt(points.replicate_rss / points.replicate_freedom))
        if points.replicate_freedom
        else None,
        "effect_p": dict(law.tests.effect_p) if law.tests else {},
        "lack_of_fit_p": law.tests.lack_of_fit_p if law.tests else None,
    }


def with_aicc(fitted: Sequence[tuple[float | None, Judged]]) -> list[dict[str, Any]]:
    """Entries with AICc and its distance to the best shape of the same settings."""
    entries = []
    for at, judged in fitted:
        runs = judged.law.points.n_runs
        rivals = [other.law.aicc for there, other in fitted if there == at and other.law.points.n_runs == runs]
        lowest = min((value for value in rivals if value is not None), default=None)
        own = judged.law.aicc
        distance = None if own is None or lowest is None else own - lowest
        entries.append(entry(at, judged) | {"aicc": own, "delta_aicc": distance})
    return entries


def elbow_entry(cells: float | None, judged: Judged) -> dict[str, Any] | None:
    """The law that stops at a break, beside the smooth one; shown, and never an answer."""
    law = judged.law
    if law.form.name != POWER_FLOOR.name or law.best is None:
        return None
    found = find_elbow(law.points, law.best, law.problem.freedom)
    if found is None:
        return None
    values = {"alpha": found.alpha, "P0": found.break_params, "c": found.floor, "a": found.coefficient}
    reason = "shown for comparison: a law that breaks has as many parameters as most ladders have sizes"
    return entry(cells, judged) | {
        "form": "elbow",
        "formula": ELBOW_FORMULA,
        "parameters": {name: {"value": value} | NO_INTERVAL for name, value in values.items()},
        "verdict": "refused",
        "reasons": [reason],
        "settles": [],
        "rss": found.misfit_rss + law.points.replicate_rss,
        "r2": None,
        "better_than_smooth_p": found.p,
        "aicc": None,
        "delta_aicc": None,
    }


def other_estimators(cells: float | None, head: Judged, rows: Rows) -> list[dict[str, Any]]:
    """The headline's law by moderated weights (with gates and intervals) and by Huber on the log loss (values)."""
    law = head.law
    if law.best is None:
        return []
    points = moderated(law.points)
    weighted = fit_law(law.form, rows, thorough=False, points=points, only=law.form.parameters)
    entries = [entry(cells, judge(weighted, head.refusals)) | {"estimator": MODERATED}]
    axes = {axis: rows[axis] for axis in law.form.axes}
    values = huber_log(law.problem, axes, rows["loss"], law.best)
    reason = "shown for comparison: this estimator has no interval here"
    huber = {
        "estimator": HUBER,
        "parameters": {name: {"value": value} | NO_INTERVAL for name, value in values.items()},
        "verdict": "refused",
        "reasons": [reason],
        "settles": [],
        "rss": None,
        "r2": None,
    }
    return [*entries, entry(cells, head) | huber]
