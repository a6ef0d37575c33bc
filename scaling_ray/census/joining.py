"""Several files as one Census: their genes, their donors, and the cells that more than one of them holds.

A donor is one person whatever a file calls them, and a cell is one cell however often it was published. Both are
decided here, before any split: spellings of one donor become one, donors who share cells become one, and of a cell's
copies one counts and the others are marked as no primary data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from scaling_ray.census.beliefs import Belief, Row, Rules, lines_of
from scaling_ray.census.counts import as_counts
from scaling_ray.census.donors import LEAST_DONORS, is_nobody, one_spelling, respelled, serves_a_split
from scaling_ray.census.h5ad import CellFile
from scaling_ray.census.matrices import genes_of
from scaling_ray.census.twins import BANDS, fingerprints, repeats_within, shared_masks, twins
from scaling_ray.errors import BadInput

_LEAST_SHARED_CELLS = 0.01
"""Share of the smaller donor's cells that two donors must have in common to be one person."""
_FEW_SHARED_GENES = 0.5
_MANY_BARCODES = 0.1
_SEQUENCE = re.compile(r"[ACGT]{12,}")

File = tuple[CellFile, Belief]


@dataclass
class Joined:
    """The files as one table of N cells and G genes.

    files: with the genes and cells that go in; feature_id, feature_name (G,); column: for each file the gene of each of
    its own genes, (G of the file,); obs: for each file its kept cells; organism; twin_of (N,) joinid of the copy that
    counts, None where no cell has a second copy; rows, warnings: what was believed across files.
    """

    files: list[File]
    organism: str
    feature_id: np.ndarray
    feature_name: np.ndarray
    column: list[np.ndarray]
    obs: list[pd.DataFrame]
    twin_of: np.ndarray | None = None
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> list[str]:
        """Lines for people, where there is anything to say across files."""
        lines = lines_of(self.rows, self.warnings)
        return [f"all {len(self.obs)} files" if len(self.obs) > 1 else "the file as a whole", *lines] if lines else []


def counts_of(file: File) -> Iterator[sp.csr_matrix]:
    """Blocks of the kept cells of a file over its genes, in whole numbers."""
    cells, belief = file
    for start, block in cells.chunks(belief.counts.place):
        kept = belief.kept[start : start + block.shape[0]]
        found = sp.csr_matrix(as_counts(block)[kept][:, belief.genes.column])
        found.sort_indices()
        yield found


def join(files: Sequence[File], rules: Rules) -> Joined:
    """One table out of files that were believed one by one.

    Raises:
        BadInput: several species, or files that share no gene.
    """
    organisms = Counter(belief.genes.organism for _, belief in files)
    if len(organisms) > 1:
        shown = ", ".join(
            f"{belief.file} {len(belief.genes.column):,} genes of {belief.genes.organism}" for _, belief in files
        )
        raise BadInput("C017", "files", shown, "hold several species; one Census holds one, so import them apart")
    rows: list[Row] = []
    warnings: list[str] = []
    shared = _shared(files)
    if len(files) > 1:
        _tell_genes(files, shared, rules, rows, warnings)
    if rules.genes == "intersection":
        files = _restrict(files, shared, warnings)
    # one file keeps its order of genes; genes of several files are sorted by id, so the order of files does not matter
    genes = pd.Index(files[0][1].genes.feature_id)
    for _, belief in files[1:]:
        genes = genes.union(belief.genes.feature_id)
    name_of = {
        gene: name
        for _, belief in reversed(files)
        for gene, name in zip(belief.genes.feature_id, belief.genes.feature_name, strict=True)
    }
    joined = Joined(
        list(files),
        next(iter(organisms)),
        genes.to_numpy(),
        np.array([name_of[gene] for gene in genes], dtype=object),
        [genes.get_indexer(belief.genes.feature_id) for _, belief in files],
        [belief.obs for _, belief in files],
        rows=rows,
        warnings=warnings,
    )
    pairs = _pairs(files, joined)
    _one_donor_each(joined, pairs)
    _mark_copies(joined, pairs, [belief.counts.stats.totals[belief.kept] for _, belief in files])
    return joined


def _shared(files: Sequence[File]) -> set[str]:
    sets = [set(belief.genes.feature_id.tolist()) for _, belief in files]
    return set.intersection(*sets)


def _tell_genes(files: Sequence[File], shared: set[str], rules: Rules, rows: list[Row], warnings: list[str]) -> None:
    sizes = {belief.file: len(belief.genes.column) for _, belief in files}
    everything = len(set().union(*(belief.genes.feature_id.tolist() for _, belief in files)))
    shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    if not shared:
        raise BadInput("C018", "files", shown, "share no gene; gene ids of one kind are needed in all of them")
    kept = len(shared) if rules.genes == "intersection" else everything
    rows.append(("genes", f"{kept:,} ({rules.genes}); {len(shared):,} are in every file ({shown})"))
    if len(shared) < _FEW_SHARED_GENES * min(sizes.values()):
        share = len(shared) / min(sizes.values())
        warnings.append(f"files share {share:.0%} of the smallest gene set: check that their ids are of one kind")


