"""The verdict, before the number: every reason not to believe an exponent, as a plain sentence.

A gate that shuts gives a reason and what would settle it. Any gate shut means "refused", and a refused fit has no
headline parameters. A floor of zero is an answer; a parameter on the edge of a search is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

from scaling_ray.laws.fit import Floats, Points, Problem, Solution
from scaling_ray.laws.forms import EXPONENT_SEARCH, Form
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.refits import Refit

Rows = Mapping[str, NDArray]  # one entry per column, each (R,)

MIN_SIZES, MIN_CELL_COUNTS = 4, 3
SIZE_EFFECT_P, LACK_OF_FIT_P = 0.001, 0.01
MAX_RATIO = 3.0
LEAK_Z = -4.0
SEARCH_ERROR = 1e-5
MIN_RESIDUAL_FREEDOM = 8  # without repeated cells, residuals stand in for seed noise from here on

# What must be the same in all runs of one law, and what may follow the size and the data but not change within a cell.
COHORT_COLUMNS = (
    "genes",
    "donors",
    "recipe",
    "umi_fraction",
    "objective",
    "schedule",
    "data_hash",
    "micro_batch",
    "accumulation",
)
PER_CELL_COLUMNS = ("max_cells_seen", "lr", "micro_steps")

_AXIS_WORDS = {"params": ("sizes", "parameters"), "cells": ("data sizes", "training cells")}
_AXIS_WORDS |= {"flops": ("budgets", "FLOP")}


@dataclass(frozen=True)
class Shut:
    """A gate that is shut: why, and what would open it."""

    reason: str
    settles: str


@dataclass(frozen=True)
class Tests:
    """F-tests of one fit; None where the runs cannot answer."""

    effect_p: Mapping[str, float | None]  # axis -> p of "the loss does not depend on it"
    lack_of_fit_p: float | None


def verdict(shut: Sequence[Shut]) -> str:
    """``supported`` or ``refused``."""
    return "refused" if shut else "supported"


def count_gates(form: Form, points: Points) -> list[Shut]:
    """Too few sizes, or too few distinct numbers of cells, to determine an exponent at all."""
    shut = []
    needs = {"params": MIN_SIZES, "cells": MIN_CELL_COUNTS, "flops": MIN_SIZES}
    for axis in form.axes:
        values = points.distinct(axis)
        if values.size < needs[axis]:
            plural, unit = _AXIS_WORDS[axis]
            shut.append(
                Shut(
                    f"only {values.size} {plural} without baselines, and an exponent needs at least {needs[axis]}",
                    f"{needs[axis] - values.size} or more further {plural}, {_between(values, unit)}",
                )
            )
    return shut


def protocol_gates(rows: Rows) -> list[Shut]:
    """What is wrong with the runs themselves, whatever law is drawn through them; ``rows`` are the points' runs."""
    shut = []
    for name in COHORT_COLUMNS:
        if name in rows and len(found := np.unique(rows[name].astype(str))) > 1:
            shut.append(
                Shut(
                    f"mixed cohorts: the runs differ in {name} ({', '.join(found[:4])}), not only in size and cells",
                    f"one fit for each {name}, or runs that share it",
                )
            )
    cell_of_run = _cells(rows)
    for name in PER_CELL_COLUMNS:
        if name not in rows:
            continue
        values = rows[name].astype(str)
        mixed = [cell for cell in np.unique(cell_of_run) if len(np.unique(values[cell_of_run == cell])) > 1]
        if mixed:
            shut.append(
                Shut(
                    f"mixed cohorts: {name} differs between runs of the same size and data in {len(mixed)} of "
                    f"{len(np.unique(cell_of_run))} cells",
                    f"runs of one cell that share {name}",
                )
            )
    shut += _seed_gates(rows, cell_of_run)
    if "undertrained" in rows and (count := int(np.sum(_flags(rows["undertrained"])))):
        cells = len(np.unique(cell_of_run[_flags(rows["undertrained"])]))
        shut.append(
            Shut(
                f"{count} of {len(cell_of_run)} runs ({cells} cells) were still improving when their budget ended: "
                f"they are undertrained",
                "a larger budget of cells seen for these runs, until validation stops them",
            )
        )
    if "lr_at_edge" in rows and np.any(_flags(rows["lr_at_edge"])):
        sizes = sorted({_size_name(rows, int(i)) for i in np.flatnonzero(_flags(rows["lr_at_edge"]))})
        shut.append(
            Shut(
                f"the learning rate of {_listed(sizes)} is the lowest or highest of those tried",
                "further learning rates beyond the edge for these sizes",
            )
        )
    if "baseline" in rows:
        shut += _gene_mean_gate(rows)
    if "bound_z" in rows:
        leaking = np.flatnonzero(np.nan_to_num(rows["bound_z"].astype(float), nan=0.0) < LEAK_Z)
        if leaking.size:
            shut.append(
                Shut(
                    f"{leaking.size} runs are better than the planted bound allows (paired z below {LEAK_Z:g}): "
                    f"masked values leak into the input or test cells into training",
                    "the leak found and closed, and the runs repeated",
                )
            )
    return shut


