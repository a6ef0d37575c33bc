"""What the columns of a count matrix are: genes of one species by their Ensembl ids, and what is no gene.

Ids keep no version. Names are mapped to ids by the other files of the same import and by a pinned table; a name in
neither keeps its count under the name, so that library sizes stay what they were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling_ray.census.gene_names import SPECIES, ids_by_name, names_by_id, table_source
from scaling_ray.errors import BadInput

LEAST_MATCHED = 0.5
"""Share of gene names that must be known; below it the names are refused."""

_ENSEMBL = re.compile(r"(?P<id>ENS(?P<code>[A-Z]{3,4})?G\d+)(?P<version>\.\d+)?(?P<copy>_PAR_Y)?")
_GENOME = re.compile(r"(?P<genome>GRCh3[78]|hg19|hg38|GRCm3[89]|mm10|mm39)_+(?P<rest>.+)")
_GENOME_SPECIES = {"GRCh": "homo_sapiens", "hg": "homo_sapiens", "GRCm": "mus_musculus", "mm": "mus_musculus"}
_CODES = {"": "homo_sapiens", "MUS": "mus_musculus"}
_ID_COLUMNS = (
    *("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl", "ensembl_gene_id", "ensemblid", "ensg"),
    *("accession", "featureid", "geneid", "id"),
)
_NAME_COLUMNS = ("feature_name", "gene_name", "gene_symbol", "gene_symbols", "symbol", "symbols", "gene", "name")
_TYPE_COLUMNS = ("feature_types", "feature_type", "feature_biotype", "modality")
_GENE_TYPES = frozenset({"gene expression", "gene", "genes", "rna", "gex", "expression", "mrna"})
_KINDS: dict[str, tuple[str, ...]] = {
    "antibodies": (
        *("antibody capture", "antibody", "antibodies", "adt", "protein", "cite", "hto", "multiplexing capture"),
    ),
    "peaks": ("peaks", "peak", "atac", "chromatin accessibility"),
    "guides": ("crispr guide capture", "guide", "guides", "grna", "sgrna", "crispr"),
    "spike-ins": ("spike-in", "spike_in", "spikein", "ercc"),
    "other features": (
        *("custom", "antigen capture", "vdj", "vdj-t", "vdj-b", "blank", "control", "negative control probe"),
    ),
}  # fmt: skip
_PATTERNS: dict[str, re.Pattern[str]] = {
    "peaks": re.compile(r"chr[\w.]+[:_-]\d+[-_]\d+|(\d{1,2}|[XYM]|MT)[:_-]\d{3,}[-_]\d{3,}", re.IGNORECASE),
    "antibodies": re.compile(r"(adt|hto)[_-].+|.+[_-](adt|hto|total(seq)?[abcd]?)", re.IGNORECASE),
    # five digits: ERCC1 to ERCC8 are genes
    "spike-ins": re.compile(r"ERCC[-_]\d{5}", re.IGNORECASE),
    "rows of HTSeq's summary": re.compile(r"__(no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique)"),
}


@dataclass(frozen=True)
class Genes:
    """The genes among the F features of a matrix.

    column (G,): feature of each gene; feature_id (G,) without versions, all distinct; feature_name (G,); organism: as
    a Census names it; ids_from, names_from: their sources in the file; matched: what the ids rest on, in words; ids:
    every source of ids by its name, (F,) each; left_out: kind of what is no gene -> features; notes: what was changed
    or kept unusually, in sentences.
    """

    column: np.ndarray
    feature_id: np.ndarray
    feature_name: np.ndarray
    organism: str
    ids_from: str
    names_from: str
    matched: str
    left_out: dict[str, int]
    notes: tuple[str, ...]


def without_version(feature_id: str) -> str:
    """An Ensembl id without its version; any other text as it is."""
    found = _ENSEMBL.fullmatch(feature_id)
    return found["id"] + (found["copy"] or "") if found else feature_id


def texts(column: pd.Series | pd.Index) -> np.ndarray:
    """(F,) stripped texts, "" for what is missing or says "nan"."""
    values = [
        "" if value is None or value is pd.NA or value != value else _decoded(value).strip()
        for value in column.astype(object)
    ]
    return np.array(["" if v.lower() in ("nan", "none", "na", "<na>") else v for v in values], dtype=object)


def _decoded(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def id_sources(var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of ``var`` that may name genes, by their name there, (F,) texts each; the index comes first."""
    folded = {_folded(c): c for c in reversed(var.columns)}
    found = {"the var index": texts(var.index)}
    found |= {f"var column {folded[name]}": texts(var[folded[name]]) for name in _ID_COLUMNS if name in folded}
    return found


