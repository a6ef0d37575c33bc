"""The files between the two phases of a conversion: each range of the Census as sparse rows, cut by shard file.

Phase one reads a contiguous range once. It writes ``ranges/NNNNN.rows`` (a piece per shard file),
``ranges/NNNNN.counts`` (histograms of training cells) and, last, ``ranges/NNNNN.facts`` (offsets of the pieces, and a
key per cell by which duplicates are found): a range with facts is done. Phase two gathers the pieces of one shard file.
Both phases are functions of their input and know no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
import scipy.sparse as sp
from numpy.typing import NDArray

from scaling_ray.census.source import Census
from scaling_ray.errors import DamagedFiles
from scaling_ray.shards.format import (
    BLOCK_GENES,
    CODE_COLUMNS,
    FILE_CELLS,
    LARGEST_COUNT,
    SPLITS,
    block_name,
    block_widths,
    encode_block,
)
from scaling_ray.shards.genes import CountHistogram
from scaling_ray.shards.order import keyed_hash
from scaling_ray.storage import Place

PROCESS_BYTES = 450 << 20
"""Memory of a task before it has read a cell: interpreter, libraries, TileDB's buffers."""
BYTES_PER_NNZ_READ, BYTES_PER_NNZ_KEPT = 192, 28
"""Memory per non-zero of one read (a third of the bound is for it), and of a range being cut."""

_DUPLICATE_KEY = 0xD0B1E

