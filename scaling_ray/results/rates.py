"""What a sweep's trials say of learning rates: the best, whether it lies at an edge, how well it carries over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from scaling_ray.results.columns import Row
from scaling_ray.runs import RunSpec


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


def at_edge(run: RunSpec, rate: float, tried: Iterable[float]) -> bool:
    """Whether a run's rate is the lowest or highest that was tried, where it was chosen or where it comes from."""
    rates = list(tried)
    return any(math.isclose(rate, edge * run.lr_factor, rel_tol=0.006) for edge in (min(rates), max(rates)))


def check_ratios(runs: Iterable[RunSpec], rows: Mapping[str, Row]) -> dict[int, float]:
    """By number of genes, the best rate of the size that checks a transfer over the one it took over.

    Empty where no rates are transferred, or the trials have not ended.
    """
    everything = list(runs)
    choosing = {name for run in everything for name in run.lr_candidates}
    checking = [run for run in everything if run.role == "rate" and run.run_id not in choosing]
    found: dict[int, float] = {}
    for genes in sorted({run.genes for run in checking}):
        here = [rows[run.run_id] for run in checking if run.genes == genes]
        sizes = {row.size for row in here}
        taken = [rows[r.run_id].lr for r in everything if (r.role, r.genes) == ("law", genes) and r.size in sizes]
        tried = [(row.val_loss, row.lr) for row in here if row.val_loss is not None and row.lr is not None]
        if tried and taken and taken[0] is not None and all(row.status in ("done", "failed") for row in here):
            found[genes] = best_rate(tried) / taken[0]
    return found