def name_source(var: pd.DataFrame) -> tuple[str, np.ndarray] | None:
    """The column of gene names and its (F,) texts, where there is one."""
    folded = {_folded(c): c for c in reversed(var.columns)}
    name = next((folded[name] for name in _NAME_COLUMNS if name in folded), None)
    return None if name is None else (f"var column {name}", texts(var[name]))


def _folded(column: object) -> str:
    return re.sub(r"[\s.\-]+", "_", str(column).strip().lower())


def kinds_of(var: pd.DataFrame) -> np.ndarray:
    """(F,) what each feature is: "" for a gene, else one of "antibodies", "peaks", "guides", "spike-ins", ...

    A column of feature types decides where there is one; what no column says is told from the form of the ids.
    """
    kind = np.full(len(var), "", dtype=object)
    folded = {_folded(c): c for c in reversed(var.columns)}
    column = next((folded[name] for name in _TYPE_COLUMNS if name in folded), None)
    if column is not None:
        types = np.array([text.lower() for text in texts(var[column])], dtype=object)
        known = {word: name for name, words in _KINDS.items() for word in words}
        # where a file says which features are gene expression, whatever else it names is none
        says_genes = any(value in _GENE_TYPES for value in types)
        for value in set(types.tolist()):
            if value in known:
                kind[types == value] = known[value]
            elif says_genes and value and value not in _GENE_TYPES:
                kind[types == value] = "other features"
    sources = [*id_sources(var).values()]
    for name, pattern in _PATTERNS.items():
        for values in sources:
            hit = np.array([pattern.fullmatch(value) is not None for value in values], dtype=bool)
            kind[hit & (kind == "")] = name
    return kind


def known_names(var: pd.DataFrame) -> dict[str, str]:
    """Gene name -> Ensembl id without version, as a file that has both says; names of several ids are left out."""
    found = name_source(var)
    sources = id_sources(var)
    ids_from = _best_source(sources, np.ones(len(var), bool))
    names = found[1] if found is not None else sources["the var index"]
    mapped: dict[str, str] = {}
    several: set[str] = set()
    for name, given in zip(names, sources[ids_from], strict=True):
        feature_id = _ensembl_in(given)
        if feature_id is None or not name or name == given:
            continue
        if mapped.setdefault(name, feature_id[0]) != feature_id[0]:
            several.add(name)
    return {name: feature_id for name, feature_id in mapped.items() if name not in several}


def share_of_genes(names: Sequence[str]) -> float:
    """Share of names that are Ensembl ids, or names of genes in a table that is shipped; 0 of no names."""
    tables = [ids_by_name(species) for species in SPECIES]
    known = [_ensembl_in(name) is not None or any(name in table for table in tables) for name in names]
    return sum(known) / max(len(known), 1)


