"""The choice among learning rates: the lowest point of a parabola through the best candidate and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scaling_ray.results.columns import Row
from scaling_ray.runs import RunSpec


def choose_rates(runs: list[RunSpec], rows: Mapping[str, Row], earlier: Mapping[str, float]) -> dict[str, float]:
    """The chosen rates by run id; those of ``earlier`` never change.

    A choice is made once every candidate has a result or diverged, and at least one has a result.
    """
    chosen = dict(earlier)
    for run in runs:
        if not run.lr_candidates or run.run_id in chosen:
            continue
        candidates = [rows[name] for name in run.lr_candidates]
        if any(row.status != "done" and row.failure != "diverged" for row in candidates):
            continue
        losses = [(row.val_loss, row.lr) for row in candidates if row.val_loss is not None and row.lr is not None]
        if losses:
            chosen[run.run_id] = best_rate(losses)
    return chosen


def best_rate(tried: Sequence[tuple[float, float]]) -> float:
    """The rate to train with, from (validation loss, rate) of the candidates that ended.

    Between its two neighbours the best candidate's loss is near a parabola in the logarithm of the rate: the rate is
    its lowest point, to three digits. A candidate without two neighbours (of an edge, or beside one that diverged) is
    taken itself.
    """
    rising = sorted((rate, loss) for loss, rate in tried)
    best = min(range(len(rising)), key=lambda i: (rising[i][1], rising[i][0]))
    if not 0 < best < len(rising) - 1:
        return rising[best][0]
    (low, a), (mid, b), (high, c) = rising[best - 1 : best + 2]
    left, right = math.log(mid / low), math.log(high / mid)
    # Slopes of both chords; the parabola's own is zero where they cancel.
    down, up = (b - a) / left, (c - b) / right
    if up - down <= 0:
        return mid
    middle = math.log(mid) - (down * right + up * left) / (2 * (up - down))
    return float(f"{min(max(math.exp(middle), low), high):.3g}")


def with_rates(runs: list[RunSpec], chosen: Mapping[str, float]) -> list[RunSpec]:
    """The runs, each with its rate where one has been chosen."""
    return [run.model_copy(update={"lr": chosen[run.run_id]}) if run.run_id in chosen else run for run in runs]
