"""Gates on the runs' own protocol, which hold for every law, and the leak test.

A paired z compares a run with the planted bound on the same cells and masks. No model can be better than the bound, so
a z far below zero means that masked values leak into the input or test cells into training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.laws.gates import Refusal, counted, listed
from scaling_ray.laws.points import Agreement, Rows

LEAK_Z = -4.0


def protocol_gates(rows: Rows, agreement: Agreement) -> list[Refusal]:
    """Refusals by the protocol of the points' runs, always in the same order."""
    refusals = []
    for name in agreement.within_law:
        if name in rows and len(found := np.unique(rows[name].astype(str))) > 1:
            refusals.append(
                Refusal(
                    f"mixed cohorts: the runs differ in {name} ({', '.join(found[:4])}), not only in size and cells",
                    f"one fit for each {name}, or runs that share it",
                    spoils_losses=True,
                )
            )
    setting_of_run = _settings(rows)
    settings = np.unique(setting_of_run)
    for name in agreement.by_size:
        if name not in rows:
            continue
        values = rows[name].astype(str)
        mixed = [setting for setting in settings if len(np.unique(values[setting_of_run == setting])) > 1]
        if mixed:
            refusals.append(
                Refusal(
                    f"mixed cohorts: {name} differs between runs of the same size and data in {len(mixed)} of "
                    f"{len(settings)} settings",
                    f"runs of one setting that share {name}",
                    spoils_losses=True,
                )
            )
    refusals += _seed_gates(rows, setting_of_run)
    if "baseline_loss" in rows:
        refusals += _gene_mean_gate(rows)
    if "held_out_in_training" in rows and (told := int(np.sum(_flags(rows["held_out_in_training"])))):
        refusals.append(
            Refusal(
                f"{told} runs trained on the validation and test cells too (train.held_out_in_training), so their "
                "losses are of no held-out cell",
                "the same runs without those cells",
                spoils_losses=True,
            )
        )
    if leaking := int(np.sum(_leak_scores(rows) < LEAK_Z)):
        refusals.append(
            Refusal(
                f"{leaking} runs are better than the planted bound allows (paired z below {LEAK_Z:g}): "
                f"masked values leak into the input or test cells into training",
                "the leak found and closed, and the runs repeated",
                spoils_losses=True,
            )
        )
    return refusals


TRANSFER_HOLDS = 2.0
"""Factor by which the best rate of a checking size may differ from the one it took over."""


@dataclass(frozen=True)
class Flagged:
    """Runs (R,) that a table itself flags: a law is fitted with them and without."""

    runs: NDArray[np.bool_]
    reason: str
    settles: str
    them: str = "them"  # what is left out, in "without ..."


def flagged_runs(rows: Rows, diverged: Rows) -> list[Flagged]:
    """Flags of the points' runs.

    Args:
        rows: the runs, each column (R,).
        diverged: ``params`` and ``cells`` of runs that diverged and are no rows; what is left of their settings is not
            left at random.
    """
    found = []
    setting_of_run = _settings(rows)
    if "undertrained" in rows and np.any(marked := _flags(rows["undertrained"])):
        in_settings = len(np.unique(setting_of_run[marked]))
        reason = (
            f"{int(marked.sum())} of {counted(len(setting_of_run), 'run')} (in {counted(in_settings, 'setting')}) were "
            "still improving when their budget ended, so they are undertrained"
        )
        found.append(
            Flagged(
                marked,
                reason,
                "a larger budget of cells seen (train.max_cells_seen), until validation stops these runs",
            )
        )
    if "lr_at_edge" in rows and np.any(marked := _flags(rows["lr_at_edge"])):
        sizes = sorted({_size_name(rows, int(i)) for i in np.flatnonzero(marked)})
        reason = f"the learning rate of {listed(sizes)} is the lowest or highest of those tried"
        found.append(Flagged(marked, reason, "learning rates beyond those tried for these sizes (lr.rates)"))
    if count := len(next(iter(diverged.values()), [])):
        marked = np.isin(setting_of_run, _settings(diverged))
        reason = f"{counted(count, 'run')} diverged and {'is' if count == 1 else 'are'} missing from the fit"
        settles = "these settings repeated at a lower learning rate (lr.rates)"
        found.append(Flagged(marked, reason, settles, "what is left of those settings"))
    return found


