"""How laws are written into ``fit.json``: one entry per fit, its parameters, and the headline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_ray.laws.elbow import FORMULA as ELBOW_FORMULA
from scaling_ray.laws.elbow import find_elbow
from scaling_ray.laws.estimators import HUBER, LEAST_SQUARES, WEIGHTED
from scaling_ray.laws.forms import POWER_FLOOR
from scaling_ray.laws.intervals import OPEN
from scaling_ray.laws.law import Fitted, fit_law
from scaling_ray.laws.noise import COMMON, RESIDUAL
from scaling_ray.laws.points import Rows
from scaling_ray.laws.verdict import Judged, judge

NO_INTERVAL: dict[str, Any] = {"low": None, "high": None, "closed": False, "at_bound": False}
NO_INTERVAL |= {"profile_low": None, "profile_high": None, "delta_low": None, "delta_high": None}


def parameter(law: Fitted, name: str) -> dict[str, Any]:
    """One parameter: ``low``..``high`` is the shown interval, ``profile_low``..``profile_high`` the statistical one."""
    shown, interval, delta = law.headline_interval(name), law.intervals.get(name, OPEN), law.deltas.get(name, OPEN)
    return {
        "value": law.parameters[name],
        "low": shown.low,
        "high": shown.high,
        "closed": shown.closed,
        "at_bound": law.at_bound.get(name, False),
        "profile_low": interval.low,
        "profile_high": interval.high,
        "delta_low": delta.low,
        "delta_high": delta.high,
    }


def headline(cells: float | None, judged: Judged) -> dict[str, Any]:
    """The verdict; where it is not refused the parameters."""
    head: dict[str, Any] = {
        "verdict": judged.verdict,
        "reasons": judged.reasons,
        "settles": judged.settles,
        "form": judged.law.form.name,
        "formula": judged.law.form.formula,
        "estimator": estimator_of(judged.law),
        "cells": cells,
    }
    if judged.answered:
        head["parameters"] = {name: parameter(judged.law, name) for name in judged.law.form.parameters}
    return head


def of_axis(judged: Judged, axis: str, contrast: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """``headline.size`` or ``headline.data``: its verdict, the exponent where it is answered, and what it bought."""
    form = judged.law.form
    exponent = next((name for name in form.exponents if form.axis_of(name) == axis), None)
    found: dict[str, Any] = {"exponent": exponent, "parameter": None, "sentence": contrast["sentence"]}
    if exponent is None:
        reasons = list(notes) or [contrast["reason"] or "too few numbers of cells for a term of their own"]
        return {"verdict": "refused", "reasons": reasons} | found
    own = judged.of_axis(axis)
    if own.answered:
        found["parameter"] = parameter(judged.law, exponent)
    return {"verdict": own.verdict, "reasons": own.reasons} | found


def estimator_of(law: Fitted) -> str:
    """How the runs were weighed."""
    return WEIGHTED if law.noise.kind not in (COMMON, RESIDUAL) else LEAST_SQUARES


def entry(cells: float | None, judged: Judged) -> dict[str, Any]:
    """One fit of ``fits``."""
    law = judged.law
    points = law.points
    rss = law.unweighted_rss if law.best else None
    total = float(np.sum(points.runs * (points.loss - np.average(points.loss, weights=points.runs)) ** 2))
    total += points.noise_rss
    return {
        "form": law.form.name,
        "formula": law.form.formula,
        "estimator": estimator_of(law),
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
        "noise_sd": float(np.sqrt(points.noise_rss / points.replicate_freedom)) if points.replicate_freedom else None,
        "noise": noise_entry(law),
        "effect_p": dict(law.tests.effect_p) if law.tests else {},
        "lack_of_fit_p": law.tests.lack_of_fit_p if law.tests else None,
    }


def noise_entry(law: Fitted) -> dict[str, Any]:
    """The modelled noise, and the misfit that intervals are widened by, as standard deviations in loss units."""
    noise, points = law.noise, law.points
    misfit = None
    if law.best is not None:
        extra = law.width.variance * noise.of_means(points.runs)
        extra = extra - (noise.variance / points.runs if noise.variance is not None else 0.0)
        misfit = float(np.sqrt(np.median(np.maximum(extra, 0.0))))
    return {
        "kind": noise.kind,
        "low": float(np.sqrt(noise.variance.min())) if noise.variance is not None else None,
        "high": float(np.sqrt(noise.variance.max())) if noise.variance is not None else None,
        "freedom": noise.freedom,
        "misfit": misfit,
        "least_misfit": noise.least_misfit,
    }


def with_aicc(fitted: Sequence[tuple[float | None, Judged]]) -> list[dict[str, Any]]:
    """Entries with AICc and its distance to the best shape of the same settings."""
    entries = []
    for at, judged in fitted:
        size = (judged.law.points.n_runs, judged.law.points.n_settings)
        rivals = [
            other.law.aicc
            for there, other in fitted
            if there == at and (other.law.points.n_runs, other.law.points.n_settings) == size
        ]
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
        "rss": None,
        "r2": None,
        "better_than_smooth_p": found.p,
        "aicc": None,
        "delta_aicc": None,
    }


def other_estimators(cells: float | None, head: Judged, rows: Rows, huber: dict[str, float]) -> list[dict[str, Any]]:
    """The headline's law by plain least squares where its own weighs by the noise, and by Huber on the log loss."""
    law = head.law
    if law.best is None:
        return []
    entries = []
    if estimator_of(law) == WEIGHTED:
        plain = fit_law(law.form, rows, thorough=False, plain=True, only=law.form.parameters)
        reason = "shown for comparison: it weighs every run the same, though their noise differs by size"
        entries.append(
            entry(cells, judge(plain, []))
            | {"estimator": LEAST_SQUARES, "verdict": "refused", "reasons": [reason], "settles": []}
        )
    if not huber:
        return entries
    reason = "shown for comparison: this estimator has no interval here"
    values = {
        "estimator": HUBER,
        "parameters": {name: {"value": value} | NO_INTERVAL for name, value in huber.items()},
        "verdict": "refused",
        "reasons": [reason],
        "settles": [],
        "rss": None,
        "r2": None,
    }
    return [*entries, entry(cells, head) | values]
