"""Draws the cells of a planted Census, range by range; a range depends only on the spec and its own number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scaling_ray.planted.truth import PlantedTruth


@dataclass(frozen=True)
class CellRange:
    """B cells of one range.

    Attributes:
        state, effect, dataset: (B,) latent integers.
        donor: (B,) index into ``PlantedTruth.donor_ids``.
        copy_of: (B,) row within the range that this row repeats, -1 for an original.
        counts: (B, G) int32.
    """

    state: np.ndarray
    effect: np.ndarray
    dataset: np.ndarray
    donor: np.ndarray
    copy_of: np.ndarray
    counts: sp.csr_matrix


def draw_range(truth: PlantedTruth, index: int) -> CellRange:
    """All cells of range ``index`` (``spec.range_cells`` of them)."""
    spec, n = truth.spec, truth.spec.range_cells
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, 0xCE115, index])))
    dataset = _choice(rng, spec.dataset_share, n)
    state = _choice(rng, truth.state_prior, n)
    place = rng.integers(0, spec.donors_per_dataset, n)
    donor = dataset * spec.donors_per_dataset + place
    effect = truth.effect_of_donor([truth.donor_ids[d] for d in donor])
    size = np.empty(n)
    for t in range(len(spec.dataset_share)):
        sizes, share = truth.depth_grid(t)
        rows = np.flatnonzero(dataset == t)
        size[rows] = sizes[_choice(rng, share, len(rows))]

    weights = np.empty((n, spec.n_genes))
    for t in range(len(spec.dataset_share)):
        rows = np.flatnonzero(dataset == t)
        weights[rows] = truth.weights(t)[state[rows] * spec.n_effects + effect[rows]]
    theta = size / (size + truth.concentration)
    # inversion starts at the probability of a zero, which must not underflow, and walks up to the count
    deep = (size > 2 * truth.concentration) | (weights.max(axis=1) > 300)
    shallow_rows, deep_rows = np.flatnonzero(~deep), np.flatnonzero(deep)
    parts = [
        _by_inversion(rng, weights[shallow_rows], theta[shallow_rows]),
        _by_mixture(rng, weights[deep_rows], theta[deep_rows]),
    ]
    counts = sp.vstack(parts, format="csr", dtype=np.int32)[np.argsort(np.concatenate([shallow_rows, deep_rows]))]

    copy_of = np.full(n, -1)
    copies = np.flatnonzero(rng.random(n) < spec.copied_share)
    own = np.setdiff1d(np.arange(n), copies)
    # a copy follows its original, so that a Census cut inside a range never holds a copy without it
    place_of = np.searchsorted(own, copies)
    copies, place_of = copies[place_of > 0], place_of[place_of > 0]
    copy_of[copies] = own[(rng.random(len(copies)) * place_of).astype(np.int64)]
    source = np.where(copy_of >= 0, copy_of, np.arange(n))
    return CellRange(
        state=state[source],
        effect=effect[source],
        dataset=dataset[source],
        donor=donor[source],
        copy_of=copy_of,
        counts=counts[source].tocsr(),
    )


def _choice(rng: np.random.Generator, probability: np.ndarray | tuple[float, ...], size: int) -> np.ndarray:
    edges = np.cumsum(np.asarray(probability, float))
    return np.minimum(np.searchsorted(edges, rng.random(size) * edges[-1], side="right"), len(edges) - 1)


def _by_inversion(rng: np.random.Generator, shape: np.ndarray, theta: np.ndarray) -> sp.csr_matrix:
    """Negative binomials of (B, G) shapes, from one uniform each; only non-zero counts are computed."""
    uniform = rng.random(shape.shape)
    at_zero = np.exp(shape * np.log1p(-theta)[:, None])
    row, gene = np.nonzero(uniform > at_zero)
    values = np.zeros(len(row), np.int32)
    left = np.arange(len(row))
    u, mass, r, t = uniform[row, gene], at_zero[row, gene], shape[row, gene], theta[row]
    reached, count = mass.copy(), 0
    while len(left):
        mass = mass * (r + count) / (count + 1) * t
        reached = reached + mass
        count += 1
        # a mass this small no longer moves the sum: the uniform lies in the rounding of the tail
        more = (u > reached) & ((mass > 1e-17) | (count < r * t / (1 - t)))
        values[left[~more]] = count
        left, u, mass, r, t, reached = (a[more] for a in (left, u, mass, r, t, reached))
    return sp.csr_matrix((values, (row, gene)), shape=shape.shape)


def _by_mixture(rng: np.random.Generator, shape: np.ndarray, theta: np.ndarray) -> sp.csr_matrix:
    """The same law for deep libraries: a Poisson count at a gamma rate."""
    # gamma needs a positive shape; unmeasured genes are set to no rate afterwards
    rate = rng.standard_gamma(np.where(shape > 0, shape, 1.0)) * (theta / (1 - theta))[:, None]
    rate[shape == 0] = 0.0
    return sp.csr_matrix(rng.poisson(rate).astype(np.int32))
