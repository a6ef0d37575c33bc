"""Laws without a power that may describe the same settings as well, and what they predict.

An exponent is an answer only where the runs tell a power law from its rivals: a logarithm, an exponential approach to
a floor, and a law that stops falling at some size. What describes the settings as well by AIC, at the modelled
variance, takes the exponent away; what is less than 2 worse widens the prediction to hold its own. A law that falls as
a power until it stops takes the exponent away only where its own lies outside the shown interval; it widens the
prediction in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling_ray.laws.fit import Floats
from scaling_ray.laws.forms import EXPONENT_SEARCH
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.law import Fitted
from scaling_ray.laws.valley import EXPONENTIAL, LOGARITHM, STOPS, Valley

_LOGARITHM, _STOPPING_LOGARITHM = "a logarithm of {x}", "a logarithm of {x} that stops falling ({x}0)"
_APPROACH = "an exponential approach, exp(-{x} / {x}0)"
_STOPPING_POWER = "a power without a floor that stops (a min(P, P0)^-alpha)"
_SYMBOLS = {"params": "P", "cells": "D", "flops": "C"}
AS_GOOD = 2.0
"""AIC of a rival above that of the power law up to which its prediction counts as well."""
Range = Callable[[Mapping[str, float]], Interval]
_ALPHAS, _BREAKS, _ZOOMS = 61, 25, 6
_EXACT = 1e-6  # both describe every setting to the last digits


@dataclass(frozen=True)
class Rival:
    """One law without a power of ``axis``, fitted to the same settings."""

    axis: str
    formula: str
    excess: float  # its AIC less that of the power law: misfit in units of the modelled variance, two for a parameter
    exponent: float | None  # its own, where it stops but falls as a power until then
    loss_in: Range  # a place (axis -> value) to the range of its loss, at the law's own widened variance

    @property
    def preferred(self) -> bool:
        """Whether it describes the settings as well as the power law, or better."""
        return self.excess <= _EXACT

    @property
    def as_good(self) -> bool:
        """Whether what it predicts cannot be ruled out."""
        return self.excess <= AS_GOOD


def rivals_of(law: Fitted) -> list[Rival]:
    """Every rival of a law with a floor; empty where the law was not fitted, or nothing is known of the noise."""
    form, points = law.form, law.points
    if law.best is None or form.floor is None or not form.exponents or law.width.allowed is None:
        return []
    least, scale = law.best.misfit_rss, law.width.variance

    def excess(misfit: float, fewer: int = 0) -> float:
        return (misfit - least) / scale - 2.0 * fewer

    found = []
    for axis in form.axes:
        if points.distinct(axis).size < 3:
            continue
        symbol = _SYMBOLS[axis]
        misfit, loss_in = _fit_shape(law, axis, EXPONENTIAL)
        found.append(Rival(axis, _APPROACH.format(x=symbol), excess(misfit), None, loss_in))
        # A logarithm has no exponent to choose: one parameter fewer, unless it stops.
        misfit, loss_in = _fit_shape(law, axis, LOGARITHM)
        plain = Rival(axis, _LOGARITHM.format(x=symbol), excess(misfit, 1), None, loss_in)
        misfit, loss_in = _fit_shape(law, axis, STOPS)
        stopping = Rival(axis, _STOPPING_LOGARITHM.format(x=symbol), excess(misfit), None, loss_in)
        found.append(min(plain, stopping, key=lambda rival: rival.excess))
    if form.axes == ("params",) and points.distinct("params").size >= 4:
        misfit, loss_in, exponent = _power_that_stops(points.loss, points.weight, np.log(points.axes["params"]))
        found.append(Rival("params", _STOPPING_POWER, excess(misfit), exponent, loss_in))
    return found


def _fit_shape(law: Fitted, axis: str, shape: str) -> tuple[float, Range]:
    """Misfit and prediction (never below zero) of the form with another shape of one axis."""
    loss, weight, allowed = law.points.loss, law.points.weight, law.width.allowed or 0.0
    valley = Valley(law.form, law.points.axes, {axis: shape})
    coarse = valley.whole(loss, weight)
    misfit, logs = valley.minimum(loss, weight, coarse)
    limit = misfit + allowed
    if shape == LOGARITHM and valley.dimensions == 1:  # nothing to search
        scan = valley.scan(loss, weight, [np.array([0.0])])
    else:
        scan = valley.below(loss, weight, coarse, logs, limit)

    def loss_in(place: Mapping[str, float]) -> Interval:
        found = valley.ends(scan, weight, valley.place_weights(scan, place), limit, open_at_edge=False)
        return Interval(*(None if end is None else max(end, 0.0) for end in (found.low, found.high)))

    return misfit, loss_in


def _power_that_stops(loss: Floats, weight: Floats, logs: Floats) -> tuple[float, Range, float]:
    """``a min(P, P0)^-alpha``, P0 no larger than the second largest size: beyond it nothing would have stopped."""
    sizes = np.unique(logs)
    start = float(sizes[0])
    edges = (float(np.log(EXPONENT_SEARCH[0])), float(np.log(EXPONENT_SEARCH[1])))
    alphas, breaks = np.linspace(edges[0], edges[1], _ALPHAS), np.linspace(float(sizes[1]), float(sizes[-2]), _BREAKS)

    def solve(log_alphas: Floats, ends: Floats) -> tuple[Floats, Floats]:
        reach = np.minimum(logs[None, :], ends[:, None]) - start  # (B, S)
        column = np.exp(-np.exp(log_alphas)[:, None, None] * reach[None])  # (A, B, S)
        square, product = column**2 @ weight, column @ (weight * loss)
        return float(weight @ loss**2) - product**2 / square, product / square

    best, centre, coefficient = np.inf, (0.0, 0.0), 0.0
    for _ in range(_ZOOMS):
        misfit, solved = solve(alphas, breaks)
        i, j = np.unravel_index(int(np.argmin(misfit)), misfit.shape)
        if misfit[i, j] < best:
            best, centre = float(misfit[i, j]), (float(alphas[i]), float(breaks[j]))
            coefficient = float(solved[i, j])
        steps = [(g[1] - g[0]) if g.size > 1 else 0.0 for g in (alphas, breaks)]
        alphas = np.linspace(max(centre[0] - steps[0], edges[0]), min(centre[0] + steps[0], edges[1]), 13)
        low, high = float(sizes[1]), float(sizes[-2])
        breaks = np.linspace(max(centre[1] - steps[1], low), min(centre[1] + steps[1], high), 13)
    alpha, end = float(np.exp(centre[0])), centre[1]

    def loss_in(place: Mapping[str, float]) -> Interval:
        there = coefficient * float(np.exp(-alpha * (min(np.log(place["params"]), end) - start)))
        return Interval(there, there)

    return max(best, 0.0), loss_in, alpha
