"""Gates: every reason not to believe a fitted law, as a plain sentence.

A gate gives a :class:`Refusal`: the reason, and the runs that would settle it. Any refusal means "refused", and a
refused fit has no headline parameters. A floor of zero is an answer; a parameter on the edge of a search is not.
Refusals by the runs' protocol, which no choice of law can mend, are in :mod:`protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_ray.laws.fit import Floats, Points, Solution
from scaling_ray.laws.forms import EXPONENT_SEARCH, Form
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.law import Fitted

MIN_SIZES, MIN_CELL_COUNTS = 4, 3
SIZE_EFFECT_P, LACK_OF_FIT_P = 0.001, 0.01
MAX_RATIO = 3.0
SEARCH_ERROR = 1e-5

_AXIS_WORDS = {"params": ("sizes", "parameters"), "cells": ("data sizes", "training cells")}
_AXIS_WORDS |= {"flops": ("budgets", "FLOP")}


@dataclass(frozen=True)
class Refusal:
    """Why a law is refused, and what would settle it."""

    reason: str
    settles: str


def count_gates(form: Form, points: Points) -> list[Refusal]:
    """Too few sizes, or too few distinct numbers of cells, to determine an exponent at all."""
    refusals = []
    needs = {"params": MIN_SIZES, "cells": MIN_CELL_COUNTS, "flops": MIN_SIZES}
    for axis in form.axes:
        values = points.distinct(axis)
        if values.size < needs[axis]:
            plural, unit = _AXIS_WORDS[axis]
            refusals.append(
                Refusal(
                    f"only {values.size} {plural} (anchor sizes left out), and an exponent needs at least "
                    f"{needs[axis]}",
                    f"{needs[axis] - values.size} or more further {plural}, {_between(values, unit)}",
                )
            )
    return refusals


def cannot_fix(form: Form, points: Points) -> Refusal:
    """Too few settings, or all on one line, for the parameters of the form."""
    return Refusal(
        f"{points.n_settings} settings of distinct {' and '.join(form.axes) or 'axes'} cannot fix the "
        f"{len(form.parameters)} parameters of {form.formula}",
        "further sizes" + (" crossed with further numbers of cells" if len(form.axes) > 1 else ""),
    )


def choices_gate(alphas: Sequence[Mapping[str, Any]]) -> list[Refusal]:
    """Declared choices of equal standing that lead to different exponents; ``alphas`` have ``value`` (or None)."""
    values = [float(alpha["value"]) for alpha in alphas if alpha["value"] is not None]
    if len(values) < 2 or max(values) / min(values) < MAX_RATIO:
        return []
    return [
        Refusal(
            f"declared choices disagree: alpha runs from {min(values):.2g} to {max(values):.2g} over choices of equal "
            f"standing, a factor of {max(values) / min(values):.1f}",
            "more sizes at both ends, so that no single size decides",
        )
    ]


def fit_gates(law: Fitted) -> list[Refusal]:
    """Refusals by the fit itself; none for a law that was fitted without tests."""
    form, points, best, tests = law.form, law.points, law.best, law.tests
    if best is None or tests is None:
        return []
    refusals = []
    for axis, p in tests.effect_p.items():
        plural, unit = _AXIS_WORDS[axis]
        what = {"params": "size", "cells": "data", "flops": "compute"}[axis]
        if p is None:
            refusals.append(
                Refusal(
                    "no setting was trained with two seeds, so the noise between runs is unknown",
                    "at least 2, better 3 seeds per setting",
                )
            )
            break
        if p >= SIZE_EFFECT_P:
            refusals.append(
                Refusal(
                    f"the effect of {what} is within the noise of the runs (F-test p = {p:.2g}, "
                    f"needed below {SIZE_EFFECT_P:g})",
                    f"{plural} further apart, {_beyond(points.distinct(axis), unit)}, or more seeds per setting",
                )
            )
    for i, name in enumerate(form.exponents):
        axis = form.axis_of(name)
        refusals += _exponent_gates(name, points.distinct(axis), axis, best, i, law.intervals[name])
    if tests.lack_of_fit_p is not None and tests.lack_of_fit_p < LACK_OF_FIT_P:
        refusals.append(
            Refusal(
                f"the form does not fit: the means of settings depart from it by more than the noise of the runs "
                f"explains (lack of fit p = {tests.lack_of_fit_p:.2g}, needed above {LACK_OF_FIT_P:g})",
                "a look at the settings with the largest residuals: budget, learning rate, or a form that saturates",
            )
        )
    for name in form.exponents:
        estimate = law.parameters[name]
        own = [refit for refit in law.refits if refit.exponent == name and refit.bonferroni.excludes(estimate)]
        # Without noise intervals have no width, and the searches' own last digits would lie outside.
        moved = [refit for refit in own if abs(refit.values[name] / estimate - 1.0) > SEARCH_ERROR]
        if moved:
            plural, unit = _AXIS_WORDS[form.axis_of(name)]
            refusals.append(
                Refusal(
                    f"{name} hangs on single {plural}: without {listed([f'{m.left_out:,.0f}' for m in moved])} {unit} "
                    f"the interval excludes the value of all",
                    f"{plural} next to those, {_between(points.distinct(form.axis_of(name)), unit)}",
                )
            )
    return refusals


def _exponent_gates(
    name: str, values: Floats, axis: str, best: Solution, index: int, interval: Interval
) -> list[Refusal]:
    plural, unit = _AXIS_WORDS[axis]
    edges = f"{EXPONENT_SEARCH[0]:g} to {EXPONENT_SEARCH[1]:g}"
    if best.at_search_edge(index):
        return [
            Refusal(
                f"{name} rests on the edge of its search ({edges}), so the value is the search's and not the runs'",
                f"{plural} {_beyond(values, unit)}",
            )
        ]
    if interval.low is None or interval.high is None:
        side = "both sides" if interval.low is interval.high else "below" if interval.low is None else "above"
        return [
            Refusal(
                f"the 95% interval of {name} is open ({side}) within {edges}: the runs do not bound it",
                f"{plural} {_beyond(values, unit)}, or more seeds per setting",
            )
        ]
    ratio = interval.high / interval.low
    if ratio >= MAX_RATIO:
        seeds = (np.log(ratio) / np.log(MAX_RATIO)) ** 2
        return [
            Refusal(
                f"the 95% interval of {name} spans a factor {ratio:.1f}, and {MAX_RATIO:g} is the most that counts as "
                f"an answer",
                f"about {max(seeds, 1.1):.1f} times the seeds, or {plural} {_beyond(values, unit)}",
            )
        ]
    return []


def listed(names: Sequence[str]) -> str:
    """Names as a part of a sentence: "a, b and c"."""
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
