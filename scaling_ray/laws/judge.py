"""One law on one set of runs, with everything that was asked of it, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_ray.laws import gates
from scaling_ray.laws.fit import Points, Problem, Solution, gather
from scaling_ray.laws.forms import Form
from scaling_ray.laws.intervals import OPEN, Interval, delta_t, profiles, union
from scaling_ray.laws.points import Rows
from scaling_ray.laws.refits import Refit, leave_one_out


@dataclass(frozen=True)
class Fitted:
    """A form on the runs of ``points``: estimates, both kinds of interval, refits, tests, and the gates that shut."""

    form: Form
    points: Points
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    deltas: Mapping[str, Interval]
    at_bound: Mapping[str, bool]
    refits: Sequence[Refit]
    shut: Sequence[gates.Shut]
    tests: gates.Tests
    best: Solution | None

    @property
    def verdict(self) -> str:
        """``supported`` or ``refused``."""
        return gates.verdict(self.shut)

    @property
    def problem(self) -> Problem:
        """The search that ``best`` came from."""
        return Problem(self.form, self.points)

    @property
    def aicc(self) -> float | None:
        """Small-sample AIC over distinct cells: seeds of one cell are no further evidence about the shape."""
        cells, free = self.points.n_cells, len(self.form.parameters) + 1
        if self.best is None or cells <= free + 1 or self.best.misfit_rss <= 0:
            return None
        return float(
            cells * np.log(self.best.misfit_rss / cells) + 2 * free + 2 * free * (free + 1) / (cells - free - 1)
        )

    def widest(self, name: str) -> Interval:
        """Union of the interval with those of the refits that left one size (or one number of cells) out."""
        return union([self.intervals[name], *(r.intervals[name] for r in self.refits if name in r.intervals)])


def judge(
    form: Form,
    rows: Rows,
    protocol: Sequence[gates.Shut],
    *,
    thorough: bool = True,
    points: Points | None = None,
    only: tuple[str, ...] | None = None,
) -> Fitted:
    """Fit a form to runs and judge it.

    Args:
        form: the law.
        rows: columns of the runs, each (R,).
        protocol: gates that the runs themselves already shut.
        thorough: with refits and the gates of the fit; else estimates and intervals of alpha and the floor only.
        points: the runs gathered with other weights, where the estimator is not plain least squares.
        only: parameters to find intervals of; all where None.
    """
    axes = {axis: rows[axis] for axis in form.axes}
    points = gather(axes, rows["loss"]) if points is None else points
    shut = list(gates.count_gates(form, points)) + list(protocol)
    empty = gates.Tests({}, None)
    logs = [np.log(values) for values in points.axes.values()]
    rank = np.linalg.matrix_rank(np.stack([np.ones(points.n_cells), *logs], axis=1))
    if points.n_cells < len(form.parameters) or rank < 1 + len(form.axes):
        shut.append(
            gates.Shut(
                f"{points.n_cells} cells of distinct {' and '.join(form.axes) or 'settings'} cannot fix the "
                f"{len(form.parameters)} parameters of {form.formula}",
                "further sizes" + (" crossed with further numbers of cells" if len(form.axes) > 1 else ""),
            )
        )
        return Fitted(form, points, {}, {}, {}, {}, [], shut, empty, None)
    problem = Problem(form, points)
    best = problem.search()
    parameters = {name: problem.value(best, name) for name in form.parameters}
    brief = tuple(n for n in form.parameters if n in ("alpha", form.floor))
    wanted = only or (form.parameters if thorough else brief)
    intervals = profiles(problem, best, wanted)
    at_bound = {name: best.at_search_edge(i) for i, name in enumerate(form.exponents)}
    refits: list[Refit] = []
    tests = empty
    if thorough and form.axes:
        for exponent in form.exponents:
            refits += leave_one_out(form, axes, rows["loss"], exponent, wanted)
        tests = gates.f_tests(problem, best)
        shut += gates.fit_gates(problem, best, intervals, refits, tests)
    deltas = delta_t(problem, best)
    return Fitted(form, points, parameters, intervals, deltas, at_bound, refits, shut, tests, best)


def parameter(fit: Fitted, name: str) -> dict[str, Any]:
    """Estimate, profile and Delta-t interval of one parameter, as fit.json has them."""
    interval, delta = fit.intervals.get(name, OPEN), fit.deltas.get(name, OPEN)
    return {
        "value": fit.parameters[name],
        "low": interval.low,
        "high": interval.high,
        "closed": interval.closed,
        "at_bound": fit.at_bound.get(name, False),
        "delta_low": delta.low,
        "delta_high": delta.high,
    }


def headline_parameter(fit: Fitted, name: str) -> dict[str, Any]:
    """The same, with the headline interval: profile and leave-one-out refits united."""
    widest = fit.widest(name)
    return parameter(fit, name) | {"widest_low": widest.low, "widest_high": widest.high}
