"""Flagged runs as a sensitivity: the same law with them and without, and the settings that Huber's loss sets aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.laws.estimators import huber_log
from scaling_ray.laws.forms import Form
from scaling_ray.laws.gates import MIN_CELL_COUNTS, MIN_SIZES, Refusal
from scaling_ray.laws.law import Fitted, fit_law
from scaling_ray.laws.points import Rows, where
from scaling_ray.laws.protocol import Flagged

MIN_SETTINGS = 20  # below which one setting in its place is as likely as one out of it
OUTLYING = 5.0  # robust standard deviations
MOST_OUTLYING = 0.1


@dataclass(frozen=True)
class Compared:
    """The law that the verdict is about, with what was left out for it and what that does."""

    rows: Rows
    refusals: list[Refusal]
    doubts: list[Refusal]
    entries: list[dict[str, Any]]


def enough(form: Form, rows: Rows) -> bool:
    """Whether runs have the sizes and numbers of cells that an exponent needs."""
    needs = {"params": MIN_SIZES, "cells": MIN_CELL_COUNTS, "flops": MIN_SIZES}
    return bool(len(rows["loss"])) and all(np.unique(rows[axis]).size >= needs[axis] for axis in form.axes)


def without_flagged(form: Form, rows: Rows, flagged: list[Flagged]) -> Compared:
    """Leave flagged runs out where enough sizes remain, and compare; else keep them and refuse.

    Args:
        form: the headline's law.
        rows: all runs that could be points.
        flagged: kinds of flags, each with its runs (R,).
    """
    marked = np.zeros(len(rows["loss"]), dtype=bool)
    for flag in flagged:
        marked |= flag.runs
    if not flagged:
        return Compared(rows, [], [], [])
    if not marked.any():
        # What they flag is in no row: there is nothing to compare with, and that is said.
        left = [Refusal(f"{flag.reason}; nothing is left of their settings", flag.settles) for flag in flagged]
        return Compared(rows, [] if enough(form, rows) else left, left, [])
    clean = where(rows, ~marked)
    if not enough(form, clean) or (np.any(marked) and not enough(form, rows)):
        return Compared(rows, [Refusal(f.reason, f.settles) for f in flagged], [], [])
    kept = fit_law(form, clean)
    all_runs = fit_law(form, rows, thorough=False)
    reason = "; ".join(flag.reason for flag in flagged)
    settles = "; ".join(dict.fromkeys(flag.settles for flag in flagged))
    them = " or ".join(dict.fromkeys(flag.them for flag in flagged))
    return _compare(form, clean, kept, all_runs, reason, settles, them)


def _compare(form: Form, rows: Rows, kept: Fitted, all_runs: Fitted, reason: str, settles: str, them: str) -> Compared:
    if kept.best is None or all_runs.best is None:
        return Compared(rows, [Refusal(reason, settles)], [], [])
    entries, refusals, said = [], [], []
    for name in form.exponents:
        own, other, shown = kept.parameters[name], all_runs.parameters[name], kept.headline_interval(name)
        entries.append(
            {"what": "flagged", "reason": reason, "parameter": name, "without": own, "with": other}
            | {"low": shown.low, "high": shown.high, "inside": not shown.excludes(other)}
        )
        said.append(f"{name} {own:.3g} without {them}, {other:.3g} with")
        if shown.excludes(other):
            text = f"{reason} ({name} is {own:.3g} without {them} and {other:.3g} with, outside its interval)"
            refusals.append(Refusal(text, settles, form.axis_of(name)))
    doubts = [] if refusals else [Refusal(f"{reason} ({', '.join(said)}; both lie inside the interval)", settles)]
    return Compared(rows, refusals, doubts, entries)


def without_outlying(form: Form, rows: Rows, law: Fitted, huber: dict[str, float]) -> Compared:
    """Set aside settings far from Huber's fit where they move an exponent beyond its statistical interval.

    Args:
        form: the law.
        rows: its runs.
        law: its least-squares fit.
        huber: parameters by Huber's loss.
    """
    same = Compared(rows, [], [], [])
    if law.best is None or not huber or law.points.n_settings < MIN_SETTINGS:
        return same
    places = [{axis: float(rows[axis][i]) for axis in form.axes} for i in range(len(rows["loss"]))]
    away = np.log(rows["loss"]) - np.log([form.loss_at(huber, place) for place in places])
    spread = 1.4826 * float(np.median(np.abs(away - np.median(away))))
    outlying: NDArray[np.bool_] = np.abs(away) > OUTLYING * max(spread, 1e-12)
    if not outlying.any() or outlying.mean() > MOST_OUTLYING:
        return same
    kept_rows = where(rows, ~outlying)
    if not enough(form, kept_rows):
        return same
    kept = fit_law(form, kept_rows, thorough=False)
    moved = [
        name for name in form.exponents if kept.best is not None and kept.intervals[name].excludes(law.parameters[name])
    ]
    if not moved:
        return same
    named = ", ".join(str(int(row)) for row in rows["row"][outlying][:8]) if "row" in rows else ""
    count = int(outlying.sum())
    reason = (
        f"least squares and Huber's loss disagree: {count} runs (rows {named}) lie more than {OUTLYING:g} robust "
        "standard deviations from the law and are set aside"
    )
    said, entries = [], []
    for name in form.exponents:
        said.append(f"{name} {kept.parameters[name]:.3g} without them, {law.parameters[name]:.3g} with them")
        entries.append(
            {"what": "outlying", "reason": reason, "parameter": name}
            | {"without": kept.parameters[name], "with": law.parameters[name], "huber": huber[name]}
        )
    return Compared(
        kept_rows, [], [Refusal(f"{reason} ({'; '.join(said)})", "a look at these runs, or their repeats")], entries
    )


def huber_parameters(law: Fitted, rows: Rows) -> dict[str, float]:
    """Parameters by Huber's loss on log losses; empty where the law was not fitted."""
    if law.best is None:
        return {}
    return huber_log(law.problem, {axis: rows[axis] for axis in law.form.axes}, rows["loss"], law.best)
