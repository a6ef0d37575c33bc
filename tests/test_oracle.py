"""The exact floor against enumeration, against itself in expectation, and in its order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.special import gammaln

from scaling_ray.errors import BadInput
from scaling_ray.planted.draw import draw_range
from scaling_ray.planted.oracle import oracle
from scaling_ray.planted.truth import PlantedTruth, PlantSpec
from scaling_ray.recipe import Recipe

Planted = tuple[PlantedTruth, dict[str, Any], np.ndarray, np.ndarray, np.ndarray]
"""Truth, a batch of cells, their effects; counts and data sets of other cells."""

TINY = PlantSpec(
    n_genes=6,
    seed=3,
    branching=(2, 2),
    program_gene_fraction=(0.5, 0.5),
    program_strength=(1.5, 1.0),
    n_effects=2,
    effect_gene_fraction=0.6,
    effect_sd=0.8,
    donors_per_dataset=2,
    dataset_share=(0.7, 0.3),
    unmeasured_fraction=(0.0, 0.3),
    largest_share=0.6,
    concentration_per_gene=0.7,
    depth_per_gene=(1.0, 1.5),
    depth_levels=3,
)


def dm_log_pmf(counts: np.ndarray, weights: np.ndarray) -> float:
    """Dirichlet-multinomial over the categories of positive weight, written out."""
    kept = weights > 0
    x, a = counts[kept], weights[kept]
    n, total = x.sum(), a.sum()
    return float(
        gammaln(n + 1)
        - gammaln(x + 1).sum()
        + gammaln(total)
        - gammaln(total + n)
        + (gammaln(a + x) - gammaln(a)).sum()
    )


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to share ``total`` counts among ``parts`` genes."""
    if parts == 0:
        return [()] if total == 0 else []
    bars = itertools.combinations(range(total + parts - 1), parts - 1)
    return [tuple(b - a - 1 for a, b in zip((-1, *cut), (*cut, total + parts - 1), strict=True)) for cut in bars]


def panel_sum_probability(truth: PlantedTruth, dataset: int, weights_in_panel: float, total: int) -> float:
    """P(panel sum): negative binomials averaged over the planted depths."""
    sizes, share = truth.depth_grid(dataset)
    theta = sizes / (sizes + truth.concentration)
    log_choose = gammaln(weights_in_panel + total) - gammaln(weights_in_panel) - gammaln(total + 1)
    return float(np.sum(share * np.exp(log_choose) * theta**total * (1 - theta) ** weights_in_panel))


def enumerated(
    truth: PlantedTruth,
    counts: np.ndarray,
    panel: np.ndarray,
    raw_sum: int,
    masked: np.ndarray,
    dataset: int,
    effect: int | None,
    recipe: Recipe,
) -> dict[str, Any]:
    """Posterior and predictive by summing the joint law over every hidden configuration of all genes."""
    components = len(truth.component_prior)
    measured = truth.measured[dataset]
    visible_genes = [g for g, m in zip(panel, masked, strict=True) if measured[g] and not m]
    visible = {int(g): int(c) for g, c in zip(panel, counts, strict=True) if g in visible_genes}
    genes = range(truth.spec.n_genes) if recipe == "corrected" else panel
    total = raw_sum if recipe == "corrected" else int(counts.sum())
    hidden = [int(g) for g in genes if measured[g] and int(g) not in visible]
    left = total - sum(visible.values())
    joint = np.zeros(components)
    masked_genes = [int(g) for g, m in zip(panel, masked, strict=True) if m]
    law = np.zeros((len(masked_genes), total + 1))
    for c in range(components):
        if effect is not None and c % truth.spec.n_effects != effect:
            continue
        weights = truth.weights(dataset)[c]
        inside = np.zeros_like(weights)
        inside[list(genes)] = weights[list(genes)]
        prior = truth.component_prior[c]
        if recipe == "published":
            prior *= panel_sum_probability(truth, dataset, inside.sum(), total)
        for filling in compositions(left, len(hidden)):
            x = np.zeros(truth.spec.n_genes, int)
            x[list(visible)] = list(visible.values())
            x[hidden] = filling
            p = prior * math.exp(dm_log_pmf(x, inside))
            joint[c] += p
            for row, gene in enumerate(masked_genes):
                law[row, x[gene]] += p
    posterior = joint / joint.sum()
    law /= law.sum(axis=1, keepdims=True)
    value = np.log1p(np.arange(total + 1) * (1e4 / total)) if total else np.zeros(1)
    mean = law @ value
    variance = law @ value**2 - mean**2
    safe = np.where(law > 0, law, 1.0)
    observed = np.array([int(c) for c, m in zip(counts, masked, strict=True) if m])
    p = posterior[posterior > 0]
    return {
        "mean": mean,
        "variance": variance.sum(),
        "entropy": -(law * np.log2(safe)).sum(),
        "nll": -np.log2(law[np.arange(len(observed)), observed]).sum(),
        "squared": ((value[observed] - mean) ** 2).sum(),
        "posterior_entropy": -(p * np.log(p)).sum(),
    }


