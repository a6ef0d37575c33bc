"""References of limited predictors on planted cells: how fast the loss can fall where only some states are told apart.

The best prediction is m = sum_c w_c mu_c over components c, with posterior weights w_c. A limited predictor has the
same posterior, but answers for a component with less than what is known of it: with e_c the mean expression of a
component in its data set, and e'_c what is left of it under the limit, it predicts m + sum_c w_c (e'_c - e_c). Two
limits:

``told``: the n most frequent states keep their own mean, all others share one, their average. With all told apart
nothing is lost; with one class left the answer is the gene mean's. In a plant of the law e'_c is the average of all
states and what the n strongest programs, each by itself, move it by; with all of them followed, what is left is what
programs do together.

``rank``: e' is the best approximation of rank n to the table of means about its average, weighted by frequency.

m is a conditional expectation, so for any predictor that is a function of the visible part, expected loss = floor +
expected squared distance to m. The excess is therefore computed as that distance, free of the noise of the masked
counts.

What this bounds. ``rank`` is the least excess of any table of n directions where states lie open, so about that of
linear read-outs of n numbers per cell. A transformer of width d is not held to it: a softmax over genes with queries of
width d separates many more than d groups of genes, so its loss may fall below at n = d, and a training budget may keep
it above. ``told`` is the loss of one predictor, hence an upper bound for what n states allow. Exponents by n are
references for the shape of a size law, not for the constant that ties n to parameters.

Shape legend: B cells, V genes of the panel, C components (state major), T data sets, n a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.errors import BadInput
from scaling_ray.planted.draw import draw_range
from scaling_ray.planted.law import LawSpec
from scaling_ray.planted.oracle import expected_values, oracle, posteriors
from scaling_ray.planted.truth import PlantedTruth

Floats = NDArray[np.float64]

MASK_FRACTION = 0.15
"""Share of the genes that is hidden unless said, as in training unless a spec says another."""

INTERPOLATION_POINTS = 200
"""Weights at which the mean of a gene's value is summed exactly; it is interpolated between them."""


@dataclass(frozen=True)
class LimitedExcess:
    """Excess over the attainable floor, squared error per masked gene, by limit.

    Attributes:
        told: (N,) states told apart (programs followed, in a plant of the law).
        told_excess: (N,) excess where so many are.
        rank: (M,) directions.
        rank_excess: (M,) excess of so many directions.
    """

    told: NDArray[np.int64]
    told_excess: Floats
    rank: NDArray[np.int64]
    rank_excess: Floats


def state_means(truth: PlantedTruth, dataset: int, panel: NDArray[np.integer]) -> Floats:
    """(C, V) mean of x = log1p(count * 1e4 / total) in each component, over the depths of a data set.

    Interpolated in the log of the weight, with totals rounded to whole counts; unmeasured genes are 0.
    """
    weights = truth.weights(dataset)[:, panel]
    seen = weights > 0
    grid = np.geomspace(
        weights[seen].min(), max(weights[seen].max(), weights[seen].min() * 1.001), INTERPOLATION_POINTS
    )
    sizes, share = truth.depth_grid(dataset)
    mean = np.zeros(len(grid))
    for size, part in zip(np.rint(sizes).astype(int), share, strict=True):
        mean += part * expected_values(grid, truth.concentration, int(size))
    return np.where(seen, np.interp(np.log(np.where(seen, weights, 1.0)), np.log(grid), mean), 0.0)


def class_of_component(truth: PlantedTruth, told: int) -> NDArray[np.int64]:
    """(C,) class of each component where ``told`` states are told apart and the rarer ones are one class.

    Effects stay apart.
    """
    if told < 0:
        raise BadInput("C062", "told", told, "choose 0 or more")
    place = np.empty(len(truth.state_prior), np.int64)
    place[np.argsort(-truth.state_prior, kind="stable")] = np.arange(len(place))
    of_state = np.minimum(place, told)
    effects = truth.spec.n_effects
    both = (of_state[:, None] * effects + np.arange(effects)).ravel()
    return np.unique(both, return_inverse=True)[1].astype(np.int64)


