"""Whether a repetition of a sweep found what a reference found: a test per quantity, at one error rate over all.

Settings have two or three seeds each, so the noise between runs is pooled over settings and over both sides, by
:func:`~scaling_ray.laws.noise.model_noise`. Where both sides ran the same seeds the differences of pairs are pooled
instead: equal seeds share their cells and first weights, and on one machine their digits.

A drift is a difference beyond a tolerance: the null of each test is |difference| <= tolerance (Hodges and Lehmann,
J. R. Stat. Soc. B 16 (1954) 261), its p-value is taken at the edge of that range, and the family is kept at ``ALPHA``
by Holm (Scand. J. Stat. 6 (1979) 65). No dependence between the tests can raise the error rate of that procedure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from scaling_ray.laws.fit import Floats, Points
from scaling_ray.laws.noise import COMMON, MIN_FREEDOM, model_noise

Verdict = Literal["agrees", "drifted", "cannot tell"]
AGREES: Verdict = "agrees"
DRIFTED: Verdict = "drifted"
CANNOT_TELL: Verdict = "cannot tell"
ALPHA = 0.01
"""Chance of a drift that is none, over all quantities of one comparison."""
ROUNDING = 1e-9
"""Relative difference up to which figures without noise are equal: sums in another order."""
LEAST_SHARED = 2.0
"""Least factor by which seeds that settings share raise the variance of a contrast: two or three seeds cannot show it
well, and the project's own three sweeps have 0.7 to 2.0 (1.4 on average) for means over sizes."""
_PRIOR = 3.0
"""Log odds for one common variance. A trend of the noise that was found on few runs makes some settings look surer than
they are: they are: such a variance is mixed with the common one by what the runs say of either."""
_CHOSEN = 0.5  # of the freedom counts where the noise was given a trend or shrunk: that choice rests on the same runs
UNKNOWN = "too few repeated settings to know the noise"
BLIND = "the noise hides any drift smaller than all that was learned"
_SURE = 1e6  # degrees of freedom of an interval that someone else has made
_NORMAL_95 = 1.959963984540054

Losses = Mapping[str, Mapping[str, float]]
"""Setting -> seed -> loss."""


@dataclass(frozen=True)
class Axes:
    """Where a setting stands in the grid."""

    params: float
    cells: float


@dataclass(frozen=True)
class Difference:
    """Found less reference, in one quantity.

    ``error`` is the standard error of ``value`` and ``freedom`` what it is known by; both are None where nothing says
    them. ``found_error`` is that of the found figure alone. ``identical``: the same to the last digit, run by run.
    """

    name: str
    reference: float
    found: float
    error: float | None
    freedom: float | None
    found_error: float | None
    tolerance: float
    identical: bool = False
    paired: bool = False

    @property
    def value(self) -> float:
        """Found less reference."""
        return self.found - self.reference


@dataclass(frozen=True)
class Judgement:
    """A difference with its verdict; ``p`` is of the null that it is no larger than the tolerance.

    ``low``..``high`` is the 95% interval of the difference, ``detectable`` the smallest one that this comparison would
    call a drift; None where the noise is not known.
    """

    difference: Difference
    verdict: Verdict
    p: float | None
    low: float | None
    high: float | None
    detectable: float | None
    reason: str


@dataclass(frozen=True)
class _Noise:
    """Residuals of runs (or of pairs) and the variance of one, by setting."""

    names: list[str]
    difference: Floats  # (S,)
    variance: Floats | None  # (S,) of the difference of means
    found_variance: Floats | None  # (S,) of the found mean
    freedom: float
    sides: list[Floats]  # each (S, R): residuals of the runs of a side, where all its settings have the same seeds
    run_variance: Floats | None  # (S,) of one run (or pair)
    paired: bool