@pytest.mark.parametrize("recipe", ["corrected", "published"])
@pytest.mark.parametrize("known_effect", [False, True])
def test_agrees_with_enumeration_of_every_hidden_configuration(recipe: Recipe, known_effect: bool) -> None:
    truth = PlantedTruth(TINY)
    cells = draw_range(truth, 0)
    counts = cells.counts.toarray()
    raw_sum = counts.sum(axis=1)
    rng = np.random.default_rng(0)
    compared = 0
    for panel in (np.array([4, 0, 2, 5]), np.array([1, 3, 0, 2, 5, 4])):
        for i in np.flatnonzero(raw_sum <= 9)[:12]:
            dataset = int(cells.dataset[i])
            measured = truth.measured[dataset][panel]
            masked = measured & (rng.random(len(panel)) < 0.45)
            if not masked.any():
                continue
            effect = int(cells.effect[i]) if known_effect else None
            got = oracle(
                truth,
                counts=counts[i : i + 1, panel],
                panel=panel,
                raw_sum=raw_sum[i : i + 1],
                masked=masked[None],
                measured=measured[None],
                dataset=np.array([dataset]),
                effect=None if effect is None else np.array([effect]),
                recipe=recipe,
            )
            want = enumerated(truth, counts[i, panel], panel, int(raw_sum[i]), masked, dataset, effect, recipe)
            assert got.prediction[0, masked] == pytest.approx(want["mean"], abs=1e-9)
            assert np.isnan(got.prediction[0, ~masked]).all()
            assert got.variance_sum[0] == pytest.approx(want["variance"], abs=1e-9)
            assert got.entropy_bits_sum[0] == pytest.approx(want["entropy"], abs=1e-9)
            assert got.nll_bits_sum[0] == pytest.approx(want["nll"], abs=1e-9)
            assert got.squared_error_sum[0] == pytest.approx(want["squared"], abs=1e-9)
            assert got.posterior_entropy_nats[0] == pytest.approx(want["posterior_entropy"], abs=1e-9)
            assert got.masked_genes[0] == masked.sum()
            compared += 1
    assert compared >= 15


@pytest.fixture(scope="module")
def planted() -> Planted:
    """The default plant's own truth, 400 of its cells, a panel of variable genes and 15% of it masked."""
    truth = PlantedTruth(PlantSpec())
    first, second = draw_range(truth, 0), draw_range(truth, 1)
    reference = first.counts.toarray()
    scaled = np.log1p(reference * (1e4 / np.maximum(reference.sum(axis=1, keepdims=True), 1)))
    panel = np.sort(np.argsort(-scaled.var(axis=0), kind="stable")[:256])
    rows = np.flatnonzero(second.copy_of < 0)[:400]
    counts = second.counts[rows].toarray()
    dataset = second.dataset[rows]
    measured = truth.measured[dataset][:, panel]
    rng = np.random.default_rng(5)
    masked = np.zeros_like(measured)
    for i, row in enumerate(measured):
        genes = np.flatnonzero(row)
        masked[i, rng.choice(genes, round(0.15 * len(genes)), replace=False)] = True
    batch = {
        "counts": counts[:, panel],
        "panel": panel,
        "raw_sum": counts.sum(axis=1),
        "masked": masked,
        "measured": measured,
        "dataset": dataset,
    }
    return truth, batch, second.effect[rows], reference, first.dataset


def _within(difference: np.ndarray, standard_errors: float) -> bool:
    """Whether the mean over cells is zero to so many of its standard errors."""
    return abs(difference.mean()) <= standard_errors * difference.std(ddof=1) / math.sqrt(len(difference))


