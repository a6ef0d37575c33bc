"""The schedule of a run: the learning rate of each update, and which updates end a part of the budget."""

from __future__ import annotations

import math

from scaling_ray.spec import TrainingRules

TRAIN_ROWS_PER_RUN = 100
"""Approximate number of rows of kind "train" in a run's metrics.jsonl."""


def learning_rate(train: TrainingRules, peak: float, step: int) -> float:
    """The rate of update number ``step`` (from 0): linear warm-up, then constant, linear or cosine decay."""
    total = train.total_steps
    warmup = round(train.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if train.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    shape = 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (train.final_lr_fraction + (1 - train.final_lr_fraction) * shape)


def ends_part(steps: int, total_steps: int, parts: int) -> bool:
    """Whether update number ``steps`` (from 1) ends one of ``parts`` equal parts of ``total_steps``."""
    return steps * parts // total_steps > (steps - 1) * parts // total_steps


def row_interval(total_steps: int) -> int:
    """Updates between two rows of kind "train"."""
    return max(1, total_steps // TRAIN_ROWS_PER_RUN)
