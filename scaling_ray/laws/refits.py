"""The same fit without a part of the runs: each size in turn, or the largest size predicted before it is fitted.

A bootstrap of seeds cannot see that the form is wrong, or that the largest size was undertrained: every resample
shares the fault. Leaving one size out can, because the sizes disagree then. The headline interval is therefore the
union of the statistical profile with those of the refits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from scaling_ray.laws.fit import Floats, Problem, Solution, gather
from scaling_ray.laws.forms import Form
from scaling_ray.laws.intervals import Interval, profile, profile_at, profiles

MOST_REFITS = 12


@dataclass(frozen=True)
class Refit:
    """The fit with one value of an axis (of very many, a twelfth of them) left out, and its 95% intervals."""

    axis: str
    left_out: float
    exponent: str
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    bonferroni: Interval  # of the exponent, at 1 - 0.05 / refits
    problem: Problem
    best: Solution


@dataclass(frozen=True)
class HeldOut:
    """The largest size, predicted by a fit that never saw it; ``low``..``high`` is for the mean of its runs."""

    params: float
    cells: float | None
    observed: float
    predicted: float
    low: float | None
    high: float | None

    @property
    def covered(self) -> bool | None:
        """Whether the observed mean lies in the prediction interval (None where that is open)."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.observed <= self.high


def leave_one_out(
    form: Form, axes: Mapping[str, Floats], loss: Floats, exponent: str, names: tuple[str, ...] | None = None
) -> list[Refit]:
    """Refit without each value of ``exponent``'s own axis in turn; ``axes`` and ``loss`` are per run (R,).

    Intervals are found of ``names`` (all parameters where None). Empty where a refit would leave fewer settings than
    parameters, or fewer than two values of the axis.
    """
    axis = form.axis_of(exponent)
    values = np.unique(axes[axis])
    # Other people's tables may hold hundreds of distinct values: neighbours are then left out together.
    groups = np.array_split(values, min(values.size, MOST_REFITS))
    refits = []
    for group in groups:
        kept = ~np.isin(axes[axis], group)
        points = gather({name: column[kept] for name, column in axes.items()}, loss[kept])
        if points.n_settings < len(form.parameters) or points.distinct(axis).size < 2:
            return []
        problem = Problem(form, points)
        best = problem.search()
        refits.append(
            Refit(
                axis,
                float(np.exp(np.mean(np.log(group)))) if group.size > 1 else float(group[0]),
                exponent,
                {name: problem.value(best, name) for name in form.parameters},
                profiles(problem, best, names or form.parameters),
                profile(problem, best, exponent, 1.0 - 0.05 / len(groups)),
                problem,
                best,
            )
        )
    return refits


def hold_out_largest(form: Form, axes: Mapping[str, Floats], loss: Floats, level: float = 0.95) -> list[HeldOut]:
    """Predict each setting of the largest size from the smaller ones; empty where those do not suffice."""
    if "params" not in axes:
        return []
    largest = float(np.max(axes["params"]))
    kept = axes["params"] < largest
    if not np.any(kept):
        return []
    points = gather({name: column[kept] for name, column in axes.items()}, loss[kept])
    if points.n_settings < len(form.parameters) or points.distinct("params").size < 2:
        return []
    problem = Problem(form, points)
    best = problem.search()
    unseen = gather({name: column[~kept] for name, column in axes.items()}, loss[~kept])
    held = []
    for i in range(unseen.n_settings):
        where = {name: column[i : i + 1] for name, column in unseen.axes.items()}
        cells = float(where["cells"][0]) if "cells" in where else None
        predicted = float(problem.predict(best, where)[0])
        law = profile_at(problem, best, where, np.ones(1), level)
        low = high = None
        if law.low is not None and law.high is not None:
            # The law's own interval, widened by the noise of a mean of so many runs.
            student = float(stdtrit(problem.freedom, 0.5 + level / 2))
            noise = student**2 * best.rss / problem.freedom / float(unseen.runs[i])
            low = predicted - float(np.hypot(predicted - law.low, np.sqrt(noise)))
            high = predicted + float(np.hypot(law.high - predicted, np.sqrt(noise)))
        held.append(HeldOut(largest, cells, float(unseen.loss[i]), predicted, low, high))
    return held
