"""The law that stops: ``L = a min(P, P0)^-alpha + c``, a power law up to a break and a plateau after it.

A plateau that something other than size made (one learning rate for all, too little data, a budget that ends) looks
like a floor, and a smooth law with a floor then answers with an exponent that is too large. The smooth law is this one
with its break beyond the largest size, so the two can be compared by an F-test with one degree of freedom, which sees
a corner that the general test of lack of fit spreads over all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from scaling_ray.laws.fit import Floats, Points, Solution, non_negative
from scaling_ray.laws.forms import EXPONENT_SEARCH

FORMULA = "L = a min(P, P0)^-alpha + c"
PARAMETERS = ("alpha", "P0", "c", "a")

_ALPHAS, _BREAKS = 97, 33
_ZOOMS = 14


@dataclass(frozen=True)
class Elbow:
    """The best broken law of a table of sizes, and how surely it beats the smooth one.

    ``p`` is corrected for the sizes between which the break could lie (Bonferroni); None without noise to test against.
    """

    alpha: float
    break_params: float
    floor: float
    coefficient: float
    misfit_rss: float
    p: float | None


def find_elbow(points: Points, smooth: Solution, freedom: int) -> Elbow | None:
    """Fit the broken law to ``points`` (their axis ``params``) and test it against ``smooth``.

    Args:
        points: settings of distinct sizes.
        smooth: the best ``power_floor`` of the same points.
        freedom: residual degrees of freedom of ``smooth``.

    Returns:
        None with fewer sizes than the broken law has parameters plus one.
    """
    sizes = points.distinct("params")
    if sizes.size <= len(PARAMETERS) or points.n_settings != sizes.size:
        return None
    logs, root = np.log(points.axes["params"]), np.sqrt(points.weight)
    reference = float(logs[np.argmin(logs)])
    target = points.loss * root
    # A break before the second size leaves one size to the power law, and one in the last gap bends nothing that a
    # floor does not: both are the smooth law's own limits.
    low, high = float(np.log(sizes[1])), float(np.log(sizes[-1]))

    def misfit_at(log_alpha: Floats, breaks: Floats) -> tuple[Floats, Floats]:
        clipped = np.minimum(logs[None, :], breaks[:, None]) - reference
        power = np.exp(-np.exp(log_alpha)[:, None] * clipped)
        columns = np.stack([np.ones_like(power), power], axis=2) * root[None, :, None]
        return non_negative(columns, np.broadcast_to(target, power.shape))

    alphas = np.linspace(float(np.log(EXPONENT_SEARCH[0])), float(np.log(EXPONENT_SEARCH[1])), _ALPHAS)
    breaks = np.linspace(low, high, _BREAKS)
    grid = np.stack([g.ravel() for g in np.meshgrid(alphas, breaks)], axis=1)
    rss, solved = misfit_at(grid[:, 0], grid[:, 1])
    k = int(np.argmin(rss))
    centre, value, best = grid[k], float(rss[k]), solved[k]
    reach = np.array([alphas[1] - alphas[0], breaks[1] - breaks[0]])
    offsets = np.linspace(-1.0, 1.0, 9)
    window = np.stack([g.ravel() for g in np.meshgrid(offsets, offsets)], axis=1)
    bounds = np.array([[*np.log(EXPONENT_SEARCH)], [low, high]])
    for _ in range(_ZOOMS):
        around = np.clip(centre + reach * window, bounds[:, 0], bounds[:, 1])
        rss, solved = misfit_at(around[:, 0], around[:, 1])
        k = int(np.argmin(rss))
        if rss[k] < value:
            centre, value, best = around[k], float(rss[k]), solved[k]
        reach = reach * 0.4
    alpha = float(np.exp(centre[0]))
    coefficient = float(best[1]) * float(np.exp(alpha * reference))
    noise, noise_freedom = points.replicate_rss, points.replicate_freedom
    if noise_freedom < 1:
        noise, noise_freedom = value, freedom - 1
    p = None
    if noise_freedom >= 1:
        gained = max(smooth.misfit_rss - value, 0.0)
        tail = float(fdtrc(1, noise_freedom, gained * noise_freedom / noise)) if noise > 0 else float(gained == 0.0)
        p = min(1.0, tail * (sizes.size - 2))
    return Elbow(alpha, float(np.exp(centre[1])), float(best[0]), coefficient, value, p)
