"""The ranking of genes, from histograms of training cells' counts, which add up over ranges without a second read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from skmisc.loess import loess

from scaling_ray.errors import BadInput
from scaling_ray.spec import DataSpec

SMALL_COUNTS = 64
"""Counts below this are kept in a dense table; the rarer larger ones are listed."""
LEAST_VARYING_GENES = 10
"""A trend of variance on mean is not fitted to fewer genes."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CountHistogram:
    """How many cells hold each non-zero (gene, count): three parallel arrays, sorted by gene, then count."""

    gene: Ints
    count: Ints
    cells: Ints

    @classmethod
    def of(cls, gene: NDArray[np.integer], count: NDArray[np.integer], n_genes: int) -> CountHistogram:
        """From the (gene, count) of each non-zero entry."""
        total = HistogramSum(n_genes)
        small = count < SMALL_COUNTS
        everything = bool(small.all())
        genes, counts = (gene, count) if everything else (gene[small], count[small])
        keys = genes.astype(np.int64) * SMALL_COUNTS + counts
        total.small += np.bincount(keys, minlength=len(total.small))
        if not everything:
            keys, cells = np.unique(
                (gene[~small].astype(np.int64) << 32) | count[~small].astype(np.int64), return_counts=True
            )
            total.large.append(cls(keys >> 32, keys & 0xFFFFFFFF, cells.astype(np.int64)))
        return total.result()


