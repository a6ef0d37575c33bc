"""The order of cells as a pure function of integers: no state, no Ray, the same on every worker and after any restart.

A run reads the ``n_cells`` rows of the training permutation that start at its replicate's offset. Epoch e visits them
in a keyed permutation; batch k is positions [k B, (k+1) B) of the endless sequence epoch 0, epoch 1, ... so that every
row appears exactly once per epoch, the remainder included, and every batch is full.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise: a bijection of 64-bit integers."""
    x = values.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keyed_hash(key: int, values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A 64-bit hash of each value under ``key`` (any Python integer; its low 64 bits count)."""
    seed = mix64(np.array([key & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    return mix64(mix64(values.astype(np.uint64) + _GOLDEN) ^ seed)


def keyed_permutation(key: int, ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Indices that put ``ids`` in the order of their keyed hash."""
    return np.argsort(keyed_hash(key, ids), kind="stable").astype(np.int64)


def replicate_rows(n_train: int, n_cells: int | None, seed: int) -> NDArray[np.int64]:
    """Rows of the training permutation that replicate ``seed`` reads: ``n_cells`` from its own offset, wrapping."""
    if n_cells is None or n_cells >= n_train:
        return np.arange(n_train, dtype=np.int64)
    offset = int(keyed_hash(0x0FF5E7, np.array([seed]))[0] % np.uint64(n_train))
    return (offset + np.arange(n_cells, dtype=np.int64)) % n_train


@lru_cache(maxsize=4)
def _epoch_order(n_cells: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = keyed_permutation((seed << 32) ^ epoch, np.arange(n_cells))
    order.setflags(write=False)
    return order


def batch_rows(step: int, cells_per_step: int, n_cells: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Global batch number ``step``: (indices into the run's rows, epoch of each), both of length ``cells_per_step``."""
    position = step * cells_per_step + np.arange(cells_per_step, dtype=np.int64)
    epochs, within = position // n_cells, position % n_cells
    rows = np.empty(cells_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _epoch_order(n_cells, seed, int(epoch))[within[chosen]]
    return rows, epochs
