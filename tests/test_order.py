"""The order of cells: each once per epoch, a pure function of integers, nested replicates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scaling_ray.shards import order
from scaling_ray.shards.order import RunOrder, RunRows, keyed_hash, keyed_permutation, mix64

GOLDEN = Path(__file__).parent / "golden" / "order.json"
LOW_64 = (1 << 64) - 1


def batch_rows(step: int, cells_per_step: int, n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of a run that reads every cell of ``n_cells`` in one row group."""
    run = RunOrder(RunRows(n_cells, n_cells), np.array([0, n_cells]), seed)
    return run.batch(step, cells_per_step)


def replicate_rows(n_train: int, n_cells: int | None, seed: int) -> np.ndarray:
    """All rows of a replicate, in its order."""
    return order.replicate_rows(n_train, n_cells, seed).all()


def splitmix64(x: int) -> int:
    """The finaliser in plain Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & LOW_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & LOW_64
    return x ^ (x >> 31)


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    values = [0, 1, 2, 0x9E3779B97F4A7C15, LOW_64]
    assert mix64(np.array(values, dtype=np.uint64)).tolist() == [splitmix64(v) for v in values]
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first output of the published generator at seed 0


def test_keyed_hash_depends_on_the_key_and_is_spread_evenly() -> None:
    ids = np.arange(40_000)
    first, second = keyed_hash(1, ids), keyed_hash(2, ids)
    assert not np.any(first == second)
    for hashes in (first, second):
        assert len(np.unique(hashes)) == len(ids)
        bins = np.bincount((hashes >> np.uint64(56)).astype(int), minlength=256)
        chi_square = ((bins - len(ids) / 256) ** 2 / (len(ids) / 256)).sum()
        assert 170 < chi_square < 350  # 255 degrees of freedom; both bounds below 1e-4
    ranks = keyed_permutation(1, ids), keyed_permutation(2, ids)
    assert abs(np.corrcoef(*ranks)[0, 1]) < 0.02
    assert abs(np.corrcoef(ranks[0][:-1], ranks[0][1:])[0, 1]) < 0.02


def test_keyed_permutation_orders_ids_wherever_they_stand() -> None:
    ids = np.array([5, 17, 3, 99, 1_000_000_007])
    shuffled = ids[[4, 0, 2, 1, 3]]
    assert ids[keyed_permutation(7, ids)].tolist() == shuffled[keyed_permutation(7, shuffled)].tolist()


@pytest.mark.parametrize(("n_cells", "cells_per_step"), [(100, 32), (7, 32), (64, 32), (33, 1), (5, 5)])
def test_every_row_appears_once_per_epoch(n_cells: int, cells_per_step: int) -> None:
    epochs = 6
    steps = -(-epochs * n_cells // cells_per_step)
    batches = [batch_rows(step, cells_per_step, n_cells, seed=3) for step in range(steps)]
    assert all(len(rows) == len(epoch) == cells_per_step for rows, epoch in batches)
    rows = np.concatenate([batch[0] for batch in batches])[: epochs * n_cells].reshape(epochs, n_cells)
    epoch = np.concatenate([batch[1] for batch in batches])[: epochs * n_cells].reshape(epochs, n_cells)
    assert (np.sort(rows, axis=1) == np.arange(n_cells)).all()
    assert (epoch == np.arange(epochs)[:, None]).all()
    assert any((rows[0] != rows[e]).any() for e in range(1, epochs))


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    forward = [batch_rows(step, 32, 50, seed=1) for step in range(20)]
    for step in reversed(range(20)):
        batch_rows(step + 900, 32, 50, seed=2)  # whatever was asked before
        rows, epochs = batch_rows(step, 32, 50, seed=1)
        assert (rows == forward[step][0]).all()
        assert (epochs == forward[step][1]).all()


def test_a_returned_batch_is_the_callers_own() -> None:
    rows, _ = batch_rows(0, 10, 10, seed=1)
    before = rows.copy()
    rows[:] = -1
    assert (batch_rows(0, 10, 10, seed=1)[0] == before).all()


def test_seeds_and_epochs_are_shuffled_apart() -> None:
    orders = [batch_rows(step, 2_000, 2_000, seed)[0] for seed in (0, 1, 2) for step in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1  # 4.5 standard errors


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slices_of_ranks_make_up_the_global_batch(ranks: int) -> None:
    """Ranks run the whole plan and slice; nothing is dropped or repeated."""
    share = 36 // ranks
    for step in range(5):
        rows, epochs = batch_rows(step, 36, 50, seed=1)
        parts = [batch_rows(step, 36, 50, seed=1)[0][r * share : (r + 1) * share] for r in range(ranks)]
        assert np.concatenate(parts).tolist() == rows.tolist()
        assert len(epochs) == 36


def test_replicates_are_nested_prefixes_from_an_offset_of_their_own() -> None:
    n_train = 3_000
    offsets = set()
    for seed in range(12):
        small, large = replicate_rows(n_train, 500, seed), replicate_rows(n_train, 2_000, seed)
        assert large[:500].tolist() == small.tolist()
        assert len(set(large.tolist())) == 2_000
        assert large.min() >= 0
        assert large.max() < n_train
        assert (np.diff(large) % n_train == 1).all()
        offsets.add(int(small[0]))
    assert len(offsets) == 12
    assert any(np.diff(replicate_rows(n_train, 2_000, seed)).min() < 0 for seed in range(12)), "none wraps round"


def test_all_cells_are_all_cells() -> None:
    for wanted in (None, 10, 11):
        assert replicate_rows(10, wanted, seed=5).tolist() == list(range(10))


def test_golden_order() -> None:
    """Fixed for good: a change moves every run of every sweep."""
    golden = json.loads(GOLDEN.read_text())
    assert made() == golden


def made() -> dict[str, list[int]]:
    return {
        "keyed_hash(1, 0..3)": keyed_hash(1, np.arange(4)).tolist(),
        "keyed_permutation(42, 100..115)": keyed_permutation(42, np.arange(100, 116)).tolist(),
        "batch_rows(3, 8, 20, 5) rows": batch_rows(3, 8, 20, 5)[0].tolist(),
        "batch_rows(2, 8, 20, 5) epochs": batch_rows(2, 8, 20, 5)[1].tolist(),
        "replicate_rows(1000, 5, 0..2) first": [int(replicate_rows(1000, 5, seed)[0]) for seed in range(3)],
    }
