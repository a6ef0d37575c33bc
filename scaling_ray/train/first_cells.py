"""What a run's first training cells say before it trains: the best constants, and weights to start from.

A run whose smoothed validation loss is more than a fifth above that of these constants after half its budget, or where
it is stopped early, has diverged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling_ray.model.linear_start import has_room, linear_weights
from scaling_ray.model.masking import log_normalise
from scaling_ray.model.objectives import Objective, objective_named
from scaling_ray.model.start import START_CELLS, starting_weights
from scaling_ray.records import LossSums
from scaling_ray.rules import LINEAR_START_CELLS
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Feed
from scaling_ray.train.batches import Batch, DeviceCells

WORSE = 1.2
"""Loss over that of the best constants from which on a run has diverged; one that stays at them reaches 1.06 at a high
rate."""
FEWEST_UPDATES = 100
"""Updates before which no run is judged: a start is soon left, whatever the rate."""


@dataclass(frozen=True)
class FirstCells:
    """values (N, V) of the cells at full depth, which of them were measured, and the objective's constants (V, O)."""

    values: Tensor
    measured: Tensor
    constants: Tensor

    def starting_weights(self, drawn: Mapping[str, Tensor], run: RunSpec) -> dict[str, Tensor]:
        """The weights that a run starts from."""
        if _is_linear(run):
            found = linear_weights(
                drawn,
                self.values,
                self.measured,
                self.constants,
                heads=run.shape.heads,
                mask_fraction=run.train.mask_fraction,
                seed=run.seed,
                turns=run.train.linear_start_turns(run.genes, len(self.values)),
            )
            if found is not None:
                return found
        first = slice(0, START_CELLS)
        return starting_weights(drawn, self.values[first], self.measured[first], self.constants, run.seed)


def _is_linear(run: RunSpec) -> bool:
    """Whether a run asks for the regression and has room for it; its outputs are values, and seen at full depth."""
    rules = run.train
    are_values = rules.objective == "mse" and rules.umi_fraction == 1.0
    return rules.start == "linear" and are_values and has_room(run.shape.width, run.shape.heads)


def first_cells(feed: Feed, run: RunSpec) -> FirstCells:
    """Look at the first cells of a run's order on the CPU: :data:`START_CELLS` of them, more for a regression."""
    most = LINEAR_START_CELLS if _is_linear(run) else START_CELLS
    cells, _ = feed.batch(0, min(most, len(feed.order.rows)))
    held = DeviceCells.of(cells, torch.device("cpu"))
    counts = held.counts.to(torch.int32) & 0xFFFF
    values, measured = log_normalise(counts, held.raw_sum, run.train.recipe), held.measured[held.dataset]
    constants = objective_named(run.train.objective).constants(values, counts, held.raw_sum, measured)
    return FirstCells(values, measured, constants.float())


def constant_loss(batches: Sequence[Batch], constants_VO: Tensor, objective: Objective) -> float:
    """Mean loss of the constants on evaluation batches."""
    total = LossSums(0.0, 0.0)
    for batch in batches:
        outputs = constants_VO.to(batch.values.device)[batch.masks.positions]
        loss = objective.losses(outputs, batch.targets, batch.masks.weights).double().sum()
        total = LossSums(total.loss + float(loss), total.masked_genes + float(batch.masks.weights.double().sum()))
    return total.mean


def is_judged(run: RunSpec, step: int, over: bool) -> bool:
    """Whether a run at update ``step`` is to be better than the best constants: at half its budget, or where it ends.

    ``published`` is not judged: the study's own smallest size ends above them.
    """
    if run.train.recipe == "published":
        return False
    return over or (step >= FEWEST_UPDATES and 2 * step >= run.train.total_steps)


def worse_than_constants(loss: float, constants: float, step: int) -> str | None:
    """What to say of a run whose validation loss stands above that of the best constants; None where it does not."""
    if loss <= WORSE * constants:
        return None
    return (
        f"update {step}: validation loss {loss:.4g}, where the best constants of each gene have {constants:.4g}; lower "
        "the rate"
    )
