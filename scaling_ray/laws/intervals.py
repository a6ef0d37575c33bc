"""F-profile intervals of one fit: of its parameters and of anything linear in its coefficients.

An interval is every value v of a quantity whose best fit, all else free, has
``RSS(v) <= RSS_min * (1 + F(1, n - p; level) / (n - p))``: Bates and Watts, Nonlinear Regression Analysis (1988),
section 6.1. Intervals speak of seed noise under the form; they are conditional on the held-out cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import fdtri, stdtrit

from scaling_ray.laws.fit import Floats, Problem, Solution, least_squares
from scaling_ray.laws.forms import EXPONENT_SEARCH

_SCAN_POINTS, _RESCAN_POINTS = 41, 9
_REGION_POINTS = {0: 1, 1: 241, 2: 41}
_REGION_ZOOM = {0: 1, 1: 21, 2: 9}
_MOST_STEPS = 80  # along a flat rim rounding alone would go on for ever
_AT_EDGE = 1e-6  # in log exponents
_SEARCH = (float(np.log(EXPONENT_SEARCH[0])), float(np.log(EXPONENT_SEARCH[1])))

# Exponents (K, q) -> what the coefficients in scaled units (K, m) are multiplied with and summed.
Weights = Callable[[Floats], Floats]


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


def union(intervals: list[Interval]) -> Interval:
    """The smallest interval that holds all of them; open where one is."""
    lows, highs = [i.low for i in intervals], [i.high for i in intervals]
    low = None if None in lows else min(low for low in lows if low is not None)
    high = None if None in highs else max(high for high in highs if high is not None)
    return Interval(low, high)


def threshold(problem: Problem, best: Solution, level: float) -> float | None:
    """Largest sum of squares of the means of settings inside the interval; None without degrees of freedom."""
    if problem.freedom < 1:
        return None
    allowed = best.rss * float(fdtri(1, problem.freedom, level)) / problem.freedom
    # A table without any noise would leave nothing to bracket but the search's own last digits.
    exact = 1e-14 * float(np.sum(problem.points.weight * problem.points.loss**2))
    return best.misfit_rss + max(allowed, exact)


def profile(problem: Problem, best: Solution, name: str, level: float = 0.95) -> Interval:
    """F-profile interval of parameter ``name`` of the problem's form."""
    return profiles(problem, best, (name,), level)[name]


def profiles(problem: Problem, best: Solution, names: tuple[str, ...], level: float = 0.95) -> dict[str, Interval]:
    """F-profile intervals of several parameters, the exponents' region found once."""
    limit = threshold(problem, best, level)
    if limit is None:
        return dict.fromkeys(names, OPEN)
    form, found = problem.form, {}
    coefficients = [name for name in names if name in form.coefficients]
    for name in form.exponents if coefficients else names:
        if name in form.exponents:
            found[name] = _profile_exponent(problem, best, form.exponents.index(name), limit)
    for name in coefficients:
        j = form.coefficients.index(name)

        def weights(exponents: Floats, j: int = j) -> Floats:
            units = problem.columns_at(exponents, problem.points.axes)[1]
            chosen = np.zeros_like(units)
            chosen[:, j] = units[:, j]
            return chosen

        found[name] = _extremes(problem, best, weights, limit, [found[e] for e in form.exponents])
    return {name: found[name] for name in names}


def profile_at(
    problem: Problem,
    best: Solution,
    axes: Mapping[str, Floats],
    signs: Floats,
    level: float = 0.95,
    known: Mapping[str, Interval] | None = None,
) -> Interval:
    """F-profile interval of ``sum(signs * law(axes))`` over N places: a predicted loss, or a difference of two.

    ``known`` may hold the exponents' profiles of the same level, which are found otherwise.
    """
    limit = threshold(problem, best, level)
    if limit is None:
        return OPEN
    names = problem.form.exponents
    if known is not None and all(name in known for name in names):
        region = [known[name] for name in names]
    else:
        region = [_profile_exponent(problem, best, i, limit) for i in range(len(names))]

    def weights(exponents: Floats) -> Floats:
        combined: Floats = np.einsum("n,knm->km", signs, problem.columns_at(exponents, axes)[0])
        return combined

    return _extremes(problem, best, weights, limit, region, open_at_edge=False)