def differences(reference: Losses, found: Losses, axes: Mapping[str, Axes], tolerance: float) -> list[Difference]:
    """Every loss and contrast that both sides have.

    Args:
        reference: losses of the reference.
        found: losses of the repetition.
        axes: where each setting of either side stands; settings of one loss only (equal genes).
        tolerance: smallest difference that matters, in units of the loss.

    Returns:
        one difference per common setting, under its name; then contrasts along each axis between neighbours ("W4 to
        W8" by their parameters), averaged over the other axis, named ``params:A:B`` and ``cells:A:B``.
    """
    noise = _noise(reference, found, axes)
    before = {name: float(np.mean(list(reference[name].values()))) for name in noise.names}
    after = {name: float(np.mean(list(found[name].values()))) for name in noise.names}
    losses = []
    for i, name in enumerate(noise.names):
        losses.append(
            Difference(
                name,
                before[name],
                after[name],
                None if noise.variance is None else float(np.sqrt(noise.variance[i])),
                None if noise.variance is None else noise.freedom,
                None if noise.found_variance is None else float(np.sqrt(noise.found_variance[i])),
                tolerance,
                identical=dict(reference[name]) == dict(found[name]),
                paired=noise.paired,
            )
        )
    return losses + _contrasts(noise, losses, axes, tolerance)


def _noise(reference: Losses, found: Losses, axes: Mapping[str, Axes]) -> _Noise:
    names = [name for name in reference if name in found and reference[name] and found[name]]
    paired = bool(names) and all(reference[name].keys() == found[name].keys() for name in names)
    one, two = [_values(reference, names), _values(found, names)]
    differing = np.array([b.mean() - a.mean() for a, b in zip(one, two, strict=True)])
    if paired:
        pairs = [np.array([found[n][seed] - loss for seed, loss in reference[n].items()]) for n in names]
        counts = np.array([values.size for values in pairs], dtype=np.float64)
        squares = _squares(pairs)
        freedoms, per_run, sides = counts - 1, 1.0 / np.maximum(counts, 1), [pairs]
    else:
        n_one, n_two = (np.array([values.size for values in side], dtype=np.float64) for side in (one, two))
        squares = _squares(one) + _squares(two)
        freedoms, per_run, sides = n_one + n_two - 2, 1.0 / n_one + 1.0 / n_two, [one, two]
    if not names or freedoms.sum() < MIN_FREEDOM:
        return _Noise(names, differing, None, None, 0.0, [], None, paired)
    variance, freedom = _run_variance([axes[name] for name in names], one, squares, freedoms)
    # The interval of the found mean is for a picture: it is that of runs, even where pairs decide.
    own = variance
    if paired:
        both = _squares(one) + _squares(two)
        own, _ = _run_variance([axes[name] for name in names], one, both, 2 * freedoms)
    found_variance = own / np.array([values.size for values in two])
    residuals = [_residuals(side, reference if i == 0 else found, names) for i, side in enumerate(sides)]
    known = [each for each in residuals if each is not None]
    return _Noise(names, differing, variance * per_run, found_variance, freedom, known, variance, paired)


def _squares(side: Sequence[Floats]) -> Floats:
    """Sum of squares of the runs of each setting around their mean, (S,)."""
    return np.array([np.sum((values - values.mean()) ** 2) for values in side])


def _values(losses: Losses, names: Sequence[str]) -> list[Floats]:
    return [np.array(list(losses[name].values()), dtype=np.float64) for name in names]


def _run_variance(
    axes: Sequence[Axes], losses: Sequence[Floats], squares: Floats, freedoms: Floats
) -> tuple[Floats, float]:
    """Variance of one run in each setting (S,) and its degrees of freedom, from sums of squares and their freedoms."""
    points = Points(
        {"params": np.array([each.params for each in axes]), "cells": np.array([each.cells for each in axes])},
        np.array([values.mean() for values in losses]),
        freedoms + 1,
        float(squares.sum()),
        setting_rss=squares,
        noise_rss=float(squares.sum()),
    )
    noise = model_noise(points)
    assert noise.variance is not None  # the freedoms were counted before
    if noise.kind == COMMON:
        return noise.variance, noise.freedom
    common = np.full(points.n_settings, squares.sum() / freedoms.sum())
    gain = _log_likelihood(noise.variance, squares, freedoms) - _log_likelihood(common, squares, freedoms)
    share = float(np.exp(min(_PRIOR - gain, 0.0)))
    mixed = share * common + (1 - share) * noise.variance
    return np.maximum(mixed, noise.variance), noise.freedom * _CHOSEN


