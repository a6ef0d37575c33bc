"""The noise between runs of one setting, modelled by size: in a real sweep small sizes may spread 15 times as far.

The replicates choose between one variance for all, a variance that grows with the loss above the lowest one, and
variances of sizes shrunk towards that (Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004) 3): the sum of squares of a size,
over its expected variance, follows an F distribution with the prior's degrees of freedom, and each step away from one
common variance must raise twice the log likelihood by more than 3.84.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from scaling_ray.laws.fit import Floats, Points

LEAST_MISFIT = 0.01
"""Standard deviation of a setting around its law, as a share of the loss drop, below which no law is trusted."""
MIN_FREEDOM = 4
"""Degrees of freedom from which replicates, or else residuals, count as knowledge of the noise."""

_SOFTENING = 0.05  # of the drop: how near the lowest loss the trend may tell settings apart
_SLOPES = np.linspace(0.0, 3.0, 16)  # of the log variance by the log loss above the lowest
_PRIORS = np.array([np.inf, 32.0, 16.0, 8.0, 4.0])  # degrees of freedom of the shared variance
_STEP = 3.84 / 2
_ROUNDS = 12
COMMON, GROWING, BY_SIZE, GROWING_BY_SIZE, RESIDUAL = (
    "one variance for all sizes",
    "a variance that grows with the loss",
    "variances of sizes, shrunk towards one",
    "variances of sizes, shrunk towards one that grows with the loss",
    "residuals, since no setting was repeated often enough",
)


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


def drop_of(points: Points) -> float:
    """What the loss falls by over the settings, never zero."""
    drop = float(np.max(points.loss) - np.min(points.loss))
    return max(drop, 1e-9 * float(np.max(np.abs(points.loss))))


def model_noise(points: Points) -> Noise:
    """Model the noise of one run from the replicates of a table."""
    drop = drop_of(points)
    least = LEAST_MISFIT * drop
    freedom = points.replicate_freedom
    if freedom < MIN_FREEDOM or points.setting_rss is None:
        return Noise(RESIDUAL, None, 0.0, least)
    common = points.replicate_rss / freedom
    one = Noise(COMMON, np.full(points.n_settings, common), float(freedom), least)
    if "params" in points.axes:
        group = np.unique(points.axes["params"], return_inverse=True)[1].reshape(-1)
    else:
        group = np.arange(points.n_settings)
    groups = int(group.max()) + 1
    freedoms = np.bincount(group, weights=points.runs - 1, minlength=groups)
    if np.count_nonzero(freedoms) < 3 or common <= 0:
        return one
    # A size whose runs are copies of each other would be infinitely sure of itself.
    squares = np.maximum(points.setting_rss, 1e-8 * common * (points.runs - 1))
    height = np.log((points.loss - float(np.min(points.loss))) / drop + _SOFTENING)
    trend = np.exp(_SLOPES[:, None] * (height - height.mean())[None, :])  # (B, S)
    scaled = np.zeros((_SLOPES.size, groups))
    log_trend = np.zeros((_SLOPES.size, groups))
    for i in range(points.n_settings):
        scaled[:, group[i]] += squares[i] / trend[:, i]
        log_trend[:, group[i]] += 0.5 * (points.runs[i] - 1) * np.log(trend[:, i])
    some = freedoms > 0
    n, q, jacobian = freedoms[some], scaled[:, some], log_trend[:, some].sum(axis=1)
    best, value, chosen = -np.inf, np.zeros(0), (0, 0)
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
        if score[k] > best:
            best, value, chosen = float(score[k]), level, (k, j)
    k, j = chosen
    if (k, j) == (0, 0):
        return one
    prior, level_here = float(_PRIORS[j]), float(value[k])
    variance = level_here * trend[k]
    if np.isinf(prior):
        return Noise(GROWING, variance, float(freedom - 1), least)
    shrunk = (prior + scaled[k] / level_here) / (prior + freedoms)
    # A moderated variance knows what its size and the prior know, never more than all replicates together.
    known = min(prior + float(np.mean(n)), float(freedom - 1))
    return Noise(GROWING_BY_SIZE if k else BY_SIZE, variance * shrunk[group], known, least)
