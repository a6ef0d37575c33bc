"""The baselines and planted floors of a sweep as files: their names, which runs share them, and reading them.

Computing them is in ``sweep.references``. All are in squared error of the normalised values: they stand beside runs
whose losses have that unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.results.sweep_files import read_sealed, read_table
from scaling_ray.rules import TrainingRules
from scaling_ray.runs import RunSpec
from scaling_ray.spec import content_hash
from scaling_ray.storage import Place

UNIT = "mse"
"""The unit of every reference."""


def reference_name(run: RunSpec, train_cells: int) -> str:
    """The name of a run's references. Runs of one name share training cells, genes and masks, and so references."""
    partial = run.cells is not None and run.cells < train_cells
    cells = f"d{run.cells}-s{run.seed}" if partial else "dall"
    donors = f"-n{run.donors}-s{run.seed}" if run.donors is not None else ""
    return f"v{run.genes}-{cells}{donors}-{_masks_and_values(run.train)}"


def floor_name(genes: int, train: TrainingRules) -> str:
    """The file of the planted floors over ``genes`` genes, one row per test cell."""
    return f"floor-v{genes}-{_masks_and_values(train)}.parquet"


def _masks_and_values(train: TrainingRules) -> str:
    """A short hash of the rules that masks and values follow, besides cells and genes."""
    named: dict[str, Any] = {"recipe": train.recipe, "mask_fraction": train.mask_fraction}
    if train.umi_fraction < 1:
        named["umi_fraction"] = train.umi_fraction
    return content_hash(named)[:8]


def read_closed_form(references: Place, name: str) -> dict[str, Any] | None:
    """The references published under ``name``, or None."""
    found: dict[str, Any] | None = read_sealed(references, f"{name}.json")
    return found


def read_floor(references: Place, genes: int, train: TrainingRules) -> dict[str, NDArray[np.float64]] | None:
    """The floors' columns as arrays, or None where there are none (yet)."""
    name = floor_name(genes, train)
    if not references.exists(name):
        return None
    table = read_table(references, name)
    return {column: table[column].to_numpy() for column in table.column_names}


def per_gene_bits(squared_error: NDArray[np.float64], masked_genes: NDArray[np.integer]) -> float:
    """Bits per masked gene under a Gaussian of each gene's own error variance: the mean of 0.5 log2(2 pi e variance).

    Args:
        squared_error: (V,) summed over the masked entries of each gene.
        masked_genes: (V,) number of those entries; genes without any, or predicted without error, are left out.
    """
    told = (masked_genes > 0) & (squared_error > 0)
    variance = squared_error[told] / masked_genes[told]
    return float(np.average(0.5 * np.log2(2 * np.pi * np.e * variance), weights=masked_genes[told]))
