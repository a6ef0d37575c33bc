"""The choice among learning rates, once their trials have ended."""

from __future__ import annotations

from collections.abc import Mapping

from scaling_ray.results.columns import Row
from scaling_ray.results.rates import best_rate
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
            best = best_rate(losses)
            chosen[run.run_id] = best if run.lr_factor == 1.0 else float(f"{best * run.lr_factor:.3g}")
    return chosen


def with_rates(runs: list[RunSpec], chosen: Mapping[str, float]) -> list[RunSpec]:
    """The runs, each with its rate where one has been chosen."""
    return [run.model_copy(update={"lr": chosen[run.run_id]}) if run.run_id in chosen else run for run in runs]