def resolve_genes(
    file: str,
    var: pd.DataFrame,
    *,
    known: Mapping[str, str] | None = None,
    organism: str | None = None,
    as_given: bool = False,
) -> Genes:
    """Which features are genes, and the id of each.

    Args:
        file: its name, for messages.
        var: one row per feature.
        known: gene names and ids of the other files of the same import.
        organism: the species asked for; genes of others are then left out. None: told from the ids.
        as_given: take ids as they stand: no version is dropped and no name is mapped.

    Raises:
        BadInput: no genes, several species, ids that repeat, or names of which too few are known.
    """
    kind = kinds_of(var)
    column = np.flatnonzero(kind == "")
    left_out = dict(Counter(kind[kind != ""].tolist()))
    if not len(column):
        what = ", ".join(f"{count:,} {name}" for name, count in left_out.items()) or "nothing"
        raise BadInput("C004", f"{file}: genes", what, "holds no genes; give the file of gene expression")
    sources = id_sources(var)
    ids_from = _best_source(sources, kind == "")
    given = sources[ids_from][column]
    found_names = name_source(var)
    names = (found_names[1] if found_names is not None else sources["the var index"])[column]
    names_from = found_names[0] if found_names is not None else "the var index"
    notes: list[str] = []
    if as_given:
        if organism is None:
            raise BadInput("C005", "--organism", None, "goes with --gene-ids given; name homo_sapiens or mus_musculus")
        ids, kept, matched = given, np.ones(len(given), bool), "ids as they stand (--gene-ids given)"
    else:
        ids, species, matched = _identified(file, given, names, known or {}, organism, notes)
        organism, kept = _one_species(file, species, organism)
        if not kept.all():
            left_out["genes of other species"] = int((~kept).sum())
    ids, column, names = ids[kept], column[kept], names[kept]
    _refuse_repeats(file, ids, given[kept])
    symbol = names_by_id(organism) if organism in SPECIES else {}
    unnamed = [not name or without_version(name) == gene for name, gene in zip(names, ids, strict=True)]
    names = np.array(
        [
            (symbol[gene] if gene in symbol else gene) if bare else name
            for name, gene, bare in zip(names, ids, unnamed, strict=True)
        ],
        dtype=object,
    )
    if all(unnamed):
        names_from = table_source(organism) if organism in SPECIES else ids_from
    return Genes(column, ids, names, organism, ids_from, names_from, matched, left_out, tuple(notes))


def _ensembl_in(text: str) -> tuple[str, str, bool] | None:
    """(id without version, species, whether more stands beside it) of a text that names one Ensembl gene."""
    whole = _ENSEMBL.fullmatch(text)
    if whole is None:
        hits = {hit["id"] + (hit["copy"] or ""): hit for hit in _ENSEMBL.finditer(text)}
        if len(hits) != 1:
            return None
        whole = next(iter(hits.values()))
    return whole["id"] + (whole["copy"] or ""), _organism(whole["code"] or ""), whole[0] != text


def _organism(code: str) -> str:
    return _CODES[code] if code in _CODES else f"ENS{code}G..."


def _best_source(sources: Mapping[str, np.ndarray], genes: np.ndarray) -> str:
    """The source with the most Ensembl ids; of equal ones the first."""
    return max(sources, key=lambda name: sum(_ENSEMBL.search(value) is not None for value in sources[name][genes]))