def _seed_gates(rows: Rows, cell_of_run: NDArray) -> list[Shut]:
    """Runs of one cell are repeats only where their seeds are known to differ."""
    if "seed" not in rows:
        return []
    seeds = rows["seed"].astype(str)
    if missing := int(np.sum(seeds == "")):
        reason = f"{missing} of {seeds.size} runs have no seed, so it is not known which runs of a cell are repeats"
        return [Shut(reason, "the seed of every run")]
    keys = np.array([f"{cell}/{seed}" for cell, seed in zip(cell_of_run, seeds, strict=True)])
    if repeated := seeds.size - np.unique(keys).size:
        reason = f"{repeated} runs have the size, cells and seed of another run: they are copies and not repeats"
        return [Shut(reason, "one run of each size, cells and seed")]
    return []


def _gene_mean_gate(rows: Rows) -> list[Shut]:
    baseline = rows["baseline"].astype(float)
    worse = []
    for size in np.unique(rows["params"]):
        here = (rows["params"] == size) & np.isfinite(baseline)
        if np.any(here) and np.mean(rows["loss"][here]) >= np.mean(baseline[here]):
            worse.append(_size_name(rows, int(np.flatnonzero(here)[0])))
    if not worse:
        return []
    return [
        Shut(
            f"{_listed(worse)} did not beat the mean of each gene, so its loss measures training and not size",
            f"{_listed(worse)} trained to convergence, or declared a baseline",
        )
    ]


def diverged_gate(count: int) -> list[Shut]:
    """Cells of the grid whose runs diverged leave a hole that is not at random."""
    if not count:
        return []
    return [
        Shut(f"{count} runs diverged and are missing from the fit", "these cells repeated at a lower learning rate")
    ]


def choices_gate(alphas: Sequence[Mapping[str, Any]]) -> list[Shut]:
    """Declared choices of equal standing that lead to different exponents; ``alphas`` have ``value`` (or None)."""
    values = [float(alpha["value"]) for alpha in alphas if alpha["value"] is not None]
    if len(values) < 2 or max(values) / min(values) < MAX_RATIO:
        return []
    return [
        Shut(
            f"declared choices disagree: alpha runs from {min(values):.2g} to {max(values):.2g} over choices of equal "
            f"standing, a factor of {max(values) / min(values):.1f}",
            "more sizes at both ends, so that no single size decides",
        )
    ]


def f_tests(problem: Problem, best: Solution) -> Tests:
    """Does the loss depend on each axis, and does the form describe the cell means?

    Both against the noise between runs of the same cell; where no cell was repeated, the dependence is tested against
    the residuals, and only with enough of them.
    """
    points, form = problem.points, problem.form
    freedom, noise_rss = points.replicate_freedom, points.replicate_rss
    if freedom < 1 and problem.freedom >= MIN_RESIDUAL_FREEDOM:
        freedom, noise_rss = problem.freedom, best.rss
        saturated = len(form.parameters)
    else:
        saturated = points.n_cells
    effects: dict[str, float | None] = {}
    for axis in form.axes:
        others = [points.axes[name] for name in form.axes if name != axis]
        group = (
            np.unique(np.stack(others, axis=1), axis=0, return_inverse=True)[1] if others else np.zeros(points.n_cells)
        )
        rss, groups = _within(points, np.asarray(group).reshape(-1))
        rss += points.replicate_rss
        effects[axis] = _f_tail(rss - noise_rss, saturated - groups, noise_rss, freedom)
        if saturated - groups < 1 <= problem.freedom:
            effects[axis] = _nested_effect(problem, best, axis)
    extra = points.n_cells - len(form.parameters)
    # Rounding is no lack of fit, even where copies of one loss leave no noise to hide it.
    rounding = 1e-20 * float(np.sum(points.runs * points.loss**2))
    misfit = best.misfit_rss if best.misfit_rss > rounding else 0.0
    lack = _f_tail(misfit, extra, points.replicate_rss, points.replicate_freedom)
    return Tests(effects, lack)


def _nested_effect(problem: Problem, best: Solution, axis: str) -> float | None:
    """Whether the law without an axis does as well, by the residuals of the whole law.

    For tables where nearly every cell has values of its own, such as a D that differs from run to run.
    """
    form = problem.form
    shorter = Form(f"{form.name}_without_{axis}", "", tuple(term for term in form.terms if term.axis != axis))
    reduced = Problem(shorter, problem.points).search()
    extra = len(form.parameters) - len(shorter.parameters)
    return _f_tail(reduced.rss - best.rss, extra, best.rss, problem.freedom)


