"""Rows of shards as arrays, without Ray, from a directory or an S3 prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import BLOCK_GENES, block_name, block_widths, decode_block, row_groups
from scaling_ray.shards.order import WINDOW_ROWS, RunOrder, RunRows, donor_rows, replicate_rows
from scaling_ray.storage import Place, open_place

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Raw counts of some cells over the first V genes.

    counts (N, V) uint16; raw_sum (N,) int64 over all genes of the Census; cell (N,) int64 soma_joinids; dataset and
    donor (N,) int32 codes; measured (datasets, V) bool: True where the dataset measured the gene.
    """

    counts: NDArray[np.uint16]
    raw_sum: Ints
    cell: Ints
    dataset: NDArray[np.int32]
    donor: NDArray[np.int32]
    measured: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.cell)

    def rows(self, index: Ints | slice) -> Cells:
        """The cells at ``index`` (copied where it is an array)."""
        return Cells(
            self.counts[index] if isinstance(index, slice) else self.counts.take(index, axis=0),
            self.raw_sum[index],
            self.cell[index],
            self.dataset[index],
            self.donor[index],
            self.measured,
        )

    def narrowed(self, genes: int) -> Cells:
        """The same cells over the first ``genes`` genes (a view)."""
        return Cells(
            self.counts[:, :genes], self.raw_sum, self.cell, self.dataset, self.donor, self.measured[:, :genes]
        )


def joined(parts: list[Cells]) -> Cells:
    """Cells of the same shards, one part after the other."""
    return Cells(
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.raw_sum for part in parts]),
        np.concatenate([part.cell for part in parts]),
        np.concatenate([part.dataset for part in parts]),
        np.concatenate([part.donor for part in parts]),
        parts[0].measured,
    )


ID_COLUMNS = ("cell", "raw_sum", "dataset_id", "donor_id")


def columns_for(genes: int) -> list[str]:
    """Parquet columns with the first ``genes`` genes and the identifiers that a batch needs."""
    return [*ID_COLUMNS, *(block_name(i) for i in range(len(block_widths(genes))))]


def decode_cells(table: pa.Table, genes: int, stored_genes: int, measured: NDArray[np.bool_]) -> Cells:
    """Cells from a table with ``columns_for(genes)``."""
    counts = np.empty((table.num_rows, genes), dtype=np.uint16)
    _decode_into(counts, table, stored_genes, slice(None))
    ids = {name: table[name].to_numpy() for name in ID_COLUMNS}
    return Cells(counts, ids["raw_sum"], ids["cell"], ids["dataset_id"], ids["donor_id"], measured)


def _decode_into(counts: NDArray[np.uint16], table: pa.Table, stored_genes: int, rows: Ints | slice) -> None:
    """Write the given rows of a table's blocks side by side into ``counts`` (rows, V)."""
    genes = counts.shape[1]
    for index, width in enumerate(block_widths(stored_genes)[: len(block_widths(genes))]):
        start = index * BLOCK_GENES
        wanted = min(width, genes - start)
        counts[:, start : start + wanted] = decode_block(table[block_name(index)], width)[rows, :wanted]


def read_measured(where: Path | str | Place, manifest: ShardManifest, genes: int) -> NDArray[np.bool_]:
    """(datasets, genes) bool from presence.parquet."""
    table = _ShardFile(open_place(where, "shards"), "presence.parquet").table()
    packed = decode_block(table["measured"], manifest.genes)
    return packed[:, :genes].astype(bool)


