"""What the runs leave open: F-profile intervals, leave-one-size-out refits, a held-out largest size.

An interval is every value v of a parameter whose best fit, all other parameters free, has
``RSS(v) <= RSS_min * (1 + F(1, n - p; level) / (n - p))``: Bates and Watts, Nonlinear Regression Analysis (1988),
section 6.1. Intervals speak of seed noise under the form; they are conditional on the held-out cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import fdtri, stdtrit

from scaling_ray.laws.fit import Floats, Problem, Solution, gather
from scaling_ray.laws.forms import EXPONENT_SEARCH, Form

_PROFILE_TOLERANCE = {1: 1e-5, 2: 2e-4}  # in log exponents; the residual is flat to second order there
_DOUBLINGS = 40
_SCAN_POINTS, _RESCAN_POINTS = 41, 9


@dataclass(frozen=True)
class Interval:
    """Profile interval of one parameter; an open end is None and leaves ``closed`` False."""

    low: float | None
    high: float | None

    @property
    def closed(self) -> bool:
        """Whether both ends were found where the search was still free to go on."""
        return self.low is not None and self.high is not None

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside; an open end excludes nothing on its side."""
        return (self.low is not None and value < self.low) or (self.high is not None and value > self.high)


OPEN = Interval(None, None)


@dataclass(frozen=True)
class Refit:
    """The fit with one value of an axis left out: estimates and 95% intervals of an exponent and of the floor."""

    axis: str
    left_out: float
    exponent: str
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    bonferroni: Interval  # of the exponent, at 1 - 0.05 / refits


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


def threshold(problem: Problem, best: Solution, level: float) -> float | None:
    """Largest sum of squares of cell means inside the interval; None without degrees of freedom."""
    if problem.freedom < 1:
        return None
    allowed = best.rss * float(fdtri(1, problem.freedom, level)) / problem.freedom
    return best.misfit_rss + allowed


def profile(problem: Problem, best: Solution, name: str, level: float = 0.95) -> Interval:
    """F-profile interval of parameter ``name`` of the problem's form."""
    limit = threshold(problem, best, level)
    if limit is None:
        return OPEN
    exact = 1e-20 * float(np.sum(problem.points.runs * problem.points.loss**2))
    limit = max(limit, best.misfit_rss + exact)  # a table without any noise would leave nothing to bracket
    if name in problem.form.exponents:
        return _profile_exponent(problem, best, problem.form.exponents.index(name), limit)
    return _profile_coefficient(problem, best, problem.form.coefficients.index(name), limit)


def _profile_exponent(problem: Problem, best: Solution, index: int, limit: float) -> Interval:
    centre = float(np.log(best.exponents[index]))
    ends = [_outermost_crossing(problem, index, float(edge), centre, limit) for edge in np.log(EXPONENT_SEARCH)]
    low, high = (None if end is None else float(np.exp(end)) for end in ends)
    return Interval(low, high)


def _outermost_crossing(problem: Problem, index: int, edge: float, centre: float, limit: float) -> float | None:
    """Where the profile first falls to ``limit`` on the way from ``edge`` to the optimum; None if it is below at once.

    The whole span is scanned, so that a second valley below the limit counts as what the runs leave open.
    """
    outside, inside = edge, centre
    points = _SCAN_POINTS
    while abs(inside - outside) > 1e-7:
        steps = np.linspace(outside, inside, points)
        points = _RESCAN_POINTS
        below = problem.misfit_along(index, steps) <= limit
        below[-1] = True  # the optimum, or a point found below in the scan before
        first = int(np.argmax(below))
        if first == 0:
            return None if outside == edge else outside
        outside, inside = float(steps[first - 1]), float(steps[first])
    return inside


def _profile_coefficient(problem: Problem, best: Solution, index: int, limit: float) -> Interval:
    # With two exponents the grid is dear, and the valley is followed from the optimum instead.
    near = best.exponents if len(best.exponents) > 1 else None

    def at(value: float) -> Solution:
        return problem.search(fixed={index: value}, tolerance=_PROFILE_TOLERANCE[len(best.exponents) or 1], near=near)

    def excess(value: float) -> float:
        return at(value).misfit_rss - limit

    def end_or_open(value: float) -> float | None:
        # An end that only the edge of an exponent's search produced is not an end.
        solution = at(value)
        stuck = any(solution.at_search_edge(i) for i in range(len(problem.form.exponents)))
        return None if stuck else value

    centre = float(best.coefficients[index])
    scale = max(centre, 1e-9 * float(np.max(problem.points.loss)))
    high: float | None = None
    # No floor is bounded more tightly than the mean of all runs would be.
    first_step = max(1e-3 * scale, float(np.sqrt((limit - best.misfit_rss) / problem.points.n_runs)))
    inside, step = centre, first_step
    for _ in range(_DOUBLINGS):
        if excess(centre + step) > 0:
            high = float(brentq(excess, inside, centre + step, rtol=1e-8)) if excess(inside) < 0 else inside
            break
        inside, step = centre + step, 2.0 * step
    high = None if high is None else end_or_open(high)
    if centre == 0.0 or excess(0.0) <= 0:
        return Interval(end_or_open(0.0), high)  # zero is a natural bound: an answer, not an open end
    inside, step = centre, first_step
    while excess(max(centre - step, 0.0)) <= 0:
        inside, step = max(centre - step, 0.0), 2.0 * step
    outside = max(centre - step, 0.0)
    low = float(brentq(excess, outside, inside, rtol=1e-8)) if excess(inside) < 0 else inside
    return Interval(end_or_open(low), high)