def delta_t(problem: Problem, best: Solution, level: float = 0.95) -> dict[str, Interval]:
    """Wald intervals with Student's t from the Jacobian at the optimum: a check of the profile, not the answer.

    Exponents on the scale of their logarithm, as the search has them; coefficients of zero are held there.
    """
    form = problem.form
    if problem.freedom < 1:
        return dict.fromkeys(form.parameters, OPEN)
    columns, units = problem.design(best.exponents[None, :])
    columns, scaled = columns[0], best.coefficients / units[0]
    jacobian, names = [], []
    for i, name in enumerate(form.exponents):
        j = next(j for j, term in enumerate(form.terms) if term.exponent == name)
        logs = np.log(problem.points.axes[str(form.terms[j].axis)])
        # In plain coefficients: d(a x^-e) / d(log e) = -e log(x) a x^-e.
        jacobian.append(-best.exponents[i] * logs * scaled[j] * columns[:, j])
        names.append(name)
    for j, name in enumerate(form.coefficients):
        if best.coefficients[j] > 0:
            # For a power's coefficient the derivative is by its logarithm, which never runs out of range.
            jacobian.append(scaled[j] * columns[:, j])
            names.append(name)
    design = np.stack(jacobian, axis=1) * np.sqrt(problem.points.weight)[:, None]
    covariance = np.linalg.pinv(design.T @ design, hermitian=True) * best.rss / problem.freedom
    reach = float(stdtrit(problem.freedom, 0.5 + level / 2)) * np.sqrt(np.maximum(np.diag(covariance), 0.0))
    found = dict.fromkeys(form.parameters, OPEN)
    for name, width in zip(names, reach, strict=True):
        value = problem.value(best, name)
        if name == form.floor:
            found[name] = Interval(max(value * (1.0 - width), 0.0), value * (1.0 + width))
        elif width < 50.0:
            found[name] = Interval(value * float(np.exp(-width)), value * float(np.exp(width)))
    return found


def _profile_exponent(problem: Problem, best: Solution, index: int, limit: float) -> Interval:
    centre = float(np.log(best.exponents[index]))
    ends = [_outermost_crossing(problem, index, float(edge), centre, limit) for edge in np.log(EXPONENT_SEARCH)]
    low, high = (None if end is None else float(np.exp(end)) for end in ends)
    return Interval(low, high)


def _outermost_crossing(problem: Problem, index: int, edge: float, centre: float, limit: float) -> float | None:
    """Where the profile first falls to ``limit`` on the way from ``edge`` to the optimum; None if it is below at once.

    The whole span is scanned, so that a second valley below the limit counts as what the runs leave open.
    """
    if abs(centre - edge) < _AT_EDGE:
        return None
    outside, inside, points = edge, centre, _SCAN_POINTS
    near: tuple[float, float] | None = None
    # The other exponent's own error, squared, must stay far below what the limit allows.
    total = float(np.sum(problem.points.weight * problem.points.loss**2))
    coarse = 1e-3 if limit > 1e-9 * total else 1e-7
    while abs(inside - outside) > 1e-7:
        steps = np.linspace(outside, inside, points)
        misfit, other = problem.misfit_along(index, steps, near, coarse if near is None else min(coarse, 1e-5))
        points = _RESCAN_POINTS
        below = misfit <= limit
        below[-1] = True  # the optimum, or a point found below in the scan before
        first = int(np.argmax(below))
        if first == 0:
            return None if outside == edge else outside
        outside, inside = float(steps[first - 1]), float(steps[first])
        ends = sorted((float(other[first - 1]), float(other[first])))
        margin = 0.02 + 0.25 * (ends[1] - ends[0])
        near = (max(ends[0] - margin, _SEARCH[0]), min(ends[1] + margin, _SEARCH[1]))
    return inside


