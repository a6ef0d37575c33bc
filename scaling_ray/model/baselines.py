"""Closed-form references on the same training cells, genes and masks as a run: the gene mean and a shrunk Gaussian.

The Gaussian predicts a masked value by its conditional mean given the visible ones. Its covariance is shrunk towards
its diagonal, (1 - s) S + s diag(S), with s chosen on validation cells. numpy only; arrays are
values (B, V), masked (B, V) bool (targets), hidden (B, V) bool (masked or unmeasured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_ray.records import LossSums

SHRINKAGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Moments:
    """Mean (V,) and covariance (V, V) of training values, each over the cells that measured the genes."""

    mean: Floats
    covariance: Floats


def training_moments(chunks: Callable[[], Iterable[tuple[NDArray[np.floating], Bools]]]) -> Moments:
    """Moments of training values, each pair of genes over the cells that measured both (0 where none did).

    ``chunks`` is called twice and yields (values, measured), both (cells of the chunk, V), over all cells. Pairwise
    covariances need not be a valid covariance matrix; negative eigenvalues are then set to zero and the variances
    restored. Where every cell measured every gene, the moments are the plain sample moments.
    """
    total = cells = products = pairs = np.zeros(())
    for values, measured in chunks():
        present = measured.astype(np.float64)
        total, cells = total + (values * present).sum(0), cells + present.sum(0)
    mean = total / np.maximum(cells, 1.0)
    everywhere = True
    for values, measured in chunks():
        present = measured.astype(np.float64)
        centred = (values - mean) * present
        products, pairs = products + centred.T @ centred, pairs + present.T @ present
        everywhere = everywhere and bool(measured.all())
    covariance = products / np.maximum(pairs - 1.0, 1.0)
    return Moments(mean, covariance if everywhere else _nearest_semidefinite(covariance))


def _nearest_semidefinite(covariance: Floats) -> Floats:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    if eigenvalues[0] >= 0:
        return covariance
    clipped = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
    before, after = np.diag(covariance), np.diag(clipped)
    scale = np.sqrt(np.divide(before, after, out=np.zeros_like(before), where=after > 0))
    return clipped * scale[:, None] * scale


def gene_mean_errors(mean: Floats, values: NDArray[np.floating], masked: Bools) -> Floats:
    """(B,) squared error of predicting each masked gene by its training mean, summed per cell."""
    return np.where(masked, (values - mean) ** 2, 0.0).sum(1)


def gaussian_errors(
    moments: Moments, shrinkage: float, values: NDArray[np.floating], masked: Bools, hidden: Bools
) -> Floats:
    """(B,) squared error of the conditional mean given the visible genes, summed per cell.

    With precision matrix P, hidden set h and visible set v: E[x_h | x_v] = m_h - P_hh^-1 P_hv (x_v - m_v).
    """
    variance = np.diag(moments.covariance)
    floor = 1e-6 * max(float(variance.mean()), 1e-12)
    shrunk = (1 - shrinkage) * moments.covariance + np.diag(shrinkage * variance + floor)
    precision = np.linalg.inv(shrunk)
    errors = np.zeros(len(values))
    for cell in range(len(values)):
        absent = np.flatnonzero(hidden[cell])
        centred = np.where(hidden[cell], 0.0, values[cell] - moments.mean)
        shift = np.linalg.solve(precision[np.ix_(absent, absent)], precision[absent] @ centred)
        residual = values[cell, absent] - (moments.mean[absent] - shift)
        errors[cell] = (residual[masked[cell, absent]] ** 2).sum()
    return errors


def choose_shrinkage(
    moments: Moments, values: NDArray[np.floating], masked: Bools, hidden: Bools
) -> tuple[float, LossSums]:
    """The shrinkage of lowest squared error on (validation) cells, and that error."""
    count = float(masked.sum())
    tried = {s: float(gaussian_errors(moments, s, values, masked, hidden).sum()) for s in SHRINKAGES}
    best = min(tried, key=lambda s: tried[s])
    return best, LossSums(tried[best], count)
