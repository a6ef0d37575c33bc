"""The verdict rule on many tables of known truth: how often it answers, refuses, and covers.

What the rule promises can only be counted on tables whose law is known, in hundreds. :func:`judge_tables` fits and
judges each as ``fit_table`` does, and leaves out what no simulation asks for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtri

from scaling_ray.laws.fit import Floats
from scaling_ray.laws.forms import POWER_FLOOR, Form
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.law import fit_law
from scaling_ray.laws.many import Design
from scaling_ray.laws.points import Rows
from scaling_ray.laws.predictions import predict_at
from scaling_ray.laws.protocol import Flagged
from scaling_ray.laws.sensitivity import without_flagged
from scaling_ray.laws.verdict import judge

Flags = NDArray[np.bool_]


@dataclass
class JudgedTables:
    """Verdicts and intervals of B tables; an open end is NaN. Names are those of the form's parameters."""

    verdicts: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    statistical: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    shown: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    predicted: list[tuple[float, float]] = field(default_factory=list)
    refused_by: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> Flags:
        """(B,): whether the table has an exponent, supported or approximate."""
        return np.array([verdict != "refused" for verdict in self.verdicts])

    def covers(self, name: str, truth: float, *, shown: bool = True) -> Flags:
        """(B,): the interval of a parameter holds ``truth``; an open end excludes nothing on its side."""
        low, high = np.array((self.shown if shown else self.statistical)[name]).T
        covered: Flags = ~(low > truth) & ~(high < truth)
        return covered

    def predicts(self, truth: Floats) -> Flags:
        """(B,): the interval of the predicted loss holds what a new setting showed (B,)."""
        low, high = np.array(self.predicted).T
        covered: Flags = ~(low > truth) & ~(high < truth)
        return covered

    def ratio(self, name: str) -> Floats:
        """(B,): high over low of the shown interval; infinite where it is open."""
        low, high = np.array(self.shown[name]).T
        ratio: Floats = np.nan_to_num(high / low, nan=np.inf)
        return ratio


def draw(law: Floats, noise: float | Floats, tables: int, seeds: int, rng: np.random.Generator) -> Floats:
    """Losses (B, S, R) of ``tables`` tables: a law (S,) with Gaussian seed noise (one sd, or (S,) of them)."""
    sd = np.broadcast_to(np.asarray(noise, dtype=np.float64), law.shape)
    losses: Floats = law[None, :, None] + rng.standard_normal((tables, law.size, seeds)) * sd[None, :, None]
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


def judge_tables(
    axes: dict[str, Floats],
    losses: Floats,
    *,
    form: Form = POWER_FLOOR,
    place: dict[str, float] | None = None,
    keep: Flags | None = None,
) -> JudgedTables:
    """Fit a law to each of B tables (B, S, R) of settings with axes (S,) and R seeds each.

    Args:
        axes: name -> (S,).
        losses: (B, S, R).
        form: the law.
        place: where to predict the mean of R further runs (axis -> value).
        keep: (B, S, R) runs without a flag; all where None. A table with flagged runs is judged as
            :func:`~scaling_ray.laws.sensitivity.without_flagged` has it.
    """
    found = JudgedTables()
    seeds = losses.shape[2]
    runs = {name: np.repeat(values, seeds) for name, values in axes.items()}
    names = tuple(name for name in form.parameters if name in (*form.exponents, form.floor))
    for i, table in enumerate(losses):
        rows: Rows = runs | {"loss": table.reshape(-1)}
        refusals = []
        if keep is not None and not keep[i].all():
            flag = Flagged(~keep[i].reshape(-1), "flagged", "repeats")
            compared = without_flagged(form, rows, [flag])
            rows, refusals = compared.rows, compared.refusals
        judged = judge(fit_law(form, rows, only=names), refusals)
        law = judged.law
        found.verdicts.append(judged.verdict)
        found.refused_by.update({refusal.reason[:40] for refusal in judged.refusals})
        for name in names:
            found.values.setdefault(name, []).append(law.parameters.get(name, np.nan))
            for kind, intervals in ((found.statistical, law.intervals), (found.shown, law.shown)):
                interval = intervals.get(name)
                kind.setdefault(name, []).append(_ends(interval))
        if place is not None:
            interval = predict_at(judged, place, float(seeds))[1] if law.best is not None else None
            found.predicted.append(_ends(interval))
    return found


def _ends(interval: Interval | None) -> tuple[float, float]:
    """Both ends, an open one as NaN."""
    if interval is None:
        return np.nan, np.nan
    return (np.nan if interval.low is None else interval.low), (np.nan if interval.high is None else interval.high)
