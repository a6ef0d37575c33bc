"""Gene mean and shrunk Gaussian against the textbook formula, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest

from scaling_ray.model.baselines import (
    SHRINKAGES,
    Moments,
    choose_shrinkage,
    gaussian_errors,
    gene_mean_errors,
    training_moments,
)

GENES = 30


def moments_of(values: np.ndarray, measured: np.ndarray) -> Moments:
    """Moments of values in one piece."""
    return training_moments(lambda: [(values, measured)])


def drawn(cells: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, masked, hidden) of correlated genes, some unmeasured, and one gene that is constant."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(GENES, 5))
    values = 2.0 + rng.normal(size=(cells, 5)) @ mixing.T + 0.3 * rng.normal(size=(cells, GENES))
    values[:, 3] = 1.5
    measured = np.ones((cells, GENES), dtype=bool)
    measured[::3, -4:] = False
    values[~measured] = 0.0
    masked = (rng.random((cells, GENES)) < 0.15) & measured
    return values, masked, masked | ~measured


def brute_force(
    mean: np.ndarray, covariance: np.ndarray, values: np.ndarray, masked: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """E[x_h | x_v] = m_h + S_hv S_vv^-1 (x_v - m_v), from the joint of the visible and the masked genes alone."""
    errors = np.zeros(len(values))
    for cell, (x, target, absent) in enumerate(zip(values, masked, hidden, strict=True)):
        v = ~absent
        weights = np.linalg.solve(covariance[np.ix_(v, v)], (x - mean)[v])
        predicted = mean[target] + covariance[np.ix_(target, v)] @ weights
        errors[cell] = ((x[target] - predicted) ** 2).sum()
    return errors


def test_moments_are_those_of_numpy_where_all_is_measured() -> None:
    values = drawn(200, 0)[0]
    moments = moments_of(values, np.ones_like(values, dtype=bool))
    assert moments.mean == pytest.approx(values.mean(0))
    assert moments.covariance == pytest.approx(np.cov(values, rowvar=False), abs=1e-12)


def test_moments_leave_unmeasured_cells_out() -> None:
    _, masked, hidden = drawn(300, 1)
    measured = masked | ~hidden
    values = 2.0 + np.random.default_rng(5).normal(size=(300, GENES))  # weakly correlated: pairwise moments are valid
    moments = moments_of(values, measured)
    for gene in (0, GENES - 1):
        own = values[measured[:, gene], gene]
        assert moments.mean[gene] == pytest.approx(own.mean())
        assert moments.covariance[gene, gene] == pytest.approx(own.var(ddof=1))
    both = measured[:, 0] & measured[:, -1]
    centred = (values - moments.mean)[both]
    assert moments.covariance[0, -1] == pytest.approx(centred[:, 0] @ centred[:, -1] / (both.sum() - 1))
    junk = np.where(measured, values, 1e6)
    assert moments_of(junk, measured).covariance == pytest.approx(moments.covariance)
    never = measured.copy()
    never[:, 0], never[:, 1] = np.arange(300) % 2 == 0, np.arange(300) % 2 == 1
    assert moments_of(values, never).covariance[0, 1] == 0


def test_moments_stay_those_of_a_distribution_where_genes_are_unmeasured() -> None:
    """Pairwise covariances of strongly correlated genes have negative eigenvalues, whose inverse predicts nonsense."""
    values, masked, hidden = drawn(400, 3)
    measured = masked | ~hidden
    moments = moments_of(values, measured)
    centred = np.where(measured, values - moments.mean, 0.0)
    present = measured.astype(float)
    pairwise = centred.T @ centred / (present.T @ present - 1)
    assert np.linalg.eigvalsh(pairwise)[0] < -1e-3, "the case under test"
    assert np.linalg.eigvalsh(moments.covariance)[0] > -1e-9
    assert np.diag(moments.covariance) == pytest.approx(np.diag(pairwise))
    assert np.abs(moments.covariance - pairwise).max() < 0.02 * np.abs(pairwise).max()


def test_gene_mean_errors_run_over_masked_genes_alone() -> None:
    values, masked, _ = drawn(50, 2)
    mean = np.linspace(0, 1, GENES)
    expected = [sum((values[c, g] - mean[g]) ** 2 for g in range(GENES) if masked[c, g]) for c in range(50)]
    assert gene_mean_errors(mean, values, masked) == pytest.approx(expected)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 0.9])
def test_gaussian_is_the_conditional_mean(shrinkage: float) -> None:
    train, masked, hidden = drawn(400, 3)
    moments = moments_of(train, masked | ~hidden)
    values, masked, hidden = drawn(60, 4)
    off_diagonal = (1 - shrinkage) * moments.covariance
    variance = np.diag(moments.covariance)
    shrunk = off_diagonal + np.diag(shrinkage * variance + 1e-6 * variance.mean())
    expected = brute_force(moments.mean, shrunk, values, masked, hidden)
    assert gaussian_errors(moments, shrinkage, values, masked, hidden) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_unmeasured_genes_are_marginalised_whatever_stands_there() -> None:
    train = drawn(400, 3)[0]
    moments = moments_of(train, np.ones_like(train, dtype=bool))
    values, masked, hidden = drawn(60, 4)
    junk = np.where(hidden & ~masked, 1e3, values)
    clean = gaussian_errors(moments, 0.1, values, masked, hidden)
    assert gaussian_errors(moments, 0.1, junk, masked, hidden) == pytest.approx(clean)
    assert not np.allclose(gaussian_errors(moments, 0.1, values, masked, masked), clean), (
        "unmeasured genes were believed"
    )


def test_full_shrinkage_is_the_gene_mean_and_a_fit_beats_it() -> None:
    train, masked, hidden = drawn(400, 3)
    moments = moments_of(train, masked | ~hidden)
    values, masked, hidden = drawn(60, 4)
    mean_errors = gene_mean_errors(moments.mean, values, masked)
    assert gaussian_errors(moments, 1.0, values, masked, hidden) == pytest.approx(mean_errors)
    assert gaussian_errors(moments, 0.01, values, masked, hidden).sum() < 0.1 * mean_errors.sum()


def test_cells_with_nothing_hidden_or_nothing_visible() -> None:
    values = drawn(400, 3)[0]
    moments = moments_of(values, np.ones_like(values, dtype=bool))
    none, everything = np.zeros((1, GENES), dtype=bool), np.ones((1, GENES), dtype=bool)
    assert gaussian_errors(moments, 0.1, values[:1], none, none).tolist() == [0.0]
    blind = gaussian_errors(moments, 0.1, values[:1], everything, everything)
    assert blind == pytest.approx(gene_mean_errors(moments.mean, values[:1], everything))


def test_shrinkage_is_the_best_on_the_cells_given() -> None:
    """Few training cells want much shrinkage, many want little; the sums are those of the choice."""
    chosen = {}
    values, masked, hidden = drawn(100, 5)
    for cells in (12, 2_000):
        train, train_masked, train_hidden = drawn(cells, 6)
        moments = moments_of(train, train_masked | ~train_hidden)
        best, sums = choose_shrinkage(moments, values, masked, hidden)
        totals = {s: gaussian_errors(moments, s, values, masked, hidden).sum() for s in SHRINKAGES}
        assert totals[best] == min(totals.values())
        assert sums.loss == pytest.approx(totals[best])
        assert sums.masked_genes == masked.sum()
        assert sums.mean == pytest.approx(totals[best] / masked.sum())
        chosen[cells] = best
    assert chosen[12] > chosen[2_000]
