"""Least squares on the loss, by variable projection: exponents outside, non-negative coefficients inside.

Given the exponents a law is linear in its coefficients, so each trial exponent costs one small exact
non-negative least-squares problem and the outer search has one or two dimensions: it can be covered by a grid
(every grid minimum is a start) and each start refined by a shrinking grid, without derivatives.
Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973) 413.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from scaling_ray.laws.forms import EXPONENT_SEARCH, Form

Floats = NDArray[np.float64]

_GRID_POINTS = {0: 1, 1: 121, 2: 37}  # per free exponent, equally spaced in its logarithm
_ZOOM_POINTS = {0: 1, 1: 17, 2: 9}
_STARTS = 4
_MOST_STEPS = 200  # along a flat valley rounding alone would go on for ever
_LOG_LOW, _LOG_HIGH = (float(np.log(edge)) for edge in EXPONENT_SEARCH)


@dataclass(frozen=True)
class Points:
    """Runs gathered into settings of equal axes, S of them.

    Least squares over runs equals weighted least squares over their means plus ``replicate_rss``, the sum of squares
    of runs around the mean of their setting, which no law can explain.
    """

    axes: Mapping[str, Floats]  # name -> (S,)
    loss: Floats  # (S,) mean over the runs of the setting
    runs: Floats  # (S,) number of runs
    replicate_rss: float
    run_weight: Floats | None = None  # (S,) weight of one run of the setting; one each where None
    setting_rss: Floats | None = None  # (S,) unweighted sum of squares of runs around the mean of their setting
    noise_rss: float = 0.0  # their sum, in loss units whatever the weights

    @property
    def weight(self) -> Floats:
        """Weight of each mean, (S,): its runs, times what one of them weighs."""
        return self.runs if self.run_weight is None else self.runs * self.run_weight

    @property
    def n_runs(self) -> int:
        """Runs of all settings."""
        return int(self.runs.sum())

    @property
    def n_settings(self) -> int:
        """Settings of distinct axes."""
        return self.loss.size

    @property
    def replicate_freedom(self) -> int:
        """Degrees of freedom of the noise between runs of one setting."""
        return self.n_runs - self.n_settings

    def distinct(self, axis: str) -> Floats:
        """Sorted distinct values of an axis."""
        return np.unique(self.axes[axis])


def gather(axes: Mapping[str, Floats], loss: Floats) -> Points:
    """Gather runs (R,) that share all ``axes`` (each (R,)) into :class:`Points`."""
    loss = np.asarray(loss, dtype=np.float64)
    if axes:
        stacked = np.stack([np.asarray(values, dtype=np.float64) for values in axes.values()], axis=1)
        keys, setting_of_run = np.unique(stacked, axis=0, return_inverse=True)
        setting_of_run = setting_of_run.reshape(-1)
    else:
        keys, setting_of_run = np.zeros((1, 0)), np.zeros(loss.size, dtype=np.int64)
    runs = np.bincount(setting_of_run, minlength=len(keys)).astype(np.float64)
    mean = np.bincount(setting_of_run, weights=loss, minlength=len(keys)) / runs
    squares = np.bincount(setting_of_run, weights=(loss - mean[setting_of_run]) ** 2, minlength=len(keys))
    setting_rss: Floats = np.asarray(squares, dtype=np.float64)
    named = {name: keys[:, i].copy() for i, name in enumerate(axes)}
    total = float(setting_rss.sum())
    return Points(named, mean, runs, total, setting_rss=setting_rss, noise_rss=total)


@dataclass(frozen=True)
class Solution:
    """The best point of one search; sums of squares of runs (``rss``) and of the means of settings (``misfit_rss``)."""

    rss: float
    misfit_rss: float
    exponents: Floats  # (q,)
    coefficients: Floats  # (m,) in the units of the loss and the axes

    def at_search_edge(self, index: int) -> bool:
        """Whether exponent ``index`` rests on an edge of its search."""
        log_value = float(np.log(self.exponents[index]))
        return log_value < _LOG_LOW + 1e-6 or log_value > _LOG_HIGH - 1e-6


class Problem:
    """One form on one set of points; all searches over it."""

    def __init__(self, form: Form, points: Points) -> None:
        """Take ``form`` to ``points``, whose axes must include the form's."""
        self.form, self.points = form, points
        self._root_weight = np.sqrt(points.weight)
        self._target = points.loss * self._root_weight
        # Axes are divided by their geometric mean, so that columns stay near one at every exponent.
        self._reference = {axis: float(np.exp(np.mean(np.log(points.axes[axis])))) for axis in form.axes}
        self._largest = {axis: float(np.max(points.axes[axis])) for axis in form.axes}

    @property
    def freedom(self) -> int:
        """Residual degrees of freedom: runs less free parameters."""
        return self.points.n_runs - len(self.form.parameters)

    def value(self, solution: Solution, name: str) -> float:
        """Parameter ``name`` of a solution of this problem."""
        if name in self.form.exponents:
            return float(solution.exponents[self.form.exponents.index(name)])
        return float(solution.coefficients[self.form.coefficients.index(name)])

    def columns_at(self, exponents: Floats, axes: Mapping[str, Floats]) -> tuple[Floats, Floats]:
        """The law's columns at ``axes`` (each (N,)) for K trial exponents (K, q).

        Returns:
            columns (K, N, m), and what turns their coefficients to plain units (K, m).
        """
        count = len(next(iter(axes.values()))) if axes else self.points.n_settings
        columns = np.ones((exponents.shape[0], count, len(self.form.terms)))
        units = np.ones((exponents.shape[0], len(self.form.terms)))
        for j, term in enumerate(self.form.terms):
            if term.axis is None:
                continue
            if term.exponent is None:
                columns[:, :, j] = np.log(self._largest[term.axis] / np.asarray(axes[term.axis]))[None, :]
                continue
            power = exponents[:, self.form.exponents.index(term.exponent)]
            logs = np.log(np.asarray(axes[term.axis]) / self._reference[term.axis])
            columns[:, :, j] = np.exp(-power[:, None] * logs[None, :])
            units[:, j] = self._reference[term.axis] ** power
        return columns, units

    def design(self, exponents: Floats) -> tuple[Floats, Floats]:
        """Columns (K, S, m) at the settings for K trial exponents (K, q), and their units (K, m)."""
        return self.columns_at(exponents, self.points.axes)

    def weighted_design(self, exponents: Floats) -> tuple[Floats, Floats, Floats]:
        """Columns (K, S, m) and target (S,) whose plain least squares is the weighted one, and units (K, m)."""
        columns, units = self.design(exponents)
        return columns * self._root_weight[None, :, None], self._target, units

    def solve(self, exponents: Floats) -> tuple[Floats, Floats]:
        """Best non-negative coefficients at each of K trial exponents (K, q).

        Returns:
            misfit sum of squares of the means of settings (K,) and coefficients (K, m) in plain units.
        """
        weighted, target, units = self.weighted_design(exponents)
        misfit, scaled = non_negative(weighted, np.broadcast_to(target, weighted.shape[:2]))
        return misfit, scaled * units

    def search(
        self,
        held: Mapping[int, float] | None = None,
        tolerance: float = 1e-9,
        near: Floats | None = None,
    ) -> Solution:
        """The minimum over the exponents not ``held`` (index -> value).

        Global, from every minimum of a grid; or, with ``near`` (q,), from there only.
        """
        held = held or {}
        n_exponents = len(self.form.exponents)
        free = [i for i in range(n_exponents) if i not in held]
        base = np.array([np.log(held[i]) if i in held else 0.0 for i in range(n_exponents)])
        axis = np.linspace(_LOG_LOW, _LOG_HIGH, _GRID_POINTS[len(free)]) if free else np.zeros(1)
        trials = _lattice(axis, len(free)) if near is None else np.log(near[free])[None, :]

        def misfit_at(log_free: Floats) -> tuple[Floats, Floats]:
            logs = np.tile(base, (len(log_free), 1))
            logs[:, free] = log_free
            return self.solve(np.exp(logs))

        misfit, coefficients = misfit_at(trials)
        best_trial, best_misfit, best_coefficients = trials[0], np.inf, coefficients[0]
        starts = [0] if near is not None else _local_minima(misfit.reshape((len(axis),) * len(free)))
        for start in starts:
            centre, value, found = trials[start], misfit[start], coefficients[start]
            reach = float(axis[1] - axis[0]) if free else 0.0
            offsets = np.linspace(-1.0, 1.0, _ZOOM_POINTS[len(free)])
            window = _lattice(offsets, len(free))
            steps = 0
            while reach > tolerance and steps < _MOST_STEPS:
                steps += 1
                around = np.clip(centre + reach * window, _LOG_LOW, _LOG_HIGH)
                values, solved = misfit_at(around)
                k = int(np.argmin(values))
                moved_to_rim = bool(np.any(np.abs(around[k] - centre) > 0.99 * reach))
                if values[k] < value:
                    centre, value, found = around[k], values[k], solved[k]
                else:
                    moved_to_rim = False
                if not moved_to_rim:
                    reach *= 2.0 * float(offsets[1] - offsets[0])
            if value < best_misfit:
                best_trial, best_misfit, best_coefficients = centre, float(value), found
        logs = base.copy()
        logs[free] = best_trial
        exponents = np.exp(logs)
        return Solution(best_misfit + self.points.replicate_rss, best_misfit, exponents, best_coefficients)

    def misfit_along(
        self, index: int, log_values: Floats, near: tuple[float, float] | None = None, tolerance: float = 1e-5
    ) -> tuple[Floats, Floats]:
        """Best misfit with exponent ``index`` held at each exp(log_values) (N,), the other (at most one) free.

        Args:
            index: of the exponent that is held.
            log_values: where it is held.
            near: range of the other's logarithm to start from; all of its search where None.
            tolerance: of the other's logarithm; the misfit is flat to second order there.

        Returns:
            misfit (N,) and the other's logarithm (N,), zero where there is none.
        """
        n_exponents, held = len(self.form.exponents), np.asarray(log_values)
        if n_exponents == 1:
            return self.solve(np.exp(held)[:, None])[0], np.zeros(held.size)

        def misfit_at(other: Floats) -> Floats:  # (N, T) -> (N, T)
            logs = np.empty((other.size, 2))
            logs[:, index] = np.repeat(held, other.shape[1])
            logs[:, 1 - index] = other.reshape(-1)
            return self.solve(np.exp(logs))[0].reshape(other.shape)

        axis = np.linspace(_LOG_LOW, _LOG_HIGH, 31) if near is None else np.linspace(*near, 9)
        other = np.tile(axis, (held.size, 1))
        each, reach, lowest = np.arange(held.size), float(axis[1] - axis[0]), np.full(held.size, np.inf)
        centre, offsets = np.zeros(held.size), np.linspace(-1.0, 1.0, 9)
        while True:
            misfit = misfit_at(other)
            best = np.argmin(misfit, axis=1)
            centre = np.where(misfit[each, best] < lowest, other[each, best], centre)
            lowest = np.minimum(lowest, misfit[each, best])
            if reach < tolerance:
                return lowest, centre
            other = np.clip(centre[:, None] + reach * offsets, _LOG_LOW, _LOG_HIGH)
            reach *= float(offsets[1] - offsets[0]) * 1.5

    def predict(self, solution: Solution, axes: Mapping[str, Floats]) -> Floats:
        """The law's loss at ``axes`` (each (N,))."""
        columns, units = self.columns_at(solution.exponents[None, :], axes)
        predicted: Floats = columns[0] @ (solution.coefficients / units[0])
        return predicted


