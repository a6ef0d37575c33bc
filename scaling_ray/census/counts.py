"""Whether values are raw counts: looked at one by one, and once more all together.

One value says little: 0/1 matrices, rounded CP10K and rounded logarithms are whole numbers too. What gives them away is
how whole numbers lie together, and each rule below says what it saw in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

TOLERANCE = 1e-3
"""Distance from a whole number up to which a value is read as it: what single-precision arithmetic leaves."""

_MOST_LOST = 1e-3
"""Share of a matrix's sum that rounding may move; beyond it small fractions, not noise, were rounded away."""
_LEAST_CELLS = 50
_LEAST_VALUES = 1_000
"""Cells with counts and values above zero below which the rules on all values together stay silent."""


def fault_of(values: np.ndarray) -> str:
    """The reason why some values are no raw counts, or the empty text."""
    if not len(values):
        return ""
    if not np.isfinite(values).all():
        return "holds values that are not finite"
    whole = np.rint(values)
    if (whole < 0).any():
        return f"holds negative values ({values[whole < 0][0]:g})"
    fractional = np.abs(values - whole) > TOLERANCE
    if fractional.any():
        return f"holds fractional values ({values[fractional][0]:.6g})"
    if whole.max() > 2**24:
        return f"holds values beyond 2^24 ({whole.max():g}), which float32 does not keep exactly"
    return ""


def as_counts(block: sp.csr_matrix) -> sp.csr_matrix:
    """The block in whole numbers: repeated entries summed, zeros gone, genes rising in each row."""
    block = sp.csr_matrix(block)
    block.sum_duplicates()
    if not np.issubdtype(block.dtype, np.integer):
        block.data = np.rint(block.data)
    block.eliminate_zeros()
    return block


@dataclass
class ValueStats:
    """What one pass over a matrix sees of its C cells and G genes, in whole numbers.

    After the pass totals, nonzero, ones, largest, smallest are (C,); gene_sum and gene_square (G,).
    """

    genes: int
    rounded: int = 0
    farthest: float = 0.0
    sum_given: float = 0.0
    sum_counts: float = 0.0
    square_counts: float = 0.0
    repeated: int = 0
    _cells: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gene_sum, self.gene_square = np.zeros(self.genes), np.zeros(self.genes)

    def add(self, block: sp.csr_matrix, columns: np.ndarray | None = None) -> sp.csr_matrix:
        """Look at the next rows, as they are in the file; returns them in whole numbers.

        Args:
            block: (B, F) values without a fault.
            columns: the F features that are genes; all where left out.
        """
        before = block.nnz
        block = sp.csr_matrix(block)
        block.sum_duplicates()
        self.repeated += before - block.nnz
        if not np.issubdtype(block.dtype, np.integer):
            given = block.data.astype(np.float64)
            off = np.abs(given - np.rint(given))
            self.rounded += int((off > 0).sum())
            self.farthest = max(self.farthest, float(off.max(initial=0.0)))
            self.sum_given += float(given.sum())
        else:
            self.sum_given += float(block.data.sum(dtype=np.float64))
        counts = as_counts(block)
        every = columns is None or len(columns) == block.shape[1]
        seen = counts if every else sp.csr_matrix(counts[:, columns])
        values = seen.data.astype(np.float64)
        self.sum_counts += float(counts.data.sum(dtype=np.float64))
        self.square_counts += float((values**2).sum())
        row = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
        self.gene_sum += np.bincount(seen.indices, values, minlength=self.genes)
        self.gene_square += np.bincount(seen.indices, values**2, minlength=self.genes)
        cells = np.zeros((6, seen.shape[0]))
        cells[0] = np.bincount(row, values, minlength=seen.shape[0])
        cells[1] = np.diff(seen.indptr)
        cells[2] = np.bincount(row, values == 1, minlength=seen.shape[0])
        np.maximum.at(cells[3], row, values)
        cells[4] = np.inf
        np.minimum.at(cells[4], row, values)
        cells[5] = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        self._cells.append(cells)
        return counts

    def __getattr__(self, name: str) -> np.ndarray:
        order = ("totals", "nonzero", "ones", "largest", "smallest", "totals_of_all")
        if name not in order:
            raise AttributeError(name)
        rows = np.concatenate([np.zeros((6, 0)), *self._cells], axis=1)
        return rows[order.index(name)]

    @property
    def zero_share(self) -> float:
        """Share of zeros among cells x genes."""
        values = len(self.totals) * self.genes
        return 1.0 - float(self.nonzero.sum()) / values if values else 1.0

    def rounding_fault(self) -> str:
        """The reason why rounding to whole numbers would change the data, or the empty text."""
        moved = abs(self.sum_counts - self.sum_given)
        if moved <= _MOST_LOST * max(abs(self.sum_given), 1e-300):
            return ""
        return (
            f"holds values near zero that rounding would lose ({self.sum_given:.4g} in all, {self.sum_counts:.4g} left)"
        )


def why_no_counts(stats: ValueStats) -> str:
    """The reason, with its numbers, why whole numbers are no raw counts; the empty text where none was found.

    Four rules, silent below 50 cells with counts or 1,000 values above zero:

    * every value above zero is 1: a 0/1 matrix;
    * cells have the same total (its middle nine tenths lie within 5%): scaled to one total, then rounded. Captured
      libraries differ by far more;
    * more than 5% of the cells with at least 20 genes seen have no gene with a single count: scaled up, then rounded.
      In counts one is the most common value (bone marrow, thinned to a fiftieth or cut to 200 genes: no such cell);
    * no value above 16, and values above zero vary no more than a Poisson draw of one rate for all genes would:
      rounded logarithms. Genes differ in rate, so counts spread far wider.
    """
    filled = stats.totals > 0
    totals, nonzero = stats.totals[filled], stats.nonzero[filled]
    values = float(nonzero.sum())
    if len(totals) < _LEAST_CELLS or values < _LEAST_VALUES:
        return ""
    largest = float(stats.largest.max())
    if largest == 1:
        return f"every one of {values:,.0f} values above zero is 1: a matrix of seen or not seen"
    low, middle, high = np.quantile(totals, [0.05, 0.5, 0.95])
    if high - low <= max(0.05 * middle, 2.0):
        return f"cells have the same total (9 in 10 lie within {low:,.0f} to {high:,.0f}): normalised, then rounded"
    many = nonzero >= 20
    if many.sum() >= _LEAST_CELLS:
        without = float((stats.ones[filled][many] == 0).mean())
        if without > 0.05:
            least = float(np.median(stats.smallest[filled][many]))
            return (
                f"{without:.0%} of cells have no gene with one count (the least is {least:.0f}): scaled, then rounded"
            )
    mean = float(totals.sum()) / values
    spread = stats.square_counts / values - mean**2
    expected = _truncated_poisson_variance(mean)
    if largest <= 16 and mean > 1.1 and spread < 1.5 * expected:
        return (
            f"no value is above {largest:.0f}, and values above zero (mean {mean:.2f}) vary by {spread:.2f}, hardly "
            f"more than one rate for all genes would give ({expected:.2f}): rounded logarithms"
        )
    return ""


def _truncated_poisson_variance(mean: float) -> float:
    """Variance of a Poisson draw that is known to be above zero and has this mean (> 1)."""
    low, high = 0.0, mean
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if rate / -np.expm1(-rate) < mean else (low, rate)
    return mean * (1 + high - mean)
