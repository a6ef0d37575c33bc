"""The loss on held-out cells under the fixed evaluation masks: summed cell by cell and gene by gene."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from scaling_ray.execution import Execution
from scaling_ray.model.objectives import objective_named
from scaling_ray.records import LossSums
from scaling_ray.results.sweep_files import TEST_CELLS, TEST_GENES, write_table
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells
from scaling_ray.storage import Place
from scaling_ray.train.batches import Batch, evaluation_batches
from scaling_ray.train.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Losses on N cells under the fixed evaluation masks, over all ranks, float64 on the CPU.

    losses (N,) of each cell, summed over its counts (N,) masked genes; gene_losses and gene_counts (V,) the same by
    gene.
    """

    losses: Tensor
    counts: Tensor
    gene_losses: Tensor
    gene_counts: Tensor

    @property
    def sums(self) -> LossSums:
        """Sums over all cells."""
        return LossSums(float(self.losses.sum()), float(self.counts.sum()))


def autocast(execution: Execution, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A run's precision as a context for its forward passes."""
    if execution.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def evaluate(
    engine: Engine,
    cells: Cells,
    run: RunSpec,
    made: list[Batch] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Loss on cells under the fixed evaluation masks. Every rank.

    Args:
        engine: with the weights.
        cells: N of them.
        run: its recipe, objective, micro-batch and precision.
        made: ``evaluation_batches`` of these cells, from a caller that evaluates them repeatedly.
        beat: called after every batch.
    """
    device, width, n_cells = engine.device, run.execution.micro_batch, len(cells)
    objective = objective_named(run.train.objective)
    of_cells = torch.zeros(2, n_cells, dtype=torch.float64, device=device)
    of_genes = torch.zeros(2, run.genes, dtype=torch.float64, device=device)
    starts = range(0, n_cells, width)
    engine.model.eval()
    with torch.no_grad(), autocast(run.execution, device):
        for first in range(0, len(starts), engine.ranks):
            # A forward pass under ZeRO 3 is collective: a rank with no cells left repeats the last ones and drops them.
            index = first + engine.rank
            number = min(index, len(starts) - 1)
            start = starts[number]
            if made is not None:
                batch = made[number]
            else:
                (batch,) = evaluation_batches(cells.rows(slice(start, start + width)), run.train, width, device)
            outputs = engine.model(batch.values, batch.masks.hidden, batch.masks.positions)
            if index < len(starts):
                losses = objective.losses(outputs, batch.targets, batch.masks.weights)
                of_cells[0, start : start + len(losses)] = losses.sum(1).double()
                of_cells[1, start : start + len(losses)] = batch.masks.weights.sum(1).double()
                add_by_gene(of_genes, losses, batch)
            beat()
    engine.model.train()
    summed = engine.sum_over_ranks(torch.cat([of_cells, of_genes], dim=1)).cpu()
    return Evaluation(*summed[:, :n_cells], *summed[:, n_cells:])


def add_by_gene(of_genes: Tensor, losses_BK: Tensor, batch: Batch) -> None:
    """Add to (2, V) the losses of a batch's masked genes, and their number, gene by gene."""
    where = batch.masks.positions.flatten()
    of_genes[0].index_add_(0, where, losses_BK.double().flatten())
    of_genes[1].index_add_(0, where, batch.masks.weights.double().flatten())


def write_test_losses(place: Place, cells: Cells, found: Evaluation) -> None:
    """Write the test split's losses by cell and by gene, for paired comparisons and for bits by gene."""
    by_cell = {"cell": cells.cell, "loss": found.losses, "masked_genes": found.counts}
    by_gene = {"gene": np.arange(len(found.gene_losses)), "loss": found.gene_losses, "masked_genes": found.gene_counts}
    for name, columns in ((TEST_CELLS, by_cell), (TEST_GENES, by_gene)):
        table = pa.table({key: np.asarray(values) for key, values in columns.items()})
        write_table(place, name, table.set_column(2, "masked_genes", table["masked_genes"].cast(pa.int32())))