class _ShardFile:
    """A Parquet file of a shard directory; faults in it rise as DamagedFiles with its name."""

    def __init__(self, shards: Place, name: str) -> None:
        self.name = name
        try:
            self._file = pq.ParquetFile(shards.parquet_source(name), pre_buffer=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedFiles("D025", [f"{name}: {error}"]) from error

    def table(self, columns: list[str] | None = None) -> pa.Table:
        try:
            return self._file.read(columns=columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedFiles("D026", [f"{self.name}: {error}"]) from error

    def row_group(self, index: int, columns: list[str]) -> pa.Table:
        try:
            return self._file.read_row_group(index, columns=columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedFiles("D027", [f"{self.name}: {error}"]) from error


def check_genes(genes: int, manifest: ShardManifest) -> None:
    """BadInput where the shards hold fewer genes."""
    if genes > manifest.genes:
        raise BadInput(
            "D028", "grid.genes", genes, f"is more than the {manifest.genes} genes of the shards; build them with more"
        )


def read_split(where: Path | str | Place, manifest: ShardManifest, split: str, genes: int) -> Cells:
    """All cells of a split over the first ``genes`` genes, in the order of the permutation."""
    check_genes(genes, manifest)
    shards = open_place(where, "shards")
    tables = []
    for entry in manifest.splits[split].files:
        table = _ShardFile(shards, entry.path).table(columns_for(genes))
        if table.num_rows != entry.rows:
            raise DamagedFiles("D029", [f"{entry.path}: holds {table.num_rows} cells, the manifest says {entry.rows}"])
        tables.append(table)
    return decode_cells(pa.concat_tables(tables), genes, manifest.genes, read_measured(shards, manifest, genes))


def read_raw_sums(where: Path | str | Place, file: str) -> Ints:
    """(N,) counts of each cell of one shard file over all genes of the Census."""
    found: Ints = _ShardFile(open_place(where, "shards"), file).table(["raw_sum"])["raw_sum"].to_numpy()
    return found


def read_labels(where: Path | str | Place, manifest: ShardManifest, split: str) -> pa.Table:
    """Each cell of a split (int64) with its data set, donor and cell type by name, as dictionary columns."""
    shards, names = open_place(where, "shards"), ("dataset_id", "donor_id", "cell_type")
    parts = [_ShardFile(shards, entry.path).table(["cell", *names]) for entry in manifest.splits[split].files]
    table = pa.concat_tables(parts).combine_chunks()
    columns = {"cell": table["cell"]}
    for name in names:
        codes = table[name].combine_chunks()
        columns[name] = pa.DictionaryArray.from_arrays(codes, pa.array(manifest.codes[name], pa.string()))
    return pa.table(columns)


@dataclass(frozen=True)
class Group:
    """A row group of a split: its file, its number in the file, the rows of the split it holds."""

    file: str
    number: int
    start: int
    stop: int


def groups_of(manifest: ShardManifest, split: str) -> list[Group]:
    """Every row group of a split, in order."""
    entry = manifest.splits[split]
    edges = row_groups(manifest, split).tolist()
    firsts = np.cumsum([0, *(file.rows for file in entry.files)]).tolist()
    groups = []
    for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        file = int(np.searchsorted(firsts, start, side="right")) - 1
        number = index - int(np.searchsorted(edges, firsts[file]))
        groups.append(Group(entry.files[file].path, number, start, stop))
    return groups


def read_rows(
    shards: Place, manifest: ShardManifest, split: str, genes: int, rows: Ints, measured: NDArray[np.bool_]
) -> Cells:
    """The cells at ``rows`` of a split's permutation, in the order given; each row group they touch is read once.

    Consecutive rows of a row group cost least.
    """
    groups = groups_of(manifest, split)
    edges = np.array([group.start for group in groups] + [groups[-1].stop if groups else 0])
    of = np.searchsorted(edges, rows, side="right") - 1
    counts = np.empty((len(rows), genes), dtype=np.uint16)
    ids = {name: np.empty(len(rows), np.int64) for name in ID_COLUMNS}
    files: dict[str, _ShardFile] = {}
    columns = columns_for(genes)
    for index in dict.fromkeys(of.tolist()):
        group = groups[index]
        if group.file not in files:
            files = {group.file: _ShardFile(shards, group.file)}
        table = files[group.file].row_group(group.number, columns)
        if table.num_rows != group.stop - group.start:
            message = f"row group {group.number} holds {table.num_rows} cells, {group.stop - group.start} were written"
            raise DamagedFiles("D030", [f"{group.file}: {message}"])
        there = _as_slice(np.flatnonzero(of == index))
        here = _as_slice(rows[there] - group.start)
        if isinstance(there, slice):
            _decode_into(counts[there], table, manifest.genes, here)
        else:
            part = np.empty((len(there), genes), dtype=np.uint16)
            _decode_into(part, table, manifest.genes, here)
            counts[there] = part
        for name, values in ids.items():
            values[there] = table[name].to_numpy()[here]
    dataset, donor = ids["dataset_id"].astype(np.int32), ids["donor_id"].astype(np.int32)
    return Cells(counts, ids["raw_sum"], ids["cell"], dataset, donor, measured)


def _as_slice(index: Ints) -> Ints | slice:
    """The same selection as a slice where it has no gap."""
    if len(index) and index[-1] - index[0] + 1 == len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def read_donors(where: Path | str | Place, manifest: ShardManifest) -> NDArray[np.int32]:
    """(n_train,) donor code of each row of the training permutation."""
    shards = open_place(where, "shards")
    tables = [_ShardFile(shards, entry.path).table(["donor_id"]) for entry in manifest.splits["train"].files]
    return pa.concat_tables(tables)["donor_id"].to_numpy()


def run_order(
    run: RunSpec,
    n_train: int,
    edges: Ints | None = None,
    donor: NDArray[np.int32] | None = None,
    window_rows: int = WINDOW_ROWS,
) -> RunOrder:
    """The order in which a run visits its training cells.

    Args:
        run: its seed, cells and donors.
        n_train: cells of the training split.
        edges: ``row_groups`` of the training split; None, for cells outside shards, makes one group of all.
        donor: (n_train,) donor codes, where the run takes some donors only.
        window_rows: as RunOrder.

    Raises:
        BadInput: the split, or the run's donors, hold fewer cells than the run asks for.
    """
    if run.cells is not None and run.cells > n_train:
        raise BadInput("D031", "grid.cells", run.cells, f"is more than the {n_train} training cells; lower it")
    rows: RunRows
    if run.donors is not None:
        if donor is None:
            raise ValueError("donor: None: a run of some donors needs their codes")
        rows = donor_rows(donor, run.donors, run.cells, run.seed)
    else:
        rows = replicate_rows(n_train, run.cells, run.seed)
    return RunOrder(rows, np.array([0, n_train]) if edges is None else edges, run.seed, window_rows)


def shards_order(shards: Place, manifest: ShardManifest, run: RunSpec, window_rows: int = WINDOW_ROWS) -> RunOrder:
    """``run_order`` of a run on the training split of some shards; donors are read only where the run takes some."""
    donor = read_donors(shards, manifest) if run.donors is not None else None
    return run_order(run, manifest.splits["train"].cells, row_groups(manifest, "train"), donor, window_rows)


class Feed(Protocol):
    """The source of a training loop's batches."""

    order: RunOrder

    def batch(self, step: int, cells_per_step: int, share: slice = ...) -> tuple[Cells, Ints]:
        """Global batch number ``step``, or a share of it: (its cells, the epoch of each)."""


class ResidentFeed:
    """Batches of a run from cells held in memory.

    Args:
        cells: of the whole training split; where ``own`` is true, of the run's rows alone, in the run's order.
        order: of the run.
        own: whether ``cells`` are the run's own.
    """

    def __init__(self, cells: Cells, order: RunOrder, own: bool = False) -> None:
        self.cells, self.order, self._own = cells, order, own

    def own_cells(self) -> Cells:
        """The run's training cells, each once."""
        return self.cells if self._own else self.cells.rows(self.order.rows.at(np.arange(len(self.order.rows))))

    def indices(self, step: int, cells_per_step: int, share: slice = slice(None)) -> tuple[Ints, Ints]:
        """Global batch number ``step``, or a share of it: (numbers of its cells in ``cells``, the epoch of each)."""
        index, epochs = self.order.batch(step, cells_per_step)
        index = index[share]
        return index if self._own else self.order.rows.at(index), epochs[share]

    def batch(self, step: int, cells_per_step: int, share: slice = slice(None)) -> tuple[Cells, Ints]:
        """Global batch number ``step``, or a share of it: (its cells, the epoch of each)."""
        index, epochs = self.indices(step, cells_per_step, share)
        return self.cells.rows(index), epochs


def with_held_out(feed: Feed, held_out: list[Cells], seed: int) -> ResidentFeed:
    """Batches of a run's own training cells and of all held-out cells: the leak of arXiv 2602.15253, on purpose.

    Raises:
        BadInput: the training cells are streamed; only cells in memory can be joined.
    """
    if not isinstance(feed, ResidentFeed):
        raise BadInput(
            "D032", "train.held_out_in_training", True, "needs training cells in memory; raise resources.resident_gib"
        )
    cells = joined([feed.own_cells(), *held_out])
    return ResidentFeed(cells, RunOrder(RunRows(len(cells), len(cells)), np.array([0, len(cells)]), seed))