def _identified(
    file: str,
    given: np.ndarray,
    names: np.ndarray,
    known: Mapping[str, str],
    organism: str | None,
    notes: list[str],
) -> tuple[np.ndarray, list[str], str]:
    """(ids, species of each or "" where its id does not say, what they rest on)."""
    ids = np.array([value or name for value, name in zip(given, names, strict=True)], dtype=object)
    species = [""] * len(ids)
    versions = beside = 0
    for at, value in enumerate(given):
        hit = _ensembl_in(value)
        if hit is not None:
            ids[at], species[at] = hit[:2]
            beside += hit[2]
            versions += not hit[2] and hit[0] != value
    told = sum(name != "" for name in species)
    if versions:
        notes.append(f"{versions:,} Ensembl ids had a version, which was dropped")
    if beside:
        notes.append(f"{beside:,} Ensembl ids were cut out of longer texts")
    rest = np.array([name == "" for name in species])
    if not rest.any():
        return ids, species, f"Ensembl ids ({told:,})"
    plain = np.array([_without_genome(value)[0] for value in ids[rest]], dtype=object)
    genomes = Counter(species_ for _, species_ in map(_without_genome, ids[rest]) if species_)
    if len(genomes) > 1 and organism is None:
        raise _two_species(file, genomes)
    # the species that the ids name, the flag, the prefixes; else the table that knows more of the names
    species_of_names = organism or next(iter(Counter(filter(None, species))), None) or next(iter(genomes), None)
    hits = {name: sum(value in ids_by_name(name) for value in plain) for name in SPECIES}
    if species_of_names is None and hits:
        best = max(hits, key=lambda name: hits[name])
        species_of_names = best if hits[best] else None
        both = sorted(hits.values())
        if organism is None and both[0] > 0.5 * both[1] > 0:
            raise _two_species(file, hits, "gene names known of each")
    table = ids_by_name(species_of_names) if species_of_names in SPECIES else {}
    taken = set(ids[~rest].tolist())
    mapped = by_files = by_table = 0
    for place, name in zip(np.flatnonzero(rest), plain, strict=True):
        at = int(place)
        found = known[name] if name in known else table[name] if name in table else None
        if found is None or found in taken:
            ids[at] = name
            continue
        taken.add(found)
        ids[at], mapped = found, mapped + 1
        by_files, by_table = (by_files + 1, by_table) if name in known else (by_files, by_table + 1)
        hit = _ensembl_in(found)
        species[at] = hit[1] if hit else ""
    left = int(rest.sum()) - mapped
    if told < LEAST_MATCHED * len(ids) and told + mapped < LEAST_MATCHED * len(ids):
        shown = ", ".join(f"{name} {count:,}" for name, count in hits.items())
        raise BadInput(
            "C006",
            f"{file}: gene names",
            f"{told + mapped:,} of {len(ids):,} known",
            f"give Ensembl ids in a column of var; known names: {shown} ({table_source('homo_sapiens')}, "
            f"{table_source('mus_musculus')}); or take the names as ids with --gene-ids given --organism NAME",
        )
    if genomes:
        notes.append(f"{sum(genomes.values()):,} names began with a genome, which was dropped")
    if left:
        shown = ", ".join(repr(name) for name in ids[rest] if _ensembl_in(name) is None and name)[:60]
        notes.append(f"{left:,} genes have no known id and keep their names as ids ({shown}...)")
    parts = [f"Ensembl ids ({told:,})"] if told else []
    if by_files:
        parts.append(f"names by the ids of the other files ({by_files:,})")
    if by_table and species_of_names is not None:
        parts.append(f"names by {table_source(species_of_names)} ({by_table:,})")
    share = f"; {(told + mapped) / len(ids):.1%} of {len(ids):,} genes" if mapped else ""
    if told < LEAST_MATCHED * len(ids) and species_of_names is not None:
        species = [name or species_of_names for name in species]
    return ids, species, ", ".join(parts) + share


def _without_genome(name: str) -> tuple[str, str]:
    """(name without the genome before it, the genome's species or "")."""
    found = _GENOME.fullmatch(name)
    if found is None:
        return name, ""
    species = next(value for prefix, value in _GENOME_SPECIES.items() if found["genome"].startswith(prefix))
    return found["rest"], species


def _one_species(file: str, species: Iterable[str], organism: str | None) -> tuple[str, np.ndarray]:
    """(the organism, which genes are its own). Genes whose ids name no species go with the others."""
    species = list(species)
    counts = Counter(filter(None, species))
    if organism is None:
        if len(counts) > 1:
            raise _two_species(file, counts)
        organism = next(iter(counts), "")
    elif not counts[organism]:
        shown = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
        raise BadInput("C007", "--organism", organism, f"has no gene in {file}; it holds {shown or 'no Ensembl id'}")
    if organism not in SPECIES:
        raise BadInput(
            "C008",
            f"{file}: species",
            f"{counts[organism]:,} ids {organism}",
            f"is not supported; a Census here holds {' or '.join(SPECIES)}",
        )
    return organism, np.array([name in ("", organism) for name in species], dtype=bool)


def _two_species(file: str, counts: Mapping[str, int], what: str = "genes of several species") -> BadInput:
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    remedy = "one Census holds one species; give one, or keep one species' genes with --organism NAME"
    return BadInput("C009", f"{file}: {what}", shown, remedy)


def _refuse_repeats(file: str, ids: np.ndarray, given: np.ndarray) -> None:
    values, first, repeats = np.unique(ids.astype(str), return_index=True, return_counts=True)
    if not (repeats > 1).any():
        return
    again = values[repeats > 1][0]
    shown = ", ".join(dict.fromkeys(str(text) for text in given[ids == again]))
    raise BadInput(
        "C010",
        f"{file}: feature_id",
        again,
        f"occurs more than once ({int((repeats - 1).sum()):,} such; the file says {shown}); make gene ids unique",
    )
