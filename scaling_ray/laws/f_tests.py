"""F-tests of one fit: whether the loss depends on an axis, and whether the form describes the means of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

from scaling_ray.laws.fit import Points, Problem, Solution
from scaling_ray.laws.forms import Form

MIN_RESIDUAL_FREEDOM = 8  # without repeated settings, residuals stand in for seed noise from here on


@dataclass(frozen=True)
class Tests:
    """F-tests of one fit; None where the runs cannot answer."""

    effect_p: Mapping[str, float | None]  # axis -> p of "the loss does not depend on it"
    lack_of_fit_p: float | None


def f_tests(problem: Problem, best: Solution) -> Tests:
    """Does the loss depend on each axis, and does the form describe the means of the settings?

    Both against the noise between runs of the same setting; where no setting was repeated, the dependence is tested
    against the residuals, and only with enough of them.
    """
    points, form = problem.points, problem.form
    freedom, noise_rss = points.replicate_freedom, points.replicate_rss
    if freedom < 1 and problem.freedom >= MIN_RESIDUAL_FREEDOM:
        freedom, noise_rss = problem.freedom, best.rss
        saturated = len(form.parameters)
    else:
        saturated = points.n_settings
    effects: dict[str, float | None] = {}
    for axis in form.axes:
        others = [points.axes[name] for name in form.axes if name != axis]
        group = (
            np.unique(np.stack(others, axis=1), axis=0, return_inverse=True)[1]
            if others
            else np.zeros(points.n_settings)
        )
        rss, groups = _within(points, np.asarray(group).reshape(-1))
        rss += points.replicate_rss
        effects[axis] = _f_tail(rss - noise_rss, saturated - groups, noise_rss, freedom)
        if saturated - groups < 1 <= problem.freedom:
            effects[axis] = _nested_effect(problem, best, axis)
    extra = points.n_settings - len(form.parameters)
    # Rounding is no lack of fit, even where copies of one loss leave no noise to hide it.
    rounding = 1e-20 * float(np.sum(points.runs * points.loss**2))
    misfit = best.misfit_rss if best.misfit_rss > rounding else 0.0
    lack = _f_tail(misfit, extra, points.replicate_rss, points.replicate_freedom)
    return Tests(effects, lack)


def _nested_effect(problem: Problem, best: Solution, axis: str) -> float | None:
    """Whether the law without an axis does as well, by the residuals of the whole law.

    For tables where nearly every setting has values of its own, such as a D that differs from run to run.
    """
    form = problem.form
    shorter = Form(f"{form.name}_without_{axis}", "", tuple(term for term in form.terms if term.axis != axis))
    reduced = Problem(shorter, problem.points).search()
    extra = len(form.parameters) - len(shorter.parameters)
    return _f_tail(reduced.rss - best.rss, extra, best.rss, problem.freedom)


def _within(points: Points, group: NDArray) -> tuple[float, int]:
    """Sum of squares of means (weighted by runs) around their group's mean, and the number of groups."""
    total, labels = 0.0, np.unique(group)
    for label in labels:
        here = group == label
        mean = np.average(points.loss[here], weights=points.runs[here])
        total += float(np.sum(points.runs[here] * (points.loss[here] - mean) ** 2))
    return total, labels.size


def _f_tail(rss: float, freedom: int, noise_rss: float, noise_freedom: int) -> float | None:
    if noise_freedom < 1 or freedom < 1:
        return None
    if noise_rss <= 0:
        return 0.0 if rss > 0 else 1.0
    ratio = max(rss, 0.0) / freedom / (noise_rss / noise_freedom)
    return float(fdtrc(freedom, noise_freedom, ratio))