def leave_one_out(form: Form, axes: Mapping[str, Floats], loss: Floats, exponent: str) -> list[Refit]:
    """Refit without each value of ``exponent``'s own axis in turn; ``axes`` and ``loss`` are per run (R,).

    Empty where a refit would leave fewer cells than parameters, or fewer than two values of the axis.
    """
    axis = form.axis_of(exponent)
    values = np.unique(axes[axis])
    refits = []
    for value in values:
        kept = axes[axis] != value
        points = gather({name: column[kept] for name, column in axes.items()}, loss[kept])
        if points.n_cells < len(form.parameters) or points.distinct(axis).size < 2:
            return []
        problem = Problem(form, points)
        best = problem.search()
        names = (exponent,) if form.floor is None else (exponent, form.floor)
        refits.append(
            Refit(
                axis,
                float(value),
                exponent,
                {name: problem.value(best, name) for name in names},
                {name: profile(problem, best, name) for name in names},
                profile(problem, best, exponent, 1.0 - 0.05 / values.size),
            )
        )
    return refits


def hold_out_largest(form: Form, axes: Mapping[str, Floats], loss: Floats, level: float = 0.95) -> list[HeldOut]:
    """Predict each cell of the largest size from the smaller ones; empty where those do not suffice."""
    if "params" not in axes:
        return []
    largest = float(np.max(axes["params"]))
    kept = axes["params"] < largest
    if not np.any(kept):
        return []
    points = gather({name: column[kept] for name, column in axes.items()}, loss[kept])
    if points.n_cells < len(form.parameters) or points.distinct("params").size < 2:
        return []
    problem = Problem(form, points)
    best = problem.search()
    unseen = gather({name: column[~kept] for name, column in axes.items()}, loss[~kept])
    held = []
    for i in range(unseen.n_cells):
        where = {name: column[i : i + 1] for name, column in unseen.axes.items()}
        cells = float(where["cells"][0]) if "cells" in where else None
        predicted = float(problem.predict(best, where)[0])
        low, high = _prediction_interval(problem, best, where, float(unseen.runs[i]), level)
        held.append(HeldOut(largest, cells, float(unseen.loss[i]), predicted, low, high))
    return held


def _prediction_interval(
    problem: Problem, best: Solution, where: Mapping[str, Floats], runs: float, level: float
) -> tuple[float | None, float | None]:
    """Profile interval of the law's value at ``where``, widened by the noise of a mean of ``runs`` runs.

    At given exponents the law is linear, so the prediction has a closed-form interval; the profile is the union of
    these over every exponent still inside the limit.
    """
    limit = threshold(problem, best, level)
    if limit is None:
        return None, None
    n_exponents = len(problem.form.exponents)
    axis = np.geomspace(*EXPONENT_SEARCH, 1501 if n_exponents == 1 else 101)
    grid = (
        np.stack([g.ravel() for g in np.meshgrid(*[axis] * n_exponents)], axis=1) if n_exponents else np.zeros((1, 0))
    )
    trials = np.concatenate([best.exponents[None, :], grid])
    misfit, coefficients = problem.solve(trials)
    inside = misfit <= limit
    trials, misfit, coefficients = trials[inside], misfit[inside], coefficients[inside]
    columns, units = problem.design(trials)
    at = np.ones_like(units)
    for j, term in enumerate(problem.form.terms):
        if term.axis is not None and term.exponent is not None:
            power = trials[:, problem.form.exponents.index(term.exponent)]
            at[:, j] = float(where[term.axis][0]) ** -power * units[:, j]
    value = np.sum(coefficients / units * at, axis=1)
    gram = np.einsum("kcm,c,kcn->kmn", columns, problem.points.runs, columns)
    leverage = np.einsum("km,kmn,kn->k", at, np.linalg.pinv(gram, hermitian=True), at)
    reach = np.sqrt(np.maximum(limit - misfit, 0.0) * leverage)
    student = float(stdtrit(problem.freedom, 0.5 + level / 2))
    noise = student**2 * best.rss / problem.freedom / runs
    predicted = float(problem.predict(best, where)[0])
    low = predicted - np.sqrt((predicted - np.min(value - reach)) ** 2 + noise)
    high = predicted + np.sqrt((np.max(value + reach) - predicted) ** 2 + noise)
    return float(low), float(high)