def limited_excess(
    truth: PlantedTruth,
    *,
    counts: NDArray[np.integer],
    panel: NDArray[np.integer],
    raw_sum: NDArray[np.integer],
    masked: NDArray[np.bool_],
    measured: NDArray[np.bool_],
    dataset: NDArray[np.integer],
    told: Sequence[int] = (),
    rank: Sequence[int] = (),
) -> LimitedExcess:
    """Excess of limited predictors on given cells, for the corrected recipe; it comes on top of ``oracle``'s floor.

    The cells are given as to ``oracle``. Each limit costs one table of C x V per data set.

    Args:
        truth: from ``load_truth``.
        counts: (B, V) raw counts of the panel's genes.
        panel: (V,) var joinids of the panel.
        raw_sum: (B,) sum of the counts of all genes.
        masked: (B, V) bool.
        measured: (B, V) bool.
        dataset: (B,) rows of ``truth.measured``.
        told: numbers of states told apart, or of programs followed.
        rank: numbers of directions.

    Raises:
        BadInput: as ``oracle``; or a limit below 0.
    """
    for field, limits in (("told", told), ("rank", rank)):
        if any(n < 0 for n in limits):
            raise BadInput("C063", field, list(limits), "choose 0 or more")
    masked, dataset = np.asarray(masked, bool), np.asarray(dataset, np.int64)
    weight_of = posteriors(
        truth, counts=counts, panel=panel, raw_sum=raw_sum, masked=masked, measured=measured, dataset=dataset
    )  # fmt: skip
    there = [int(t) for t in np.unique(dataset)]
    means = {t: state_means(truth, t, panel) for t in there}
    prior = truth.component_prior
    centred = {t: means[t] - prior @ means[t] for t in there}
    share = np.bincount(dataset, minlength=len(truth.measured)) / max(len(dataset), 1)
    spread = sum(share[t] * (centred[t].T * prior) @ centred[t] for t in there)
    directions = np.linalg.eigh(spread)[1][:, ::-1]
    masked_genes = max(int(masked.sum()), 1)

    def excess(lost: dict[int, Floats]) -> float:
        total = 0.0
        for i, (kept, weight) in enumerate(weight_of):
            total += float(np.sum((weight @ lost[int(dataset[i])][kept])[masked[i]] ** 2))
        return total / masked_genes

    told_excess = [excess({t: _untold(truth, means[t], n) for t in there}) for n in told]
    rank_excess = [
        excess({t: centred[t] - (centred[t] @ directions[:, :n]) @ directions[:, :n].T for t in there}) for n in rank
    ]
    return LimitedExcess(
        np.array(told, np.int64), np.array(told_excess), np.array(rank, np.int64), np.array(rank_excess)
    )


def _untold(truth: PlantedTruth, means_CV: Floats, told: int) -> Floats:
    """(C, V) distance of each component's mean to what is told of it."""
    prior = truth.component_prior
    if not isinstance(truth.spec, LawSpec):
        return _by_class(means_CV, prior, class_of_component(truth, told))
    # all states are equally frequent and programs uncorrelated, so each one's part stands by itself
    signs = truth.spec.signs(truth.state_path)[:, :told].astype(float)
    centred = means_CV - prior @ means_CV
    return np.asarray(centred - signs @ (signs.T @ (prior[:, None] * centred)))


def _by_class(means_CV: Floats, prior: Floats, of_component: NDArray[np.int64]) -> Floats:
    """(C, V) distance of each component's mean to its class's, which is weighted by frequency."""
    classes = int(of_component.max()) + 1
    if classes == len(prior):
        return np.zeros_like(means_CV)
    total = np.bincount(of_component, prior, classes)
    summed = np.zeros((classes, means_CV.shape[1]))
    np.add.at(summed, of_component, means_CV * prior[:, None])
    return means_CV - (summed / total[:, None])[of_component]


