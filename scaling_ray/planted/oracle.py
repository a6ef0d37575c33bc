"""The exact floor of a planted Census: the loss of the best possible predictor of masked genes on given cells.

Given its state, effect and total, a cell's counts are Dirichlet-multinomial. So the posterior over (state, effect)
from the visible counts is closed, with all hidden genes pooled into one category, and a masked count is then a
mixture of beta-binomials over the rest of the total beside the visible counts. There is no sampling and no
approximation but these two: components of posterior weight below ``PRUNE`` are left out, and the sums over counts end
when less than ``TAIL`` of the probability is left.

``corrected`` conditions on the full library: its hidden genes are the masked ones and all measured genes outside of
the panel. ``published`` normalises by the panel's sum and sees no more than that: its hidden genes are the masked
ones, and the panel's sum itself, whose law depends on the state, joins the evidence through the planted depths.
Both take the data set's list of measured genes as known; state and effect are distributed alike in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import gammaln, logsumexp

from scaling_ray.errors import BadInput
from scaling_ray.planted.truth import PlantedTruth, load_truth

__all__ = ["PRUNE", "TAIL", "OracleResult", "expected_values", "load_truth", "oracle", "posteriors"]

PRUNE = 1e-12
TAIL = 1e-11
SCALE = 1e4
"""Counts are scaled to this total before log1p."""

Recipe = Literal["corrected", "published"]


@dataclass(frozen=True)
class OracleResult:
    """Sums over each cell's masked genes; divide sums by sums, never average ratios.

    Attributes:
        squared_error_sum: (B,) realised (x - m)^2 of the best prediction m.
        variance_sum: (B,) its expectation over cells with the same visible part.
        entropy_bits_sum: (B,) sum of the per-gene conditional entropies of the count.
        nll_bits_sum: (B,) realised -log2 of the predictive probability of the count.
        masked_genes: (B,) how many were masked.
        posterior_entropy_nats: (B,) of the pair (state, effect), or of the state where the effect was given.
        prediction: (B, V) m, nan where not masked.
        tail_mass: (B,) largest probability left out of any gene's sums, rounding included.
    """

    squared_error_sum: np.ndarray
    variance_sum: np.ndarray
    entropy_bits_sum: np.ndarray
    nll_bits_sum: np.ndarray
    masked_genes: np.ndarray
    posterior_entropy_nats: np.ndarray
    prediction: np.ndarray
    tail_mass: np.ndarray


def oracle(
    truth: PlantedTruth,
    *,
    counts: np.ndarray,
    panel: np.ndarray,
    raw_sum: np.ndarray,
    masked: np.ndarray,
    measured: np.ndarray,
    dataset: np.ndarray,
    effect: np.ndarray | None = None,
    recipe: Recipe = "corrected",
) -> OracleResult:
    """The best prediction of masked genes and its loss, cell by cell.

    Args:
        truth: from ``load_truth``.
        counts: (B, V) raw counts of the panel's genes.
        panel: (V,) var joinids of the panel.
        raw_sum: (B,) sum of the counts of all genes.
        masked: (B, V) bool; masked genes must be measured.
        measured: (B, V) bool.
        dataset: (B,) rows of ``truth.measured`` (``truth.dataset_index(dataset_ids)``).
        effect: (B,) the cells' effects (``truth.effect_of_donor(donor_ids)``): the answer is then the bound, which no
            predictor passes. None: effects are marginalised over their prior, and the answer is the floor attainable
            from the cell alone.
        recipe: chooses the total that scales the counts, x = log1p(count * 1e4 / total), and is known to the predictor.

    Raises:
        BadInput: shapes, masks or totals that do not fit the truth.
    """
    counts, panel, masked = np.asarray(counts, np.int64), np.asarray(panel, np.int64), np.asarray(masked, bool)
    measured, dataset = np.asarray(measured, bool), np.asarray(dataset, np.int64)
    raw_sum = np.asarray(raw_sum, np.int64)
    _check(truth, counts, panel, raw_sum, masked, measured, dataset, recipe)
    cells, genes = counts.shape
    components = np.arange(len(truth.component_prior))
    sums = np.zeros((4, cells))
    posterior_entropy, tail_mass = np.zeros(cells), np.zeros(cells)
    prediction = np.full((cells, genes), np.nan)
    for t in np.unique(dataset):
        evidence = _Evidence(truth, int(t), panel, recipe)
        for i in np.flatnonzero(dataset == t):
            visible = measured[i] & ~masked[i]
            total = int(raw_sum[i] if recipe == "corrected" else counts[i].sum())
            with np.errstate(divide="ignore"):
                log_prior = np.log(truth.component_prior)
            if effect is not None:
                log_prior = np.where(components % truth.spec.n_effects == effect[i], log_prior, -np.inf)
            weight, kept, pool = evidence.posterior(log_prior, counts[i], visible, masked[i], total)
            posterior_entropy[i] = -float(np.sum(weight * np.log(weight)))
            targets = np.flatnonzero(masked[i])
            if not len(targets):
                continue
            only_one_hidden = evidence.hidden_genes(visible) == 1
            hidden = total - int(counts[i, visible].sum())
            moments = _mixture_moments(
                weight,
                evidence.weights[kept][:, targets].T,
                pool[kept][None, :],
                hidden,
                total,
                counts[i, targets],
                only_one_hidden,
            )
            prediction[i, targets] = moments.mean
            scaled = _scaled(counts[i, targets], total)
            sums[:, i] = (
                np.sum((scaled - moments.mean) ** 2),
                moments.variance.sum(),
                moments.entropy_bits.sum(),
                moments.nll_bits.sum(),
            )
            tail_mass[i] = moments.tail_mass
    return OracleResult(
        squared_error_sum=sums[0],
        variance_sum=sums[1],
        entropy_bits_sum=sums[2],
        nll_bits_sum=sums[3],
        masked_genes=masked.sum(axis=1),
        posterior_entropy_nats=posterior_entropy,
        prediction=prediction,
        tail_mass=tail_mass,
    )


def posteriors(
    truth: PlantedTruth,
    *,
    counts: np.ndarray,
    panel: np.ndarray,
    raw_sum: np.ndarray,
    masked: np.ndarray,
    measured: np.ndarray,
    dataset: np.ndarray,
    recipe: Recipe = "corrected",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each cell the components that its visible part leaves, and their weights, which sum to 1.

    Arguments and errors are those of ``oracle``; effects are not known.
    """
    counts, panel, masked = np.asarray(counts, np.int64), np.asarray(panel, np.int64), np.asarray(masked, bool)
    measured, dataset = np.asarray(measured, bool), np.asarray(dataset, np.int64)
    raw_sum = np.asarray(raw_sum, np.int64)
    _check(truth, counts, panel, raw_sum, masked, measured, dataset, recipe)
    evidence = {int(t): _Evidence(truth, int(t), panel, recipe) for t in np.unique(dataset)}
    log_prior = np.log(truth.component_prior)
    found = []
    for i, t in enumerate(dataset):
        total = int(raw_sum[i] if recipe == "corrected" else counts[i].sum())
        visible = measured[i] & ~masked[i]
        weight, kept, _ = evidence[int(t)].posterior(log_prior, counts[i], visible, masked[i], total)
        found.append((kept, weight))
    return found