@pytest.mark.parametrize("recipe", ["corrected", "published"])
def test_on_planted_cells_it_is_calibrated_and_in_order(planted: Planted, recipe: Recipe) -> None:
    truth, batch, effect, reference, reference_dataset = planted
    bound = oracle(truth, **batch, effect=effect, recipe=recipe)
    attainable = oracle(truth, **batch, recipe=recipe)
    assert _within(bound.squared_error_sum - bound.variance_sum, 4)
    assert _within(attainable.squared_error_sum - attainable.variance_sum, 4)
    assert _within(bound.nll_bits_sum - bound.entropy_bits_sum, 4)
    assert _within(attainable.nll_bits_sum - attainable.entropy_bits_sum, 4)
    assert attainable.tail_mass.max() < 1e-8
    assert attainable.tail_mass[batch["dataset"] < 3].max() < 1e-10

    # Knowing the effects cannot hurt. Expectations order exactly; realised errors only within their noise.
    gain = attainable.squared_error_sum - bound.squared_error_sum
    assert gain.mean() > -4 * gain.std(ddof=1) / math.sqrt(len(gain))
    assert bound.entropy_bits_sum.mean() < attainable.entropy_bits_sum.mean()

    panel, masked = batch["panel"], batch["masked"]
    totals = {"corrected": (reference.sum(axis=1), batch["raw_sum"])}
    totals["published"] = (reference[:, panel].sum(axis=1), batch["counts"].sum(axis=1))
    of_reference, of_cells = totals[recipe]
    known = truth.measured[reference_dataset][:, panel]
    x_reference = np.log1p(reference[:, panel] * (1e4 / np.maximum(of_reference, 1))[:, None])
    gene_mean = (x_reference * known).sum(axis=0) / known.sum(axis=0)
    x = np.log1p(batch["counts"] * (1e4 / np.maximum(of_cells, 1))[:, None])
    baseline = (np.where(masked, x - gene_mean, 0.0) ** 2).sum(axis=1)
    worse = baseline - attainable.squared_error_sum
    assert worse.mean() > 10 * worse.std(ddof=1) / math.sqrt(len(worse))
    # there must be much to learn, and the states must not lie open
    assert baseline.sum() > 1.7 * attainable.squared_error_sum.sum()
    assert bound.posterior_entropy_nats.mean() > 0.2
    assert attainable.posterior_entropy_nats.mean() > 0.2


def test_the_best_prediction_ignores_what_is_masked(planted: Planted) -> None:
    truth, batch, _, _, _ = planted
    some = {k: v if k == "panel" else v[:40] for k, v in batch.items()}
    before = oracle(truth, **some, recipe="corrected")
    shuffled = dict(some, counts=some["counts"].copy())
    rng = np.random.default_rng(1)
    for row, hidden in zip(shuffled["counts"], some["masked"], strict=True):
        genes = np.flatnonzero(hidden)
        row[genes] = row[rng.permutation(genes)]
    assert (shuffled["counts"] != some["counts"]).any()
    after = oracle(truth, **shuffled, recipe="corrected")
    # the sums over counts end a little later where a large count was observed, hence not to the last bit
    np.testing.assert_allclose(after.prediction, before.prediction, rtol=0, atol=1e-9)


def test_a_cell_without_counts_is_certain() -> None:
    truth = PlantedTruth(TINY)
    recipes: tuple[Recipe, ...] = ("corrected", "published")
    for recipe in recipes:
        found = oracle(
            truth,
            counts=np.zeros((1, 3), int),
            panel=np.array([0, 1, 2]),
            raw_sum=np.zeros(1),
            masked=np.array([[True, False, False]]),
            measured=np.ones((1, 3), bool),
            dataset=np.zeros(1, int),
            recipe=recipe,
        )
        assert found.prediction[0, 0] == 0 and found.variance_sum[0] == 0 and found.nll_bits_sum[0] == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recipe": "other"}, "recipe"),
        ({"panel": np.array([0, 0, 2])}, "panel"),
        ({"raw_sum": np.array([1])}, "counts"),
        ({"measured": np.zeros((1, 3), bool), "masked": np.zeros((1, 3), bool)}, "measured"),
        ({"dataset": np.zeros(2, int)}, "dataset"),
    ],
)
def test_cells_that_do_not_fit_the_truth_are_refused(change: dict[str, Any], field: str) -> None:
    batch = {
        "counts": np.array([[1, 2, 0]]),
        "panel": np.array([0, 1, 2]),
        "raw_sum": np.array([7]),
        "masked": np.array([[True, False, False]]),
        "measured": np.ones((1, 3), bool),
        "dataset": np.zeros(1, int),
    }
    with pytest.raises(BadInput) as refusal:
        oracle(PlantedTruth(TINY), **(batch | change))
    assert refusal.value.field == field
