"""What a file of cells is believed to hold, and why: the counts, the genes, the donors, what is dropped.

``find_counts`` looks at every value of a file once. ``believe`` joins what it saw with the genes and the obs columns
into one table for people; nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from scaling_ray.census.columns import ObsColumns, batches_of_donors, map_obs
from scaling_ray.census.counts import TOLERANCE, ValueStats, as_counts, fault_of, why_no_counts
from scaling_ray.census.donors import is_nobody
from scaling_ray.census.features import Genes, kinds_of, resolve_genes
from scaling_ray.census.h5ad import CellFile
from scaling_ray.errors import BadInput

LEAST_LIBRARY = 0.5
"""Share of the total in an obs column that a cell's counts must have (median); below it they are cut to a panel."""
_WHOLE_LIBRARY = 0.98
_FEW_GENES = 5_000
_TOTALS = (
    *("raw_sum", "total_counts", "n_counts", "ncount_rna", "numi", "n_umi", "n_umis", "total_umis", "total_umi"),
    *("umi_count", "umi_counts", "umis", "nread", "n_reads", "ncounts", "totalcounts"),
)
"""Names of obs columns (folded to small letters) that hold a cell's total, as common programs write it."""

Row = tuple[str, str]


@dataclass(frozen=True)
class Rules:
    """What the user asked for; every field stands for a flag of the same name.

    layer, organism: None to find them; donor: columns of donors, () to find them; genes: "union" or "intersection";
    gene_ids: "mapped" or "given"; trust_counts: take whole numbers as counts although they look like none; cut_counts:
    take counts of a panel as whole libraries; title, source: what the data sets are called, and where they are from.
    """

    layer: str | None = None
    donor: tuple[str, ...] = ()
    organism: str | None = None
    genes: str = "union"
    gene_ids: str = "mapped"
    trust_counts: bool = False
    cut_counts: bool = False
    title: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class FoundCounts:
    """The place of a file's raw counts. kinds (F,): "" for a gene; stats: of the F features that are genes."""

    place: str
    looked_at: dict[str, str]
    var: pd.DataFrame
    kinds: np.ndarray
    stats: ValueStats


@dataclass
class Belief:
    """One file. rows: (what, text) of the table; warnings: sentences with numbers."""

    file: str
    dataset_id: str
    container: str
    counts: FoundCounts
    genes: Genes
    columns: ObsColumns
    kept: np.ndarray
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def obs(self) -> pd.DataFrame:
        """The kept cells in the Census's columns."""
        return self.columns.obs[self.kept].reset_index(drop=True)

    def table(self) -> list[str]:
        """Lines for people: the file, then what was believed of it."""
        head = f"{self.file} ({self.container}, {len(self.kept):,} cells x {len(self.counts.kinds):,} features)"
        return [head, *lines_of(self.rows, self.warnings)]


def lines_of(rows: list[Row], warnings: list[str]) -> list[str]:
    """The rows of a table, aligned, warnings last."""
    return [f"  {what:<10} {text}" for what, text in [*rows, *(("WARNING", text) for text in warnings)]]


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
            raise BadInput("--layer", layer, f"of {cells.name} {cells.unread[layer]}")
        raise BadInput("--layer", layer, f"is not in {cells.name}; it has {', '.join(cells.places)}")
    reasons: dict[str, str] = dict(cells.unread)
    good: dict[str, FoundCounts] = {}
    for place in [layer] if layer is not None else cells.places:
        var = cells.var(place)
        if cells.shape(place) != (len(cells.obs), len(var)):
            sizes = f"does not fit {len(cells.obs)} cells and {len(var)} genes"
            raise BadInput(f"{cells.name}:{place}", cells.shape(place), sizes)
        kinds = kinds_of(var)
        stats, reason = _looked_at(cells, place, np.flatnonzero(kinds == ""))
        if reason:
            reasons[place] = reason
        else:
            good[place] = FoundCounts(place, reasons, var, kinds, stats)
    if not good:
        why = "; ".join(f"{place}: {reason}" for place, reason in reasons.items()) or "the file has no matrix"
        raise BadInput(cells.name, "no raw counts", f"{why}. Store raw counts in X, raw.X or a layer")
    first, *others = good
    differing = [place for place in others if not _same(cells, good[first], good[place])]
    if differing:
        raise BadInput(
            "--layer", [first, *differing], f"hold different raw counts in {cells.name}; say which one with --layer"
        )
    why = "" if trust_counts else why_no_counts(good[first].stats)
    if why:
        raise BadInput(
            f"{cells.name}:{first}", "no raw counts", f"{why}. Give raw counts, or --trust-counts if these are"
        )
    return good[first]