def _restrict(files: Sequence[File], shared: set[str], warnings: list[str]) -> list[File]:
    """The files over the genes that all have; totals are those of these genes from here on."""
    found: list[File] = []
    for cells, belief in files:
        keep = np.array([gene in shared for gene in belief.genes.feature_id], dtype=bool)
        if keep.all():
            found.append((cells, belief))
            continue
        genes = replace(
            belief.genes,
            column=belief.genes.column[keep],
            feature_id=belief.genes.feature_id[keep],
            feature_name=belief.genes.feature_name[keep],
        )
        before = belief.counts.stats.totals[belief.kept]
        stats = genes_of(cells, belief.counts.place, genes.column)
        share = float(np.median(stats.totals[belief.kept] / before))
        warnings.append(f"{belief.file}: libraries of the shared genes are {share:.1%} of its own (median)")
        kept = stats.totals > 0
        found.append((cells, replace(belief, genes=genes, counts=replace(belief.counts, stats=stats), kept=kept)))
    return found


Pairs = list[tuple[int, int, np.ndarray, np.ndarray]]
"""(file, other file, cells of the one, their twins in the other)."""


def _pairs(files: Sequence[File], joined: Joined) -> Pairs:
    found: Pairs = []
    masks = shared_masks([belief.genes.feature_id for _, belief in files])
    prints = []
    for at, file in enumerate(files):
        others = [other for other in range(len(files)) if other != at]
        wanted = [masks[at, other] for other in others] or [np.ones(len(file[1].genes.column), bool)]
        made = fingerprints(counts_of(file), file[1].genes.feature_id, wanted, BANDS if others else 1)
        prints.append(dict(zip(others or [at], made, strict=True)))
        again = repeats_within(made[0])
        if again:
            joined.warnings.append(f"{file[1].file}: {again:,} cells have the counts of another cell of the same file")
    for one in range(len(files)):
        for other in range(one + 1, len(files)):
            left, right, near = twins(prints[one][other], prints[other][one])
            _tell_barcodes(joined, one, other, [files[at][1].file for at in (one, other)], len(left))
            if not len(left):
                continue
            found.append((one, other, left, right))
            differ = f"; {near:,} of them differ in some genes" if near else ""
            names = f"{files[one][1].file} and {files[other][1].file}"
            genes = int(masks[one, other].sum())
            joined.rows.append(
                ("twins", f"{len(left):,} cells are in both {names} (counts of {genes:,} shared genes agree{differ})")
            )
    return found


def _tell_barcodes(joined: Joined, one: int, other: int, names: list[str], known: int) -> None:
    """Warn where files share many more barcodes than cells: the same cells may have been counted in another way."""
    codes = [{_barcode(name) for name in joined.obs[at]["observation_joinid"]} for at in (one, other)]
    common = len(codes[0] & codes[1])
    # of two 10x samples of 10,000 cells one or two in a hundred barcodes agree by chance
    if common - known > max(20, _MANY_BARCODES * min(map(len, codes))):
        joined.warnings.append(
            f"{names[0]} and {names[1]} share {common:,} barcodes and {known:,} cells by their counts: if they are the "
            "same cells counted in two ways, import one of the files"
        )


def _barcode(name: str) -> str:
    """The sequence in a cell's name, where it has one: what stands around it differs between files."""
    found = _SEQUENCE.search(name)
    return found[0] if found else name


