"""What stands beside every run, on its own training cells, genes and masks.

The gene mean and the shrunk Gaussian always; where the cells were planted, the exact floors on the same test cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from scaling_ray.model.baselines import choose_shrinkage, gaussian_errors, gene_mean_errors, training_moments
from scaling_ray.model.masking import EVALUATION_MASK_SEED, draw_masks, log_normalise
from scaling_ray.planted.oracle import oracle
from scaling_ray.planted.truth import parse_truth
from scaling_ray.records import ShardManifest
from scaling_ray.shards.order import RunOrder
from scaling_ray.shards.read import Cells, read_measured, read_rows, shards_order
from scaling_ray.spec import RunSpec, TrainSpec, content_hash
from scaling_ray.storage import Place, write_atomic, write_json

SHRINKAGE_CELLS = 512
"""Validation cells on which the Gaussian's shrinkage is chosen."""
CHUNK_CELLS = 16_384
"""Training cells that are in memory as float64 at a time."""

Ints = NDArray[np.int64]


def reference_name(run: RunSpec, train_cells: int) -> str:
    """Runs of one name share training cells, genes and masks, and so their references."""
    partial = run.cells is not None and run.cells < train_cells
    cells = f"d{run.cells}-s{run.seed}" if partial else "dall"
    donors = f"-n{run.donors}-s{run.seed}" if run.donors is not None else ""
    return f"v{run.genes}-{cells}{donors}-{_masks_and_values(run.train)}"


def _masks_and_values(train: TrainSpec) -> str:
    """A short name for what decides masks and values besides the cells and genes."""
    named: dict[str, Any] = {"recipe": train.recipe, "mask_fraction": train.mask_fraction}
    if train.umi_fraction < 1:
        named["umi_fraction"] = train.umi_fraction
    return content_hash(named)[:8]


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


def training_chunks(order: RunOrder, read: Callable[[Ints], Cells]) -> Iterator[Cells]:
    """A run's training cells, window by window. read: the cells at some rows of the training permutation."""
    for window in order.windows(0):
        stored = order.stored(window)
        for start in range(0, len(stored), CHUNK_CELLS):
            yield read(order.rows.at(stored[start : start + CHUNK_CELLS]))


def closed_form_references(
    run: RunSpec, order: RunOrder, read: Callable[[Ints], Cells], val: Cells, test: Cells
) -> dict[str, Any]:
    """Gene mean and shrunk Gaussian of a run's training cells: val and test MSE per masked gene.

    No Gaussian where the network sees thinned cells: this one would see them whole.
    """

    def chunks() -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        for cells in training_chunks(order, read):
            yield _values(cells, run.train), cells.measured[cells.dataset]

    moments = training_moments(chunks)
    facts: dict[str, Any] = {"training_cells": len(order.rows)}
    shrinkage = None
    if run.train.umi_fraction == 1:
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
        by_gene = np.where(masked, (values - moments.mean) ** 2, 0.0).sum(0), masked.sum(0)
        facts[f"{split}_gene_mean_per_gene_bits"] = per_gene_bits(*by_gene)
        if split == "test":
            errors = gaussian_errors(moments, shrinkage, values, masked, hidden) if shrinkage is not None else None
            facts["test_gaussian_mse"] = float(errors.sum()) / count if errors is not None else None
    return facts


def per_gene_bits(squared_error: NDArray[np.float64], masked_genes: NDArray[np.integer]) -> float:
    """Bits per masked gene under a Gaussian of each gene's own error variance: the mean of 0.5 log2(2 pi e variance).

    Args:
        squared_error: (V,) summed over the masked entries of each gene.
        masked_genes: (V,) how many those are; genes without any, or predicted without error, are left out.
    """
    told = (masked_genes > 0) & (squared_error > 0)
    variance = squared_error[told] / masked_genes[told]
    return float(np.average(0.5 * np.log2(2 * np.pi * np.e * variance), weights=masked_genes[told]))


def write_closed_form(
    directory: Path, run: RunSpec, order: RunOrder, read: Callable[[Ints], Cells], val: Cells, test: Cells
) -> None:
    """Compute and publish ``directory/<name>.json`` unless it is there."""
    path = directory / f"{reference_name(run, order.rows.n_train)}.json"
    if not path.is_file():
        write_json(path, closed_form_references(run, order, read, val, test))


def floor_path(directory: Path, genes: int, train: TrainSpec) -> Path:
    """Where the planted floors over ``genes`` genes stand, one row per test cell."""
    return directory / f"floor-v{genes}-{_masks_and_values(train)}.parquet"


def write_planted_floor(
    directory: Path, shards: Place, manifest: ShardManifest, genes: int, test: Cells, train: TrainSpec
) -> None:
    """Compute and publish, per test cell, the squared error and bits of the bound and of the attainable oracle."""
    path = floor_path(directory, genes, train)
    if path.is_file():
        return
    truth = parse_truth(shards.read("plant.json").decode(), f"{shards}/plant.json")
    panel = pq.read_table(shards.parquet_source("genes.parquet"), columns=["soma_joinid"])["soma_joinid"]
    panel = panel.to_numpy()[:genes]
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


def closed_form_task(
    directory: str, run: str, shards: Place, manifest: str, train: Cells | None, val: Cells, test: Cells
) -> None:
    """``write_closed_form`` of a run given as text, from the cells of its node or, where train is None, the shards."""
    spec, record = RunSpec.model_validate_json(run), ShardManifest.parse(manifest, "the shards' manifest")
    torch.set_num_threads(1)
    measured = read_measured(shards, record, spec.genes)

    def read(rows: Ints) -> Cells:
        if train is not None:
            return train.narrowed(spec.genes).rows(rows)
        return read_rows(shards, record, "train", spec.genes, rows, measured)

    order = shards_order(shards, record, spec)
    write_closed_form(Path(directory), spec, order, read, val.narrowed(spec.genes), test.narrowed(spec.genes))


def floor_task(directory: str, shards: Place, manifest: str, genes: int, test: Cells, train: str) -> None:
    """``write_planted_floor`` of records given as text."""
    torch.set_num_threads(1)
    record, spec = ShardManifest.parse(manifest, "the shards' manifest"), TrainSpec.model_validate_json(train)
    write_planted_floor(Path(directory), shards, record, genes, test.narrowed(genes), spec)
