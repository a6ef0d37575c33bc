"""Thinned cells follow the binomial law, molecule by molecule, and depend on nothing but (seed, epoch, cell)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import small_run, synthetic_cells
from scipy.stats import chi2

from scaling_ray.model.masking import EVALUATION_MASK_SEED, draw_masks, log_normalise
from scaling_ray.model.thinning import thin
from scaling_ray.rules import TrainingRules
from scaling_ray.train.batches import Batch, make_batch

CPU = torch.device("cpu")
LOW_32 = 0xFFFFFFFF
MOLECULES = [
    1,
    2,
    3,
    10,
    40,
    100,
    254,
    255,
    256,
    257,
    300,
    511,
    512,
    1_000,
    3_000,
    8_191,
    8_192,
    32_767,
    32_768,
    65_535,
]
MOLECULES += [70_000]


def thinned(
    counts: torch.Tensor,
    raw_sum: torch.Tensor | None = None,
    fraction: float = 0.5,
    seed: int = 3,
    epochs: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
    most: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``thin`` with cells 0..B-1 of epoch 0 whose library is their panel, unless told otherwise."""
    raw_sum = counts.sum(1) if raw_sum is None else raw_sum
    epochs = torch.zeros(len(counts), dtype=torch.int64) if epochs is None else epochs
    cells = torch.arange(len(counts)) if cells is None else cells
    most = (int(counts.max()), int(raw_sum.max())) if most is None else most
    return thin(counts, raw_sum, fraction, seed, epochs, cells, most)


def draws_of(molecules: int, fraction: float, seed: int = 3, cells: int = 400, genes: int = 250) -> np.ndarray:
    """Thinned counts of many cells and genes that all hold ``molecules``."""
    return thinned(torch.full((cells, genes), molecules), fraction=fraction, seed=seed)[0].numpy().ravel()


def chance(molecules: int, fraction: float) -> np.ndarray:
    """(molecules + 1,) the binomial law out of log-gamma, not out of the library that made the tables."""
    kept = np.arange(molecules + 1)
    ways = [math.lgamma(molecules + 1) - math.lgamma(k + 1) - math.lgamma(molecules - k + 1) for k in kept]
    return np.exp(np.array(ways) + kept * math.log(fraction) + (molecules - kept) * math.log1p(-fraction))