def _extremes(
    problem: Problem,
    best: Solution,
    weights: Weights,
    limit: float,
    region: list[Interval],
    *,
    open_at_edge: bool = True,
) -> Interval:
    """Range of ``weights . coefficients`` over every set of parameters whose misfit is at most ``limit``.

    At given exponents that set is an ellipsoid in the coefficients, so the range there is closed; the profile is the
    union over the exponents of the region. Where an end leaves the non-negative coefficients, the faces without some
    of them hold the end instead. With ``open_at_edge`` an end that only the edge of an exponent's search made is none.
    """
    box = np.log([[i.low or EXPONENT_SEARCH[0], i.high or EXPONENT_SEARCH[1]] for i in region]).reshape(-1, 2)
    dimensions = len(region)
    ends = []
    for sign in (-1.0, 1.0):
        axes = [np.linspace(low, high, _REGION_POINTS[dimensions]) for low, high in box]
        trials = np.stack([g.ravel() for g in np.meshgrid(*axes)], axis=1) if dimensions else np.zeros((1, 0))
        trials = np.concatenate([trials, np.log(best.exponents)[None, :]])
        values = sign * _ends_at(problem, np.exp(trials), weights, limit, sign)
        k = int(np.argmax(values))
        centre, value = trials[k], float(values[k])
        reach = (box[:, 1] - box[:, 0]) / max(_REGION_POINTS[dimensions] - 1, 1)
        offsets = np.linspace(-1.0, 1.0, _REGION_ZOOM[dimensions])
        window = np.stack([g.ravel() for g in np.meshgrid(*[offsets] * dimensions)], axis=1) if dimensions else None
        steps = 0
        while window is not None and np.max(reach) > 1e-7 and steps < _MOST_STEPS:
            steps += 1
            around = np.clip(centre + reach * window, box[:, 0], box[:, 1])
            values = sign * _ends_at(problem, np.exp(around), weights, limit, sign)
            k = int(np.argmax(values))
            on_rim = bool(np.any(np.abs(window[k]) > 0.99)) and values[k] > value
            if values[k] > value:
                centre, value = around[k], float(values[k])
            if not on_rim:
                reach = reach * 2.0 * (offsets[1] - offsets[0])
        edges = np.log(EXPONENT_SEARCH)
        stuck = bool(np.any((centre < edges[0] + _AT_EDGE) | (centre > edges[1] - _AT_EDGE)))
        ends.append(None if (stuck and open_at_edge) or not np.isfinite(value) else sign * value)
    return Interval(ends[0], ends[1])


def _ends_at(problem: Problem, exponents: Floats, weights: Weights, limit: float, sign: float) -> Floats:
    """The lower (sign -1) or upper (1) end at each of K exponents, (K,); minus sign times infinity where there is none.

    Raises nothing: a face without freedom has no end.
    """
    columns, target, _ = problem.weighted_design(exponents)
    wanted = weights(exponents)
    trials, _, width = columns.shape
    found = np.full(trials, -sign * np.inf)
    targets = np.broadcast_to(target, columns.shape[:2])
    faces = [list(active) for size in range(width, 0, -1) for active in combinations(range(width), size)]
    pending = np.arange(trials)
    for active in faces:
        if pending.size == 0:
            break
        whole = len(active) == width
        some, along = columns if whole else columns[pending][:, :, active], wanted[pending][:, active]
        misfit, solved = least_squares(some, targets[pending])
        inside = np.flatnonzero(misfit <= limit)
        if inside.size == 0:
            if whole:
                break
            continue
        rows, some, along, misfit, solved = pending[inside], some[inside], along[inside], misfit[inside], solved[inside]
        gram = np.einsum("kcm,kcn->kmn", some, some)
        ridge = 1e-14 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(len(active))
        towards = np.linalg.solve(gram + ridge, along[:, :, None])[:, :, 0]
        leverage = np.maximum(np.einsum("km,km->k", along, towards), 0.0)
        step = np.sqrt((limit - misfit) / np.where(leverage > 0, leverage, np.inf))
        end = solved + sign * step[:, None] * towards
        scale = 1e-12 * np.max(np.abs(solved), axis=1, keepdims=True)
        feasible = np.all(end >= -scale, axis=1)
        value = np.where(feasible, np.sum(along * end, axis=1), -sign * np.inf)
        found[rows] = np.maximum(found[rows], value) if sign > 0 else np.minimum(found[rows], value)
        if whole:
            # An end inside the non-negative coefficients cannot be passed by one on a face.
            # With all columns outside the limit every face is outside too.
            pending = rows[~feasible]
    return found