def _log_likelihood(variance: Floats, squares: Floats, freedoms: Floats) -> float:
    """Of sums of squares (S,), each the variance of its setting times chi squared."""
    return float(-0.5 * np.sum(freedoms * np.log(variance) + squares / variance))


def _residuals(side: Sequence[Floats], losses: Losses, names: Sequence[str]) -> Floats | None:
    """Runs less the mean of their setting, (S, R) with seeds in one order; None where settings have other seeds."""
    seeds = [list(losses[name]) for name in names]
    if any(set(each) != set(seeds[0]) for each in seeds) or len(seeds[0]) < 2:
        return None
    rows = []
    for values, mine in zip(side, seeds, strict=True):
        by_seed = dict(zip(mine, values, strict=True))
        rows.append([by_seed[seed] for seed in seeds[0]])
    table = np.array(rows)
    return table - table.mean(axis=1, keepdims=True)


def _contrasts(
    noise: _Noise, losses: Sequence[Difference], axes: Mapping[str, Axes], tolerance: float
) -> list[Difference]:
    found = []
    for axis, other in (("params", "cells"), ("cells", "params")):
        place = np.array([getattr(axes[name], axis) for name in noise.names])
        held = np.array([getattr(axes[name], other) for name in noise.names])
        steps = _steps(place, held)
        if not steps:
            continue
        weights = np.stack([row for _, _, row in steps])  # (K, S)
        scale = _shared_by_seeds(noise, weights)
        before = weights @ np.array([loss.reference for loss in losses])
        after = weights @ np.array([loss.found for loss in losses])
        for k, (low, high, row) in enumerate(steps):
            part = np.flatnonzero(row)
            error = own = None
            if noise.variance is not None and noise.found_variance is not None:
                error = float(np.sqrt(scale * (row**2 @ noise.variance)))
                own = float(np.sqrt(scale * (row**2 @ noise.found_variance)))
            found.append(
                Difference(
                    f"{axis}:{low:g}:{high:g}",
                    float(before[k]),
                    float(after[k]),
                    error,
                    None if error is None else noise.freedom,
                    own,
                    tolerance,
                    identical=all(losses[i].identical for i in part.tolist()),
                    paired=noise.paired,
                )
            )
    return found


def _steps(place: Floats, held: Floats) -> list[tuple[float, float, Floats]]:
    """Neighbours along an axis with the weights (S,) of their gain: loss at the lower less loss at the higher."""
    values, steps = np.unique(place), []
    for low, high in zip(values, values[1:], strict=False):
        at = [{held[i]: i for i in np.flatnonzero(place == value)} for value in (low, high)]
        shared = sorted(at[0].keys() & at[1].keys())
        if shared:
            row = np.zeros(place.size)
            for other in shared:
                row[at[0][other]], row[at[1][other]] = 1.0 / len(shared), -1.0 / len(shared)
            steps.append((float(low), float(high), row))
    return steps


def _shared_by_seeds(noise: _Noise, weights: Floats) -> float:
    """By how much seeds that settings share raise the variance of contrasts, at least ``LEAST_SHARED``.

    Runs of one seed stand on the same cells, so their errors go together: what contrasts (K, S) vary by from seed to
    seed is compared with what independent runs would make them vary by.
    """
    if noise.run_variance is None or not noise.sides:
        return LEAST_SHARED
    expected = weights**2 @ noise.run_variance  # (K,)
    if not np.all(expected > 0):
        return LEAST_SHARED
    squares = sum(np.sum((weights @ side) ** 2, axis=1) for side in noise.sides)
    freedom = sum(side.shape[1] - 1 for side in noise.sides)
    return max(LEAST_SHARED, float(np.mean(squares / freedom / expected)))


def between_estimates(
    name: str,
    reference: tuple[float, float, float],
    found: tuple[float, float, float],
    tolerance: float,
) -> Difference:
    """The difference of two estimates, each a value with the ends of its 95% interval.

    Intervals need not be symmetric: of each, the half that points to the other estimate counts.
    """
    (a, a_low, a_high), (b, b_low, b_high) = reference, found
    halves = (a_high - a, b - b_low) if b > a else (a - a_low, b_high - b)
    error = float(np.hypot(*halves)) / _NORMAL_95
    own = (b_high - b_low) / 2 / _NORMAL_95
    return Difference(name, a, b, error, _SURE, own, tolerance, identical=reference == found)