def _lattice(axis: Floats, dimensions: int) -> Floats:
    """Every combination of ``axis`` values, (len(axis) ** dimensions, dimensions)."""
    return np.array(list(product(axis, repeat=dimensions))).reshape(len(axis) ** dimensions, dimensions)


def _local_minima(misfit: Floats) -> list[int]:
    """Flat indices of the lowest grid minima: a trial no higher than its neighbours along each axis."""
    lowest = np.ones(misfit.shape, dtype=bool)
    for dimension in range(misfit.ndim):
        padded = np.pad(
            misfit, [(1, 1) if d == dimension else (0, 0) for d in range(misfit.ndim)], constant_values=np.inf
        )
        size = misfit.shape[dimension]
        before, after = (np.take(padded, range(first, first + size), axis=dimension) for first in (0, 2))
        lowest &= (misfit <= before) & (misfit <= after)
    flat = np.flatnonzero(lowest.reshape(-1))
    return [int(i) for i in flat[np.argsort(misfit.reshape(-1)[flat])][:_STARTS]]


def non_negative(columns: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Exact non-negative least squares for K small problems at once, by trying every set of active columns.

    Args:
        columns: (K, S, m), m at most 4 or so.
        target: (K, S).

    Returns:
        residual sums of squares (K,) and coefficients (K, m).
    """
    trials, _, width = columns.shape
    rss = np.sum(target**2, axis=1)
    best = np.zeros((trials, width))
    pending = np.arange(trials)
    for size in range(width, 0, -1):
        for active in combinations(range(width), size):
            if pending.size == 0:
                return rss, best
            # Every column of every problem is what the first pass takes, without a copy.
            first = size == width and pending.size == trials
            some, wanted = (columns, target) if first else (columns[pending][:, :, active], target[pending])
            left, solved = least_squares(some, wanted)
            feasible = np.all(solved >= 0.0, axis=1)
            better = feasible & (left < rss[pending])
            rows = pending[better]
            rss[rows] = left[better]
            best[rows] = 0.0
            best[np.ix_(rows, active)] = solved[better]
            if size == width:
                # The unconstrained optimum, where feasible, cannot be beaten by a subset.
                pending = pending[~feasible]
    return rss, best


def least_squares(columns: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Unconstrained least squares of K problems (K, S, m), (K, S) by modified Gram-Schmidt with the target as last.

    Batched LAPACK spends most of its time entering and leaving matrices this small. Bjorck, BIT 7 (1967) 1: backward
    stable when the target is orthogonalised along with the columns.

    Returns:
        residual sums of squares (K,) and coefficients (K, m).
    """
    width = columns.shape[2]
    triangle: list[list[Floats]] = []
    unit: list[Floats] = []
    for j in range(width):
        rest = columns[:, :, j]
        # Two columns that coincide leave nothing; a pivot of rounding size keeps the residual right.
        floor = 1e-13 * np.sqrt(np.einsum("kc,kc->k", rest, rest)) + 1e-300
        row = []
        for i in range(j):
            row.append(np.einsum("kc,kc->k", unit[i], rest))
            rest = rest - row[i][:, None] * unit[i]
        row.append(np.maximum(np.sqrt(np.einsum("kc,kc->k", rest, rest)), floor))
        unit.append(rest / row[j][:, None])
        triangle.append(row)
    rest, along = target, []
    for i in range(width):
        along.append(np.einsum("kc,kc->k", unit[i], rest))
        rest = rest - along[i][:, None] * unit[i]
    solved = np.zeros((len(target), width))
    for i in reversed(range(width)):
        known = sum((triangle[j][i] * solved[:, j] for j in range(i + 1, width)), np.zeros(len(target)))
        solved[:, i] = (along[i] - known) / triangle[i][i]
    return np.einsum("kc,kc->k", rest, rest), solved
