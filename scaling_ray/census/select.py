"""Which cells, in which split, in which order, and which genes: decided before any count is written.

Splits come first; genes are ranked on training cells alone, from mergeable histograms of counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from skmisc.loess import loess

from scaling_ray.errors import BadInput
from scaling_ray.shards.format import CODE_COLUMNS, SPLITS
from scaling_ray.shards.order import keyed_hash, keyed_permutation
from scaling_ray.spec import DataSpec

MANY_GROUPS = 1_000
"""Above this many groups each one's split is read off its own hash; below, groups are placed greedily."""
TRIED_ORDERS = 32
"""Orders in which few groups are placed, to come near the wanted fractions."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """The chosen cells by joinid: split (N,) index into SPLITS, position (N,) within its split's permutation."""

    joinid: Ints
    split: NDArray[np.int8]
    position: Ints
    codes: dict[str, NDArray[np.int32]]
    labels: dict[str, list[str]]
    groups: dict[str, list[str]]
    dropped: dict[str, int]


def split_groups(sizes: dict[str, int], fractions: dict[str, float], salt: int) -> dict[str, str]:
    """Group -> split, never leaving a split empty.

    Many groups: by their hash. Few: in hash order, each to the split that is least full for its share, the last groups
    being kept for splits that are still empty; of TRIED_ORDERS such fillings the one nearest to ``fractions`` is taken.
    BadInput where there are fewer groups than splits.
    """
    if len(sizes) < len(fractions):
        raise BadInput(
            "data.split_by",
            sorted(sizes),
            f"gives {len(sizes)} groups for {len(fractions)} splits; split by another column",
        )
    names = sorted(sizes)
    hashes = keyed_hash(salt, np.array([_text_key(name) for name in names], dtype=np.uint64))
    if len(names) > MANY_GROUPS:
        edges = np.cumsum(list(fractions.values()))
        where = np.minimum(np.searchsorted(edges, hashes / 2.0**64, side="right"), len(fractions) - 1)
        if len(np.unique(where)) == len(fractions):
            return {name: list(fractions)[int(index)] for name, index in zip(names, where, strict=True)}
    fillings = []
    for order in range(TRIED_ORDERS):
        ranked = np.argsort(keyed_hash(order, hashes), kind="stable")
        fillings.append(_fill([names[int(index)] for index in ranked], sizes, fractions))
    return min(fillings, key=lambda filling: filling[0])[1]


def _fill(names: list[str], sizes: dict[str, int], fractions: dict[str, float]) -> tuple[float, dict[str, str]]:
    """Place groups one after the other: (sum over splits of |share - wanted| / wanted, group -> split)."""
    total = sum(sizes.values())
    filled = dict.fromkeys(fractions, 0)
    assigned: dict[str, str] = {}
    for done, name in enumerate(names):
        empty = [split for split in fractions if not filled[split]]
        candidates = empty if len(empty) >= len(names) - done else list(fractions)
        chosen = min(candidates, key=lambda s: (filled[s] + sizes[name]) / (fractions[s] * total))
        assigned[name] = chosen
        filled[chosen] += sizes[name]
    miss = sum(abs(filled[s] / (fractions[s] * total) - 1) for s in fractions)
    return miss, assigned


