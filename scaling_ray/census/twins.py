"""Cells that several files hold: found by their counts of the genes that two files share, whatever else each has.

A cell's shared counts are hashed whole and in bands of genes. Two cells are twins where the whole agrees, or where
enough bands do: the same cell counted again with other annotations differs in some genes and agrees in most bands. All
is sums of integers, so one pass over a file serves every other file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

BANDS = 32
LEAST_GENES = 10
"""Genes above zero that a cell must have among the shared ones; fewer say little about which cell it is."""
_LEAST_BAND_GENES = 5
_LEAST_BANDS = 3
"""Bands that must agree, and genes above zero in each, for cells that differ somewhere."""


@dataclass(frozen=True)
class Fingerprints:
    """Of the C cells of one file, over the genes shared with another file.

    whole (C,) uint64; bands (C, BANDS) uint64; genes (C,), band_genes (C, BANDS): shared genes above zero.
    """

    whole: np.ndarray
    bands: np.ndarray
    genes: np.ndarray
    band_genes: np.ndarray


def shared_masks(feature_ids: Sequence[np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """(file, other file) -> (G of the first,) bool: genes that the other has too."""
    sets = [set(ids.tolist()) for ids in feature_ids]
    return {
        (one, other): np.array([gene in sets[other] for gene in ids], dtype=bool)
        for one, ids in enumerate(feature_ids)
        for other in range(len(feature_ids))
        if other != one
    }


def fingerprints(
    blocks: Iterable[sp.csr_matrix], feature_id: np.ndarray, shared: Sequence[np.ndarray], bands: int = BANDS
) -> list[Fingerprints]:
    """One for each mask of shared genes, out of one pass.

    Args:
        blocks: (B, G) counts in whole numbers, in the order of cells.
        feature_id: (G,).
        shared: (G,) bool each.
        bands: of genes; one where only whole cells are compared, which takes 12 bytes a cell and not 384.
    """
    keys = np.array([_key(gene) for gene in feature_id], dtype=np.uint64)
    band = (keys % np.uint64(bands)).astype(np.int64)
    # a column for each band; masks apply to the entries, which are hashed once
    to_band = sp.csr_matrix(
        (np.ones(len(keys), np.uint64), (np.arange(len(keys)), band)), shape=(len(keys), bands), dtype=np.uint64
    )
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in shared]
    for block in blocks:
        value = block.data.astype(np.uint64)
        hashed = _mixed(keys[block.indices] + value * np.uint64(0x9E3779B97F4A7C15))
        for part, mask in zip(parts, shared, strict=True):
            there = mask[block.indices]
            shape = (block.indices, block.indptr)
            sums = sp.csr_matrix((np.where(there, hashed, np.uint64(0)), *shape), shape=block.shape) @ to_band
            seen = sp.csr_matrix((there.astype(np.uint64), *shape), shape=block.shape) @ to_band
            part.append((sums.toarray(), seen.toarray().astype(np.int32)))
    found = []
    for part in parts:
        of_bands = np.concatenate([np.zeros((0, bands), np.uint64), *(sums for sums, _ in part)])
        band_genes = np.concatenate([np.zeros((0, bands), np.int32), *(seen for _, seen in part)])
        whole = of_bands.sum(axis=1, dtype=np.uint64)
        found.append(Fingerprints(whole, of_bands, band_genes.sum(axis=1), band_genes))
    return found


def twins(one: Fingerprints, other: Fingerprints) -> tuple[np.ndarray, np.ndarray, int]:
    """(cells of the one file, their twins in the other, pairs that differ somewhere); each cell at most once."""
    left, right = _equal(one.whole, one.genes >= LEAST_GENES, other.whole, other.genes >= LEAST_GENES)
    free = [np.ones(len(one.whole), bool), np.ones(len(other.whole), bool)]
    free[0][left], free[1][right] = False, False
    votes = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        enough = [free[at] & (each.band_genes[:, band] >= _LEAST_BAND_GENES) for at, each in enumerate((one, other))]
        a, b = _equal(one.bands[:, band], enough[0], other.bands[:, band], enough[1])
        votes.append(np.stack([a, b], axis=1))
    pairs, counts = np.unique(np.concatenate(votes), axis=0, return_counts=True)
    pairs = pairs[counts >= _LEAST_BANDS]
    _, first = np.unique(pairs[:, 0], return_index=True)
    pairs = pairs[first]
    _, first = np.unique(pairs[:, 1], return_index=True)
    pairs = pairs[first]
    return np.concatenate([left, pairs[:, 0]]), np.concatenate([right, pairs[:, 1]]), len(pairs)


def repeats_within(prints: Fingerprints) -> int:
    """Cells whose counts are those of an earlier cell of the same file."""
    enough = prints.genes >= LEAST_GENES
    return int(enough.sum()) - len(np.unique(prints.whole[enough]))


def _equal(
    left: np.ndarray, left_counts: np.ndarray, right: np.ndarray, right_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places of equal values, the first of each value on both sides."""
    a, b = np.flatnonzero(left_counts), np.flatnonzero(right_counts)
    _, first, second = np.intersect1d(left[a], right[b], return_indices=True)
    return a[first], b[second]


def _key(feature_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(str(feature_id).encode(), digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of a value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