def expected_values(weights: np.ndarray, concentration: float, total: int) -> np.ndarray:
    """(K,) mean of log1p(count * 1e4 / total) for genes of given Dirichlet weights, in a library of that total."""
    if total == 0:
        return np.zeros(len(weights))
    a = np.asarray(weights, float)[:, None]
    nothing_seen = np.zeros(len(a), np.int64)
    return _mixture_moments(np.ones(1), a, np.array([[concentration]]), total, total, nothing_seen, False).mean


class _Evidence:
    """Likelihoods of one data set's cells under every component, for one panel and recipe."""

    def __init__(self, truth: PlantedTruth, dataset: int, panel: np.ndarray, recipe: Recipe) -> None:
        everywhere = truth.weights(dataset)
        self.weights = np.ascontiguousarray(everywhere[:, panel])  # (C, V)
        self._corrected = recipe == "corrected"
        in_panel = self.weights.sum(axis=1)
        if self._corrected:
            # summed over the genes outside, not by subtraction, so that a panel of all genes leaves exactly 0
            outside = np.setdiff1d(np.arange(truth.spec.n_genes), panel)
            self._outside = everywhere[:, outside].sum(axis=1)
            self._outside_genes = int(truth.measured[dataset][outside].sum())
        else:
            self._outside, self._outside_genes = np.zeros(len(in_panel)), 0
            sizes, share = truth.depth_grid(dataset)
            theta = sizes / (sizes + truth.concentration)
            # (C, J): log share_j + in_panel * log(1 - theta_j), the part of the panel sum's law without the sum
            self._log_sum_law = np.log(share) + in_panel[:, None] * np.log1p(-theta)
            self._log_theta = np.log(theta)
        self._measured = truth.measured[dataset][panel]

    def hidden_genes(self, visible: np.ndarray) -> int:
        return int((self._measured & ~visible).sum()) + self._outside_genes

    def posterior(
        self, log_prior: np.ndarray, counts: np.ndarray, visible: np.ndarray, masked: np.ndarray, total: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(weights of the components kept, their indices, (C,) pooled weight of all hidden genes).

        With weights a_g, and h counts of the total left for the hidden genes, whose weights sum to b,
        P(visible counts, total) is, up to factors that no component changes,
        prod_g Gamma(a_g + x_g) / Gamma(a_g) * Gamma(b + h) / Gamma(b) * P(total) * Gamma(A) / Gamma(A + total).
        In the full library A is the same everywhere. In the panel, P(total) is a mixture over depths of negative
        binomials of shape A, whose own Gamma(A + total) / Gamma(A) cancels the last factor.
        """
        shown = np.flatnonzero(visible & (counts > 0))
        a = self.weights[:, shown]
        pool = self.weights[:, masked].sum(axis=1) + self._outside
        hidden = total - int(counts[shown].sum())
        log_weight = log_prior + (gammaln(a + counts[shown]) - gammaln(a)).sum(axis=1)
        if hidden:
            log_weight = log_weight + gammaln(pool + hidden) - gammaln(pool)
        if not self._corrected:
            log_weight = log_weight + logsumexp(self._log_sum_law + total * self._log_theta, axis=1)
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        kept = np.flatnonzero(weight >= PRUNE)
        return weight[kept] / weight[kept].sum(), kept, pool


@dataclass(frozen=True)
class _Moments:
    mean: np.ndarray
    variance: np.ndarray
    entropy_bits: np.ndarray
    nll_bits: np.ndarray
    tail_mass: float


def _mixture_moments(
    weight: np.ndarray,
    a: np.ndarray,
    pool: np.ndarray,
    hidden: int,
    total: int,
    observed: np.ndarray,
    only_one_hidden: bool,
) -> _Moments:
    """Moments of x = log1p(1e4 count / total) and entropy of the count, for K genes under mixture weights (M,).

    Each gene's count is beta-binomial(hidden, a, pool - a) in each component; ``a`` is (K, M), ``pool`` (1, M).
    Probabilities follow from p(0) by p(c + 1) / p(c) = (n - c)(a + c) / ((c + 1)(b + n - c - 1)).
    """
    genes = len(a)
    mass, first, second, entropy = (np.zeros(genes) for _ in range(4))
    chance = np.zeros(genes)
    if only_one_hidden or hidden == 0:
        # nothing is random: the one hidden gene holds all missing counts
        value = np.full(genes, _scaled(np.array([hidden]), total)[0])
        right = observed == hidden
        nll = np.where(right, 0.0, np.inf)
        return _Moments(value, np.zeros(genes), np.zeros(genes), nll, 0.0)
    b = pool - a
    log_p = gammaln(b + hidden) - gammaln(b) - gammaln(pool + hidden) + gammaln(pool)  # (K, M) at count 0
    # log-gamma of a large library carries a rounding error that no tail can fall below
    rounding = 4e-16 * gammaln(float(hidden) + 2.0)
    left = np.arange(genes)
    start, block = 0, 32
    while len(left) and start <= hidden:
        count = np.arange(start, min(start + block, hidden + 1))
        ratio = (hidden - count) / (count + 1.0)
        if count[-1] < hidden:
            after = (a[left][:, :, None] + count) / (b[left][:, :, None] + (hidden - 1.0 - count))
            step = np.log(after * ratio)
        else:
            step = _log_steps_to_the_end(a[left], b[left], count, hidden)
        inside = np.cumsum(step, axis=2)
        log_block = log_p[left][:, :, None] + np.concatenate([np.zeros_like(inside[:, :, :1]), inside[:, :, :-1]], 2)
        log_p[left] += inside[:, :, -1]
        q = np.einsum("m,kmc->kc", weight, np.exp(log_block))
        value = _scaled(count, total)
        mass[left] += q.sum(axis=1)
        first[left] += q @ value
        second[left] += q @ value**2
        entropy[left] -= np.sum(q * np.log2(np.where(q > 0, q, 1.0)), axis=1)
        here = (observed[left] >= start) & (observed[left] <= count[-1])
        chance[left[here]] = q[here, observed[left[here]] - start]
        missing = 1.0 - mass[left]
        ended = (missing < TAIL) | ((missing < rounding) & (q.sum(axis=1) < TAIL))
        left = left[~(ended & (observed[left] <= count[-1]))]
        start, block = int(count[-1]) + 1, min(2 * block, 4096)
    with np.errstate(divide="ignore"):
        nll = -np.log2(chance)
    return _Moments(first, np.maximum(second - first**2, 0.0), entropy, nll, float(np.abs(1.0 - mass).max()))


def _log_steps_to_the_end(a: np.ndarray, b: np.ndarray, count: np.ndarray, hidden: int) -> np.ndarray:
    """Log ratios of the block that ends with the last count; no step follows it."""
    inner = count[:-1]
    steps = np.log(
        (a[:, :, None] + inner) * ((hidden - inner) / (inner + 1.0)) / (b[:, :, None] + (hidden - 1.0 - inner))
    )
    return np.concatenate([steps, np.zeros((*a.shape, 1))], axis=2)


def _scaled(count: np.ndarray, total: int) -> np.ndarray:
    """log1p(count * 1e4 / total); a cell without counts is 0 everywhere."""
    return np.log1p(count * (SCALE / total)) if total else np.zeros(len(count))


def _check(
    truth: PlantedTruth,
    counts: np.ndarray,
    panel: np.ndarray,
    raw_sum: np.ndarray,
    masked: np.ndarray,
    measured: np.ndarray,
    dataset: np.ndarray,
    recipe: str,
) -> None:
    cells, genes = counts.shape
    if recipe not in ("corrected", "published"):
        raise BadInput("C067", "recipe", recipe, "choose corrected or published")
    for field, array, shape in (
        ("panel", panel, (genes,)),
        ("raw_sum", raw_sum, (cells,)),
        ("masked", masked, (cells, genes)),
        ("measured", measured, (cells, genes)),
        ("dataset", dataset, (cells,)),
    ):
        if array.shape != shape:
            raise BadInput("C068", field, array.shape, f"expected the shape {shape} that goes with counts")
    if len(np.unique(panel)) != genes or panel.min() < 0 or panel.max() >= truth.spec.n_genes:
        raise BadInput("C069", "panel", panel.tolist(), f"must be distinct joinids below {truth.spec.n_genes}")
    if not np.array_equal(measured, truth.measured[dataset][:, panel]):
        raise BadInput(
            "C070", "measured", "array", "differs from the truth's list for these data sets and genes; take that list"
        )
    if (masked & ~measured).any():
        raise BadInput("C071", "masked", "array", "a gene that was not measured cannot be a target; mask measured ones")
    if (counts[~measured] != 0).any() or (counts.sum(axis=1) > raw_sum).any():
        raise BadInput(
            "C072",
            "counts",
            "array",
            "counts of unmeasured genes, or more than raw_sum; are these cells of this plant?",
        )
