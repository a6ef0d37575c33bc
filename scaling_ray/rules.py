"""What training is, whatever it is carried out with: the rules that are part of a run's identity."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scaling_ray.errors import BadInput
from scaling_ray.recipe import OBJECTIVES, Recipe

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1)]

LINEAR_START_CELLS = 4096
"""Most training cells that a linear start is fitted to."""
_HIDDEN_GENES_WANTED, _MOST_TURNS, _MOST_TIMES_HIDDEN = 16, 8, 2
"""Of each of as many cells as that; the turns that it may take to hide as many; and, where there are fewer cells, how
often a gene of a cell is hidden at most, on average over its turns."""


class Frozen(BaseModel):
    """A closed, immutable table of a spec."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TrunkRules(Frozen):
    """The schedule "wsd": warm-up, a constant rate for as long as validation improves, then a short decay.

    What the trunk is at an update does not depend on its budget, so everything here but ``branches`` is counted in
    cells seen. A trunk that stops improving (``patience_evaluations``) decays from there; the decay is ``decay_share``
    of all the cells that a run then has seen. ``branches`` are shares of the budget: at each of them a branch decays as
    a run of that smaller budget would, is evaluated, and the trunk goes on from before it as though nothing had been.
    """

    warmup_cells: PositiveInt = 2_000
    evaluation_cells: PositiveInt = 2_000
    decay_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    branches: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5]

    @model_validator(mode="after")
    def _no_branch_twice(self) -> TrunkRules:
        if len(set(self.branches)) != len(self.branches):
            raise BadInput("S016", "train.trunk.branches", self.branches, "holds a share twice; remove it")
        return self


class TrainingRules(Frozen):
    """What training is, whatever it is carried out with. An update takes ``cells_per_step`` cells.

    One cell presentation counts once in ``max_cells_seen``. ``umi_fraction`` below 1 thins what the network sees to
    that share of a cell's molecules; targets keep full depth. With ``schedule = "wsd"`` the table ``trunk`` takes the
    place of ``warmup_fraction`` and ``evaluations``; other schedules leave it alone. ``held_out_in_training`` adds the
    validation and test cells to a run's training cells, as the study's released launchers do: results, verdict and
    report say so, and such losses are of no held-out cell. ``start`` says what the first weights
    are: drawn at random, knowing the run's cells (:mod:`scaling_ray.model.start`), or predicting by a linear regression
    of them (:mod:`scaling_ray.model.linear_start`), for which a size has to have room; "auto" is cells for
    ``corrected``, and for ``published`` drawn.
    """

    recipe: Recipe = "corrected"
    objective: str = "mse"
    start: Literal["auto", "cells", "linear", "drawn"] = "auto"
    mask_fraction: Share = 0.15
    umi_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    held_out_in_training: bool = False
    max_cells_seen: PositiveInt | dict[str, PositiveInt] = 100_000
    cells_per_step: PositiveInt = 32
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    trunk: TrunkRules = TrunkRules()
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_beta2: Share = 0.99
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluations: PositiveInt = 20
    curve_cells: PositiveInt = 512
    smoothing_evaluations: PositiveInt = 3
    patience_evaluations: Annotated[int, Field(ge=0, strict=True)] = 5

    @field_validator("objective")
    @classmethod
    def _objective_is_known(cls, value: str) -> str:
        if value not in OBJECTIVES:
            raise ValueError(f"is no known objective; use {', '.join(OBJECTIVES)}")
        return value

    @property
    def wsd(self) -> TrunkRules | None:
        """The rules of the trunk, for runs that have one."""
        return self.trunk if self.schedule == "wsd" else None

    @property
    def starts_from_cells(self) -> bool:
        """Whether the first weights are taken from the run's training cells."""
        return self.start in ("cells", "linear") or (self.start == "auto" and self.recipe == "corrected")

    def linear_start_turns(self, genes: int, cells: int) -> int:
        """Times that a linear start looks at each of a run's cells, so that enough of a panel's genes were hidden.

        Where a mask hides sixteen genes or more, once: there, looking at few cells again was no better.
        """
        hidden = max(1, int(genes * self.mask_fraction + 0.5))
        if hidden >= _HIDDEN_GENES_WANTED:
            return 1
        turns = min(_MOST_TURNS, math.ceil(_HIDDEN_GENES_WANTED / hidden))
        if cells >= LINEAR_START_CELLS:
            return turns
        return min(math.ceil(turns * LINEAR_START_CELLS / cells), math.ceil(_MOST_TIMES_HIDDEN * genes / hidden))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole budget; only resolved rules have them."""
        if isinstance(self.max_cells_seen, dict):
            raise BadInput(
                "S017", "train.max_cells_seen", self.max_cells_seen, "is a table by size; resolve it for one size first"
            )
        return self.max_cells_seen // self.cells_per_step

    @property
    def branched_share(self) -> float:
        """Cells that branches of a trunk see, over those of the whole budget."""
        return sum(self.wsd.branches) * self.wsd.decay_share if self.wsd is not None else 0.0

    @property
    def loss_unit(self) -> str:
        """The unit of every loss of such runs."""
        return OBJECTIVES[self.objective].unit
