"""Huber's loss on the log losses, beside least squares: an estimator that a few runs out of place do not pull.

The weights of least squares by the noise of each size are those of :mod:`noise`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import least_squares, minimize

from scaling_ray.laws.fit import Floats, Problem, Solution
from scaling_ray.laws.forms import EXPONENT_SEARCH

LEAST_SQUARES, WEIGHTED, HUBER = "least_squares", "weighted_least_squares", "huber_log"
HUBER_DELTA = 1e-3  # on the log loss, as in Hoffmann et al. (2203.15556)


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