def fit_gates(
    problem: Problem, best: Solution, intervals: Mapping[str, Interval], refits: Sequence[Refit], tests: Tests
) -> list[Shut]:
    """What the runs cannot say about this law."""
    form, points = problem.form, problem.points
    shut = []
    for axis, p in tests.effect_p.items():
        plural, unit = _AXIS_WORDS[axis]
        what = {"params": "size", "cells": "data", "flops": "compute"}[axis]
        if p is None:
            shut.append(
                Shut(
                    "no cell was trained with two seeds, so the noise between runs is unknown",
                    "at least 2, better 3 seeds per cell",
                )
            )
            break
        if p >= SIZE_EFFECT_P:
            shut.append(
                Shut(
                    f"the effect of {what} is within the noise of the runs (F-test p = {p:.2g}, "
                    f"needed below {SIZE_EFFECT_P:g})",
                    f"{plural} further apart, {_beyond(points.distinct(axis), unit)}, or more seeds per cell",
                )
            )
    for i, name in enumerate(form.exponents):
        shut += _exponent_gates(name, points.distinct(form.axis_of(name)), form.axis_of(name), best, i, intervals[name])
    if tests.lack_of_fit_p is not None and tests.lack_of_fit_p < LACK_OF_FIT_P:
        shut.append(
            Shut(
                f"the form does not fit: cell means depart from it by more than the noise of the runs explains "
                f"(lack of fit p = {tests.lack_of_fit_p:.2g}, needed above {LACK_OF_FIT_P:g})",
                "a look at the cells with the largest residuals: budget, learning rate, or a form that saturates",
            )
        )
    for name in form.exponents:
        estimate = problem.value(best, name)
        own = [refit for refit in refits if refit.exponent == name and refit.bonferroni.excludes(estimate)]
        # Without noise intervals have no width, and the searches' own last digits would lie outside.
        moved = [refit for refit in own if abs(refit.values[name] / estimate - 1.0) > SEARCH_ERROR]
        if moved:
            plural, unit = _AXIS_WORDS[form.axis_of(name)]
            shut.append(
                Shut(
                    f"{name} hangs on single {plural}: without {_listed([f'{m.left_out:,.0f}' for m in moved])} {unit} "
                    f"the interval excludes the value of all",
                    f"{plural} next to those, {_between(points.distinct(form.axis_of(name)), unit)}",
                )
            )
    return shut


def _exponent_gates(name: str, values: Floats, axis: str, best: Solution, index: int, interval: Interval) -> list[Shut]:
    plural, unit = _AXIS_WORDS[axis]
    edges = f"{EXPONENT_SEARCH[0]:g} to {EXPONENT_SEARCH[1]:g}"
    if best.at_search_edge(index):
        return [
            Shut(
                f"{name} rests on the edge of its search ({edges}), so the value is the search's and not the runs'",
                f"{plural} {_beyond(values, unit)}",
            )
        ]
    if interval.low is None or interval.high is None:
        side = "both sides" if interval.low is interval.high else "below" if interval.low is None else "above"
        return [
            Shut(
                f"the 95% interval of {name} is open ({side}) within {edges}: the runs do not bound it",
                f"{plural} {_beyond(values, unit)}, or more seeds per cell",
            )
        ]
    ratio = interval.high / interval.low
    if ratio >= MAX_RATIO:
        seeds = (np.log(ratio) / np.log(MAX_RATIO)) ** 2
        return [
            Shut(
                f"the 95% interval of {name} spans a factor {ratio:.1f}, and {MAX_RATIO:g} is the most that counts as "
                f"an answer",
                f"about {max(seeds, 1.1):.1f} times the seeds, or {plural} {_beyond(values, unit)}",
            )
        ]
    return []


def _within(points: Points, group: NDArray) -> tuple[float, int]:
    """Sum of squares of cell means (weighted by runs) around their group's mean, and the number of groups."""
    total, labels = 0.0, np.unique(group)
    for label in labels:
        here = group == label
        mean = np.average(points.loss[here], weights=points.runs[here])
        total += float(np.sum(points.runs[here] * (points.loss[here] - mean) ** 2))
    return total, labels.size


def _f_tail(rss: float, freedom: int, noise_rss: float, noise_freedom: int) -> float | None:
    if noise_freedom < 1 or freedom < 1:
        return None
    if noise_rss <= 0:
        return 0.0 if rss > 0 else 1.0
    ratio = max(rss, 0.0) / freedom / (noise_rss / noise_freedom)
    return float(fdtrc(freedom, noise_freedom, ratio))


def _cells(rows: Rows) -> NDArray:
    keys = [rows[name].astype(str) for name in ("params", "cells") if name in rows]
    return np.array(["/".join(key) for key in zip(*keys, strict=True)])


def _flags(column: NDArray) -> NDArray:
    return np.array([value is True or str(value).lower() in {"true", "1", "1.0"} for value in column])


def _size_name(rows: Rows, row: int) -> str:
    return str(rows["size"][row]) if "size" in rows else f"{float(rows['params'][row]):,.0f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _between(values: Floats, unit: str) -> str:
    """Names the widest gap on a log axis and its middle."""
    if values.size < 2:
        return f"at least ten times apart in {unit}"
    gap = int(np.argmax(np.diff(np.log(values))))
    middle = float(np.sqrt(values[gap] * values[gap + 1]))
    return f"for example near {middle:,.0f} {unit} (between {values[gap]:,.0f} and {values[gap + 1]:,.0f})"


def _beyond(values: Floats, unit: str) -> str:
    return f"below {values[0] / 3:,.0f} or above {values[-1] * 3:,.0f} {unit}"