def _text_key(text: str) -> int:
    """64-bit FNV-1a of a text: a stable integer for keyed hashing."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def select_cells(obs: pd.DataFrame, data: DataSpec, census_cells: int) -> Selection:
    """Split and permute the cells of ``obs`` (soma_joinid, the code columns), those that passed the value filter."""
    if not len(obs):
        raise BadInput("data.value_filter", data.value_filter, "matches no cell of this Census; correct it")
    obs = obs.sort_values("soma_joinid")
    joinid = obs["soma_joinid"].to_numpy().astype(np.int64)
    salt = _text_key(data.salt)
    fractions = data.fractions.model_dump()
    index_of = {split: index for index, split in enumerate(SPLITS)}
    if data.split_by == "cell":
        split = _split_cells(joinid, fractions, salt)
        groups: dict[str, list[str]] = {name: [] for name in SPLITS}
    else:
        column = obs[data.split_by].astype(str)
        sizes = {str(name): int(count) for name, count in column.value_counts().items()}
        assigned = split_groups(sizes, fractions, salt)
        split = column.map(assigned).map(index_of).to_numpy().astype(np.int8)
        groups = {name: sorted(g for g, s in assigned.items() if s == name) for name in SPLITS}
    position = np.empty(len(joinid), dtype=np.int64)
    for index in range(len(SPLITS)):
        members = np.flatnonzero(split == index)
        position[members[keyed_permutation(salt ^ index, joinid[members])]] = np.arange(len(members))
    codes, labels = {}, {}
    for name in CODE_COLUMNS:
        values, found = pd.factorize(obs[name].astype(str), sort=True)
        codes[name], labels[name] = values.astype(np.int32), [str(label) for label in found]
    dropped = {"value_filter": census_cells - len(joinid)}
    return Selection(joinid, split, position, codes, labels, groups, dropped)


def _split_cells(joinid: Ints, fractions: dict[str, float], salt: int) -> NDArray[np.int8]:
    if len(joinid) < len(fractions):
        raise BadInput(
            "data.split_by", "cell", f"gives {len(joinid)} cells for {len(fractions)} splits; use more cells"
        )
    order = keyed_permutation(salt, joinid)
    held_out = [max(1, round(fractions[name] * len(joinid))) for name in SPLITS[1:]]
    split = np.zeros(len(joinid), dtype=np.int8)
    split[order[: held_out[0]]] = 1
    split[order[held_out[0] : sum(held_out)]] = 2
    return split


@dataclass(frozen=True)
class CountHistogram:
    """How many training cells hold each non-zero (gene, count): three parallel arrays; sums of histograms add up."""

    gene: Ints
    count: Ints
    cells: Ints

    @classmethod
    def merged(cls, parts: list[CountHistogram]) -> CountHistogram:
        """The sum of histograms."""
        gene = np.concatenate([part.gene for part in parts])
        count = np.concatenate([part.count for part in parts])
        cells = np.concatenate([part.cells for part in parts])
        keys, inverse = np.unique((gene << 32) | count, return_inverse=True)
        return cls(keys >> 32, keys & 0xFFFFFFFF, np.bincount(inverse, weights=cells).astype(np.int64))


@dataclass(frozen=True)
class GeneRanking:
    """order (V,) gene joinids, best first; mean and score (n_genes,) by joinid."""

    order: Ints
    mean: NDArray[np.float64]
    score: NDArray[np.float64]


def rank_genes(histogram: CountHistogram, n_cells: int, n_genes: int, data: DataSpec) -> GeneRanking:
    """Rank genes by ``data.gene_rule`` and keep ``data.genes``.

    seurat_v3 (Stuart et al. 2019): variance of counts standardised by a loess fit of log variance on log mean and
    clipped at sqrt(n); ``by_mean``: highest mean first; ``first_n``: the order of var (as arXiv 2602.15253 did).
    Ties go to the lower joinid.
    """
    if data.genes > n_genes:
        raise BadInput("data.genes", data.genes, f"is more than the {n_genes} genes of this Census; lower it")
    if n_cells < 2:
        raise BadInput("data.fractions.train", data.fractions.train, f"leaves {n_cells} training cells; use more cells")
    total = _per_gene(histogram.gene, histogram.count * histogram.cells, n_genes)
    mean = total / n_cells
    if data.gene_rule == "first_n":
        score = -np.arange(n_genes, dtype=np.float64)
    elif data.gene_rule == "by_mean":
        score = mean
    else:
        score = _standardised_variance(histogram, mean, n_cells)
    order = np.argsort(-score, kind="stable")[: data.genes].astype(np.int64)
    return GeneRanking(order, mean, score)


def _per_gene(gene: Ints, weights: NDArray[np.number], n_genes: int) -> NDArray[np.float64]:
    return np.bincount(gene, weights=weights.astype(np.float64), minlength=n_genes).astype(np.float64, copy=False)


def _standardised_variance(histogram: CountHistogram, mean: NDArray[np.float64], n_cells: int) -> NDArray[np.float64]:
    n_genes = len(mean)
    squares = _per_gene(histogram.gene, histogram.count.astype(np.float64) ** 2 * histogram.cells, n_genes)
    variance = (squares - n_cells * mean**2) / (n_cells - 1)
    varies = variance > 1e-12
    if varies.sum() < 10:
        raise BadInput(
            "data.gene_rule", "seurat_v3", f"needs genes that vary; only {int(varies.sum())} do here; use by_mean"
        )
    fit = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
    fit.fit()
    deviation = np.zeros(n_genes)
    deviation[varies] = np.sqrt(10.0**fit.outputs.fitted_values)
    clip = deviation * np.sqrt(n_cells) + mean
    clipped = np.minimum(histogram.count, clip[histogram.gene])
    sum_clipped = _per_gene(histogram.gene, clipped * histogram.cells, n_genes)
    squares_clipped = _per_gene(histogram.gene, clipped**2 * histogram.cells, n_genes)
    score = np.zeros(n_genes)
    score[varies] = (
        (n_cells * mean**2 + squares_clipped - 2 * mean * sum_clipped)[varies] / (n_cells - 1) / deviation[varies] ** 2
    )
    return score
