"""Where the loss of a model sits: in which donors, cell types and genes of the test split.

Sums are read from ``test_cells.parquet`` and ``test_genes.parquet`` of two runs, the best model and the smallest one
beside it, and joined with the sweep's own ``test_split.parquet`` and ``genes.parquet``. Losses are means per masked
gene of each group; shares are of the whole loss of the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scaling_ray.report.sweep import Sweep
from scaling_ray.results.columns import Row
from scaling_ray.results.sweep_files import GENES, TEST_CELLS, TEST_GENES, TEST_SPLIT, read_table

MOST_GROUPS, MOST_GENES = 20, 15
FEW_CELLS = 20
"""Test cells below which a group's mean loss is marked as of few cells."""
_GROUPS = {"donor_id": "donor", "cell_type": "cell type", "dataset_id": "data set"}
_Sums = tuple[NDArray[np.float64], NDArray[np.float64]]  # losses, masked genes


def where_the_loss_sits(sweep: Sweep, best: Row | None) -> dict[str, Any] | None:
    """Groups of test cells, and genes, with the loss of the best model in each; None where the files do not say.

    Returns:
        ``best`` and ``beside`` (names of sizes; beside is None where the best is the only one), ``tables``: entries of
        ``by`` and ``rows`` (``name``, ``cells``, ``few``, ``loss``, ``beside``, ``share``), and ``genes``: entries of
        ``gene``, ``loss``, ``beside``, ``share``, highest share first.
    """
    if best is None or not sweep.files.place.exists(TEST_SPLIT):
        return None
    other = _smallest_beside(sweep, best)
    cells = _read(sweep, best, TEST_CELLS, "cell")
    genes = _read(sweep, best, TEST_GENES, "gene")
    if cells is None or genes is None:
        return None
    cells_beside = _read(sweep, other, TEST_CELLS, "cell") if other else None
    genes_beside = _read(sweep, other, TEST_GENES, "gene") if other else None
    labels = read_table(sweep.files.place, TEST_SPLIT)
    place_of = {int(cell): i for i, cell in enumerate(labels["cell"].to_pylist())}
    order = np.array([place_of[int(cell)] for cell in cells[0]])
    tables = []
    for column, noun in _GROUPS.items():
        names = np.array([str(name) for name in labels[column].to_pylist()])[order]
        if len(set(names)) > 1:
            rows = _groups(names, cells[1], None if cells_beside is None else cells_beside[1])
            tables.append({"by": noun, "rows": rows[:MOST_GROUPS], "left_out": max(0, len(rows) - MOST_GROUPS)})
    return {
        "best": best.size,
        "beside": other.size if other else None,
        "tables": tables,
        "genes": _genes(sweep, genes[1], None if genes_beside is None else genes_beside[1]),
    }


def _smallest_beside(sweep: Sweep, best: Row) -> Row | None:
    """The smallest size at the best model's own genes and cells (best seed on validation), if any is smaller."""
    same = [
        row
        for row in sweep.law_rows
        if row.is_finished and (row.genes, row.cells) == (best.genes, best.cells) and row.params < best.params
    ]
    return min(same, key=lambda row: (row.params, row.val_loss or np.inf)) if same else None


def _read(sweep: Sweep, row: Row, name: str, key: str) -> tuple[NDArray[np.int64], _Sums] | None:
    """What a run's file of losses is keyed by, and its sums, in order of the key; None where there is no such file."""
    place = sweep.files.run(row.run_id).place
    if not place.exists(name):
        return None
    table: pa.Table = read_table(place, name)
    keys = table[key].to_numpy()
    order = np.argsort(keys)
    return keys[order], (table["loss"].to_numpy()[order], table["masked_genes"].to_numpy()[order].astype(float))


def _groups(names: NDArray[np.str_], best: _Sums, beside: _Sums | None) -> list[dict[str, Any]]:
    """Each group's mean loss, cells and share, highest share first."""
    total = float(best[0].sum())
    rows = []
    for name in np.unique(names):
        here = names == name
        count = int(here.sum())
        rows.append(
            {
                "name": str(name),
                "cells": count,
                "few": count < FEW_CELLS,
                "loss": _mean(best, here),
                "beside": None if beside is None else _mean(beside, here),
                "share": float(best[0][here].sum()) / total,
            }
        )
    return sorted(rows, key=lambda row: -row["share"])


def _mean(sums: _Sums, here: NDArray[np.bool_]) -> float | None:
    masked = float(sums[1][here].sum())
    return float(sums[0][here].sum()) / masked if masked else None


def _genes(sweep: Sweep, best: _Sums, beside: _Sums | None) -> list[dict[str, Any]]:
    """The genes that hold most of the loss."""
    names: Mapping[int, str] = {}
    if sweep.files.place.exists(GENES):
        table = read_table(sweep.files.place, GENES)
        names = dict(enumerate(table["feature_name"].to_pylist()))
    total = float(best[0].sum())
    found = []
    for gene in np.argsort(-best[0], kind="stable")[:MOST_GENES]:
        here = np.arange(best[0].size) == gene
        found.append(
            {
                "gene": names.get(int(gene), f"gene {gene + 1}"),
                "rank": int(gene) + 1,
                "loss": _mean(best, here),
                "beside": None if beside is None else _mean(beside, here),
                "share": float(best[0][gene]) / total,
            }
        )
    return found