def _one_donor_each(joined: Joined, pairs: Pairs) -> None:
    """One label for each person in all files."""
    labels = [frame["donor_id"].to_numpy(object).copy() for frame in joined.obs]
    spelling = one_spelling(label for each in labels for label in each)
    changed = respelled(spelling)
    if changed:
        joined.rows.append(("donors", f"spellings of one person were joined: {'; '.join(changed[:6])}"))
    labels = [np.array([spelling[label] for label in each], dtype=object) for each in labels]
    named = _take_over(labels, pairs)
    if named:
        joined.rows.append(("donors", f"{named:,} cells without a donor took the donor of their twin in another file"))
    linked = _linked(labels, pairs)
    for old, new in linked.items():
        joined.rows.append(("donors", f"{old!r} and {new!r} have cells in common: one person, {new!r}"))
    for (_, belief), each in zip(joined.files, labels, strict=True):
        joined.warnings += _many_in_one(belief.file, each, labels, linked)
    labels = [np.array([linked.get(label, label) for label in each], dtype=object) for each in labels]
    everywhere = Counter(label for each in labels for label in set(each.tolist()) if not is_nobody(label))
    both = sorted(label for label, count in everywhere.items() if count > 1)
    if both:
        shown = ", ".join(both[:6]) + (", ..." if len(both) > 6 else "")
        joined.rows.append(
            (
                "donors",
                f"{len(everywhere):,} in all; {len(both):,} are in several files and taken as one each ({shown})",
            )
        )
    elif len(labels) > 1:
        joined.rows.append(("donors", f"{len(everywhere):,} in all; none is in two files"))
    for frame, each in zip(joined.obs, labels, strict=True):
        frame["donor_id"] = each
    if everywhere and not serves_a_split({label for each in labels for label in each.tolist()}):
        joined.warnings.append(
            f"{len(everywhere)} {'donor' if len(everywhere) == 1 else 'donors'} in all: a split by donor needs "
            f"{LEAST_DONORS}; `run --cells ... --split cell` does without, its held-out cells are of the same people"
        )
    people = [len({label for label in each if not is_nobody(label)}) for each in labels]
    if len(labels) > 1 and not both and set(people) == {1}:
        joined.warnings.append(
            f"each of {len(labels):,} files is one donor: differences between donors and between files cannot be "
            "told apart"
        )


def _many_in_one(file: str, own: np.ndarray, labels: list[np.ndarray], linked: Mapping[str, str]) -> list[str]:
    """A warning where donors of one file became one person: some label of another file may be no person."""
    mine, said = set(own.tolist()), []
    for person, count in Counter(linked.get(label, label) for label in mine).items():
        if count < 2:
            continue
        foreign = {label for each in labels for label in each.tolist() if linked.get(label, label) == person} - mine
        shown = ", ".join(repr(label) for label in sorted(foreign)[:3])
        said.append(
            f"{count:,} donors of {file} became one, {person!r}, since they share cells with "
            f"{shown or 'one another'} of another file: if that is no person, name the column of donors there"
        )
    return said


def _take_over(labels: list[np.ndarray], pairs: Pairs) -> int:
    """Cells without a donor that have a twin with one take its label; how many did."""
    taken = 0
    for one, other, left, right in pairs:
        for here, there, own, others in ((one, other, left, right), (other, one, right, left)):
            nobody = np.array([is_nobody(label) for label in labels[here][own]], dtype=bool)
            known = np.array([not is_nobody(label) for label in labels[there][others]], dtype=bool)
            labels[here][own[nobody & known]] = labels[there][others[nobody & known]]
            taken += int((nobody & known).sum())
    return taken


def _linked(labels: list[np.ndarray], pairs: Pairs) -> dict[str, str]:
    """Label -> the label of the same person, where two labels have cells in common."""
    parent: dict[str, str] = {}

    def root(label: str) -> str:
        while label in parent:
            label = parent[label]
        return label

    for one, other, left, right in pairs:
        sizes = [Counter(labels[at].tolist()) for at in (one, other)]
        common = Counter(zip(labels[one][left].tolist(), labels[other][right].tolist(), strict=True))
        for (a, b), cells in sorted(common.items()):
            least = _LEAST_SHARED_CELLS * min(sizes[0][a], sizes[1][b])
            if is_nobody(a) or is_nobody(b) or cells < max(1.0, least):
                continue
            if (first := root(a)) != (second := root(b)):
                parent[second] = first
    return {label: root(label) for label in parent}


def _mark_copies(joined: Joined, pairs: Pairs, totals: list[np.ndarray]) -> None:
    """Of the copies of a cell one stays primary: the one with the most counts, of equal ones the first."""
    if not pairs:
        return
    starts = np.cumsum([0, *(len(frame) for frame in joined.obs)])
    cells = int(starts[-1])
    one = np.concatenate([starts[a] + left for a, _, left, _ in pairs])
    other = np.concatenate([starts[b] + right for _, b, _, right in pairs])
    graph = sp.coo_matrix((np.ones(len(one), bool), (one, other)), shape=(cells, cells))
    _, group = connected_components(graph, directed=False)
    primary = np.concatenate([frame["is_primary_data"].to_numpy(bool) for frame in joined.obs])
    order = np.lexsort((np.arange(cells), -np.concatenate(totals), ~primary))
    chosen = np.full(cells, -1)
    values, first = np.unique(group[order], return_index=True)
    chosen[values] = order[first]
    joined.twin_of = chosen[group]
    copies = joined.twin_of != np.arange(cells)
    joined.rows.append(
        (
            "copies",
            f"{int(copies.sum()):,} second copies are marked is_primary_data = False, which the usual value_filter "
            "leaves out; no split parts them from their twins",
        )
    )
    for at, frame in enumerate(joined.obs):
        frame["is_primary_data"] = (primary & ~copies)[starts[at] : starts[at + 1]]