def rate_doubts(rows: Rows) -> list[Refusal]:
    """What is to be said of a sweep whose learning rates nobody compared: it knows of edges, and no run has one."""
    if "lr_at_edge" not in rows or "lr" not in rows:
        return []
    if any(str(value).lower() in {"true", "false", "1", "0", "1.0", "0.0"} for value in rows["lr_at_edge"]):
        return _transfer_doubts(rows)
    reason = (
        "the learning rate was set beforehand and compared with no other, so a difference between sizes may be one of "
        "rates"
    )
    return [Refusal(reason, "rates above and below it for each size (lr.rule = 'choose')")]


def _transfer_doubts(rows: Rows) -> list[Refusal]:
    """What is to be said where the size that checked a transfer of rates has its best far from the one taken over."""
    if "lr_check_ratio" not in rows:
        return []
    ratios = np.array([float(value) if str(value) not in ("", "None") else np.nan for value in rows["lr_check_ratio"]])
    ratios = ratios[np.isfinite(ratios)]
    if not ratios.size or np.all((ratios >= 1 / TRANSFER_HOLDS) & (ratios <= TRANSFER_HOLDS)):
        return []
    worst = float(ratios[np.argmax(np.abs(np.log(ratios)))])
    reason = (
        "the learning rate was taken over from one size, and at the size that checked it the best rate is "
        f"{worst:.2g} times the one taken over, so a difference between sizes may be one of rates"
    )
    return [Refusal(reason, "a choice of rates at each size (lr.rule = 'choose'), or another lr.width_exponent")]


def leak_test(rows: Rows) -> dict[str, Any] | None:
    """The lowest paired z of the runs that have one, and whether it passes; None where none has, without a bound."""
    scores = _leak_scores(rows)
    if not np.any(np.isfinite(scores)):
        return None
    lowest = int(np.nanargmin(scores))
    return {
        "runs": int(np.sum(np.isfinite(scores))),
        "lowest_z": float(scores[lowest]),
        "run_id": str(rows["run_id"][lowest]) if "run_id" in rows else None,
        "limit": LEAK_Z,
        "passed": bool(scores[lowest] >= LEAK_Z),
    }


def _leak_scores(rows: Rows) -> NDArray:
    """Paired z of each run (R,), NaN where it has none; one NaN for a table without a bound."""
    return rows["bound_z"] if "bound_z" in rows else np.array([np.nan])


def _seed_gates(rows: Rows, setting_of_run: NDArray) -> list[Refusal]:
    """Runs of one setting are repeats only where their seeds are known to differ."""
    if "seed" not in rows:
        return []
    seeds = rows["seed"].astype(str)
    if missing := int(np.sum(seeds == "")):
        reason = f"{missing} of {seeds.size} runs have no seed, so it is not known which runs of a setting are repeats"
        return [Refusal(reason, "the seed of every run", spoils_losses=True)]
    keys = np.array([f"{setting}/{seed}" for setting, seed in zip(setting_of_run, seeds, strict=True)])
    if repeated := seeds.size - np.unique(keys).size:
        reason = f"{repeated} runs have the size, cells and seed of another run: they are copies and not repeats"
        return [Refusal(reason, "one run of each size, cells and seed", spoils_losses=True)]
    return []


def _gene_mean_gate(rows: Rows) -> list[Refusal]:
    baseline = rows["baseline_loss"].astype(float)
    worse = []
    for size in np.unique(rows["params"]):
        here = (rows["params"] == size) & np.isfinite(baseline)
        if np.any(here) and np.mean(rows["loss"][here]) >= np.mean(baseline[here]):
            worse.append(_size_name(rows, int(np.flatnonzero(here)[0])))
    if not worse:
        return []
    return [
        Refusal(
            f"{listed(worse)} did not beat the mean of each gene, so its loss measures training and not size",
            f"{listed(worse)} trained to convergence, or declared an anchor size",
        )
    ]


def _settings(rows: Rows) -> NDArray:
    """The setting of each run (R,), as text: its size and its number of cells."""
    keys = [rows[name].astype(str) for name in ("params", "cells") if name in rows]
    return np.array(["/".join(key) for key in zip(*keys, strict=True)])


def _flags(column: NDArray) -> NDArray:
    return np.array([value is True or str(value).lower() in {"true", "1", "1.0"} for value in column])


def _size_name(rows: Rows, row: int) -> str:
    return str(rows["size"][row]) if "size" in rows else f"{float(rows['params'][row]):,.0f}"
