"""F-tests of one fit: whether the loss depends on an axis, and whether the form describes the means of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

from scaling_ray.laws.fit import Floats, Points, Problem, Solution
from scaling_ray.laws.forms import Form
from scaling_ray.laws.noise import MIN_FREEDOM, Noise
from scaling_ray.laws.valley import Valley


@dataclass(frozen=True)
class Tests:
    """F-tests of one fit; None where the runs cannot answer."""

    effect_p: Mapping[str, float | None]  # axis -> p of "the loss does not depend on it"
    lack_of_fit_p: float | None
    by_residuals: bool  # whether residuals stood in for the noise between runs


def f_tests(form: Form, points: Points, noise: Noise, best: Solution) -> Tests:
    """Does the loss depend on each axis, and does the form describe the means of the settings?

    Both against the modelled noise between runs of the same setting; where that is not known, the dependence is tested
    against the residuals, from :data:`MIN_FREEDOM` degrees of freedom on.
    """
    left = points.n_settings - len(form.parameters)
    if noise.variance is None:
        effects = {axis: None if left < MIN_FREEDOM else _nested_effect(form, points, best, axis) for axis in form.axes}
        return Tests(effects, None, left >= MIN_FREEDOM)
    exact = max(float(np.min(noise.variance)), 1e-20 * float(np.max(points.loss**2)))
    by_noise = replace(points, run_weight=1.0 / np.maximum(noise.variance, exact), replicate_rss=noise.freedom)
    found: dict[str, float | None] = {}
    for axis in form.axes:
        others = [points.axes[name] for name in form.axes if name != axis]
        group = (
            np.unique(np.stack(others, axis=1), axis=0, return_inverse=True)[1]
            if others
            else np.zeros(points.n_settings)
        )
        misfit, groups = _within(by_noise, np.asarray(group).reshape(-1))
        if groups == points.n_settings:
            found[axis] = _nested_effect(form, points, best, axis) if left >= MIN_FREEDOM else None
        else:
            found[axis] = _f_tail(misfit, points.n_settings - groups, noise.freedom)
    lack = _f_tail(_lowest_misfit(form, by_noise), left, noise.freedom)
    return Tests(found, lack, False)


def _lowest_misfit(form: Form, points: Points) -> float:
    """Misfit of the form by the noise alone, which other weights than the fit's own make lowest."""
    if not form.exponents:
        return Problem(form, points).search().misfit_rss
    valley = Valley(form, points.axes)
    misfit, _ = valley.minimum(points.loss, points.weight, valley.whole(points.loss, points.weight))
    # Rounding is no lack of fit, even where copies of one loss leave no noise to hide it.
    rounding = 1e-20 * float(np.sum(points.weight * points.loss**2))
    return misfit if misfit > rounding else 0.0


def _nested_effect(form: Form, points: Points, best: Solution, axis: str) -> float | None:
    """Whether the law without an axis does as well, by the residuals of the whole law.

    For tables where nearly every setting has values of its own, such as a D that differs from run to run.
    """
    shorter = Form(f"{form.name}_without_{axis}", "", tuple(term for term in form.terms if term.axis != axis))
    if not shorter.terms:
        reduced = float(np.sum(points.weight * points.loss**2))
    elif shorter.exponents:
        valley = Valley(shorter, points.axes)
        reduced = valley.minimum(points.loss, points.weight, valley.whole(points.loss, points.weight))[0]
    else:
        reduced = Problem(shorter, points).search().misfit_rss
    extra = len(form.parameters) - len(shorter.parameters)
    left = points.n_settings - len(form.parameters)
    if left < 1 or extra < 1:
        return None
    rounding = 1e-20 * float(np.sum(points.weight * points.loss**2))
    ratio = max(reduced - best.misfit_rss, 0.0) / extra / max(best.misfit_rss / left, rounding)
    return float(fdtrc(extra, left, ratio))


def _within(points: Points, group: NDArray) -> tuple[float, int]:
    """Weighted sum of squares of means around their group's mean, and the number of groups."""
    total, labels = 0.0, np.unique(group)
    weight: Floats = points.weight
    for label in labels:
        here = group == label
        mean = np.average(points.loss[here], weights=weight[here])
        total += float(np.sum(weight[here] * (points.loss[here] - mean) ** 2))
    return total, labels.size


def _f_tail(misfit: float, freedom: int, noise_freedom: float) -> float | None:
    """Tail of a sum of squares in units of the noise's variance."""
    if noise_freedom < 1 or freedom < 1:
        return None
    return float(fdtrc(freedom, noise_freedom, max(misfit, 0.0) / freedom))
