"""The schedule of a run: the learning rate of each update, and which updates end a part of the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaling_ray.rules import TrainingRules

TRAIN_ROWS_PER_RUN = 100
"""Approximate number of rows of kind "train" in a run's metrics.jsonl."""


def learning_rate(train: TrainingRules, peak: float, step: int, decay_from: int | None = None) -> float:
    """The rate of update number ``step`` (from 0): linear warm-up, then constant, linear or cosine decay.

    A trunk is constant after its warm-up and falls linearly once it decays: from where its budget says, or from update
    number ``decay_from`` where validation ended it.
    """
    total = train.total_steps
    trunk = train.wsd
    warmup = round(train.warmup_fraction * total) if trunk is None else updates_of(train, trunk.warmup_cells)
    if step < warmup:
        return peak * (step + 1) / warmup
    if train.schedule == "constant":
        return peak
    if trunk is not None:
        start = decay_start(train) if decay_from is None else decay_from
        if step < start:
            return peak
        warmup, total = start, end_of(train, decay_from)
    done = min(1.0, (step - warmup) / max(1, total - warmup))  # a member of a stack may have ended before the others
    shape = 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done
    return peak * (train.final_lr_fraction + (1 - train.final_lr_fraction) * shape)


def updates_of(train: TrainingRules, cells: int) -> int:
    """Updates that take so many cells, at least one."""
    return max(1, cells // train.cells_per_step)


def decay_start(train: TrainingRules, share: float = 1.0) -> int:
    """Update after which a trunk decays for a budget of ``share`` of its own to end with it."""
    assert train.wsd is not None
    budget = max(1, round(share * train.total_steps))
    return budget - min(budget, max(1, round(train.wsd.decay_share * budget)))


def end_of(train: TrainingRules, decay_from: int | None = None) -> int:
    """The last update of a run: that of its budget, or of the decay that began after update ``decay_from``."""
    if decay_from is None or train.wsd is None:
        return train.total_steps
    share = train.wsd.decay_share
    return min(train.total_steps, decay_from + max(1, round(decay_from * share / (1 - share))))


def branch_starts(train: TrainingRules) -> dict[int, float]:
    """Updates after which a branch leaves the trunk, and the share of the budget that each of them stands for."""
    branches: Sequence[float] = train.wsd.branches if train.wsd is not None else []
    return {decay_start(train, share): share for share in sorted(branches)}


def is_evaluated(train: TrainingRules, steps: int, decay_from: int | None = None) -> bool:
    """Whether update number ``steps`` (from 1) is followed by a look at the validation curve."""
    if train.wsd is not None:
        return steps % updates_of(train, train.wsd.evaluation_cells) == 0 or steps == end_of(train, decay_from)
    return ends_part(steps, train.total_steps, train.evaluations)


def ends_part(steps: int, total_steps: int, parts: int) -> bool:
    """Whether update number ``steps`` (from 1) ends one of ``parts`` equal parts of ``total_steps``."""
    return steps * parts // total_steps > (steps - 1) * parts // total_steps


def row_interval(total_steps: int) -> int:
    """Updates between two rows of kind "train"."""
    return max(1, total_steps // TRAIN_ROWS_PER_RUN)
