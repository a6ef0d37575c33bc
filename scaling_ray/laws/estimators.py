"""Estimators beside plain least squares: moderated weights, Huber on the log loss. Shown, never the headline.

Three seeds say little about the noise of one size: weights of raw variances would follow chance, and one lucky size
would decide the law. Variances are therefore shrunk towards the one they share, as in limma (Smyth, Stat. Appl. Genet.
Mol. Biol. 3 (2004) 3), with at least four prior degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import digamma, polygamma

from scaling_ray.laws.fit import Floats, Points, Problem, Solution
from scaling_ray.laws.forms import EXPONENT_SEARCH

LEAST_SQUARES, MODERATED, HUBER = "least_squares", "moderated_weights", "huber_log"
MIN_PRIOR_FREEDOM = 4.0
HUBER_DELTA = 1e-3  # on the log loss, as in Hoffmann et al. (2203.15556)


def prior_freedom(setting_rss: Floats, runs: Floats) -> float:
    """Degrees of freedom of the shared variance by the spread of the log variances (Smyth 2004, section 6.2).

    Args:
        setting_rss: (S,) sums of squares of runs around their setting's mean.
        runs: (S,) runs of each setting.

    Returns:
        at least :data:`MIN_PRIOR_FREEDOM`; infinite where the variances differ by no more than chance.
    """
    some = (runs > 1) & (setting_rss > 0)
    if np.count_nonzero(some) < 3:
        return np.inf
    freedom = runs[some] - 1
    logs = np.log(setting_rss[some] / freedom) - digamma(freedom / 2) + np.log(freedom / 2)
    excess = float(
        np.mean((logs - logs.mean()) ** 2) * logs.size / (logs.size - 1) - np.mean(polygamma(1, freedom / 2))
    )
    if excess <= 0:
        return np.inf
    half = 0.5 + 1.0 / excess  # solve trigamma(half) = excess by Newton's method
    for _ in range(50):
        value = float(polygamma(1, half))
        step = value * (1.0 - value / excess) / float(polygamma(2, half))
        half += step
        if abs(step) < 1e-10 * half:
            break
    return max(2.0 * half, MIN_PRIOR_FREEDOM)


def moderated(points: Points) -> Points:
    """The same settings with one run weighted by the inverse of its setting's shrunken variance, mean weight near one.

    Without repeated runs, or where variances differ by no more than chance, the weights are equal.
    """
    if points.replicate_freedom < 1 or points.setting_rss is None or points.replicate_rss <= 0:
        return points
    prior = prior_freedom(points.setting_rss, points.runs)
    if not np.isfinite(prior):
        return points
    common = points.replicate_rss / points.replicate_freedom
    freedom = points.runs - 1
    shrunk = (prior * common + points.setting_rss) / (prior + freedom)
    weight = common / shrunk
    return replace(points, run_weight=weight, replicate_rss=float(np.sum(weight * points.setting_rss)))


def huber_log(problem: Problem, axes: Mapping[str, Floats], loss: Floats, start: Solution) -> dict[str, float]:
    """Huber's loss on log(law) - log(loss) over runs (R,), from the least-squares solution and from around it.

    Searched in the logarithms of all parameters; a floor or coefficient below 1e-12 of the largest loss is zero.

    Returns:
        parameter name -> value; no interval, which this estimator has only by bootstrap.
    """
    form, axes = problem.form, {name: np.asarray(values, dtype=np.float64) for name, values in axes.items()}
    target, exponents = np.log(loss), len(form.exponents)
    least = 1e-12 * float(np.max(loss))
    _, units = problem.columns_at(start.exponents[None, :], axes)

    edges = np.log(EXPONENT_SEARCH)
    lowest_values = np.r_[np.full(exponents, edges[0]), np.full(len(form.coefficients), -60.0)]
    highest_values = np.r_[np.full(exponents, edges[1]), np.full(len(form.coefficients), 60.0)]

    def logs_of(values: Floats) -> Floats:
        within = np.clip(values, lowest_values, highest_values)
        columns, _ = problem.columns_at(np.exp(within[:exponents])[None, :], axes)
        predicted: Floats = np.log(columns[0] @ np.exp(within[exponents:]))
        return predicted

    def objective(values: Floats) -> float:
        away = np.abs(logs_of(values) - target)
        small = away <= HUBER_DELTA
        return float(np.sum(np.where(small, 0.5 * away**2, HUBER_DELTA * (away - 0.5 * HUBER_DELTA))) / HUBER_DELTA)

    scaled = np.maximum(start.coefficients / units[0], least)
    centre = np.concatenate([np.log(start.exponents), np.log(scaled)])
    best, lowest = centre, objective(centre)
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.1, 0.3, 0.3):
        first = centre + spread * rng.standard_normal(centre.size)
        first = np.clip(first, lowest_values + 1e-6, highest_values - 1e-6)
        found = least_squares(
            lambda v: logs_of(v) - target,
            first,
            bounds=(lowest_values, highest_values),
            loss="huber",
            f_scale=HUBER_DELTA,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
            max_nfev=400,
        ).x
        # The simplex goes on where the trust region stalls at a corner of the nearly absolute loss.
        found = minimize(
            objective, found, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxfev": 3000}
        ).x
        if (value := objective(found)) < lowest:
            best, lowest = found, value
    best = np.clip(best, lowest_values, highest_values)
    power = np.exp(best[:exponents])
    _, units = problem.columns_at(power[None, :], axes)
    coefficients = np.exp(best[exponents:])
    coefficients = np.where(coefficients <= 2 * least, 0.0, coefficients) * units[0]
    return {
        **{name: float(v) for name, v in zip(form.exponents, power, strict=True)},
        **{name: float(v) for name, v in zip(form.coefficients, coefficients, strict=True)},
    }
