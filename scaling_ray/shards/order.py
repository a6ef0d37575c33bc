"""The order of cells. It is deterministic and depends only on integers: every worker and every restart finds the same.

A run reads the ``n_cells`` rows of the training permutation that start at its replicate's offset. Every epoch visits
each once: up to a window's rows in one keyed permutation; more in windows of whole stored row groups, the groups in
a keyed order and the rows of a window in another, so that a stream reads each row group once. (Stored cells are
permuted already: a window is a random sample of the run's cells.) Batch k is positions [k B, (k+1) B) of the endless
sequence epoch 0, epoch 1, ...: every row appears once per epoch, the remainder included, and every batch is full.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_ray.errors import BadInput

WINDOW_ROWS = 65_536
"""Rows shuffled together, at most: four row groups, which a stream holds in memory together."""
KEPT_WINDOWS = 3
"""Windows that keep their order between batches; a batch may straddle two."""

_CHUNKS = 0xC4A27
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


@dataclass(frozen=True)
class RunRows:
    """The rows of the training permutation that a run reads, by their number in the run: i -> row.

    They are ``n_cells`` rows from ``offset`` on, wrapping round ``n_train``, or else the rows in ``listed``.
    """

    n_train: int
    n_cells: int
    offset: int = 0
    listed: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self.n_cells

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the training permutation."""
        return (self.offset + index) % self.n_train if self.listed is None else self.listed[index]

    def all(self) -> NDArray[np.int64]:
        """Every row, in the run's order."""
        return self.at(np.arange(self.n_cells, dtype=np.int64))

    def cuts(self, edges: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers at which the run's rows enter another row group (``edges``): rising from 0 to ``n_cells``."""
        if self.listed is None:
            inner = (edges - self.offset) % self.n_train
        else:
            group = np.searchsorted(edges, self.listed, side="right")
            inner = np.flatnonzero(np.diff(group)) + 1
        return np.unique(np.concatenate([[0], inner[inner < self.n_cells], [self.n_cells]]))


def replicate_rows(n_train: int, n_cells: int | None, seed: int) -> RunRows:
    """The rows that replicate ``seed`` reads: ``n_cells`` from its own offset, wrapping, or all of them."""
    if n_cells is None or n_cells >= n_train:
        return RunRows(n_train, n_train)
    return RunRows(n_train, n_cells, _offset(n_train, seed))


def _offset(n_train: int, seed: int) -> int:
    return int(keyed_hash(0x0FF5E7, np.array([seed]))[0] % np.uint64(n_train))


def chosen_donors(n_donors: int, present: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The ``n_donors`` donors that replicate ``seed`` reads, out of ``present`` codes; fewer are a subset of more."""
    return np.sort(present[keyed_permutation(0xD0405 ^ (seed << 20), present)][:n_donors])


def donor_rows(donor: NDArray[np.int32], n_donors: int, n_cells: int | None, seed: int) -> RunRows:
    """The rows of ``chosen_donors`` that replicate ``seed`` reads: the first ``n_cells`` from its offset, wrapping.

    Args:
        donor: (n_train,) donor code of each row of the training permutation.
        n_donors: how many donors.
        n_cells: how many cells; None for all of theirs.
        seed: of the replicate.

    Raises:
        BadInput: the chosen donors hold fewer cells.
    """
    n_train = len(donor)
    chosen = chosen_donors(n_donors, np.unique(donor).astype(np.int64), seed)
    offset = 0 if n_cells is None else _offset(n_train, seed)
    order = np.roll(np.arange(n_train, dtype=np.int64), -offset)
    listed = order[np.isin(donor[order], chosen)]
    check_donors(n_donors, len(chosen), n_cells, len(listed), seed)
    listed = listed if n_cells is None else listed[:n_cells]
    return RunRows(n_train, len(listed), listed=listed)


def check_donors(n_donors: int, chosen: int, n_cells: int | None, cells: int, seed: int) -> None:
    """BadInput where there are fewer donors, or they hold fewer cells, than a run asks for."""
    if chosen < n_donors:
        raise BadInput(
            "D017", "grid.donors", n_donors, f"is more than the {chosen} donors of the training split; lower it"
        )
    if n_cells is not None and cells < n_cells:
        remedy = f"hold {cells} training cells at seed {seed}, fewer than {n_cells}; take more donors"
        raise BadInput("D018", "grid.donors", n_donors, remedy)


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together: number of the window in its epoch, first position, chunks in visiting order."""

    epoch: int
    number: int
    first: int
    rows: int
    chunks: tuple[int, ...]


class RunOrder:
    """The endless sequence of a run's rows, epoch by epoch. No answer depends on earlier questions.

    Args:
        rows: of the run.
        edges: first row of each row group of the training split, and their total.
        seed: of the run.
        window_rows: rows shuffled together, at most, unless one row group holds more.
    """

    def __init__(self, rows: RunRows, edges: NDArray[np.int64], seed: int, window_rows: int = WINDOW_ROWS) -> None:
        self.rows, self.cuts, self.seed, self.window_rows = rows, rows.cuts(edges), seed, window_rows
        self._windows: tuple[int, list[Window]] = (-1, [])
        self._visits: dict[tuple[int, int], NDArray[np.int64]] = {}

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch in the order they are visited."""
        if self._windows[0] != epoch:
            self._windows = (epoch, list(self._cut(epoch)))
        return self._windows[1]

    def _cut(self, epoch: int) -> Iterator[Window]:
        sizes = np.diff(self.cuts)
        if len(self.rows) <= self.window_rows:
            yield Window(epoch, 0, 0, len(self.rows), tuple(range(len(sizes))))
            return
        key = int(keyed_hash(_CHUNKS ^ self._key(epoch), np.zeros(1, np.int64))[0])
        first = rows = number = 0
        chunks: list[int] = []
        for chunk in keyed_permutation(key, np.arange(len(sizes))).tolist():
            if chunks and rows + sizes[chunk] > self.window_rows:
                yield Window(epoch, number, first, rows, tuple(chunks))
                first, rows, number, chunks = first + rows, 0, number + 1, []
            chunks.append(chunk)
            rows += int(sizes[chunk])
        yield Window(epoch, number, first, rows, tuple(chunks))

    def _key(self, epoch: int) -> int:
        return (self.seed << 32) ^ epoch

    def stored(self, window: Window) -> NDArray[np.int64]:
        """The window's rows by their number in the run, chunk after chunk, as they are stored."""
        parts = [np.arange(self.cuts[chunk], self.cuts[chunk + 1], dtype=np.int64) for chunk in window.chunks]
        return np.concatenate(parts)

    def shuffle(self, window: Window) -> NDArray[np.int64]:
        """(rows,) indices into ``stored``: the order in which the window's rows are visited."""
        key = self._key(window.epoch)
        if window.number:
            key = int(keyed_hash(key, np.array([window.number]))[0])
        return keyed_permutation(key, np.arange(window.rows))

    def _visit(self, window: Window) -> NDArray[np.int64]:
        name = (window.epoch, window.number)
        if name not in self._visits:
            while len(self._visits) >= KEPT_WINDOWS:
                del self._visits[next(iter(self._visits))]
            self._visits[name] = self.stored(window)[self.shuffle(window)]
        return self._visits[name]

    def batch(self, step: int, cells_per_step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Global batch number ``step``: (numbers of rows in the run, epoch of each), both (cells_per_step,)."""
        at, n_cells = step * cells_per_step, len(self.rows)
        index = np.empty(cells_per_step, dtype=np.int64)
        epochs = (at + np.arange(cells_per_step, dtype=np.int64)) // n_cells
        filled = 0
        while filled < cells_per_step:
            epoch, within = divmod(at + filled, n_cells)
            window = self.window_at(epoch, within)
            start = within - window.first
            taken = min(window.rows - start, cells_per_step - filled)
            index[filled : filled + taken] = self._visit(window)[start : start + taken]
            filled += taken
        return index, epochs

    def window_at(self, epoch: int, within: int) -> Window:
        """The window that holds position ``within`` of an epoch."""
        windows = self.windows(epoch)
        return windows[bisect.bisect_right(windows, within, key=lambda window: window.first) - 1]
