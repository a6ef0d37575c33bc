"""The conversion a careful user would write: two phases in one process, without Ray, resuming, hashes or duplicates.

Ranges of the Census are read in order; each leaves a histogram of its training cells and its sparse rows; then every
shard file is filled from all ranges and written as Parquet. It is what ``shards build`` is compared with.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import tiledbsoma as soma
from skmisc.loess import loess

RANGE_CELLS, FILE_CELLS, ROW_GROUP_CELLS, BLOCK_GENES, SMALL = 32_768, 131_072, 16_384, 256, 64
COLUMNS = ["soma_joinid", "dataset_id", "donor_id", "cell_type", "disease", "tissue", "assay"]


def convert(census: Path, out: Path, genes: int) -> tuple[int, float]:
    """Write shards of the primary cells at ``out``: (cells, seconds from the first count read to the last file)."""
    out.mkdir(parents=True)
    context = soma.SOMATileDBContext(
        tiledb_config={
            "sm.compute_concurrency_level": 1,
            "sm.io_concurrency_level": 1,
            "soma.init_buffer_bytes": 64 << 20,
        }
    )
    root: Any  # tiledbsoma types what it opens as no collection
    with soma.open(str(census), context=context) as root:
        experiment = root["census_data"]["homo_sapiens"]
        obs = experiment.obs.read(column_names=COLUMNS, value_filter="is_primary_data == True").concat().to_pandas()
        x, n_genes = experiment.ms["RNA"].X["raw"], experiment.ms["RNA"].var.count
        joinid = obs["soma_joinid"].to_numpy()
        codes = {name: obs[name].cat.codes.to_numpy(np.int32) for name in COLUMNS[1:]}
        split = _split(codes["donor_id"], len(obs["donor_id"].cat.categories))
        position = np.empty(len(joinid), np.int64)
        for index in range(3):
            own = np.flatnonzero(split == index)
            position[np.random.default_rng(index).permutation(own)] = np.arange(len(own))
        file_of = split * 1_000 + position // FILE_CELLS

        began = time.perf_counter()
        histogram = np.zeros(n_genes * SMALL, np.int64)
        pieces: dict[int, list[Piece]] = {}
        for start in range(0, int(joinid[-1]) + 1, RANGE_CELLS):
            first, last = np.searchsorted(joinid, [start, start + RANGE_CELLS])
            table = x.read((slice(start, start + RANGE_CELLS - 1), slice(None))).tables().concat()
            rows, columns = table["soma_dim_0"].to_numpy() - start, table["soma_dim_1"].to_numpy()
            counts = sp.csr_matrix(
                (table["soma_data"].to_numpy().astype(np.int32), (rows, columns)), shape=(RANGE_CELLS, n_genes)
            )[joinid[first:last] - start]
            train = counts[split[first:last] == 0]
            # counts of 64 and more are put together here, which an exact ranking must not do
            histogram += np.bincount(
                train.indices * SMALL + np.minimum(train.data, SMALL - 1), minlength=len(histogram)
            )
            raw_sum = np.asarray(counts.sum(1)).ravel()
            for file in np.unique(file_of[first:last]):
                own = np.flatnonzero(file_of[first:last] == file)
                pieces.setdefault(int(file), []).append(_write_piece(out, counts[own], raw_sum[own], first + own))
        order = _rank(histogram.reshape(n_genes, SMALL), int((split == 0).sum()), genes)
        for file, own_pieces in pieces.items():
            _write_file(out / f"{file:05d}.parquet", own_pieces, position % FILE_CELLS, order, codes, joinid)
        return len(joinid), time.perf_counter() - began


Piece = tuple[Path, np.ndarray, np.ndarray, np.ndarray]
"""A file of (gene, count); entries of each row; raw_sum; row of obs."""


def _write_piece(out: Path, counts: sp.csr_matrix, raw_sum: np.ndarray, rows: np.ndarray) -> Piece:
    """The sparse rows of one range that go to one shard file."""
    path = out / f"piece-{rows[0]}.parquet"
    table = pa.table({"gene": counts.indices.astype(np.uint16), "count": counts.data.astype(np.uint16)})
    pq.write_table(table, path, compression="zstd", compression_level=1, use_dictionary=False)
    return path, np.diff(counts.indptr), raw_sum, rows


def _split(donor: np.ndarray, donors: int) -> np.ndarray:
    """By donor, eight in ten for training."""
    return np.where(np.arange(donors) % 10 < 8, 0, np.where(np.arange(donors) % 10 == 8, 1, 2))[donor]


def _rank(histogram: np.ndarray, cells: int, genes: int) -> np.ndarray:
    """Genes by Seurat v3's standardised variance."""
    value = np.arange(SMALL)
    mean = histogram @ value / cells
    variance = (histogram @ value**2 - cells * mean**2) / (cells - 1)
    varies = variance > 1e-12
    trend = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
    trend.fit()
    deviation = np.ones(len(mean))
    deviation[varies] = np.sqrt(10**trend.outputs.fitted_values)
    clipped = np.minimum(value[None, :], (deviation * np.sqrt(cells) + mean)[:, None])
    sums, squares = (histogram * clipped).sum(1), (histogram * clipped**2).sum(1)
    score = np.where(varies, (cells * mean**2 + squares - 2 * mean * sums) / (cells - 1) / deviation**2, 0)
    return np.argsort(-score, kind="stable")[:genes]


def _write_file(
    path: Path,
    pieces: list[Piece],
    place_of: np.ndarray,
    order: np.ndarray,
    codes: dict[str, np.ndarray],
    joinid: np.ndarray,
) -> None:
    """One shard file from its pieces."""
    rank = np.full(1 << 16, -1, np.int32)
    rank[order] = np.arange(len(order))
    cells = sum(len(rows) for *_, rows in pieces)
    panel = np.zeros((cells, len(order)), np.uint16)
    sums, chosen = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
    for piece, length, raw_sum, rows in pieces:
        table = pq.read_table(piece, use_threads=False)
        ranked, place = rank[table["gene"].to_numpy()], place_of[rows]
        wanted = ranked >= 0
        panel[np.repeat(place, length)[wanted], ranked[wanted]] = table["count"].to_numpy()[wanted]
        sums[place], chosen[place] = raw_sum, rows
    columns = {"cell": joinid[chosen], "raw_sum": sums} | {name: values[chosen] for name, values in codes.items()}
    for index, start in enumerate(range(0, len(order), BLOCK_GENES)):
        block = np.ascontiguousarray(panel[:, start : start + BLOCK_GENES])
        columns[f"counts_{index:03d}"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * block.shape[1]), len(block), [None, pa.py_buffer(block)]
        )
    table = pa.table(columns)
    pq.write_table(table, path, compression="zstd", compression_level=1, row_group_size=ROW_GROUP_CELLS)
