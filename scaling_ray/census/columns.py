"""The meaning of a file's obs columns: which of the Census's columns each one fills, and where donors are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling_ray.census.donors import UNKNOWN, as_labels, is_nobody
from scaling_ray.census.layout import OBS_STRING_COLUMNS
from scaling_ray.errors import BadInput

DONOR_IS_FILE = "@file"
"""As ``--donor``: every file holds the cells of one donor, named as the file."""

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "assay": ("assay", "technology", "platform", "library_preparation_protocol", "method"),
    "cell_type": ("cell_type", "celltype", "cell_types", "cell_type_original", "cell_label", "annotation"),
    "development_stage": ("development_stage", "age", "stage"),
    "disease": ("disease", "diagnosis", "condition", "disease_status", "disease_state"),
    "donor_id": (
        *("donor_id", "donor", "donorid", "patient", "patient_id", "patientid", "individual", "individual_id"),
        *("subject", "subject_id", "subjectid", "participant", "participant_id"),
    ),
    "self_reported_ethnicity": ("self_reported_ethnicity", "ethnicity"),
    "sex": ("sex", "gender"),
    "suspension_type": ("suspension_type",),
    "tissue": ("tissue", "organ", "organ_part"),
    "tissue_type": ("tissue_type",),
    "tissue_general": ("tissue_general",),
}
_PRIMARY = ("is_primary_data", "is_primary")
_LIKE_DONORS = (
    *("donor", "patient", "subject", "individual", "participant", "person", "case", "animal", "mouse"),
    *("sample", "specimen", "biopsy", "orig_ident", "library", "batch", "replicate"),
)
_LIKE_BATCHES = ("batch", "library", "sample", "orig_ident", "run", "lane", "pool", "chemistry", "assay", "plate")


@dataclass(frozen=True)
class ObsColumns:
    """What the columns of a file say of its N cells.

    obs: the Census's columns but joinids and sums; mapped: Census column -> the file's column; missing: set to unknown;
    proposals: columns that look like donors where none was taken; without_donor: what their cells' labels said and how
    many, as given.
    """

    obs: pd.DataFrame
    mapped: dict[str, str]
    missing: tuple[str, ...]
    proposals: tuple[str, ...]
    without_donor: dict[str, int]


def map_obs(file: str, given: pd.DataFrame, dataset_id: str, donor: Sequence[str] = ()) -> ObsColumns:
    """Read the obs columns of a file by their common names.

    Args:
        file: its name, for messages.
        given: one row per cell.
        dataset_id: of all its cells.
        donor: columns of donors, where their names say too little: the first that the file has; ``@file`` for one
            donor per file.

    Raises:
        BadInput: no such column (with those that look like donors), or a flag column that is neither true nor false.
    """
    folded: dict[str, str] = {}
    for column in given.columns:
        folded.setdefault(_folded(column), str(column))
    donors_in = _donor_column(file, given, folded, donor)
    obs = pd.DataFrame(index=range(len(given)))
    mapped: dict[str, str] = {}
    missing: list[str] = []
    without_donor: dict[str, int] = {}
    for column in OBS_STRING_COLUMNS:
        if column == "dataset_id":
            obs[column] = dataset_id
            continue
        if column == "donor_id":
            found = donors_in
        else:
            found = next((folded[s] for s in _SYNONYMS.get(column, (column,)) if s in folded), None)
        if found is None and column == "tissue_general":
            found = mapped.get("tissue")
        if found is None:
            obs[column] = UNKNOWN
            if not column.endswith("_ontology_term_id"):
                missing.append(column)
            continue
        mapped[column] = found
        if column != "donor_id":
            values = given[found].astype(object).to_numpy()
            obs[column] = np.where(pd.isna(values) | (values == ""), UNKNOWN, values.astype(str)).astype(object)
        elif found == DONOR_IS_FILE:
            obs[column] = dataset_id
        else:
            obs[column] = as_labels(given[found])
            nobody = np.array([is_nobody(label) for label in obs[column]], dtype=bool)
            said = given[found].astype(object).where(given[found].notna(), "missing").astype(str)
            counts = said[nobody].value_counts()
            without_donor = {str(label): int(count) for label, count in counts.items()}
    primary = next((folded[s] for s in _PRIMARY if s in folded), None)
    obs["is_primary_data"] = True if primary is None else _as_bool(given[primary], primary)
    if primary is not None:
        mapped["is_primary_data"] = primary
    obs["observation_joinid"] = given.index.to_numpy().astype(str)
    proposals = () if donors_in is not None else tuple(like_donors(given))
    return ObsColumns(obs, mapped, tuple(missing), proposals, without_donor)


def like_donors(given: pd.DataFrame) -> list[str]:
    """Columns that may name donors, the likeliest first: by name, with 2 values or more of several cells."""
    found = []
    for column in given.columns:
        name = _folded(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(column)))
        rank = next((at for at, word in enumerate(_LIKE_DONORS) if word in name), None)
        if rank is None:
            continue
        values = given[column].nunique()
        if 2 <= values <= max(2, len(given) // 3):
            found.append((rank, str(column)))
    return [column for _, column in sorted(found)]


def batches_of_donors(given: pd.DataFrame, donors: np.ndarray) -> str | None:
    """A column of batches in which every donor is one batch and every batch one donor; None where there is none.

    Args:
        given: obs of a file.
        donors: (N,) labels of the same cells.
    """
    people = pd.Series(donors)
    if people.nunique() < 2:
        return None
    for column in given.columns:
        name = _folded(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(column)))
        if not any(word in name for word in _LIKE_BATCHES):
            continue
        pairs = pd.DataFrame(
            {"donor": people.to_numpy(), "batch": given[column].astype(str).to_numpy()}
        ).drop_duplicates()
        if len(pairs) == pairs["donor"].nunique() == pairs["batch"].nunique():
            return str(column)
    return None


def has_column(given: pd.DataFrame, name: str) -> bool:
    """Whether a file has an obs column of this name, whatever its case and blanks."""
    return any(_folded(name) == _folded(column) for column in given.columns)


def _donor_column(file: str, given: pd.DataFrame, folded: dict[str, str], donor: Sequence[str]) -> str | None:
    for name in donor:
        if name == DONOR_IS_FILE or name in given.columns:
            return name
        if _folded(name) in folded:
            return folded[_folded(name)]
    usual = next((folded[s] for s in _SYNONYMS["donor_id"] if s in folded), None)
    if donor and usual is None:
        like = ", ".join(like_donors(given)) or ", ".join(map(str, given.columns[:12])) or "no column"
        raise BadInput(
            "C002",
            "--donor",
            ", ".join(donor),
            f"is no obs column of {file}; it has {like} (--donor @file: one donor per file)",
        )
    return usual


def _folded(column: object) -> str:
    return re.sub(r"[\s.\-]+", "_", str(column).strip().lower())


def _as_bool(column: pd.Series, name: str) -> np.ndarray:
    text = column.astype(str).str.lower()
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if not text.isin(known).all():
        raise BadInput("C003", name, text[~text.isin(known)].iloc[0], "must be true or false for every cell")
    return text.map(known).to_numpy(bool)
