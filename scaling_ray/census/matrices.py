"""The matrix of raw counts in a file of cells: found, every value of it looked at, and held against what obs says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling_ray.census.counts import ValueStats, as_counts, fault_of, why_no_counts
from scaling_ray.census.features import kinds_of
from scaling_ray.census.h5ad import CellFile
from scaling_ray.errors import BadInput

LEAST_LIBRARY = 0.5
"""Share of the total in an obs column that a cell's counts must have (median); below it they are cut to a panel."""
_WHOLE_LIBRARY = 0.98
_TOTALS = (
    *("raw_sum", "total_counts", "n_counts", "ncount_rna", "numi", "n_umi", "n_umis", "total_umis", "total_umi"),
    *("umi_count", "umi_counts", "umis", "nread", "n_reads", "ncounts", "totalcounts"),
)
"""Names of obs columns (folded to small letters) that hold a cell's total, as common programs write it."""


@dataclass(frozen=True)
class FoundCounts:
    """The place of a file's raw counts. kinds (F,): "" for a gene; stats: of the F features that are genes."""

    place: str
    looked_at: dict[str, str]
    var: pd.DataFrame
    kinds: np.ndarray
    stats: ValueStats


def find_counts(cells: CellFile, layer: str | None = None, *, trust_counts: bool = False) -> FoundCounts:
    """The matrix of raw counts, every value of every candidate looked at.

    Args:
        cells: an open file.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.
        trust_counts: take whole numbers as counts although together they look like none.

    Raises:
        BadInput: no raw counts (with the reason for each place), or differing candidates.
    """
    if layer is not None and layer not in cells.places:
        if layer in cells.unread:
            raise BadInput("C022", "--layer", layer, f"of {cells.name} {cells.unread[layer]}; name another")
        raise BadInput("C023", "--layer", layer, f"is not in {cells.name}; it has {', '.join(cells.places)}")
    reasons: dict[str, str] = dict(cells.unread)
    good: dict[str, FoundCounts] = {}
    for place in [layer] if layer is not None else cells.places:
        var = cells.var(place)
        if cells.shape(place) != (len(cells.obs), len(var)):
            sizes = f"does not fit {len(cells.obs)} cells and {len(var)} genes; write the file again"
            raise BadInput("C024", f"{cells.name}:{place}", cells.shape(place), sizes)
        kinds = kinds_of(var)
        stats, reason = _looked_at(cells, place, np.flatnonzero(kinds == ""))
        if reason:
            reasons[place] = reason
        else:
            good[place] = FoundCounts(place, reasons, var, kinds, stats)
    if not good:
        why = "; ".join(f"{place}: {reason}" for place, reason in reasons.items()) or "the file has no matrix"
        others = [place for place in cells.places if layer not in (None, place) and _holds_counts(cells, place)]
        if others:
            remedy = f"{why}. Raw counts are in {' and '.join(others)}: name it, or leave --layer out"
            raise BadInput("C085", "--layer", layer, remedy)
        raise BadInput("C025", cells.name, "no raw counts", f"{why}. Store raw counts in X, raw.X or a layer")
    first, *others = good
    differing = [place for place in others if not _same(cells, good[first], good[place])]
    if differing:
        raise BadInput(
            "C026",
            "--layer",
            [first, *differing],
            f"hold different raw counts in {cells.name}; say which one with --layer",
        )
    why = "" if trust_counts else why_no_counts(good[first].stats)
    if why:
        raise BadInput(
            "C027", f"{cells.name}:{first}", "no raw counts", f"{why}. Give raw counts, or --trust-counts if these are"
        )
    return good[first]


def genes_of(cells: CellFile, place: str, columns: np.ndarray) -> ValueStats:
    """What some columns of a matrix hold; its values have no fault."""
    stats = ValueStats(len(columns))
    for _, block in cells.chunks(place):
        stats.add(block, columns)
    return stats


def _holds_counts(cells: CellFile, place: str) -> bool:
    """Whether a place of a file would pass for raw counts."""
    _, reason = _looked_at(cells, place, np.flatnonzero(kinds_of(cells.var(place)) == ""))
    return not reason


def _looked_at(cells: CellFile, place: str, columns: np.ndarray) -> tuple[ValueStats, str]:
    """(statistics, the reason why a place holds no raw counts or the empty text). Reads until the first fault."""
    stats = ValueStats(len(columns))
    for _, block in cells.chunks(place):
        entries = block.nnz
        block.sum_duplicates()
        stats.repeated += entries - block.nnz
        wrong = fault_of(block.data)
        if wrong:
            return stats, wrong
        stats.add(block, columns)
    return stats, stats.rounding_fault() or ("" if stats.sum_counts else "holds no count at all")


def _same(cells: CellFile, first: FoundCounts, second: FoundCounts) -> bool:
    if cells.shape(first.place) != cells.shape(second.place) or first.stats.sum_counts != second.stats.sum_counts:
        return False
    pairs = zip(cells.chunks(first.place), cells.chunks(second.place), strict=True)
    return all((as_counts(a) != as_counts(b)).nnz == 0 for (_, a), (_, b) in pairs)


@dataclass(frozen=True)
class Totals:
    """A cell's counts beside an obs column that says its total: share (median), and both medians."""

    column: str
    share: float
    counts: float
    told: float


def compare_totals(stats: ValueStats, obs: pd.DataFrame) -> Totals | None:
    """The counts of cells beside the total that obs says of them; None where no column says one."""
    totals, of_all = stats.totals, stats.totals_of_all
    for column in obs.columns:
        if str(column).lower().replace(" ", "_").replace(".", "_") not in _TOTALS:
            continue
        told = pd.to_numeric(obs[column], errors="coerce").to_numpy(np.float64)
        usable = (totals > 0) & np.isfinite(told) & (told > 0)
        if not usable.any():
            continue
        # with antibodies in the file, a total may count them too
        shares = [float(np.median(each[usable] / told[usable])) for each in (totals, of_all)]
        share = min(shares, key=lambda value: abs(value - 1))
        return Totals(str(column), share, float(np.median(totals[usable])), float(np.median(told[usable])))
    return None


def doubts_of_totals(file: str, stats: ValueStats, obs: pd.DataFrame, cut_counts: bool) -> list[str]:
    """Sentences on counts that do not sum to what obs says.

    Raises:
        BadInput: they are less than half of it, and ``cut_counts`` does not ask to go on.
    """
    found = compare_totals(stats, obs)
    if found is None or abs(found.share - 1) <= 1 - _WHOLE_LIBRARY:
        return []
    if found.share < LEAST_LIBRARY and not cut_counts:
        raise BadInput(
            "C028",
            f"{file}: library sizes",
            f"{found.share:.1%} of {found.column}",
            f"the counts of {stats.genes:,} genes sum to {found.counts:,.0f} a cell and {found.column} says "
            f"{found.told:,.0f} (medians): cut to a panel. Give all genes, or --cut-counts to take these as whole "
            "libraries",
        )
    return [
        f"counts sum to {found.share:.1%} of obs column {found.column} (medians {found.counts:,.0f} and "
        f"{found.told:,.0f}): library sizes are those of the counts here"
    ]
