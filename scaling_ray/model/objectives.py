"""What a network is trained for: targets from counts, a loss for each masked gene, its unit.

An objective is chosen by its name (``train.objective``); whatever trains, evaluates, saves and tracks a run speaks of
its loss and unit and knows no more. Losses leave an objective gene by gene and are summed: the mean is taken once.

Shape legend: B cells, V genes, K masked genes, O outputs of the head per gene.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.model.start import gene_means
from scaling_ray.recipe import OBJECTIVES, ObjectiveFacts


class Objective(Protocol):
    """A loss per masked gene. ``facts`` name it, its unit, and how many values the head gives for a gene."""

    facts: ObjectiveFacts

    def targets(self, values_BV: Tensor, counts_BV: Tensor, raw_sum_B: Tensor, positions_BK: Tensor) -> Tensor:
        """(B, K) or (B, K, anything): what is to be predicted at the masked positions.

        Args:
            values_BV: normalised, float32, at full depth.
            counts_BV: raw counts, int32, at full depth.
            raw_sum_B: counts of the whole cell, over all genes of the Census, int64.
            positions_BK: masked genes.
        """

    def losses(self, outputs_BKO: Tensor, targets: Tensor, weights_BK: Tensor) -> Tensor:
        """(B, K) loss of each masked gene, in float32; 0 where ``weights_BK`` is 0 (padding)."""

    def constants(self, values_NV: Tensor, counts_NV: Tensor, raw_sum_N: Tensor, measured_NV: Tensor) -> Tensor:
        """(V, O): for each gene the outputs of least loss among those that are the same for all N cells.

        Where training starts from, and what a run must beat to have learned anything.
        """


class SquaredError:
    """(prediction - normalised value)^2, as arXiv 2602.15253."""

    facts = OBJECTIVES["mse"]

    def targets(self, values_BV: Tensor, counts_BV: Tensor, raw_sum_B: Tensor, positions_BK: Tensor) -> Tensor:
        """(B, K): the values themselves."""
        return values_BV.gather(1, positions_BK)

    def losses(self, outputs_BKO: Tensor, targets: Tensor, weights_BK: Tensor) -> Tensor:
        """See Objective."""
        return (outputs_BKO[..., 0].float() - targets).square() * weights_BK

    def constants(self, values_NV: Tensor, counts_NV: Tensor, raw_sum_N: Tensor, measured_NV: Tensor) -> Tensor:
        """(V, 1): the mean of each gene."""
        return gene_means(values_NV, measured_NV)[:, None]


_KNOWN: dict[str, Objective] = {"mse": SquaredError()}


def register(objective: Objective) -> None:
    """Make an objective known under its name, to specs too; an equal name is replaced by none but itself.

    Every process that trains with it must register it.
    """
    name = objective.facts.name
    if name in _KNOWN and type(_KNOWN[name]) is not type(objective):
        raise BadInput("M017", "objective", name, "is the name of another objective; choose another one")
    OBJECTIVES[name] = objective.facts
    _KNOWN[name] = objective


def objective_named(name: str) -> Objective:
    """The objective of a name; BadInput where no such is registered in this process."""
    if name not in _KNOWN:
        raise BadInput(
            "M018", "train.objective", name, f"is not registered here; use {', '.join(_KNOWN)}, or register it"
        )
    return _KNOWN[name]
