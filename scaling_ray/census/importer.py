"""Makes a local Census out of .h5ad files with raw counts: each file a data set, genes joined on feature_id.

Progress lines report the place of the counts in each file (see ``census.h5ad``) and the meaning given to its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scaling_ray.census.h5ad import count_chunks, fault_of, find_raw_counts
from scaling_ray.census.layout import OBS_STRING_COLUMNS, CensusWriter, Dataset, existing
from scaling_ray.errors import BadInput
from scaling_ray.storage import file_sha256

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "assay": ("assay", "technology", "platform", "library_preparation_protocol", "method"),
    "cell_type": ("cell_type", "celltype", "cell_types", "cell_type_original", "cell_label", "annotation"),
    "development_stage": ("development_stage", "age", "stage"),
    "disease": ("disease", "diagnosis", "condition", "disease_status", "disease_state"),
    "donor_id": ("donor_id", "donor", "patient", "patient_id", "individual", "subject", "subject_id"),
    "self_reported_ethnicity": ("self_reported_ethnicity", "ethnicity"),
    "sex": ("sex", "gender"),
    "suspension_type": ("suspension_type",),
    "tissue": ("tissue", "organ", "organ_part"),
    "tissue_type": ("tissue_type",),
    "tissue_general": ("tissue_general",),
}
_PRIMARY = ("is_primary_data", "is_primary")


@dataclass(frozen=True)
class _Source:
    """One checked file: the place of its counts and the meaning of its columns."""

    path: Path
    place: str
    cells: int
    feature_id: np.ndarray
    feature_name: np.ndarray
    obs: pd.DataFrame
    mapped: dict[str, str]
    missing: tuple[str, ...]


def import_h5ad(
    files: Sequence[Path],
    out: Path,
    *,
    layer: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes a local Census at ``out`` from one or more .h5ad files.

    Args:
        files: each becomes one data set, named after the file.
        out: directory to appear; ``Census.open(out)`` reads it. A complete import of the same files is left as is.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.
        progress: called with one line of text now and then; some lines say which column was used for which.

    Raises:
        BadInput: not an .h5ad, no raw counts (with the reason for each place), differing candidates, gene ids
            that repeat, or ``out`` holding something else.
    """
    out, files = Path(out), [Path(f) for f in files]
    say = progress or (lambda line: None)
    if not files:
        raise BadInput("files", [], "name at least one .h5ad file")
    names = [f.stem for f in files]
    if len(set(names)) < len(names):
        raise BadInput("files", names, "two files of one name; a file's name becomes its dataset_id")
    for file in files:
        if not file.is_file():
            raise BadInput("file", str(file), "does not exist")
    about = {"kind": "imported", "files": {f.name: file_sha256(f) for f in files}, "layer": layer}
    record = existing(out)
    if record is not None:
        if {name: record["about"].get(name) for name in about} == about:
            say(f"{out}: already there")
            return out
        raise BadInput("out", str(out), "holds another Census; remove it or name a new directory")

    sources = [_inspect(f, layer, say) for f in files]
    # one file keeps its order of genes; genes of several files are sorted by id, so the order of files does not matter
    genes = pd.Index(sources[0].feature_id)
    for source in sources[1:]:
        genes = genes.union(source.feature_id)
    name_of = {i: n for s in reversed(sources) for i, n in zip(s.feature_id, s.feature_name, strict=True)}
    presence = np.zeros((len(sources), len(genes)), bool)
    columns = [genes.get_indexer(s.feature_id) for s in sources]
    for row, column in enumerate(columns):
        presence[row, column] = True
    n_cells = sum(s.cells for s in sources)
    with CensusWriter(
        out,
        var=pd.DataFrame({"feature_id": genes, "feature_name": [name_of[g] for g in genes], "feature_length": 0}),
        datasets=[Dataset(n, n, "imported", "imported", s.path.name) for n, s in zip(names, sources, strict=True)],
        presence=presence,
        n_cells=n_cells,
        categories={c: sorted({str(v) for s in sources for v in s.obs[c].unique()}) for c in OBS_STRING_COLUMNS},
        build_tag="imported",
    ) as writer:
        done = 0
        for source, column in zip(sources, columns, strict=True):
            for start, counts in count_chunks(source.path, source.place):
                wrong = fault_of(counts)
                if wrong:
                    raise BadInput(
                        f"{source.path.name}:{source.place}", wrong, f"in cells from {start} on; raw counts are needed"
                    )
                stop = start + counts.shape[0]
                counts.eliminate_zeros()
                wide = sp.csr_matrix(
                    (counts.data, column[counts.indices], counts.indptr), shape=(counts.shape[0], len(genes))
                )
                wide.sort_indices()
                writer.append(source.obs.iloc[start:stop], wide)
                done += counts.shape[0]
                say(f"imported {done:,} of {n_cells:,} cells")
        return writer.publish(
            about=about
            | {
                "counts_from": {s.path.name: s.place for s in sources},
                "columns": {s.path.name: s.mapped for s in sources},
                "set_to_unknown": {s.path.name: list(s.missing) for s in sources},
            }
        )