def genes_of(cells: CellFile, place: str, columns: np.ndarray) -> ValueStats:
    """What some columns of a matrix hold; its values have no fault."""
    stats = ValueStats(len(columns))
    for _, block in cells.chunks(place):
        stats.add(block, columns)
    return stats


def _looked_at(cells: CellFile, place: str, columns: np.ndarray) -> tuple[ValueStats, str]:
    """(statistics, the reason why a place holds no raw counts or the empty text). Reads until the first fault."""
    stats = ValueStats(len(columns))
    for _, block in cells.chunks(place):
        block.sum_duplicates()
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


def believe(
    cells: CellFile, counts: FoundCounts, dataset_id: str, rules: Rules, known: Mapping[str, str] | None = None
) -> Belief:
    """Join counts, genes and obs of a file.

    Raises:
        BadInput: as ``resolve_genes`` and ``map_obs``; or counts that are cut to a panel.
    """
    genes = resolve_genes(
        cells.name, counts.var, known=known, organism=rules.organism, as_given=rules.gene_ids == "given"
    )
    columns = map_obs(cells.name, cells.obs, dataset_id, rules.donor)
    if len(genes.column) < counts.stats.genes:
        stats = genes_of(cells, counts.place, genes.column)
        counts = FoundCounts(counts.place, counts.looked_at, counts.var, counts.kinds, stats)
    kept = counts.stats.totals > 0
    found = Belief(cells.name, dataset_id, cells.container, counts, genes, columns, kept)
    _tell_counts(found, cells)
    _tell_genes(found)
    _tell_donors(found, cells)
    _tell_columns(found)
    _tell_libraries(found, cells, rules)
    return found


def _tell_counts(found: Belief, cells: CellFile) -> None:
    stats, counts = found.counts.stats, found.counts
    text = f"raw counts from {counts.place}; whole numbers up to {stats.largest.max(initial=0):,.0f}"
    refused = {place: why for place, why in counts.looked_at.items() if place not in cells.unread}
    if refused:
        text += "; not " + ", ".join(f"{place} ({why})" for place, why in refused.items())
    found.rows.append(("counts", text))
    if stats.rounded:
        found.rows.append(
            (
                "rounded",
                f"{stats.rounded:,} values were read as whole numbers; the farthest is {stats.farthest:.1g} from one "
                f"(tolerance {TOLERANCE:g})",
            )
        )
    if stats.repeated:
        found.rows.append(
            ("summed", f"{stats.repeated:,} entries named a cell and a gene once more; the count is their sum")
        )
    dropped = int((~found.kept).sum())
    if dropped:
        found.rows.append(("dropped", f"{dropped:,} cells without counts"))
    found.warnings += [f"{place} {why}; it was not read" for place, why in cells.unread.items()]


def _tell_genes(found: Belief) -> None:
    genes = found.genes
    found.rows.append(
        (
            "genes",
            f"{len(genes.column):,} of {genes.organism} by {genes.matched}; gene ids from {genes.ids_from}, names from "
            f"{genes.names_from}",
        )
    )
    found.rows += [("", note) for note in genes.notes]
    if genes.left_out:
        shown = ", ".join(f"{count:,} {name}" for name, count in genes.left_out.items())
        found.rows.append(("left out", f"{shown}: no genes of this Census, and no part of a cell's total"))


