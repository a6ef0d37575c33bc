"""One law on many tables of the same settings at once: bootstraps, simulations, leave-one-out of each of them.

Tables that share their axes share the design: at each point of a grid of exponents the orthogonal factors are computed
once, and the misfit of every table is one matrix product. From the lowest grid points Gauss-Newton steps on the
variable projection (Kaufman, BIT 15 (1975) 49) run for all tables together. Same minimum as :class:`Problem`, which
takes one table and asks more of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from scaling_ray.laws.fit import Floats, non_negative
from scaling_ray.laws.forms import EXPONENT_SEARCH, Form

_GRID_POINTS = {1: 601, 2: 37}
_STARTS = {1: 1, 2: 2}
_STEPS = 60
_HALVINGS = 16  # of 1% in the exponent
_TABLES_AT_ONCE = 500
_LOW, _HIGH = (float(np.log(edge)) for edge in EXPONENT_SEARCH)


@dataclass(frozen=True)
class Solutions:
    """The best point of each of B tables."""

    exponents: Floats  # (B, q)
    coefficients: Floats  # (B, m) in plain units
    misfit_rss: Floats  # (B,) of the means of settings


class Design:
    """A form on S settings with known axes and runs, ready for any losses."""

    def __init__(self, form: Form, axes: Mapping[str, Floats], runs: Floats) -> None:
        """Factor the grid; ``axes`` and ``runs`` are (S,) each, the form has one exponent or two.

        Raises:
            ValueError: a form without exponents, or with a logarithm: they need no search.
        """
        if not form.exponents or any(term.axis and not term.exponent for term in form.terms):
            raise ValueError(f"{form.name} has no exponents to search, or a term without one")
        self.form, self.axes, self.runs = form, axes, np.asarray(runs, dtype=np.float64)
        self._root = np.sqrt(self.runs)
        self._reference = {axis: float(np.exp(np.mean(np.log(axes[axis])))) for axis in form.axes}
        self._logs = {axis: np.log(np.asarray(axes[axis]) / self._reference[axis]) for axis in form.axes}
        self._owner = [
            (j, form.exponents.index(t.exponent), self._logs[str(t.axis)])
            for j, t in enumerate(form.terms)
            if t.exponent
        ]
        count = len(form.exponents)
        self.grid_axis = np.linspace(_LOW, _HIGH, _GRID_POINTS[count])
        self.grid = np.stack([g.ravel() for g in np.meshgrid(*[self.grid_axis] * count, indexing="ij")], axis=1)
        columns = self._columns(self.grid)
        width = columns.shape[2]
        self._faces = []
        for size in range(1, width + 1):
            for active in combinations(range(width), size):
                unit, triangle = np.linalg.qr(columns[:, :, active])
                # Columns that coincide (an exponent near zero beside a floor) leave a pivot of rounding size.
                diagonal = np.einsum("kmm->km", triangle)
                diagonal[np.abs(diagonal) < 1e-13] = 1e-13
                self._faces.append((active, unit, np.linalg.inv(triangle)))

    def _columns(self, logs: Floats) -> Floats:
        """Weighted columns (K, S, m) at log exponents (K, q)."""
        columns = np.ones((len(logs), self.runs.size, len(self.form.terms)))
        for j, i, axis in self._owner:
            columns[:, :, j] = np.exp(-np.exp(logs[:, i])[:, None] * axis[None, :])
        weighted: Floats = columns * self._root[None, :, None]
        return weighted

    def grid_misfit(self, loss: Floats) -> Floats:
        """Misfit of the best non-negative coefficients at each point of the grid, for means (B, S): (B, K)."""
        target = np.asarray(loss) * self._root
        total = np.sum(target**2, axis=1)[:, None]
        lowest = np.broadcast_to(total, (len(target), len(self.grid))).copy()
        for _, unit, inverse in self._faces:
            trials, settings, width = unit.shape
            along = (target @ unit.transpose(1, 0, 2).reshape(settings, -1)).reshape(len(target), trials, width)
            solved = np.einsum("kij,bkj->bki", inverse, along)
            left = total - np.sum(along**2, axis=2)
            np.copyto(lowest, left, where=np.all(solved >= 0, axis=2) & (left < lowest))
        return lowest

    def fit(self, loss: Floats) -> Solutions:
        """Least squares of means (B, S), every table from the lowest points of the grid."""
        loss = np.atleast_2d(np.asarray(loss, dtype=np.float64))
        parts = [self._fit_part(loss[i : i + _TABLES_AT_ONCE]) for i in range(0, len(loss), _TABLES_AT_ONCE)]
        return Solutions(*(np.concatenate([part[i] for part in parts]) for i in range(3)))

    def _fit_part(self, loss: Floats) -> tuple[Floats, Floats, Floats]:
        misfit = self.grid_misfit(loss)
        count, each = len(self.form.exponents), np.arange(len(loss))
        starts = _lowest_minima(misfit.reshape((len(loss), *[self.grid_axis.size] * count)), _STARTS[count])
        best: tuple[Floats, Floats, Floats] | None = None
        for start in starts:
            found = self._descend(loss, self.grid[start])
            if best is None:
                best = found
                continue
            better = found[2] < best[2]
            best = (
                np.where(better[:, None], found[0], best[0]),
                np.where(better[:, None], found[1], best[1]),
                np.where(better, found[2], best[2]),
            )
        assert best is not None and len(each) == len(best[2])
        return best

    def _descend(self, loss: Floats, logs: Floats) -> tuple[Floats, Floats, Floats]:
        """Damped Gauss-Newton on the log exponents of all tables, from ``logs`` (B, q)."""
        target = loss * self._root
        logs = logs.copy()
        columns = self._columns(logs)
        misfit, scaled = non_negative(columns, target)
        damping = np.full(len(loss), 1e-3)
        moving = np.arange(len(loss))
        for _ in range(_STEPS):
            if moving.size == 0:
                break
            some, beta = columns[moving], scaled[moving]
            residual = target[moving] - np.einsum("bcm,bm->bc", some, beta)
            slopes = np.empty((moving.size, self.runs.size, logs.shape[1]))
            for j, i, axis in self._owner:
                power = np.exp(logs[moving, i])[:, None]
                slopes[:, :, i] = -power * axis * some[:, :, j] * beta[:, j, None]
            # What the coefficients in use can follow is no slope of the misfit; columns out of use span nothing.
            spanned: list[Floats] = []
            for j in range(some.shape[2]):
                rest = some[:, :, j] * (beta[:, j, None] > 0)
                for unit in spanned:
                    rest = rest - np.sum(unit * rest, axis=1, keepdims=True) * unit
                spanned.append(rest / (np.linalg.norm(rest, axis=1, keepdims=True) + 1e-300))
            for unit in spanned:
                slopes = slopes - unit[:, :, None] * np.einsum("bc,bcq->bq", unit, slopes)[:, None, :]
            gradient = np.einsum("bcq,bc->bq", slopes, residual)
            normal = np.einsum("bcp,bcq->bpq", slopes, slopes)
            diagonal = np.einsum("bqq->bq", normal)
            normal = normal + np.eye(logs.shape[1]) * (damping[moving, None] * diagonal + 1e-300)[:, None, :]
            step = np.clip(np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], -0.3, 0.3)
            trial = np.clip(logs[moving] + step, _LOW, _HIGH)
            tried = self._columns(trial)
            values, solved = non_negative(tried, target[moving])
            lower = values < misfit[moving]
            rows = moving[lower]
            small = np.max(np.abs(trial - logs[moving]), axis=1) < 1e-10
            logs[rows], misfit[rows], scaled[rows] = trial[lower], values[lower], solved[lower]
            columns[rows] = tried[lower]
            damping[moving] = np.where(lower, damping[moving] * 0.1, damping[moving] * 10.0)
            moving = moving[~(small | (damping[moving] > 1e8))]
        units = np.ones_like(scaled)
        for j, i, _ in self._owner:
            axis_name = str(self.form.terms[j].axis)
            units[:, j] = self._reference[axis_name] ** np.exp(logs[:, i])
        return np.exp(logs), scaled * units, misfit

    def profile(self, loss: Floats, solutions: Solutions, limit: Floats) -> tuple[Floats, Floats]:
        """Outermost exponents whose misfit is at most ``limit`` (B,), for a form with one exponent: low, high (B,).

        NaN where an end is open. Brackets come from the grid, 1% apart in the exponent, and are then halved.
        """
        misfit = self.grid_misfit(loss)
        target = np.asarray(loss) * self._root
        below = misfit <= limit[:, None]
        centre = np.log(solutions.exponents[:, 0])
        axis, any_below = self.grid_axis, below.any(axis=1)
        first, last = below.argmax(axis=1), axis.size - 1 - below[:, ::-1].argmax(axis=1)
        ends = []
        for inner, step, edge in ((first, -1, 0), (last, 1, axis.size - 1)):
            # An interval narrower than the grid holds the optimum and no grid point.
            nearest = np.searchsorted(axis, centre) - (1 if step < 0 else 0)
            outer = axis[np.clip(np.where(any_below, inner + step, nearest), 0, axis.size - 1)]
            inside = np.where(any_below, axis[inner], centre)
            # The optimum may lie between the last grid point below the limit and the end.
            inside = np.where(step * (centre - inside) > 0, centre, inside)
            for _ in range(_HALVINGS):
                middle = 0.5 * (inside + outer)
                low_enough = non_negative(self._columns(middle[:, None]), target)[0] <= limit
                inside, outer = np.where(low_enough, middle, inside), np.where(low_enough, outer, middle)
            ends.append(np.where(below[:, edge], np.nan, np.exp(inside)))
        return ends[0], ends[1]


def refit(form: Form, axes: Mapping[str, Floats], losses: Floats) -> Solutions:
    """Fit a law to B sets of losses (B, R) of the same R runs, for example draws of a bootstrap or of seed noise.

    Runs that share all ``axes`` (each (R,)) are gathered into their mean, which is least squares over runs.
    """
    stacked = np.stack([np.asarray(axes[name], dtype=np.float64) for name in form.axes], axis=1)
    settings, setting_of_run, runs = np.unique(stacked, axis=0, return_inverse=True, return_counts=True)
    belongs = np.zeros((len(stacked), len(settings)))
    belongs[np.arange(len(stacked)), np.asarray(setting_of_run).reshape(-1)] = 1.0
    means = np.atleast_2d(losses) @ (belongs / runs)
    named = {name: settings[:, i] for i, name in enumerate(form.axes)}
    return Design(form, named, runs.astype(np.float64)).fit(means)


def _lowest_minima(misfit: Floats, count: int) -> list[np.ndarray]:
    """Flat indices of the ``count`` lowest grid minima of each table; the lowest again where there are fewer."""
    lowest = np.ones(misfit.shape, dtype=bool)
    for dimension in range(1, misfit.ndim):
        size = misfit.shape[dimension]
        widths = [(1, 1) if d == dimension else (0, 0) for d in range(misfit.ndim)]
        padded = np.pad(misfit, widths, constant_values=np.inf)
        for first in (0, 2):
            lowest &= misfit <= np.take(padded, range(first, first + size), axis=dimension)
    flat = np.where(lowest, misfit, np.inf).reshape(len(misfit), -1)
    order = np.argpartition(flat, min(count, flat.shape[1] - 1), axis=1)[:, :count]
    values = np.take_along_axis(flat, order, axis=1)
    order = np.take_along_axis(order, np.argsort(values, axis=1), axis=1)
    values = np.sort(values, axis=1)
    return [np.where(np.isfinite(values[:, i]), order[:, i], order[:, 0]) for i in range(order.shape[1])]
