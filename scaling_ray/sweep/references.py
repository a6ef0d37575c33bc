"""What stands beside every run, on its own training cells, genes and masks.

The gene mean and the shrunk Gaussian always; where the cells were planted, the exact floors on the same test cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from scaling_ray.census.oracle import load_truth, oracle
from scaling_ray.model.baselines import choose_shrinkage, gaussian_errors, gene_mean_errors, training_moments
from scaling_ray.model.masking import EVALUATION_MASK_SEED, draw_masks, log_normalise
from scaling_ray.records import ShardManifest
from scaling_ray.shards.order import replicate_rows
from scaling_ray.shards.read import Cells
from scaling_ray.spec import RunSpec, TrainSpec, content_hash
from scaling_ray.storage import write_atomic, write_json

SHRINKAGE_CELLS = 512
"""Validation cells on which the Gaussian's shrinkage is chosen."""


def reference_name(run: RunSpec, train_cells: int) -> str:
    """Runs of one name share training cells, genes and masks, and so their references."""
    partial = run.cells is not None and run.cells < train_cells
    cells = f"d{run.cells}-s{run.seed}" if partial else "dall"
    return f"v{run.genes}-{cells}-{_masks_and_values(run.train)}"


def _masks_and_values(train: TrainSpec) -> str:
    """A short name for what decides masks and normalisation besides the cells and genes."""
    return content_hash({"recipe": train.recipe, "mask_fraction": train.mask_fraction})[:8]


def _values(cells: Cells, train: TrainSpec) -> NDArray[np.float64]:
    counts = torch.from_numpy(cells.counts.astype(np.int32))
    return log_normalise(counts, torch.from_numpy(cells.raw_sum.copy()), train.recipe).numpy().astype(np.float64)


def evaluation_masks(cells: Cells, train: TrainSpec) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(masked, hidden), both (B, V): the fixed evaluation masks, and they or unmeasured."""
    measured = cells.measured[cells.dataset]
    ids = torch.from_numpy(cells.cell.copy())
    masks = draw_masks(
        train.recipe, train.mask_fraction, EVALUATION_MASK_SEED, torch.zeros_like(ids), ids, torch.from_numpy(measured)
    )
    hidden = masks.hidden.numpy()
    return hidden & measured, hidden


def closed_form_references(run: RunSpec, train: Cells, val: Cells, test: Cells) -> dict[str, Any]:
    """Gene mean and shrunk Gaussian of a run's training cells: val and test MSE per masked gene."""
    rows = train.rows(replicate_rows(len(train), run.cells, run.seed))
    moments = training_moments(_values(rows, run.train), rows.measured[rows.dataset])
    facts: dict[str, Any] = {"training_cells": len(rows)}
    some = val.rows(slice(0, SHRINKAGE_CELLS))
    masked, hidden = evaluation_masks(some, run.train)
    shrinkage, _ = choose_shrinkage(moments, _values(some, run.train), masked, hidden)
    facts["gaussian_shrinkage"] = shrinkage
    for split, cells in (("val", val), ("test", test)):
        values = _values(cells, run.train)
        masked, hidden = evaluation_masks(cells, run.train)
        count = float(masked.sum())
        facts[f"{split}_masked_genes"] = int(count)
        facts[f"{split}_gene_mean_mse"] = float(gene_mean_errors(moments.mean, values, masked).sum()) / count
        if split == "test":
            facts["test_gaussian_mse"] = (
                float(gaussian_errors(moments, shrinkage, values, masked, hidden).sum()) / count
            )
    return facts


def write_closed_form(directory: Path, run: RunSpec, train: Cells, val: Cells, test: Cells) -> None:
    """Compute and publish ``directory/<name>.json`` unless it is there."""
    path = directory / f"{reference_name(run, len(train))}.json"
    if not path.is_file():
        write_json(path, closed_form_references(run, train, val, test))


def floor_path(directory: Path, genes: int, train: TrainSpec) -> Path:
    """Where the planted floors over ``genes`` genes stand, one row per test cell."""
    return directory / f"floor-v{genes}-{_masks_and_values(train)}.parquet"


def write_planted_floor(
    directory: Path, shards: Path, manifest: ShardManifest, genes: int, test: Cells, train: TrainSpec
) -> None:
    """Compute and publish, per test cell, the squared error and bits of the bound and of the attainable oracle."""
    path = floor_path(directory, genes, train)
    if path.is_file():
        return
    truth = load_truth(shards / "plant.json")
    panel = pq.read_table(shards / "genes.parquet", columns=["soma_joinid"])["soma_joinid"].to_numpy()[:genes]
    effect = truth.effect_of_donor([manifest.codes["donor_id"][code] for code in test.donor])
    dataset = truth.dataset_index([manifest.codes["dataset_id"][code] for code in test.dataset])
    masked, _ = evaluation_masks(test, train)
    columns: dict[str, Any] = {"cell": test.cell, "masked_genes": masked.sum(1)}
    for name, known in (("bound", effect), ("attainable", None)):
        found = oracle(
            truth,
            counts=test.counts.astype(np.int64),
            panel=panel,
            raw_sum=test.raw_sum,
            masked=masked,
            measured=test.measured[test.dataset],
            dataset=dataset,
            effect=known,
            recipe=train.recipe,
        )
        columns[f"{name}_squared_error"] = found.squared_error_sum
        columns[f"{name}_entropy_bits"] = found.entropy_bits_sum
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def read_closed_form(directory: Path, name: str) -> dict[str, Any] | None:
    """The references published under ``name``, or None."""
    path = directory / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def read_floor(directory: Path, genes: int, train: TrainSpec) -> dict[str, NDArray[np.float64]] | None:
    """The floors' columns as arrays, or None where the cells were not planted."""
    path = floor_path(directory, genes, train)
    if not path.is_file():
        return None
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