def _inspect(path: Path, layer: str | None, say: Callable[[str], None]) -> _Source:
    found = find_raw_counts(path, layer)
    obs, mapped, missing = _map_obs(found.obs, path.stem)
    values, repeats = np.unique(found.feature_id, return_counts=True)
    if (repeats > 1).any():
        raise BadInput(
            f"{path.name}: feature_id", values[repeats > 1][0], "occurs more than once; make gene ids unique"
        )
    say(f"{path.name}: raw counts from {found.place}; gene ids from {found.ids_from}")
    say(f"{path.name}: {', '.join(f'{c} from {m}' for c, m in mapped.items()) or 'no obs column recognised'}")
    if missing:
        say(f"{path.name}: set to unknown: {', '.join(missing)}")
    if "donor_id" in missing:
        say(f"{path.name}: no donor_id: a split by donor will take the whole file as one donor")
    return _Source(path, found.place, len(obs), found.feature_id, found.feature_name, obs, mapped, missing)


def _map_obs(given: pd.DataFrame, dataset_id: str) -> tuple[pd.DataFrame, dict[str, str], tuple[str, ...]]:
    """(obs columns of the Census, the file's column for each recognised one, the names of unknown ones)."""
    folded: dict[str, str] = {}
    for column in given.columns:
        folded.setdefault(str(column).lower().replace(" ", "_").replace("-", "_").replace(".", "_"), str(column))
    obs = pd.DataFrame(index=range(len(given)))
    mapped: dict[str, str] = {}
    missing: list[str] = []
    for column in OBS_STRING_COLUMNS:
        if column == "dataset_id":
            obs[column] = dataset_id
            continue
        found = next((folded[s] for s in _SYNONYMS.get(column, (column,)) if s in folded), None)
        if found is None and column == "tissue_general":
            found = mapped.get("tissue")
        if found is None:
            obs[column] = "unknown"
            if not column.endswith("_ontology_term_id"):
                missing.append(column)
            continue
        values = given[found].astype(object).to_numpy()
        obs[column] = np.where(pd.isna(values) | (values == ""), "unknown", values.astype(str)).astype(object)
        mapped[column] = found
    primary = next((folded[s] for s in _PRIMARY if s in folded), None)
    obs["is_primary_data"] = True if primary is None else _as_bool(given[primary], primary)
    if primary is not None:
        mapped["is_primary_data"] = primary
    obs["observation_joinid"] = given.index.to_numpy().astype(str)
    return obs, mapped, tuple(missing)


def _as_bool(column: pd.Series, name: str) -> np.ndarray:
    text = column.astype(str).str.lower()
    known = {"true": True, "1": True, "false": False, "0": False}
    if not text.isin(known).all():
        raise BadInput(name, text[~text.isin(known)].iloc[0], "must be true or false for every cell")
    return text.map(known).to_numpy(bool)