def _tell_donors(found: Belief, cells: CellFile) -> None:
    columns, labels = found.columns, found.obs["donor_id"].to_numpy()
    if "donor_id" not in columns.mapped:
        text = "no donor_id: a split by donor has nothing to go by"
        if columns.proposals:
            text += (
                f"; these look like donors: {', '.join(f'--donor {_quoted(name)}' for name in columns.proposals[:3])}"
            )
        found.rows.append(("donors", text))
        return
    people = pd.Series(labels).value_counts()
    people = people[[not is_nobody(str(label)) for label in people.index]]
    named = ", ".join(f"{label} ({count:,})" for label, count in people.head(6).items())
    more = f" and {len(people) - 6:,} more" if len(people) > 6 else ""
    found.rows.append(("donors", f"{len(people):,} from {columns.mapped['donor_id']}: {named}{more}"))
    if columns.without_donor:
        shown = ", ".join(f"{label!r} {count:,}" for label, count in list(columns.without_donor.items())[:5])
        total = sum(columns.without_donor.values())
        found.rows.append(("no donor", f"{total:,} cells ({shown}): a split by donor has them in training only"))
    if len(people) == 1:
        found.warnings.append("all cells are of one donor: a test on other people is not possible")
    batch = batches_of_donors(cells.obs[found.kept], labels)
    if batch is not None and batch != columns.mapped["donor_id"]:
        found.warnings.append(
            f"each of {len(people):,} donors is a batch of its own ({batch}): differences between donors and between "
            "batches cannot be told apart"
        )


def _quoted(name: str) -> str:
    return f"'{name}'" if not name.isidentifier() else name


def _tell_columns(found: Belief) -> None:
    mapped = {column: name for column, name in found.columns.mapped.items() if column != "donor_id"}
    told = ", ".join(f"{column} from {name}" for column, name in mapped.items()) or "no obs column recognised"
    found.rows.append(("columns", told))
    missing = [name for name in found.columns.missing if name != "donor_id"]
    if missing:
        found.rows.append(("", f"set to unknown: {', '.join(missing)}"))


def _tell_libraries(found: Belief, cells: CellFile, rules: Rules) -> None:
    stats = found.counts.stats
    if not found.kept.any():
        raise BadInput(found.file, "no cell", "has a count of a gene; nothing is left to import")
    totals = stats.totals[found.kept]
    low, middle, high = np.quantile(totals, [0.05, 0.5, 0.95])
    found.rows.append(
        (
            "libraries",
            f"median {middle:,.0f} counts, 9 in 10 cells {low:,.0f} to {high:,.0f}; "
            f"{np.median(stats.nonzero[found.kept]):,.0f} genes seen; {stats.zero_share:.1%} zeros",
        )
    )
    _check_totals(found, cells, rules)
    genes = len(found.genes.column)
    place, features = found.counts.place, len(found.counts.kinds)
    of_raw = cells.shape("raw.X")[1] if "raw.X" in cells.places and place != "raw.X" else 0
    if of_raw > features:
        found.warnings.append(
            f"raw.X has {of_raw:,} genes and {place} {features:,}: library sizes here are of the smaller set"
        )
    elif genes < _FEW_GENES:
        found.warnings.append(
            f"{genes:,} genes are fewer than a transcriptome has: if the others were cut off, libraries are too small"
        )
    if len(totals) > 20_000 and (totals < 100).mean() > 0.5:
        found.warnings.append(
            f"{(totals < 100).mean():.0%} of cells have fewer than 100 counts: droplets not filtered?"
        )


def _check_totals(found: Belief, cells: CellFile, rules: Rules) -> None:
    """Compare each cell's total with the obs column that says it."""
    stats = found.counts.stats
    for column in cells.obs.columns:
        if str(column).lower().replace(" ", "_").replace(".", "_") not in _TOTALS:
            continue
        told = pd.to_numeric(cells.obs[column], errors="coerce").to_numpy(np.float64)
        usable = found.kept & np.isfinite(told) & (told > 0)
        if not usable.any():
            continue
        # with antibodies in the file, a total may count them too
        shares = [float(np.median(each[usable] / told[usable])) for each in (stats.totals, stats.totals_of_all)]
        share = min(shares, key=lambda value: abs(value - 1))
        if share < LEAST_LIBRARY and not rules.cut_counts:
            raise BadInput(
                f"{found.file}: library sizes",
                f"{share:.1%} of {column}",
                f"the counts of {len(found.genes.column):,} genes sum to {np.median(stats.totals[usable]):,.0f} a cell "
                f"and {column} says {np.median(told[usable]):,.0f} (medians): cut to a panel. Give all genes, or "
                "--cut-counts to take these as whole libraries",
            )
        if abs(share - 1) > 1 - _WHOLE_LIBRARY:
            found.warnings.append(
                f"counts sum to {share:.1%} of obs column {column} (medians {np.median(stats.totals[usable]):,.0f} and "
                f"{np.median(told[usable]):,.0f}): library sizes are those of the counts here"
            )
        return