def without_noise(name: str, reference: float, found: float, tolerance: float) -> Difference:
    """The difference of two figures that no seed moves (a closed form on all cells)."""
    same = abs(found - reference) <= ROUNDING * max(abs(found), abs(reference))
    return Difference(name, reference, found, 0.0, _SURE, 0.0, tolerance, identical=same)


def judge_all(differences: Sequence[Difference], drop: float, alpha: float = ALPHA) -> list[Judgement]:
    """A verdict for each difference, with at most ``alpha`` false drifts in all of them together.

    Args:
        differences: of all kinds, of one comparison.
        drop: all that the reference gained; a loss whose drift would have to be larger to be seen cannot be told.
        alpha: chance of one or more drifts that are none.
    """
    tests = [_p_values(each) for each in differences]
    tested = [i for i, test in enumerate(tests) if test is not None]
    beyond, differs = (holm([tests[i][k] for i in tested], alpha) for k in (0, 1))  # type: ignore[index]
    drifted, nonzero = dict(zip(tested, beyond, strict=True)), dict(zip(tested, differs, strict=True))
    found = []
    for i, each in enumerate(differences):
        test = tests[i]
        if test is None or each.error is None or each.freedom is None:
            told = (AGREES, "identical") if each.identical else (CANNOT_TELL, UNKNOWN)
            found.append(Judgement(each, told[0], None, None, None, None, told[1]))
            continue
        reach = float(stdtrit(each.freedom, 0.975)) * each.error
        first = float(-stdtrit(each.freedom, alpha / len(tested) / 2)) * each.error
        blank = Judgement(each, AGREES, test[0], each.value - reach, each.value + reach, each.tolerance + first, "")
        verdict, reason = _verdict(blank, drifted[i], nonzero[i], drop)
        found.append(replace(blank, verdict=verdict, reason=reason))
    return found


def _verdict(told: Judgement, drifted: bool, differs: bool, drop: float) -> tuple[Verdict, str]:
    each = told.difference
    if each.identical:
        return AGREES, "identical"
    if drifted:
        return DRIFTED, "differs by more than the tolerance"
    if differs and abs(each.value) <= each.tolerance:
        return AGREES, "differs, by too little to matter"
    if differs:
        return CANNOT_TELL, "differs, and these runs do not say whether by more than the tolerance"
    if told.detectable is not None and told.detectable > drop:
        return CANNOT_TELL, BLIND
    return AGREES, "within noise"


def _p_values(each: Difference) -> tuple[float, float] | None:
    """P of |difference| <= tolerance and of no difference; None where the noise is not known."""
    if each.error is None or each.freedom is None:
        return None
    if each.identical:
        return 1.0, 1.0
    size = abs(each.value)
    if each.error == 0:
        return float(size <= each.tolerance), 0.0
    beyond = _tail((size - each.tolerance) / each.error, each.freedom)
    beyond += _tail((size + each.tolerance) / each.error, each.freedom)
    return min(beyond, 1.0), min(2 * _tail(size / each.error, each.freedom), 1.0)


def _tail(t: float, freedom: float) -> float:
    return float(stdtr(freedom, -t))


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Which nulls are rejected by Holm's step-down procedure; the chance of one or more false ones is ``alpha``."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def overall(losses: Sequence[Judgement], others: Sequence[Judgement], missing: Sequence[str]) -> Verdict:
    """The verdict of a comparison: drifted where anything did, agrees where the losses of the reference could be told.

    Contrasts and laws follow from the losses: that one of them cannot be told takes nothing from losses that agree. A
    setting whose seeds scatter over all that was learned says nothing, and leaves the verdict to the others as long as
    these are more than half.
    """
    if any(each.verdict == DRIFTED for each in (*losses, *others)):
        return DRIFTED
    blind = sum(each.reason == BLIND for each in losses)
    untold = sum(each.verdict == CANNOT_TELL for each in losses)
    if missing or untold > blind or 2 * blind >= len(losses):
        return CANNOT_TELL
    return AGREES
