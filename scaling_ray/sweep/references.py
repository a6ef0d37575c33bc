"""References to compare every run with, computed on its own training cells, genes and masks.

They are the gene mean and the shrunk Gaussian and, where the cells were planted, the exact floors on the same test
cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from scaling_ray.model.baselines import choose_shrinkage, gaussian_errors, gene_mean_errors, training_moments
from scaling_ray.model.masking import EVALUATION_MASK_SEED, draw_masks, log_normalise
from scaling_ray.planted.oracle import oracle
from scaling_ray.planted.truth import parse_truth
from scaling_ray.records import ShardManifest
from scaling_ray.results.references import UNIT, floor_name, per_gene_bits, reference_name
from scaling_ray.results.sweep_files import read_table, write_sealed, write_table
from scaling_ray.rules import TrainingRules
from scaling_ray.runs import RunSpec
from scaling_ray.shards.order import RunOrder
from scaling_ray.shards.read import Cells, read_measured, read_rows, shards_order
from scaling_ray.storage import Place

SHRINKAGE_CELLS = 512
"""Number of validation cells on which the Gaussian's shrinkage is chosen."""
CHUNK_CELLS = 16_384
"""Number of training cells that are in memory as float64 at a time."""

Ints = NDArray[np.int64]


def _values(cells: Cells, train: TrainingRules) -> NDArray[np.float64]:
    counts = torch.from_numpy(cells.counts.astype(np.int32))
    return log_normalise(counts, torch.from_numpy(cells.raw_sum.copy()), train.recipe).numpy().astype(np.float64)


def evaluation_masks(cells: Cells, train: TrainingRules) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(masked, hidden), both (B, V): measured genes under the fixed evaluation masks; these and unmeasured ones."""
    measured = cells.measured[cells.dataset]
    ids = torch.from_numpy(cells.cell.copy())
    masks = draw_masks(
        train.recipe, train.mask_fraction, EVALUATION_MASK_SEED, torch.zeros_like(ids), ids, torch.from_numpy(measured)
    )
    hidden = masks.hidden.numpy()
    return hidden & measured, hidden


def training_chunks(order: RunOrder, read: Callable[[Ints], Cells]) -> Iterator[Cells]:
    """A run's training cells, window by window; ``read`` gives the cells at rows of the training permutation."""
    for window in order.windows(0):
        stored = order.stored(window)
        for start in range(0, len(stored), CHUNK_CELLS):
            yield read(order.rows.at(stored[start : start + CHUNK_CELLS]))


def closed_form_references(
    run: RunSpec, order: RunOrder, read: Callable[[Ints], Cells], val: Cells, test: Cells
) -> dict[str, Any]:
    """Gene mean and shrunk Gaussian of a run's training cells: val and test MSE per masked gene.

    There is no Gaussian where the network sees thinned cells, since the Gaussian would see them whole.
    """

    def chunks() -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        for cells in training_chunks(order, read):
            yield _values(cells, run.train), cells.measured[cells.dataset]

    moments = training_moments(chunks)
    facts: dict[str, Any] = {"loss_unit": UNIT, "training_cells": len(order.rows)}
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
        facts[f"{split}_gene_mean_loss"] = float(gene_mean_errors(moments.mean, values, masked).sum()) / count
        by_gene = np.where(masked, (values - moments.mean) ** 2, 0.0).sum(0), masked.sum(0)
        facts[f"{split}_gene_mean_per_gene_bits"] = per_gene_bits(*by_gene)
        if split == "test":
            errors = gaussian_errors(moments, shrinkage, values, masked, hidden) if shrinkage is not None else None
            facts["test_gaussian_loss"] = float(errors.sum()) / count if errors is not None else None
    return facts


def write_closed_form(
    references: Place, run: RunSpec, order: RunOrder, read: Callable[[Ints], Cells], val: Cells, test: Cells
) -> None:
    """Compute and publish ``<name>.json`` unless it is there."""
    name = f"{reference_name(run, order.rows.n_train)}.json"
    if not references.exists(name):
        write_sealed(references, name, closed_form_references(run, order, read, val, test))


def write_planted_floor(
    references: Place, shards: Place, manifest: ShardManifest, genes: int, test: Cells, train: TrainingRules
) -> None:
    """Compute and publish, per test cell, the squared error and bits of the bound and of the attainable oracle."""
    name = floor_name(genes, train)
    if references.exists(name):
        return
    truth = parse_truth(shards.read("plant.json").decode(), f"{shards}/plant.json")
    panel = read_table(shards, "genes.parquet", ["soma_joinid"])["soma_joinid"].to_numpy()[:genes]
    effect = truth.effect_of_donor([manifest.codes["donor_id"][code] for code in test.donor])
    dataset = truth.dataset_index([manifest.codes["dataset_id"][code] for code in test.dataset])
    masked, _ = evaluation_masks(test, train)
    columns: dict[str, Any] = {"cell": test.cell, "masked_genes": masked.sum(1)}
    found = None
    for kind, known in (("bound", effect), ("attainable", None)):
        if found is None or truth.spec.n_effects > 1:  # where nobody carries an effect, to be told it adds nothing
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
        columns[f"{kind}_loss"] = found.squared_error_sum
        columns[f"{kind}_entropy_bits"] = found.entropy_bits_sum
    write_table(references, name, pa.table(columns))


def closed_form_task(
    references: Place, run: str, shards: Place, manifest: str, train: Cells | None, val: Cells, test: Cells
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
    write_closed_form(references, spec, order, read, val.narrowed(spec.genes), test.narrowed(spec.genes))


def floor_task(references: Place, shards: Place, manifest: str, genes: int, test: Cells, train: str) -> None:
    """``write_planted_floor`` of records given as text."""
    torch.set_num_threads(1)
    record, spec = ShardManifest.parse(manifest, "the shards' manifest"), TrainingRules.model_validate_json(train)
    write_planted_floor(references, shards, record, genes, test.narrowed(genes), spec)
