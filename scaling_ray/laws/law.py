"""One form fitted to one set of runs: estimates, intervals, refits, tests. Its verdict is in :mod:`verdict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import fdtrc, fdtri, stdtrit

from scaling_ray.laws.f_tests import Tests, f_tests
from scaling_ray.laws.fit import Floats, Points, Problem, Solution, gather
from scaling_ray.laws.forms import Form
from scaling_ray.laws.intervals import OPEN, Interval, delta_t, profiles, threshold, union
from scaling_ray.laws.noise import MIN_FREEDOM, Noise, model_noise
from scaling_ray.laws.points import Rows
from scaling_ray.laws.refits import Basin, Refit, descend, leave_one_out
from scaling_ray.laws.valley import Valley

CHI_SQUARED_95 = 3.8415  # of one degree of freedom
LACK_OF_FIT_P = 0.01  # below it, noise and misfit are no estimates of one variance


@dataclass(frozen=True)
class Width:
    """What every shown interval of a law is made of, in units of the modelled variance of a setting's mean.

    ``variance`` is the larger of that of the noise (1) and that of the misfit, known to ``freedom`` degrees;
    ``allowed`` is how far the misfit may rise above its minimum inside a 95% interval, ``statistical`` the same from
    the noise between runs alone, ``left_out`` the same in a fit that leaves a size out: at the same variance, taken as
    known, since the interval of all runs holds what is unknown of it. None where nothing is left over to judge the law
    by. ``misfit_shares`` (S,) are the parts of that variance that are misfit and not noise.
    """

    variance: float
    freedom: float
    allowed: float | None
    statistical: float | None
    left_out: float | None
    misfit_shares: Floats


@dataclass(frozen=True)
class Fitted:
    """A form on the runs of ``points``: estimates, both kinds of interval, refits and tests.

    ``best`` is None, and there are no estimates, where the settings cannot fix the parameters. ``intervals`` speak of
    the noise between runs; ``shown`` are the union of the widened interval with those of the refits. ``tests`` and
    ``basin`` are None where only estimates were asked for, or the form has no exponent.
    """

    form: Form
    points: Points
    noise: Noise
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    shown: Mapping[str, Interval]
    deltas: Mapping[str, Interval]
    at_bound: Mapping[str, bool]
    refits: Sequence[Refit]
    tests: Tests | None
    best: Solution | None
    width: Width
    basin: Basin | None

    @property
    def problem(self) -> Problem:
        """The search that ``best`` came from."""
        return Problem(self.form, self.points)

    @property
    def aicc(self) -> float | None:
        """Small-sample AIC over distinct settings: seeds of one setting are no further evidence about the shape."""
        count, free = self.points.n_settings, len(self.form.parameters) + 1
        if self.best is None or count <= free + 1:
            return None
        rss = self.unweighted_rss - self.points.noise_rss
        if rss <= 0:
            return None
        return float(count * np.log(rss / count) + 2 * free + 2 * free * (free + 1) / (count - free - 1))

    @property
    def residuals(self) -> Floats:
        """Mean less law for each setting, (S,)."""
        assert self.best is not None
        left: Floats = self.points.loss - self.problem.predict(self.best, self.points.axes)
        return left

    @property
    def unweighted_rss(self) -> float:
        """Sum of squares of runs around the law, in loss units."""
        return float(np.sum(self.points.runs * self.residuals**2)) + self.points.noise_rss

    def headline_interval(self, name: str) -> Interval:
        """The shown interval of a parameter."""
        return self.shown.get(name, OPEN)

    def loss_at(self, place: Mapping[str, float]) -> tuple[float, Interval]:
        """The law's loss at a place (axis -> value), and its range over the widened law and all refits."""
        assert self.best is not None
        value = self.form.loss_at(self.parameters, place)
        if self.basin is None or self.width.allowed is None:
            return value, OPEN
        return value, self.over_refits(value, lambda basin: basin.loss_at(place))

    def over_refits(self, value: float, of: Callable[[Basin], Interval]) -> Interval:
        """Union of what the widened law gives for a quantity of value ``value`` with what counts of each refit."""
        assert self.basin is not None
        return union([of(self.basin), *(refit.counted(value, of(refit.basin)) for refit in self.refits)])

    def reach_of_mean(self, place: Mapping[str, float], runs: float) -> float:
        """Half-width of a 95% interval for the mean of ``runs`` runs around the law at a place: noise and misfit."""
        near = np.argmin(sum(np.abs(np.log(self.points.axes[axis] / place[axis])) for axis in self.form.axes))
        if self.noise.variance is None:
            variance = self.noise.least_misfit**2
        else:
            variance = float(self.noise.variance[near]) / runs + self.noise.least_misfit**2
        return float(stdtrit(self.width.freedom, 0.975) * np.sqrt(self.width.variance * variance))


