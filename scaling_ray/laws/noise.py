"""The noise between runs of one setting, modelled by size: in a real sweep small sizes may spread 15 times as far.

The replicates choose between one variance for all, a variance that grows with the loss above the lowest one or falls
with the size, and variances of sizes shrunk towards any of these (Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004) 3): the
sum of squares of a size, over its expected variance, follows an F distribution with the prior's degrees of freedom, and
each step away from one common variance must raise twice the log likelihood by more than 3.84.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from scaling_ray.laws.fit import Floats, Points

LEAST_MISFIT = 0.01
"""Standard deviation of a setting around its law, as a share of the loss drop, below which no law is trusted."""
SHARED_BEYOND = 6
"""Values of one axis from which neighbours share their misfit, so that more of them in between average nothing out."""
MIN_FREEDOM = 4
"""Degrees of freedom from which replicates, or else residuals, count as knowledge of the noise."""

_SOFTENING = 0.05  # of the drop: how near the lowest loss the trend may tell settings apart
_SLOPES = np.linspace(0.0, 3.0, 16)  # of the log variance, along a trend that spans log(1 / _SOFTENING)
_PRIORS = np.array([np.inf, 32.0, 16.0, 8.0, 4.0])  # degrees of freedom of the shared variance
_STEP = 3.84 / 2
_ROUNDS = 12
COMMON, RESIDUAL = "one variance for all sizes", "residuals, since no setting was repeated often enough"
TRENDS = ("a variance that grows with the loss", "a variance that falls with the size")
SHRUNK = "variances of sizes, shrunk towards "


@dataclass(frozen=True)
class Noise:
    """Variance of one run in each setting (S,), or None where replicates do not show it; the declared least misfit."""

    kind: str
    variance: Floats | None
    freedom: float
    least_misfit: float  # standard deviation in loss units

    def of_means(self, runs: Floats) -> Floats:
        """Variance (S,) of each setting's mean around the law: that of its runs, and the least misfit.

        Where the noise is unknown all runs weigh the same, and residuals scale what this gives.
        """
        if self.variance is None:
            return self.least_misfit**2 / runs
        return self.variance / runs + self.least_misfit**2


@dataclass(frozen=True)
class _Choice:
    score: float
    level: float
    slope: int
    prior: int
    trend: int


def drop_of(points: Points) -> float:
    """What the loss falls by over the settings, never zero."""
    drop = float(np.max(points.loss) - np.min(points.loss))
    return max(drop, 1e-9 * float(np.max(np.abs(points.loss))))


def least_misfit(points: Points) -> float:
    """The declared least misfit of a table, as a standard deviation of its settings' means."""
    share = LEAST_MISFIT
    if len(points.axes) == 1:
        share *= float(np.sqrt(max(1.0, points.n_settings / SHARED_BEYOND)))
    return share * drop_of(points)


def model_noise(points: Points) -> Noise:
    """Model the noise of one run from the replicates of a table."""
    least, freedom = least_misfit(points), points.replicate_freedom
    if freedom < MIN_FREEDOM or points.setting_rss is None:
        return Noise(RESIDUAL, None, 0.0, least)
    common = points.replicate_rss / freedom
    one = Noise(COMMON, np.full(points.n_settings, common), float(freedom), least)
    if "params" in points.axes:
        group = np.unique(points.axes["params"], return_inverse=True)[1].reshape(-1)
    else:
        group = np.arange(points.n_settings)
    freedoms: Floats = np.bincount(group, weights=points.runs - 1).astype(np.float64)
    if np.count_nonzero(freedoms) < 3 or common <= 0:
        return one
    # A size whose runs are copies of each other would be infinitely sure of itself.
    squares = np.maximum(points.setting_rss, 1e-8 * common * (points.runs - 1))
    best = _Choice(-np.inf, common, 0, 0, 0)
    kept: tuple[Floats, Floats] | None = None
    for number, height in enumerate(_heights(points)):
        trend = np.exp(_SLOPES[:, None] * (height - height.mean())[None, :])  # (B, S)
        scaled: Floats = np.stack([np.bincount(group, weights=squares / row) for row in trend]).astype(np.float64)
        jacobian = 0.5 * np.log(trend) @ (points.runs - 1)
        found = _choose(scaled, freedoms, jacobian, number)
        if found.score > best.score + 1e-9:
            best, kept = found, (trend, scaled)
    if kept is None or (best.slope, best.prior) == (0, 0):
        return one
    trend, scaled = kept
    variance, prior = best.level * trend[best.slope], float(_PRIORS[best.prior])
    name = TRENDS[best.trend] if best.slope else COMMON
    if np.isinf(prior):
        return Noise(name, variance, float(freedom - 1), least)
    shrunk = (prior + scaled[best.slope] / best.level) / (prior + freedoms)
    # A moderated variance knows what its size and the prior know, never more than all replicates together.
    known = min(prior + float(np.mean(freedoms[freedoms > 0])), float(freedom - 1))
    return Noise(SHRUNK + name, variance * shrunk[group], known, least)


def _heights(points: Points) -> list[Floats]:
    """What a variance may grow with, (S,) each: the loss above the lowest one, and the smallness of the size."""
    span = float(np.log(1.0 / _SOFTENING))
    heights = [np.log((points.loss - float(np.min(points.loss))) / drop_of(points) + _SOFTENING)]
    if "params" in points.axes and points.distinct("params").size > 1:
        logs = np.log(points.axes["params"])
        heights.append(span * (logs.max() - logs) / (logs.max() - logs.min()))
    return heights


def _choose(scaled: Floats, freedoms: Floats, jacobian: Floats, trend: int) -> _Choice:
    """The best slope and prior for sums of squares (B, G) that each slope scaled, with freedoms (G,)."""
    some = freedoms > 0
    n, q = freedoms[some], scaled[:, some]
    best = _Choice(-np.inf, 1.0, 0, 0, trend)
    for j, prior in enumerate(_PRIORS):
        level = q.sum(axis=1) / n.sum()
        if np.isinf(prior):
            likelihood = -0.5 * n.sum() * np.log(level) - 0.5 * n.sum()
        else:
            for _ in range(_ROUNDS):
                share = (prior + n) / (prior + q / level[:, None])
                level = np.sum(share * q, axis=1) / n.sum()
            constant = gammaln((prior + n) / 2) - gammaln(prior / 2) + 0.5 * n * np.log(2 / prior)
            ratio = q / (prior * level[:, None])
            likelihood = np.sum(constant - 0.5 * (prior + n) * np.log1p(ratio), axis=1)
            likelihood = likelihood - 0.5 * n.sum() * np.log(level)
        score = likelihood - jacobian - _STEP * ((_SLOPES > 0) + float(np.isfinite(prior)))
        k = int(np.argmax(score))
        if score[k] > best.score:
            best = _Choice(float(score[k]), float(level[k]), k, j, trend)
    return best