def exponent(n: Sequence[float] | NDArray[np.number], excess: Sequence[float] | Floats) -> float:
    """The alpha of excess = constant * n^-alpha, by least squares of log excess on log n.

    Raises:
        BadInput: fewer than two points, or one that is not above 0.
    """
    x, y = np.asarray(n, float), np.asarray(excess, float)
    if len(x) < 2 or (x <= 0).any() or (y <= 0).any():
        raise BadInput("C066", "excess", y.tolist(), "needs two or more points, all above 0")
    return -float(np.polyfit(np.log(x), np.log(y), 1)[0])


def limits_of(
    truth: PlantedTruth, *, cells: int = 600, n_genes: int | None = None, mask_fraction: float = MASK_FRACTION
) -> dict[str, Any]:
    """How the loss falls with what a predictor may tell apart, on cells of a plant: the references of a size law.

    Args:
        truth: from ``load_truth``.
        cells: originals of the plant's first range that are looked at.
        n_genes: the panel is the first so many genes; None: those that programs move, or all of a tree.
        mask_fraction: share of the genes that is hidden.

    Returns:
        ``attainable_floor``, squared error per masked gene; ``drop``, what the gene mean's loss lies above it;
        ``told`` and ``rank``: ``n`` of ``what``, ``share_of_drop`` that is left, and ``exponent`` of n over
        ``exponent_n`` (two thirds of the programs at most, where the end is far).

    Raises:
        BadInput: more cells or genes than there are, or fewer than one.
    """
    law = truth.spec if isinstance(truth.spec, LawSpec) else None
    states = law.programs if law else len(truth.state_prior)
    most = truth.spec.n_genes
    n_genes = n_genes if n_genes is not None else law.n_told if law else most
    drawn = draw_range(truth, 0)
    counts = drawn.counts.toarray()
    rows = np.flatnonzero((drawn.copy_of < 0) & (counts.sum(axis=1) > 0))
    if not 1 <= cells <= len(rows):
        raise BadInput("C083", "cells", cells, f"choose 1 to {len(rows):,}")
    if not 1 <= n_genes <= most:
        raise BadInput("C084", "genes", n_genes, f"choose 1 to {most:,}")
    if not 0 < mask_fraction < 1:
        raise BadInput("C089", "mask_fraction", mask_fraction, "choose a share between 0 and 1")
    rows, panel = rows[:cells], np.arange(n_genes)
    measured = truth.measured[drawn.dataset[rows]][:, panel]
    rng = np.random.default_rng([truth.spec.seed, 0x11417])
    looked_at = {
        "counts": counts[rows][:, panel],
        "panel": panel,
        "raw_sum": counts[rows].sum(axis=1),
        "masked": measured & (rng.random(measured.shape) < mask_fraction),
        "measured": measured,
        "dataset": drawn.dataset[rows],
    }
    found = limited_excess(
        truth, **looked_at, told=_ladder(states), rank=_ladder(min(4 * states if law else states, n_genes))
    )
    drop = float(found.told_excess[0])
    if not drop > 1e-9:
        raise BadInput("C088", "cells", cells, f"of {n_genes:,} genes leave nothing to predict; take more of either")
    return {
        "cells": cells,
        "genes": n_genes,
        "mask_fraction": mask_fraction,
        "attainable_floor": float(oracle(truth, **looked_at).variance_sum.sum() / looked_at["masked"].sum()),
        "drop": drop,
        "told": {"what": "programs followed" if law else "states told apart"}
        | _reference(found.told, found.told_excess / drop, 2 * states / 3),
        "rank": {"what": "directions"} | _reference(found.rank, found.rank_excess / drop, 2 * states / 3),
    }


def _ladder(most: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to ``most``."""
    steps = sorted({2**k for k in range(30)} | {3 * 2**k for k in range(30)})
    return [0, *(n for n in steps if n < most), most]


def _reference(n: NDArray[np.int64], share: Floats, far: float) -> dict[str, Any]:
    used = (n >= 1) & (n <= far) & (share > 0)
    return {
        "n": n.tolist(),
        "share_of_drop": share.tolist(),
        "exponent": exponent(n[used], share[used]) if used.sum() >= 2 else None,
        "exponent_n": n[used].tolist(),
    }
