"""The verdict rule on many tables at once: how often it answers, refuses, and covers a known truth.

What the rule promises can only be counted on tables whose law is known, in hundreds. :func:`fit_and_judge` applies the
gates of :mod:`scaling_ray.laws.gates` that speak of the fit of ``L = a P^-alpha + c`` to B tables of the same sizes and
seeds; that it gives the verdicts and intervals of ``fit_table`` is a test.

The gates pull against each other: each refuses a share of clean tables by its own level (lack of fit 1%, leave-one-out
at most 5% by Bonferroni, in fact far less, since the refits share five sixths of their runs), and what is left of clean
tables must still be covered and answered. So no level here is chosen by its outcome: they are those of the rule,
and the simulation reports what they give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, fdtri

from scaling_ray.laws import gates
from scaling_ray.laws.fit import Floats
from scaling_ray.laws.forms import EXPONENT_SEARCH, POWER_FLOOR
from scaling_ray.laws.many import Design

Flags = NDArray[np.bool_]
_EDGES = np.log(EXPONENT_SEARCH)


@dataclass(frozen=True)
class JudgedTables:
    """Verdicts and intervals of alpha for B tables; an open end is NaN."""

    alpha: Floats  # (B,)
    low: Floats  # (B,) statistical: the F-profile
    high: Floats
    headline_low: Floats  # (B,) the union with the leave-one-size-out profiles
    headline_high: Floats
    refused_by: dict[str, Flags]  # gate -> (B,)

    @property
    def answered(self) -> Flags:
        """(B,): no gate refuses the table."""
        return ~np.any(np.stack(list(self.refused_by.values())), axis=0)

    def covers(self, truth: float, *, headline: bool = False) -> Flags:
        """(B,): the interval holds ``truth``; an open end excludes nothing on its side."""
        low, high = (self.headline_low, self.headline_high) if headline else (self.low, self.high)
        covered: Flags = ~(low > truth) & ~(high < truth)
        return covered

    def log_width_ratio(self) -> Floats:
        """(B,): log-width of the headline interval over that of the profile; infinite where the former is open."""
        ratio = np.log(self.headline_high / self.headline_low) / np.log(self.high / self.low)
        return np.where(np.isnan(ratio), np.inf, ratio)


def draw(law: Floats, noise: float, tables: int, seeds: int, rng: np.random.Generator) -> Floats:
    """Losses (B, S, R) of ``tables`` tables: a law (S,) with Gaussian seed noise."""
    losses: Floats = law[None, :, None] + rng.normal(0.0, noise, (tables, law.size, seeds))
    return losses


def expected_ratio(params: Floats, law: Floats, noise: float, seeds: int) -> float:
    """High over low of alpha's F-profile on the noiseless table, with the residual variance at its truth.

    What a table of this design should expect from the truth alone: refusing cannot make it larger.
    Infinite where an end is open.
    """
    design = Design(POWER_FLOOR, {"params": params}, np.full(params.size, float(seeds)))
    found = design.fit(law[None, :])
    freedom = params.size * seeds - len(POWER_FLOOR.parameters)
    limit = found.misfit_rss + noise**2 * float(fdtri(1, freedom, 0.95))
    low, high = design.profile(law[None, :], found, limit)
    return float(np.nan_to_num(high / low, nan=np.inf)[0])


def fit_and_judge(params: Floats, losses: Floats) -> JudgedTables:
    """Fit ``L = a P^-alpha + c`` to each of B tables (B, S, R) of sizes (S,) with R >= 2 seeds each."""
    tables, sizes, seeds = losses.shape
    means = losses.mean(axis=2)
    within = np.sum((losses - means[:, :, None]) ** 2, axis=2)  # (B, S)
    alpha, low, high, misfit, edge = _fit(params, means, within, seeds, 0.95)
    noise_freedom = sizes * (seeds - 1)
    noise = within.sum(axis=1) / noise_freedom
    between = seeds * np.sum((means - means.mean(axis=1, keepdims=True)) ** 2, axis=1)
    effect_p = fdtrc(sizes - 1, noise_freedom, between / (sizes - 1) / noise)
    extra = sizes - len(POWER_FLOOR.parameters)
    lack_p = fdtrc(extra, noise_freedom, misfit / extra / noise) if extra > 0 else np.ones(tables)
    moved = np.zeros(tables, dtype=bool)
    lows, highs, others = [low], [high], [alpha]
    for left in range(sizes):
        kept = np.arange(sizes) != left
        part = _fit(params[kept], means[:, kept], within[:, kept], seeds, 0.95)
        _, inner, outer, _, _ = _fit(params[kept], means[:, kept], within[:, kept], seeds, 1.0 - 0.05 / sizes)
        moved |= (alpha < inner) | (alpha > outer)
        lows.append(part[1])
        highs.append(part[2])
        if left in (0, sizes - 1):
            others.append(part[0])
    spread = np.max(others, axis=0) / np.min(others, axis=0)
    ratio = high / low
    refused_by = {
        "sizes": np.full(tables, sizes < gates.MIN_SIZES),
        "effect": effect_p >= gates.SIZE_EFFECT_P,
        "edge": edge,
        "open": ~edge & np.isnan(ratio),
        "wide": ~edge & (ratio >= gates.MAX_RATIO),
        "lack_of_fit": lack_p < gates.LACK_OF_FIT_P,
        "leave_one_out": moved,
        "choices": spread >= gates.MAX_RATIO if sizes > gates.MIN_SIZES else np.zeros(tables, dtype=bool),
    }
    # A NaN among the ends makes minimum and maximum NaN: a union with an open interval is open.
    return JudgedTables(alpha, low, high, np.min(lows, axis=0), np.max(highs, axis=0), refused_by)


def _fit(
    params: Floats, means: Floats, within: Floats, seeds: int, level: float
) -> tuple[Floats, Floats, Floats, Floats, Flags]:
    """Alpha, its profile at ``level``, misfit, and whether alpha rests on an edge of its search: (B,) each."""
    design = Design(POWER_FLOOR, {"params": params}, np.full(params.size, float(seeds)))
    found = design.fit(means)
    freedom = params.size * seeds - len(POWER_FLOOR.parameters)
    rss = found.misfit_rss + within.sum(axis=1)
    limit = found.misfit_rss + rss * float(fdtri(1, freedom, level)) / freedom
    low, high = design.profile(means, found, limit)
    logs = np.log(found.exponents[:, 0])
    edge = (logs < _EDGES[0] + 1e-6) | (logs > _EDGES[1] - 1e-6)
    return found.exponents[:, 0], low, high, found.misfit_rss, edge
