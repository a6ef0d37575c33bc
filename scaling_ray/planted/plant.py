"""Plants a Census whose best possible loss is known: realistic cells drawn from a model that ``plant.json`` holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from scaling_ray.census.layout import OBS_STRING_COLUMNS, CensusWriter, Dataset, existing
from scaling_ray.errors import BadInput
from scaling_ray.pace import Pace
from scaling_ray.planted.draw import CellRange, draw_range
from scaling_ray.planted.law import LawSpec
from scaling_ray.planted.truth import TRUTH_NAME, PlantedTruth, PlantSpec, Spec

DEFAULT_CELLS = 8000
DEFAULT_GENES = 2000
DEFAULT_LAW_CELLS = 40_000

# Labels are real ontology terms, so that a reader of a planted Census meets the forms of the live one.
_CELL_CLASSES = (
    (("CD4-positive, alpha-beta T cell", "CL:0000624"), ("CD8-positive, alpha-beta T cell", "CL:0000625"),
     ("natural killer cell", "CL:0000623"), ("B cell", "CL:0000236")),
    (("classical monocyte", "CL:0000860"), ("macrophage", "CL:0000235"),
     ("dendritic cell", "CL:0000451"), ("neutrophil", "CL:0000775")),
    (("endothelial cell", "CL:0000115"), ("fibroblast", "CL:0000057"),
     ("pericyte", "CL:0000669"), ("smooth muscle cell", "CL:0000192")),
    (("epithelial cell", "CL:0000066"), ("club cell", "CL:0000158"),
     ("ciliated cell", "CL:0000064"), ("goblet cell", "CL:0000160")),
)  # fmt: skip
_DISEASES = (
    ("normal", "PATO:0000461"),
    ("normal", "PATO:0000461"),
    ("acute myeloid leukemia", "MONDO:0018874"),
    ("hypertensive disorder || type 2 diabetes mellitus", "MONDO:0005044 || MONDO:0005148"),
)
_TISSUES = (
    ("blood", "UBERON:0000178", "blood", "UBERON:0000178"),
    ("lung parenchyma", "UBERON:0008946", "lung", "UBERON:0002048"),
    ("bone marrow", "UBERON:0002371", "bone marrow", "UBERON:0002371"),
    ("cortex of kidney", "UBERON:0001225", "kidney", "UBERON:0002113"),
)
_ASSAYS = (
    ("10x 3' v3", "EFO:0009922"),
    ("10x 3' v2", "EFO:0009899"),
    ("Seq-Well", "EFO:0008919"),
    ("Smart-seq2", "EFO:0008931"),
)
_STAGES = (("adult stage", "HsapDv:0000258"), ("middle aged stage", "HsapDv:0000267"))
_SEXES = (("female", "PATO:0000383"), ("male", "PATO:0000384"))


def plant(
    out: Path,
    *,
    n_cells: int = DEFAULT_CELLS,
    n_genes: int = DEFAULT_GENES,
    seed: int = 0,
    spec: Spec | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes a planted Census at ``out``, with its truth beside it in ``plant.json``.

    Range r of its cells depends on the spec and r alone: a larger plant of the same genes and seed begins with
    the cells of the smaller one. A complete plant of the same parameters is left as it is.

    Args:
        out: directory to appear; ``Census.open(out)`` reads it.
        n_cells: obs rows, copies included.
        n_genes: var rows.
        seed: of the model and of the cells.
        spec: further parameters; ``n_genes`` and ``seed`` are then taken from it.
        progress: called with one line of text now and then.

    Raises:
        BadInput: sizes out of range, or ``out`` holds something else.
    """
    out = Path(out)
    for field, value, low, high in (("cells", n_cells, 1, 10**9), ("genes", n_genes, 4, 100_000)):
        if not low <= value <= high:
            raise BadInput("C073", field, value, f"choose {low} to {high}")
    if seed < 0:
        raise BadInput("C074", "seed", seed, "choose 0 or more")
    say = progress or (lambda line: None)
    truth = PlantedTruth(spec or PlantSpec(n_genes=n_genes, seed=seed), n_cells)
    about = {"kind": "planted", "n_cells": n_cells, "table_sha256": truth.table_sha256, "spec": repr(truth.spec)}
    record = existing(out)
    if record is not None:
        if record["about"] == about:
            say(f"{out}: already there")
            return out
        raise BadInput("C075", "out", str(out), "holds another Census; remove it or name a new directory")

    size = truth.spec.range_cells
    with CensusWriter(
        out,
        var=_genes(truth),
        datasets=_datasets(truth),
        presence=truth.measured,
        n_cells=n_cells,
        categories=_categories(truth),
        build_tag=f"planted-{truth.spec.seed}",
    ) as writer:
        pace = Pace("planted", n_cells, say)
        for index in range(-(-n_cells // size)):
            cells = draw_range(truth, index)
            here = min(size, n_cells - index * size)
            writer.append(_obs(truth, cells, index).iloc[:here], cells.counts[:here])
            pace.add(here)
        return writer.publish(about=about, documents={TRUTH_NAME: truth.to_json()})


def plant_law(
    out: Path,
    *,
    n_cells: int = DEFAULT_LAW_CELLS,
    n_genes: int = LawSpec.n_genes,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """``plant`` with the truth of ``LawSpec``, whose loss falls as a power of model size and of training cells.

    Raises:
        BadInput: as ``plant``; or ``n_genes`` leaves no genes beside those that are always on.
    """
    least = LawSpec.always_on + 2
    if n_genes < least:
        raise BadInput("C076", "genes", n_genes, f"choose {least} or more: {LawSpec.always_on} are always on")
    if seed < 0:
        raise BadInput("C077", "seed", seed, "choose 0 or more")
    return plant(out, n_cells=n_cells, n_genes=n_genes, seed=seed, spec=LawSpec(n_genes, seed), progress=progress)


def _genes(truth: PlantedTruth) -> pd.DataFrame:
    number = np.arange(truth.spec.n_genes)
    # some names are shared by two genes, as in the live Census, where only feature_id is unique
    name = np.where((number % 500 == 499) & (number > 0), number - 1, number)
    return pd.DataFrame(
        {
            "feature_id": [f"ENSG9{i:010d}" for i in number],
            "feature_name": [f"PLANT{i}" for i in name],
            "feature_length": 500 + (number * 7919) % 4500,
        }
    )


def _datasets(truth: PlantedTruth) -> list[Dataset]:
    return [
        Dataset(name, f"Planted data set {i}", f"Planted collection {i // 2}", f"planted-collection-{i // 2}")
        for i, name in enumerate(truth.dataset_ids)
    ]


def _state_labels(truth: PlantedTruth) -> list[tuple[str, str]]:
    """A cell type per state: branch of the first two levels; the levels below are variation within a type."""
    labels = []
    for path in truth.state_path:
        first = int(path[0])
        second = int(path[1]) if len(path) > 1 else 0
        label, term = _CELL_CLASSES[first % 4][second % 4]
        generation = max(first // 4, second // 4)
        labels.append((f"{label} {generation + 1}", "unknown") if generation else (label, term))
    return labels


def _categories(truth: PlantedTruth) -> dict[str, list[str]]:
    cell_types = _state_labels(truth)
    pairs: dict[str, list[tuple[str, str]]] = {
        "assay": list(_ASSAYS),
        "cell_type": cell_types,
        "development_stage": list(_STAGES),
        "disease": list(_DISEASES),
        "self_reported_ethnicity": [("unknown", "unknown")],
        "sex": list(_SEXES),
        "tissue": [(t[0], t[1]) for t in _TISSUES],
        "tissue_general": [(t[2], t[3]) for t in _TISSUES],
    }
    categories = {
        "dataset_id": list(truth.dataset_ids),
        "donor_id": truth.donor_ids,
        "suspension_type": ["cell"],
        "tissue_type": ["tissue"],
    }
    for name, values in pairs.items():
        categories[name] = list(dict.fromkeys(v[0] for v in values))
        categories[f"{name}_ontology_term_id"] = list(dict.fromkeys(v[1] for v in values))
    return {name: categories[name] for name in OBS_STRING_COLUMNS}


def _obs(truth: PlantedTruth, cells: CellRange, index: int) -> pd.DataFrame:
    """Obs columns of one range. Tissue and assay follow the data set, disease the effect, the rest the donor."""
    n = len(cells.state)
    obs: dict[str, object] = {
        "dataset_id": np.array(truth.dataset_ids, object)[cells.dataset],
        "donor_id": np.array(truth.donor_ids, object)[cells.donor],
        "suspension_type": "cell",
        "tissue_type": "tissue",
        "is_primary_data": cells.copy_of < 0,
        "observation_joinid": [f"p{truth.spec.seed}-{index}-{row}" for row in range(n)],
        "self_reported_ethnicity": "unknown",
        "self_reported_ethnicity_ontology_term_id": "unknown",
    }
    tissue = _tissue_code(cells)
    labels: dict[str, tuple[tuple[tuple[str, ...], ...], np.ndarray]] = {
        "assay": (_ASSAYS, _from_the_end(cells.dataset, len(truth.dataset_ids))),
        "cell_type": (tuple(_state_labels(truth)), cells.state),
        "development_stage": (_STAGES, cells.donor % 2),
        "disease": (_DISEASES, cells.effect % 4),
        "sex": (_SEXES, (cells.donor // 2) % 2),
        "tissue": (tuple((t[0], t[1]) for t in _TISSUES), tissue),
        "tissue_general": (tuple((t[2], t[3]) for t in _TISSUES), tissue),
    }
    for name, (terms, code) in labels.items():
        obs[name] = np.array([t[0] for t in terms], object)[code]
        obs[f"{name}_ontology_term_id"] = np.array([t[1] for t in terms], object)[code]
    return pd.DataFrame(obs)


def _from_the_end(dataset: np.ndarray, n_datasets: int) -> np.ndarray:
    """Index of each data set's assay: the last data set, whatever their number, reads whole transcripts."""
    return np.where(dataset == n_datasets - 1, 3, dataset % 3)


def _tissue_code(cells: CellRange) -> np.ndarray:
    """Two tissues per data set, by donor."""
    return (cells.dataset + cells.donor % 2) % len(_TISSUES)
