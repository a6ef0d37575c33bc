"""Names of what a run may be trained on and for, known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recipe = Literal["corrected", "published"]
"""How counts become values and which genes are masked: by the full library and K exactly, or as arXiv 2602.15253."""


@dataclass(frozen=True)
class ObjectiveFacts:
    """What is known of an objective without its mathematics (that is in ``model.objectives``).

    ``unit`` is that of its mean loss per masked gene; the head gives ``outputs_per_gene`` values for each gene.
    """

    name: str
    unit: str
    outputs_per_gene: int = 1


OBJECTIVES: dict[str, ObjectiveFacts] = {"mse": ObjectiveFacts("mse", "mse")}
"""By the name that ``train.objective`` of a spec gives; ``model.objectives.register`` adds to it."""