def chance_of_worse_fit(draws: np.ndarray, law: np.ndarray) -> float:
    """p-value of Pearson's chi-square; neighbouring values share a bin until 20 draws are expected in it."""
    expected = law * len(draws)
    bin_of = np.zeros(len(law), dtype=int)
    number, filled = 0, 0.0
    for value, weight in enumerate(expected):
        bin_of[value] = number
        filled += weight
        if filled >= 20:
            number, filled = number + 1, 0.0
    if filled < 20:
        bin_of[bin_of == number] = number - 1
    wanted = np.bincount(bin_of, expected)
    found = np.bincount(bin_of[draws], minlength=len(wanted))
    assert len(wanted) > 1
    return float(chi2.sf(((found - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("molecules", MOLECULES)
def test_a_count_follows_the_binomial_law(molecules: int, fraction: float) -> None:
    """The seeds are fixed, so this passes or fails for good: 63 tests, each wrong by chance once in 100,000."""
    draws = draws_of(molecules, fraction)
    assert draws.min() >= 0 and draws.max() <= molecules
    assert 1e-5 < chance_of_worse_fit(draws, chance(molecules, fraction)) < 1 - 1e-5


def test_the_chi_square_tells_a_slightly_other_law_apart() -> None:
    """100,000 draws tell a share of 0.51, and a Poisson law of the same mean, from a binomial at 0.5."""
    draws = draws_of(255, 0.5)
    assert chance_of_worse_fit(draws, chance(255, 0.51)) < 1e-12
    poisson = np.random.default_rng(0).poisson(127.5, len(draws)).clip(max=255)
    assert chance_of_worse_fit(poisson, chance(255, 0.5)) < 1e-12


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("molecules", MOLECULES)
def test_mean_and_variance_are_those_of_the_law(molecules: int, fraction: float) -> None:
    draws = draws_of(molecules, fraction, seed=11).astype(float)
    n, variance = len(draws), molecules * fraction * (1 - fraction)
    assert abs(draws.mean() - molecules * fraction) < 4.5 * math.sqrt(variance / n)
    # a binomial's fourth central moment is variance (1 + 3 variance - 6 f (1 - f))
    fourth = variance * (1 + 3 * variance - 6 * fraction * (1 - fraction))
    # the second term is what the estimate of the mean takes away; alone where a coin is fair
    assert abs(draws.var() - variance) < 4.5 * math.sqrt((fourth - variance**2) / n) + 4.5**2 * variance / n


def test_no_count_grows_and_none_appears() -> None:
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 400, (300, 64), generator=generator) * torch.randint(0, 2, (300, 64), generator=generator)
    counts[7], counts[8, 3], counts[9, 5] = 0, 65_535, 32_768
    raw_sum = counts.sum(1) + torch.randint(0, 90_000, (300,), generator=generator)
    for fraction in (0.01, 0.5, 0.999):
        found, library = thinned(counts, raw_sum, fraction)
        assert found.dtype == library.dtype == torch.int64
        assert bool(((found >= 0) & (found <= counts)).all())
        assert bool((library <= raw_sum).all()) and bool((library >= found.sum(1)).all())
        assert bool((found[counts == 0] == 0).all())


def test_genes_cells_and_molecules_outside_the_panel_are_thinned_apart() -> None:
    counts = torch.full((4_000, 40), 300)
    found, library = thinned(counts, counts.sum(1) + 500)
    columns = torch.cat([found, (library - found.sum(1))[:, None]], dim=1).double()
    limit = 5 / math.sqrt(len(columns))  # 820 pairs
    between_genes = torch.corrcoef(columns.T).fill_diagonal_(0)
    assert float(between_genes.abs().max()) < limit
    columns = columns - columns.mean(0)
    columns = columns / columns.std(0)
    for shift in (1, 2, 64):
        pair = torch.stack([columns[:-shift].flatten(), columns[shift:].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


@pytest.mark.parametrize("outside", [0, 1, 255, 256, 3_000, 70_000, 1_000_000])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_library_is_the_thinned_panel_and_a_binomial_share_of_the_rest(outside: int, fraction: float) -> None:
    counts = torch.arange(8).repeat(20_000, 1)
    raw_sum = counts.sum(1) + outside
    found, library = thinned(counts, raw_sum, fraction)
    rest = (library - found.sum(1)).numpy()
    assert rest.min() >= 0 and rest.max() <= outside
    if outside:
        variance = outside * fraction * (1 - fraction)
        assert abs(rest.mean() - outside * fraction) < 4.5 * math.sqrt(variance / len(rest))
        assert rest.var() == pytest.approx(variance, rel=4.5 * math.sqrt(2 / len(rest)))
        deviation = math.sqrt(int(raw_sum[0]) * fraction * (1 - fraction) / len(rest))
        assert abs(float(library.double().mean()) - fraction * int(raw_sum[0])) < 4.5 * deviation
    if 1 < outside <= 3_000:
        assert chance_of_worse_fit(rest, chance(outside, fraction)) > 1e-5


def test_a_library_smaller_than_its_panel_loses_nothing_below_zero() -> None:
    """The panel's own molecules are the least that a thinned library can be."""
    counts = torch.full((50, 8), 100)
    found, library = thinned(counts, torch.full((50,), 10))
    assert torch.equal(library, found.sum(1))


def cells_and_counts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 900, (40, 64), generator=generator)
    counts[3, 5] = 40_000
    raw_sum = counts.sum(1) + torch.randint(0, 5_000, (40,), generator=generator)
    epochs = torch.arange(40) % 3
    cells = torch.arange(40) * 1_000_003 + 2**33
    return counts, raw_sum, epochs, cells


def test_a_cell_is_thinned_alike_wherever_its_batch_is_made() -> None:
    """Alone, in another order, or beside a cell of far larger counts."""
    counts, raw_sum, epochs, cells = cells_and_counts()
    whole, library = thinned(counts, raw_sum, 0.5, 7, epochs, cells)
    for row in range(40):
        one = slice(row, row + 1)
        for most in (None, (65_535, 3_000_000)):
            alone = thinned(counts[one], raw_sum[one], 0.5, 7, epochs[one], cells[one], most)
            assert torch.equal(alone[0], whole[one]) and torch.equal(alone[1], library[one])
    backwards = thinned(counts.flip(0), raw_sum.flip(0), 0.5, 7, epochs.flip(0), cells.flip(0))
    assert torch.equal(backwards[0].flip(0), whole) and torch.equal(backwards[1].flip(0), library)


def test_epochs_seeds_and_cells_are_thinned_apart() -> None:
    counts = torch.full((400, 64), 300)
    zero, cells = torch.zeros(400, dtype=torch.int64), torch.arange(400)
    first, _ = thinned(counts, None, 0.5, 7, zero, cells)
    others = {
        "next epoch": thinned(counts, None, 0.5, 7, zero + 1, cells)[0],
        "next seed": thinned(counts, None, 0.5, 8, zero, cells)[0],
        "next cell": thinned(counts, None, 0.5, 7, zero, cells + 1)[0],
        "same low word": thinned(counts, None, 0.5, 7, zero, cells + 2**32)[0],
    }
    for name, other in others.items():
        pair = torch.stack([first.flatten(), other.flatten()]).double()
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(pair.shape[1]), name
        alike = float((pair[0] == pair[1]).double().mean())
        by_chance = float((chance(300, 0.5) ** 2).sum())
        assert abs(alike - by_chance) < 4.5 * math.sqrt(by_chance / pair.shape[1]), name


@pytest.mark.parametrize("seed", [5, EVALUATION_MASK_SEED])
def test_thinning_says_nothing_about_the_mask(seed: int) -> None:
    """Genes that a cell hides keep the same share of their molecules as the others."""
    cells, epochs = torch.arange(3_000), torch.zeros(3_000, dtype=torch.int64)
    hidden = draw_masks("corrected", 0.15, seed, epochs, cells, torch.ones(3_000, 64, dtype=torch.bool)).hidden
    kept, _ = thinned(torch.full((3_000, 64), 40), None, 0.5, seed, epochs, cells)
    difference = float(kept[hidden].double().mean() - kept[~hidden].double().mean())
    assert abs(difference) < 4.5 * math.sqrt(10 / int(hidden.sum()) + 10 / int((~hidden).sum()))


GOLDEN_COUNTS = [0, 1, 2, 5, 20, 100, 255, 256, 257, 600, 3_000, 32_768, 65_535]
GOLDEN_OUTSIDE = 70_000
GOLDEN: dict[tuple[int, int, int, float], tuple[list[int], int]] = {
    (7, 0, 12_345, 0.5): ([0, 0, 1, 1, 10, 49, 140, 120, 120, 298, 1555, 16472, 32812], 86450),
    (7, 1, 12_345, 0.5): ([0, 0, 2, 2, 7, 44, 119, 127, 132, 306, 1513, 16379, 32644], 86201),
    (8, 0, 12_345, 0.5): ([0, 1, 1, 3, 10, 48, 122, 106, 117, 301, 1496, 16579, 32452], 86298),
    (7, 0, 12346, 0.5): ([0, 0, 2, 2, 9, 48, 139, 118, 125, 310, 1511, 16482, 32960], 86713),
    (7, 0, 2**33, 0.5): ([0, 1, 1, 2, 9, 54, 122, 111, 130, 306, 1510, 16127, 32779], 86198),
    (7, 0, 12_345, 0.1): ([0, 0, 0, 0, 2, 9, 33, 21, 21, 58, 334, 3329, 6579], 17309),
}
"""(seed, epoch, cell, fraction) -> thinned GOLDEN_COUNTS, and the thinned library."""


def mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & LOW_32
    x ^= x >> 15
    x = x * 0x735A2D97 & LOW_32
    return x ^ x >> 15


def reference_hash(seed: int, epoch: int, cell: int, gene: int) -> int:
    """The masks' hash, in plain Python integers."""
    key = seed & LOW_32
    for word in (epoch, cell & LOW_32, cell >> 32):
        key = mix32((mix32(key) + word + 0x9E3779B9) & LOW_32)
    return mix32(mix32(key ^ (gene * 0x9E3779B1 & LOW_32)) ^ key)


def exact_draw(molecules: int, share: Fraction, uniform: int) -> int:
    """The binomial draw of a 32-bit uniform by inversion, in exact fractions."""
    below, drawn = Fraction(0), 0
    for kept in range(molecules):
        below += math.comb(molecules, kept) * share**kept * (1 - share) ** (molecules - kept)
        if math.floor(below * 2**32) > uniform:
            break
        drawn = kept + 1
    return drawn


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(1, 4)])
@pytest.mark.parametrize(("seed", "epoch", "cell"), [(7, 0, 12_345), (7, 1, 12_345), (2**32 - 1, 3, 2**33 + 5)])
def test_counts_below_256_are_inverted_exactly(seed: int, epoch: int, cell: int, share: Fraction) -> None:
    counts = [0, 1, 2, 3, 5, 17, 40, 100, 128, 200, 254, 255]
    found, _ = thinned(
        torch.tensor([counts]), None, float(share), seed, torch.tensor([epoch]), torch.tensor([cell]), (255, 1)
    )
    salted = seed ^ 0x7417
    assert found[0].tolist() == [
        exact_draw(count, share, reference_hash(salted, epoch, cell, gene)) for gene, count in enumerate(counts)
    ]


def test_golden_draws() -> None:
    """Fixed for good: other draws make another training run, and losses that cannot be compared."""
    for (seed, epoch, cell, fraction), golden in GOLDEN.items():
        counts = torch.tensor([GOLDEN_COUNTS])
        found, library = thinned(
            counts, counts.sum(1) + GOLDEN_OUTSIDE, fraction, seed, torch.tensor([epoch]), torch.tensor([cell])
        )
        assert (found[0].tolist(), int(library[0])) == golden, (seed, epoch, cell, fraction)
    assert len({str(value) for value in GOLDEN.values()}) == len(GOLDEN) == 6


def batch_of(umi_fraction: float, recipe: str, mask_seed: int, epoch: int = 0) -> Batch:
    cells = synthetic_cells(60, genes=64, unmeasured=9)
    epochs = np.full(60, epoch, dtype=np.int64)
    return make_batch(cells, epochs, train_spec(umi_fraction, recipe), mask_seed, CPU)


def train_spec(umi_fraction: float, recipe: str) -> TrainingRules:
    return small_run(f'umi_fraction = {umi_fraction}\nrecipe = "{recipe}"').train


@pytest.mark.parametrize("recipe", ["corrected", "published"])
@pytest.mark.parametrize("mask_seed", [1, EVALUATION_MASK_SEED])
def test_a_batch_at_half_depth_keeps_targets_and_masks(recipe: str, mask_seed: int) -> None:
    whole, half = batch_of(1.0, recipe, mask_seed), batch_of(0.5, recipe, mask_seed)
    assert torch.equal(half.targets, whole.targets)
    for name in ("positions", "weights", "hidden"):
        assert torch.equal(getattr(half.masks, name), getattr(whole.masks, name)), name
    assert torch.equal(whole.targets, whole.values.gather(1, whole.masks.positions))
    assert not torch.equal(half.values, whole.values)
    assert bool((half.values[whole.values == 0] == 0).all())


@pytest.mark.parametrize("recipe", ["corrected", "published"])
def test_what_the_network_sees_is_the_thinned_cell_normalised_anew(recipe: str) -> None:
    cells = synthetic_cells(60, genes=64, unmeasured=9)
    counts, raw_sum = torch.from_numpy(cells.counts.astype(np.int64)), torch.from_numpy(cells.raw_sum)
    kept, library = thinned(counts, raw_sum, 0.5, 4, torch.full((60,), 2), torch.from_numpy(cells.cell))
    total = library if recipe == "corrected" else kept.sum(1)
    expected = np.log1p(kept.numpy() * 1e4 / total.clamp(min=1).numpy()[:, None])
    batch = batch_of(0.5, recipe, mask_seed=4, epoch=2)
    assert batch.values.numpy() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(batch.values, log_normalise(kept, library, recipe))  # type: ignore[arg-type]
    assert not torch.equal(batch.values, batch_of(0.5, recipe, mask_seed=5, epoch=2).values)
    assert not torch.equal(batch.values, batch_of(0.5, recipe, mask_seed=4, epoch=3).values)


def test_a_whole_cell_is_seen_at_full_depth() -> None:
    cells = synthetic_cells(60, genes=64)
    batch = make_batch(cells, np.zeros(60, dtype=np.int64), train_spec(1.0, "corrected"), 1, CPU)
    assert batch.values.numpy() == pytest.approx(np.log1p(cells.counts * 1e4 / cells.raw_sum[:, None]), rel=1e-6)