def fit_law(
    form: Form, rows: Rows, *, thorough: bool = True, plain: bool = False, only: tuple[str, ...] | None = None
) -> Fitted:
    """Fit a form to runs.

    Args:
        form: the law.
        rows: columns of the runs, each (R,).
        thorough: with refits and tests; else estimates and intervals of alpha and the floor only.
        plain: every run weighs the same, whatever its size's noise.
        only: parameters to find intervals of; all where None.
    """
    axes = {axis: rows[axis] for axis in form.axes}
    gathered = gather(axes, rows["loss"])
    noise = model_noise(gathered)
    points = gathered if plain else weighted(gathered, noise)
    logs = [np.log(values) for values in points.axes.values()]
    rank = np.linalg.matrix_rank(np.stack([np.ones(points.n_settings), *logs], axis=1), tol=1e-6)
    if points.n_settings < len(form.parameters) or rank < 1 + len(form.axes):
        unknown = Width(1.0, 0.0, None, None, None, np.ones(points.n_settings))
        return Fitted(form, points, noise, {}, {}, {}, {}, {}, [], None, None, unknown, None)
    problem = Problem(form, points)
    valley = Valley(form, points.axes) if form.exponents else None
    if valley is None:
        best = problem.search()
    else:
        coarse = valley.whole(points.loss, points.weight)
        _, logs_of_best = valley.minimum(points.loss, points.weight, coarse)
        best = problem.search(near=np.exp(logs_of_best))
    brief = tuple(name for name in form.parameters if name in ("alpha", "beta", form.floor))
    wanted = only or (form.parameters if thorough else brief)
    width = _width(problem, best, noise)
    basin, shown, refits = None, {}, []
    if valley is not None and width.allowed is not None and not plain:
        basin = descend(valley, points, points.weight, width.allowed, at=best)
        shown = {name: basin.interval(name) for name in wanted}
        if thorough and width.left_out is not None:
            names = tuple(dict.fromkeys((*wanted, *form.exponents)))
            for exponent in form.exponents:
                refits += leave_one_out(
                    valley, points, exponent, names, width.left_out, width.statistical, width.misfit_shares, best
                )
            shown = {
                name: union([shown[name], *(_counted(r, name, problem.value(best, name)) for r in refits)])
                for name in wanted
            }
    intervals = _statistical(problem, best, wanted, valley, width)
    # The exact ends of the statistical interval are never outside the shown ones, which are interpolated.
    shown = {name: union([shown[name], intervals[name]]) if name in shown else intervals[name] for name in wanted}
    return Fitted(
        form=form,
        points=points,
        noise=noise,
        parameters={name: problem.value(best, name) for name in form.parameters},
        intervals=intervals,
        shown=shown,
        deltas=delta_t(problem, best),
        at_bound={name: best.at_search_edge(i) for i, name in enumerate(form.exponents)},
        refits=refits,
        tests=f_tests(form, points, noise, best) if thorough and form.axes else None,
        best=best,
        width=width,
        basin=basin,
    )


def weighted(points: Points, noise: Noise) -> Points:
    """The same settings, each weighing what the modelled variance of its mean lets it; misfits are then chi-squares."""
    weight = 1.0 / noise.of_means(points.runs)
    known = float(noise.freedom) if noise.variance is not None else points.replicate_rss / noise.least_misfit**2
    if noise.variance is not None:
        # The share of the modelled variance that noise between runs explains.
        known *= float(np.mean(weight * noise.variance / points.runs))
    return replace(points, run_weight=weight / points.runs, replicate_rss=known, noise_rss=points.replicate_rss)


def _width(problem: Problem, best: Solution, noise: Noise) -> Width:
    """The rule for intervals: the larger of noise and misfit, never narrower than the statistical one."""
    points = problem.points
    left = points.n_settings - len(problem.form.parameters)
    limit = threshold(problem, best, 0.95)
    statistical = None if limit is None else limit - best.misfit_rss
    misfit = best.misfit_rss / left if left > 0 else 0.0
    if noise.variance is None:
        if left < 1:
            return Width(1.0, 0.0, None, statistical, None, np.ones(points.n_settings))
        variance, freedom, shares = max(misfit, 1.0), float(left), np.zeros(points.n_settings)
    else:
        # Satterthwaite: the declared part of the variance is known exactly, that of the runs as replicates show it.
        shares = noise.variance / points.runs / noise.of_means(points.runs)
        known = noise.freedom / max(float(np.mean(shares**2)), 1e-3)
        if misfit <= 1.0:
            variance, freedom = 1.0, known
        elif fdtrc(left, known, misfit) >= LACK_OF_FIT_P:
            # Both estimate one variance as far as anybody can see: it is known by the degrees of freedom of both.
            variance, freedom = misfit, known + left
        else:
            variance, freedom = misfit, float(left)
    allowed = max(variance * float(fdtri(1, freedom, 0.95)), statistical or 0.0)
    return Width(variance, freedom, allowed, statistical, CHI_SQUARED_95 * variance, 1.0 - shares / variance)


def _counted(refit: Refit, name: str, whole: float) -> Interval:
    """What counts of a refit's interval of a parameter."""
    if name in refit.basin.valley.names:
        return refit.counted_exponent(whole, refit.intervals[name])
    return refit.counted(whole, refit.intervals[name])


def _statistical(
    problem: Problem, best: Solution, names: tuple[str, ...], valley: Valley | None, width: Width
) -> dict[str, Interval]:
    """95% intervals from the noise between runs: exact for one exponent, from the grid for two."""
    if valley is None or valley.dimensions == 1:
        return profiles(problem, best, names)
    if width.statistical is None:
        return dict.fromkeys(names, OPEN)
    basin = descend(valley, problem.points, problem.points.weight, width.statistical, at=best)
    return {name: basin.interval(name) for name in names}


__all__ = ["MIN_FREEDOM", "Fitted", "Width", "fit_law", "weighted"]
