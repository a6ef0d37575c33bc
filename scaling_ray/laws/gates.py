"""Gates: every reason not to believe a fitted law, as a plain sentence.

A gate gives a :class:`Refusal`: the reason, and the runs that would settle it. Any refusal of :func:`fit_gates` means
"refused", and a refused fit has no headline parameters; what :func:`fit_doubts` gives means "approximate". A floor of
zero is an answer; a parameter on the edge of a search is not.
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
from scaling_ray.laws.law import LACK_OF_FIT_P, Fitted
from scaling_ray.laws.noise import MIN_FREEDOM, drop_of
from scaling_ray.laws.rivals import Rival

MIN_SIZES, MIN_CELL_COUNTS = 4, 3
SIZE_EFFECT_P = 0.001
MAX_RATIO = 3.0

_AXIS_WORDS = {"params": ("sizes", "parameters"), "cells": ("data sizes", "training cells")}
AXIS_NOUNS = {"params": "size", "cells": "number of cells", "flops": "budget"}
"""What one value of an axis is called."""
_SYMBOLS = {"params": "P", "cells": "D", "flops": "C"}
_AXIS_WORDS |= {"flops": ("budgets", "FLOP")}


@dataclass(frozen=True)
class Refusal:
    """Why a law is refused, and what would settle it."""

    reason: str
    settles: str
    axis: str | None = None  # the axis whose exponent it speaks of; of every one where None
    spoils_losses: bool = False  # whether the losses themselves cannot be compared, so that no prediction holds either


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
                    f"only {values.size} {AXIS_NOUNS[axis] if values.size == 1 else plural} (anchor sizes left out), "
                    f"and an exponent needs at least {needs[axis]}",
                    f"{needs[axis] - values.size} or more further {plural}, {_between(values, unit)}",
                    axis,
                )
            )
    return refusals


def cannot_fix(form: Form, points: Points) -> Refusal:
    """Too few settings, or all on one line, for the parameters of the form."""
    return Refusal(
        f"{counted(points.n_settings, 'setting')} of distinct {' and '.join(form.axes) or 'axes'} cannot fix the "
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
                    "no setting was trained with two seeds (or too few were), and too few residuals are left over to "
                    f"stand in for the noise between runs ({MIN_FREEDOM} degrees of freedom are needed)",
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
                    axis,
                )
            )
    for i, name in enumerate(form.exponents):
        axis = form.axis_of(name)
        # Seeds narrow an interval only where noise and not misfit makes it wide.
        noisy = law.noise.variance is not None and law.width.variance == 1.0
        refusals += _exponent_gates(name, points.distinct(axis), axis, best, i, law.headline_interval(name), noisy)
    return refusals


def fit_doubts(law: Fitted) -> list[Refusal]:
    """What keeps an answer from being supported as a law: the widened intervals already hold it."""
    form, points, tests = law.form, law.points, law.tests
    if law.best is None or tests is None:
        return []
    doubts = []
    if tests.lack_of_fit_p is not None and tests.lack_of_fit_p < LACK_OF_FIT_P:
        drop = drop_of(points)
        share = float(np.sqrt(np.mean(law.residuals**2))) / drop
        wider = "the intervals are widened by it" if law.width.variance > 1 else "less than is allowed for anyway"
        doubts.append(
            Refusal(
                f"the means of settings depart from the form by {100 * share:.1f}% of the loss drop (root mean "
                f"square), more than the noise of the runs explains (lack of fit p = {tests.lack_of_fit_p:.2g}); "
                f"{wider}",
                "a look at the settings with the largest residuals: budget, learning rate, or a form that saturates",
            )
        )
    for name in form.exponents:
        axis = form.axis_of(name)
        plural, unit = _AXIS_WORDS[axis]
        moved = [refit for refit in law.refits if refit.exponent == name and refit.moved]
        if not any(refit.exponent == name for refit in law.refits):
            values = points.distinct(axis)
            doubts.append(
                Refusal(
                    f"{name} rests on {values.size} {plural}: none can be left out to test it, and other shapes than a "
                    "power fit so few as well",
                    f"a further one of {plural}, {_between(values, unit)}",
                    axis,
                )
            )
        if moved:
            doubts.append(
                Refusal(
                    f"{name} leans on single {plural}: without {listed([m.words for m in moved])} {unit} "
                    "it moves by more than the noise of the runs explains; the interval holds those fits",
                    f"{plural} next to those, {_between(points.distinct(axis), unit)}",
                    axis,
                )
            )
    return doubts


def rival_gates(law: Fitted, rivals: Sequence[Rival]) -> list[Refusal]:
    """Laws without a power that describe the settings as well: the exponent is then a choice of form."""
    refusals = []
    for name in law.form.exponents:
        axis, shown = law.form.axis_of(name), law.headline_interval(name)
        names = [
            rival.formula
            for rival in rivals
            if rival.preferred and rival.axis == axis and (rival.exponent is None or shown.excludes(rival.exponent))
        ]
        # Three values fit any shape: fit_doubts says so, and predictions are widened by the rivals all the same.
        if names and law.points.distinct(axis).size > MIN_CELL_COUNTS:
            plural, unit = _AXIS_WORDS[axis]
            verb = "describes" if len(names) == 1 else "describe"
            refusals.append(
                Refusal(
                    f"{listed(names)} {verb} the settings as well as a power of {_SYMBOLS[axis]}, so the runs do "
                    "not show an exponent; predictions are given between them",
                    f"{plural} {_beyond(law.points.distinct(axis), unit)}, where the laws part",
                    axis,
                )
            )
    return refusals


def _exponent_gates(
    name: str, values: Floats, axis: str, best: Solution, index: int, interval: Interval, noisy: bool
) -> list[Refusal]:
    plural, unit = _AXIS_WORDS[axis]
    edges = f"{EXPONENT_SEARCH[0]:g} to {EXPONENT_SEARCH[1]:g}"
    if best.at_search_edge(index):
        return [
            Refusal(
                f"{name} rests on the edge of its search ({edges}), so the value is the search's and not the runs'",
                f"{plural} {_beyond(values, unit)}",
                axis,
            )
        ]
    if interval.low is None or interval.high is None:
        side = "both sides" if interval.low is interval.high else "below" if interval.low is None else "above"
        return [
            Refusal(
                f"the interval of {name} is open ({side}) within {edges}: the runs do not bound it",
                f"{plural} {_beyond(values, unit)}, or more seeds per setting",
                axis,
            )
        ]
    ratio = interval.high / interval.low
    if ratio >= MAX_RATIO:
        times = max((np.log(ratio) / np.log(MAX_RATIO)) ** 2, 1.1)
        ends = f"{interval.low:.2g} to {interval.high:.2g}, whichever {AXIS_NOUNS[axis]} is left out"
        return [
            Refusal(
                f"the interval of {name} ({ends}) spans a factor {ratio:.2f}, and {MAX_RATIO:g} is the most that "
                "counts as an answer",
                (f"about {times:.1f} times the seeds, or " if noisy else "") + f"{plural} {_beyond(values, unit)}",
                axis,
            )
        ]
    return []


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 run", "3 runs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


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