Arrays = dict[str, NDArray[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The sizes of a conversion's parts.

    range_tiles: tiles of X in one range, at most; file_cells: cells of one shard file, at most.
    """

    range_tiles: int = 16
    file_cells: int = FILE_CELLS


DEFAULT_LAYOUT = Layout()


def pack(arrays: Arrays) -> bytes:
    """Named arrays as compressed bytes: safetensors within zstd, the unpacked length first."""
    raw = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(raw, asbytes=True)
    return len(raw).to_bytes(8, "little") + packed


def unpack(data: bytes, name: str) -> Arrays:
    """The inverse of ``pack``; DamagedFiles naming ``name`` where the bytes are damaged."""
    try:
        length = int.from_bytes(data[:8], "little")
        return safetensors.numpy.load(pa.Codec("zstd").decompress(memoryview(data)[8:], length, asbytes=True))
    except (OSError, ValueError, safetensors.SafetensorError, pa.ArrowInvalid) as error:
        raise DamagedFiles(
            "D019", [f"{name}: is damaged ({str(error).splitlines()[0]}); remove it and call again"]
        ) from error


@dataclass(frozen=True)
class Range:
    """Part ``index`` of the Census: joinids start..stop in whole tiles, and its number of chosen cells."""

    index: int
    start: int
    stop: int
    cells: int

    @property
    def slice_name(self) -> str:
        """The file that holds its rows of the selection."""
        return f"cells/{self.index:05d}"

    @property
    def rows_name(self) -> str:
        """The file of its pieces."""
        return f"ranges/{self.index:05d}.rows"

    @property
    def counts_name(self) -> str:
        """The file of its histograms."""
        return f"ranges/{self.index:05d}.counts"

    @property
    def facts_name(self) -> str:
        """The file that says the range is done."""
        return f"ranges/{self.index:05d}.facts"


def plan_ranges(joinid: Ints, nnz: Ints, tile_cells: int, memory_bytes: int, range_tiles: int) -> list[Range]:
    """Cut the tiles that hold chosen cells into ranges whose rows fit in memory. joinid, nnz: (N,), rising joinid."""
    most_nnz = (memory_bytes - PROCESS_BYTES) // BYTES_PER_NNZ_KEPT
    tile, first, cells = np.unique(joinid // tile_cells, return_index=True, return_counts=True)
    tile_nnz = np.add.reduceat(nnz, first) if len(nnz) else np.empty(0, np.int64)
    ranges: list[Range] = []
    begun = 0
    for index in range(1, len(tile) + 1):
        whole = index == len(tile)
        if whole or tile[index] - tile[begun] >= range_tiles or tile_nnz[begun : index + 1].sum() > most_nnz:
            start, stop = int(tile[begun]) * tile_cells, (int(tile[index - 1]) + 1) * tile_cells
            ranges.append(Range(len(ranges), start, stop, int(cells[begun:index].sum())))
            begun = index
    return ranges


def bucket_of(
    split: NDArray[np.int8], position: Ints, split_cells: Sequence[int], file_cells: int
) -> NDArray[np.int32]:
    """The shard file that each chosen cell goes to, numbered through train, val and test."""
    files = [-(-cells // file_cells) for cells in split_cells]
    first = np.concatenate([[0], np.cumsum(files)[:-1]])
    return (first[split] + position // file_cells).astype(np.int32)


def bucket_names(split_cells: Sequence[int], file_cells: int) -> list[tuple[str, str]]:
    """(split, file name) of every shard file, in the order of ``bucket_of``."""
    return [
        (split, f"{split}-{index:05d}.parquet")
        for split, cells in zip(SPLITS, split_cells, strict=True)
        for index in range(-(-cells // file_cells))
    ]


def read_tiles(census: Census, part: Range, joinid: Ints, memory_bytes: int) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """The chosen cells of a range, a few tiles at a time: (rows of ``joinid``, their counts over all genes)."""
    tile = census.tile_cells
    nnz_per_cell = 64.0
    most_nnz = (memory_bytes - PROCESS_BYTES) // BYTES_PER_NNZ_READ
    at, stop = part.start, min(part.stop, census.n_cells)
    while at < stop:
        tiles = max(1, int(most_nnz / (nnz_per_cell * tile)))
        until = min(at + tiles * tile, stop)
        first, last = np.searchsorted(joinid, [at, until])
        if first < last:
            counts = census.counts(at, until)
            nnz_per_cell = max(1.0, 1.5 * counts.nnz / (until - at))
            whole = last - first == until - at
            yield slice(first, last), counts if whole else counts[joinid[first:last] - at]
        at = until


@dataclass(frozen=True)
class SparseRows:
    """Rows of counts in the narrowest integers that hold them: gene and count per entry, first entry of each row."""

    gene: NDArray[np.unsignedinteger]
    count: NDArray[np.unsignedinteger]
    first: NDArray[np.integer]

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> SparseRows:
        """From a csr matrix of (B, G)."""
        widest = int(counts.data.max()) if counts.nnz else 0
        return cls(
            counts.indices.astype(np.uint16 if counts.shape[1] <= 1 << 16 else np.uint32),
            counts.data.astype(np.uint16 if widest < 1 << 16 else np.uint32),
            counts.indptr,
        )

    def rows(self, chosen: Ints) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger], Ints]:
        """(gene, count) of the entries of some rows, one row after the other, and the number of entries of each."""
        length = np.diff(self.first)[chosen]
        if len(chosen) == len(self.first) - 1:  # rising, so all of them
            return self.gene, self.count, length
        before = np.cumsum(length) - length
        entry = np.repeat((self.first[chosen] - before).astype(self.first.dtype), length)
        entry += np.arange(len(entry), dtype=entry.dtype)
        return self.gene[entry], self.count[entry], length


Read = list[tuple[slice, SparseRows]]


def convert_range(census: Census, part: Range, cells: Arrays, memory_bytes: int) -> tuple[bytes, bytes, bytes]:
    """Phase one for one range: its rows, histograms and facts, as they are written.

    Args:
        census: open for reading.
        part: the range.
        cells: rows of the selection: joinid, split, bucket, place, batch and the code columns, each (cells,).
        memory_bytes: bound on the task's memory.
    """
    # A random weight per gene: cells share a sum (mod 2^64) by having the same counts, or by a chance of 2^-64.
    weights = np.stack([keyed_hash(_DUPLICATE_KEY, np.arange(census.n_genes)), np.ones(census.n_genes, np.uint64)], 1)
    sums = np.zeros((part.cells, 2), dtype=np.uint64)
    read: Read = []
    wide: list[Ints] = []
    for rows, counts in read_tiles(census, part, cells["joinid"], memory_bytes):
        sums[rows] = (
            sp.csr_matrix((counts.data.astype(np.uint64), counts.indices, counts.indptr), counts.shape) @ weights
        )
        beyond = np.flatnonzero(counts.data > LARGEST_COUNT)
        row = np.searchsorted(counts.indptr, beyond, side="right") - 1
        cell = cells["joinid"][rows][row]
        wide.append(np.stack([cell, counts.indices[beyond], counts.data[beyond]], 1).astype(np.int64))
        read.append((rows, SparseRows.of(counts)))
    raw_sum = sums[:, 1].astype(np.int64)
    data, index = _cut(read, cells | {"raw_sum": raw_sum})
    facts: Arrays = {"key": sums[:, 0], "raw_sum": raw_sum, "beyond": np.concatenate(wide), **index}
    return data, pack(_histograms(read, cells, census.n_genes)), pack(facts)


def _cut(read: Read, cells: Arrays) -> tuple[bytes, Arrays]:
    """The rows cut by bucket: (all pieces one after the other, bucket, offset and size of each)."""
    pieces: list[bytes] = []
    buckets = np.unique(cells["bucket"])
    for bucket in buckets:
        parts = []
        for rows, counts in read:
            own = np.flatnonzero(cells["bucket"][rows] == bucket)
            gene, count, length = counts.rows(own)
            parts.append((own + rows.start, gene, count, length))
        chosen = np.concatenate([part[0] for part in parts])
        piece: Arrays = {
            "gene": np.concatenate([part[1] for part in parts]),
            "count": np.concatenate([part[2] for part in parts]),
            "length": np.concatenate([part[3] for part in parts]).astype(np.uint32),
        }
        piece |= {name: cells[name][chosen] for name in ("joinid", "place", "raw_sum", "batch", *CODE_COLUMNS)}
        pieces.append(pack(piece))
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    index: Arrays = {
        "piece_bucket": buckets.astype(np.int32),
        "piece_start": np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
        "piece_bytes": sizes,
    }
    return b"".join(pieces), index


def _histograms(read: Read, cells: Arrays, n_genes: int) -> Arrays:
    """Training cells of the range by batch: the histograms one after the other."""
    train = cells["split"] == 0
    found: list[tuple[int, CountHistogram]] = []
    for batch in np.unique(cells["batch"][train]):
        own = train & (cells["batch"] == batch)
        entries = [counts.rows(np.flatnonzero(own[rows])) for rows, counts in read]
        gene = np.concatenate([entry[0] for entry in entries])
        count = np.concatenate([entry[1] for entry in entries])
        found.append((int(batch), CountHistogram.of(gene, count, n_genes)))
    return histogram_arrays(found)


def histogram_arrays(found: list[tuple[int, CountHistogram]]) -> Arrays:
    """Histograms of several batches as flat arrays."""
    none = CountHistogram(*(np.empty(0, dtype=np.int64) for _ in range(3)))
    parts = [histogram for _, histogram in found] or [none]
    return {
        "histogram_batch": np.array([batch for batch, _ in found], dtype=np.int32),
        "histogram_length": np.array([len(histogram.gene) for _, histogram in found], dtype=np.int64),
        "histogram_gene": np.concatenate([part.gene for part in parts]).astype(np.int32),
        "histogram_count": np.concatenate([part.count for part in parts]).astype(np.int64),
        "histogram_cells": np.concatenate([part.cells for part in parts]).astype(np.int32),
    }


def histograms_of(facts: Arrays) -> Iterator[tuple[int, CountHistogram]]:
    """(batch, histogram) of ``histogram_arrays``."""
    start = 0
    for batch, length in zip(facts["histogram_batch"], facts["histogram_length"], strict=True):
        own = slice(start, start + int(length))
        columns = (facts[f"histogram_{name}"][own].astype(np.int64) for name in ("gene", "count", "cells"))
        yield int(batch), CountHistogram(*columns)
        start = own.stop


def read_piece(building: Place, part: Range, start: int, size: int) -> Arrays:
    """One piece of a range."""
    return unpack(building.read(part.rows_name, start, size), part.rows_name)


def histograms_of_cells(pieces: Iterator[Arrays], joinids: Ints, n_genes: int) -> list[tuple[int, CountHistogram]]:
    """(batch, histogram) of some cells of a range, out of its pieces."""
    found: dict[int, list[tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]]] = {}
    for piece in pieces:
        first = np.concatenate([[0], np.cumsum(piece["length"], dtype=np.int64)])
        rows = SparseRows(piece["gene"], piece["count"], first)
        own = np.isin(piece["joinid"], joinids)
        for batch in np.unique(piece["batch"][own]):
            gene, count, _ = rows.rows(np.flatnonzero(own & (piece["batch"] == batch)))
            found.setdefault(int(batch), []).append((gene, count))
    histograms = []
    for batch, entries in sorted(found.items()):
        gene, count = (np.concatenate(side) for side in zip(*entries, strict=True))
        histograms.append((batch, CountHistogram.of(gene, count, n_genes)))
    return histograms


@dataclass(frozen=True)
class Gathered:
    """The cells of one shard file in the order of the permutation, over the ranked genes.

    panel (N, V) uint16; columns (N,): joinid, raw_sum and the codes; below_min_counts: cells with too few counts.
    """

    panel: NDArray[np.uint16]
    columns: Arrays
    below_min_counts: int

    def tables(self, cells: int) -> Iterator[pa.Table]:
        """The cells as tables of ``cells`` each, the last one of fewer."""
        for start in range(0, len(self.panel), cells):
            own = slice(start, start + cells)
            table: dict[str, Any] = {"cell": self.columns["joinid"][own], "raw_sum": self.columns["raw_sum"][own]}
            table |= {name: self.columns[name][own] for name in CODE_COLUMNS}
            for index, width in enumerate(block_widths(self.panel.shape[1])):
                first = index * BLOCK_GENES
                table[block_name(index)] = encode_block(self.panel[own, first : first + width])
            yield pa.table(table)


def gather_file(
    pieces: Iterable[Arrays], order: Ints, n_genes: int, dropped: Ints, min_counts: int, file_cells: int
) -> Gathered:
    """Phase two for one shard file.

    Args:
        pieces: the file's piece of each range that has one.
        order: (V,) gene joinids by rank.
        n_genes: genes of the Census.
        dropped: places of cells to leave out.
        min_counts: cells with fewer counts over the ranked genes are left out too.
        file_cells: places in the file.
    """
    rank = np.full(n_genes, -1, dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    panel = np.zeros((file_cells, len(order)), dtype=np.uint16)  # memory pages without a cell are never touched
    there = np.zeros(len(panel), dtype=bool)
    columns: Arrays = {name: np.zeros(len(panel), np.int64) for name in ("joinid", "raw_sum")}
    columns |= {name: np.zeros(len(panel), np.int32) for name in CODE_COLUMNS}
    for piece in pieces:
        place = piece["place"].astype(np.int64)
        there[place] = True
        for name, values in columns.items():
            values[place] = piece[name]
        ranked = rank[piece["gene"]]
        chosen = np.flatnonzero(ranked >= 0)
        row = np.repeat(place * len(order), piece["length"])[chosen]
        panel.reshape(-1)[row + ranked[chosen]] = piece["count"][chosen]
    there[dropped] = False
    kept = np.flatnonzero(there)
    before = len(kept)
    if min_counts and before:
        kept = kept[panel[: kept[-1] + 1].sum(axis=1, dtype=np.int64)[kept] >= min_counts]
    part = max(1, file_cells >> 4)
    for start in range(0, len(kept), part):  # moved up in place, a part at a time: no second panel
        own = kept[start : start + part]
        panel[start : start + len(own)] = panel[own]
    return Gathered(panel[: len(kept)], {n: values[kept] for n, values in columns.items()}, before - len(kept))
