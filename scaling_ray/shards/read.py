"""Rows of shards as arrays, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import block_name, block_widths, decode_block


@dataclass(frozen=True)
class Cells:
    """Raw counts of some cells over the first V genes, in the order of the permutation.

    counts (N, V) uint16; raw_sum (N,) int64 over all genes of the Census; cell (N,) int64 soma_joinids; dataset and
    donor (N,) int32 codes; measured (datasets, V) bool: which of these genes each dataset measured.
    """

    counts: NDArray[np.uint16]
    raw_sum: NDArray[np.int64]
    cell: NDArray[np.int64]
    dataset: NDArray[np.int32]
    donor: NDArray[np.int32]
    measured: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.cell)

    def rows(self, index: NDArray[np.int64] | slice) -> Cells:
        """The cells at ``index`` (copied where it is an array)."""
        return Cells(
            self.counts[index],
            self.raw_sum[index],
            self.cell[index],
            self.dataset[index],
            self.donor[index],
            self.measured,
        )


def columns_for(genes: int) -> list[str]:
    """Parquet columns that hold the first ``genes`` genes and what a batch needs besides."""
    return ["cell", "raw_sum", "dataset_id", "donor_id", *(block_name(i) for i in range(len(block_widths(genes))))]


def decode_cells(table: pa.Table, genes: int, stored_genes: int, measured: NDArray[np.bool_]) -> Cells:
    """Cells from a table with ``columns_for(genes)``."""
    counts = np.empty((table.num_rows, genes), dtype=np.uint16)
    for index, width in enumerate(block_widths(stored_genes)[: len(block_widths(genes))]):
        start = index * block_widths(stored_genes)[0]
        wanted = min(width, genes - start)
        counts[:, start : start + wanted] = decode_block(table[block_name(index)], width)[:, :wanted]
    column = {name: table[name].to_numpy() for name in ("cell", "raw_sum", "dataset_id", "donor_id")}
    return Cells(counts, column["raw_sum"], column["cell"], column["dataset_id"], column["donor_id"], measured)


def read_measured(directory: Path, manifest: ShardManifest, genes: int) -> NDArray[np.bool_]:
    """(datasets, genes) bool from presence.parquet."""
    try:
        table = pq.read_table(directory / "presence.parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedFiles([f"presence.parquet: {error}"]) from error
    packed = decode_block(table["measured"], manifest.genes)
    return packed[:, :genes].astype(bool)


def read_split(directory: Path, manifest: ShardManifest, split: str, genes: int) -> Cells:
    """All cells of a split over the first ``genes`` genes."""
    if genes > manifest.genes:
        raise BadInput(
            "grid.genes", genes, f"is more than the {manifest.genes} genes of the shards; build them with more"
        )
    tables = []
    for entry in manifest.splits[split].files:
        try:
            table = pq.read_table(directory / entry.path, columns=columns_for(genes))
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedFiles([f"{entry.path}: {error}"]) from error
        if table.num_rows != entry.rows:
            raise DamagedFiles([f"{entry.path}: holds {table.num_rows} cells, the manifest says {entry.rows}"])
        tables.append(table)
    return decode_cells(pa.concat_tables(tables), genes, manifest.genes, read_measured(directory, manifest, genes))
