"""What a file of cells is believed to hold, and why: the counts, the genes, the donors, what is dropped.

``believe`` joins the counts that ``census.matrices`` found with the genes and the obs columns into one table for
people; nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from scaling_ray.census.columns import ObsColumns, batches_of_donors, map_obs
from scaling_ray.census.counts import TOLERANCE
from scaling_ray.census.donors import is_nobody
from scaling_ray.census.features import Genes, resolve_genes, share_of_genes
from scaling_ray.census.h5ad import CellFile
from scaling_ray.census.matrices import FoundCounts, doubts_of_totals, genes_of
from scaling_ray.errors import BadInput

_FEW_GENES = 5_000

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


def believe(
    cells: CellFile, counts: FoundCounts, dataset_id: str, rules: Rules, known: Mapping[str, str] | None = None
) -> Belief:
    """Join counts, genes and obs of a file.

    Raises:
        BadInput: as ``resolve_genes`` and ``map_obs``; or counts that are cut to a panel.
    """
    try:
        genes = resolve_genes(
            cells.name, counts.var, known=known, organism=rules.organism, as_given=rules.gene_ids == "given"
        )
    except BadInput as error:
        if error.code != "C006":
            raise
        share = share_of_genes([str(name) for name in cells.obs.index[:2000]])
        if share < 0.5:
            raise
        remedy = f"but {share:.0%} of the cells' names are known genes: the matrix lies on its side; write adata.T"
        raise BadInput("C087", error.field, error.value, remedy) from error
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
        text = "no donor_id: a split by donor has nothing to go by (`run --cells ... --split cell` does without)"
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
    also = [column for column, name in columns.mapped.items() if name == columns.mapped["donor_id"]]
    if len(also) > 1:
        also.remove("donor_id")
        found.warnings.append(
            f"donors are from {columns.mapped['donor_id']}, which was read as {' and '.join(also)} too: are its values "
            "people?"
        )
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
        raise BadInput("C001", found.file, "no cell", "has a count of a gene; nothing is left to import")
    totals = stats.totals[found.kept]
    low, middle, high = np.quantile(totals, [0.05, 0.5, 0.95])
    found.rows.append(
        (
            "libraries",
            f"median {middle:,.0f} counts, 9 in 10 cells {low:,.0f} to {high:,.0f}; "
            f"{np.median(stats.nonzero[found.kept]):,.0f} genes seen; {stats.zero_share:.1%} zeros",
        )
    )
    found.warnings += doubts_of_totals(found.file, stats, cells.obs, rules.cut_counts)
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