@dataclass
class HistogramSum:
    """A running sum of histograms over ``n_genes`` genes."""

    n_genes: int
    small: Ints = field(init=False)
    large: list[CountHistogram] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.small = np.zeros(self.n_genes * SMALL_COUNTS, dtype=np.int64)

    def add(self, other: CountHistogram, sign: int = 1) -> None:
        """Add a histogram, or subtract (sign -1) one that was added before."""
        small = other.count < SMALL_COUNTS
        # each (gene, count) occurs once in a histogram, so plain indexing adds correctly
        self.small[other.gene[small] * SMALL_COUNTS + other.count[small]] += sign * other.cells[small]
        if not small.all():
            self.large.append(CountHistogram(other.gene[~small], other.count[~small], sign * other.cells[~small]))
        if len(self.large) > 64:
            self.large = [self._large()]

    def result(self) -> CountHistogram:
        """The sum."""
        filled = np.flatnonzero(self.small)
        large = self._large()
        gene = np.concatenate([filled // SMALL_COUNTS, large.gene])
        count = np.concatenate([filled % SMALL_COUNTS, large.count])
        cells = np.concatenate([self.small[filled], large.cells])
        order = np.lexsort((count, gene))
        return CountHistogram(gene[order], count[order], cells[order])

    def _large(self) -> CountHistogram:
        if not self.large:
            return CountHistogram(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        gene = np.concatenate([part.gene for part in self.large])
        count = np.concatenate([part.count for part in self.large])
        cells = np.concatenate([part.cells for part in self.large])
        keys, inverse = np.unique((gene << 32) | count, return_inverse=True)
        sums = np.bincount(inverse, weights=cells, minlength=len(keys)).astype(np.int64)
        there = sums != 0
        return CountHistogram(keys[there] >> 32, keys[there] & 0xFFFFFFFF, sums[there])


@dataclass(frozen=True)
class Batch:
    """Training cells that are ranked together: all of them, or the cells of one data set."""

    name: str
    histogram: CountHistogram
    cells: int


@dataclass(frozen=True)
class GeneRanking:
    """order (V,) gene joinids, best first; mean and score (G,) by joinid; batches too small to rank genes in."""

    order: Ints
    mean: Floats
    score: Floats
    batches_left_out: list[str]


def gene_list_order(feature_ids: Sequence[str], wanted: Sequence[str]) -> Ints:
    """Joinids of the listed genes, in the order of the list.

    Raises:
        BadInput: ids that the Census does not hold, naming the first few.
    """
    place = {name: index for index, name in enumerate(feature_ids)}
    unknown = [name for name in wanted if name not in place]
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise BadInput(
            "D013", "data.gene_list", shown, "is no feature_id of this Census; remove it or correct its spelling"
        )
    return np.array([place[name] for name in wanted], dtype=np.int64)


def rank_genes(batches: Iterable[Batch], n_genes: int, data: DataSpec, feature_ids: Sequence[str] = ()) -> GeneRanking:
    """Rank genes by ``data.gene_rule`` and keep ``data.genes``. Ties go to the lower joinid.

    seurat_v3 (Stuart et al. 2019): variance of counts standardised by a loess fit of log variance on log mean and
    clipped at sqrt(n). With several batches, genes are ranked within each, ranks beyond ``data.genes`` count as none,
    and the median rank over batches decides, then the number of batches with a rank (Seurat's
    SelectIntegrationFeatures, as scanpy's flavor seurat_v3 does), then the mean score.
    ``by_mean``: highest mean first; ``first_n``: the order of var (as arXiv 2602.15253 did); ``list``: data.gene_list.

    Args:
        batches: each is released before the next is requested.
        n_genes: genes of the Census (G).
        data: the rules.
        feature_ids: (G,), for ``list``.
    """
    if data.genes > n_genes:
        raise BadInput("D014", "data.genes", data.genes, f"is more than the {n_genes} genes of this Census; lower it")
    ranks: list[NDArray[np.float32]] = []
    scores, total, cells = np.zeros(n_genes), np.zeros(n_genes), 0
    left_out: list[str] = []
    for batch in batches:
        sums = _per_gene(batch.histogram.gene, batch.histogram.count * batch.histogram.cells, n_genes)
        total += sums
        cells += batch.cells
        if data.gene_rule != "seurat_v3":
            continue
        score = _standardised_variance(batch.histogram, sums / max(batch.cells, 1), batch.cells)
        if score is None:
            left_out.append(batch.name)
            continue
        rank = np.empty(n_genes, dtype=np.float32)
        rank[np.argsort(-score, kind="stable")] = np.arange(n_genes)
        rank[rank >= data.genes] = np.nan
        ranks.append(rank)
        scores += score
    if cells < 2:
        raise BadInput(
            "D015", "data.fractions.train", data.fractions.train, f"leaves {cells} training cells; use more cells"
        )
    mean = total / cells
    if data.gene_rule == "list":
        order, scores = gene_list_order(feature_ids, data.gene_list), mean
    elif data.gene_rule == "first_n":
        order, scores = np.arange(data.genes, dtype=np.int64), -np.arange(n_genes, dtype=np.float64)
    elif data.gene_rule == "by_mean":
        order, scores = np.argsort(-mean, kind="stable")[: data.genes].astype(np.int64), mean
    else:
        if not ranks:
            raise BadInput(
                "D016",
                "data.gene_rule",
                "seurat_v3",
                "finds too few genes that vary in these training cells; use by_mean",
            )
        scores /= len(ranks)
        order = _by_median_rank(np.stack(ranks), scores)[: data.genes]
    return GeneRanking(order, mean, scores, left_out)


def _by_median_rank(ranks: NDArray[np.float32], scores: Floats) -> Ints:
    """(G,) all genes: lowest median rank first (NaN last), then most batches with a rank, then highest mean score."""
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.inf).astype(np.float64)
    batches = (~np.isnan(ranks)).sum(axis=0)
    return np.lexsort((np.arange(len(scores)), -scores, -batches, median)).astype(np.int64)


def _per_gene(gene: Ints, weights: NDArray[np.number], n_genes: int) -> Floats:
    return np.bincount(gene, weights=weights.astype(np.float64), minlength=n_genes).astype(np.float64, copy=False)


def _standardised_variance(histogram: CountHistogram, mean: Floats, n_cells: int) -> Floats | None:
    """(G,) scores; None where too few genes vary, or there are too few cells, for a trend to be fitted."""
    n_genes = len(mean)
    if n_cells < 2:
        return None
    squares = _per_gene(histogram.gene, histogram.count.astype(np.float64) ** 2 * histogram.cells, n_genes)
    variance = (squares - n_cells * mean**2) / (n_cells - 1)
    varies = variance > 1e-12
    if varies.sum() < LEAST_VARYING_GENES:
        return None
    fit = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
    try:
        fit.fit()
    except ValueError:  # a singular neighbourhood: genes of a few cells share a handful of means
        return None
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
