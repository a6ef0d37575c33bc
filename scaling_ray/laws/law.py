"""One form fitted to one set of runs: estimates, intervals, refits, tests. Its verdict is in :mod:`verdict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_ray.laws.f_tests import Tests, f_tests
from scaling_ray.laws.fit import Points, Problem, Solution, gather
from scaling_ray.laws.forms import Form
from scaling_ray.laws.intervals import Interval, delta_t, profiles, union
from scaling_ray.laws.points import Rows
from scaling_ray.laws.refits import Refit, leave_one_out


@dataclass(frozen=True)
class Fitted:
    """A form on the runs of ``points``: estimates, both kinds of interval, refits and tests.

    ``best`` is None, and there are no estimates, where the settings cannot fix the parameters. ``tests`` is None where
    only estimates were asked for, or the form has no axis.
    """

    form: Form
    points: Points
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    deltas: Mapping[str, Interval]
    at_bound: Mapping[str, bool]
    refits: Sequence[Refit]
    tests: Tests | None
    best: Solution | None

    @property
    def problem(self) -> Problem:
        """The search that ``best`` came from."""
        return Problem(self.form, self.points)

    @property
    def aicc(self) -> float | None:
        """Small-sample AIC over distinct settings: seeds of one setting are no further evidence about the shape."""
        count, free = self.points.n_settings, len(self.form.parameters) + 1
        if self.best is None or count <= free + 1 or self.best.misfit_rss <= 0:
            return None
        return float(
            count * np.log(self.best.misfit_rss / count) + 2 * free + 2 * free * (free + 1) / (count - free - 1)
        )

    def headline_interval(self, name: str) -> Interval:
        """Union of the profile with those of the refits that left one size (or one number of cells) out."""
        return union([self.intervals[name], *(r.intervals[name] for r in self.refits if name in r.intervals)])


def fit_law(
    form: Form,
    rows: Rows,
    *,
    thorough: bool = True,
    points: Points | None = None,
    only: tuple[str, ...] | None = None,
) -> Fitted:
    """Fit a form to runs.

    Args:
        form: the law.
        rows: columns of the runs, each (R,).
        thorough: with refits and tests; else estimates and intervals of alpha and the floor only.
        points: the runs gathered with other weights, where the estimator is not plain least squares.
        only: parameters to find intervals of; all where None.
    """
    axes = {axis: rows[axis] for axis in form.axes}
    points = gather(axes, rows["loss"]) if points is None else points
    logs = [np.log(values) for values in points.axes.values()]
    rank = np.linalg.matrix_rank(np.stack([np.ones(points.n_settings), *logs], axis=1))
    if points.n_settings < len(form.parameters) or rank < 1 + len(form.axes):
        return Fitted(form, points, {}, {}, {}, {}, [], None, None)
    problem = Problem(form, points)
    best = problem.search()
    brief = tuple(name for name in form.parameters if name in ("alpha", form.floor))
    wanted = only or (form.parameters if thorough else brief)
    refits: list[Refit] = []
    if thorough:
        for exponent in form.exponents:
            refits += leave_one_out(form, axes, rows["loss"], exponent, wanted)
    return Fitted(
        form=form,
        points=points,
        parameters={name: problem.value(best, name) for name in form.parameters},
        intervals=profiles(problem, best, wanted),
        deltas=delta_t(problem, best),
        at_bound={name: best.at_search_edge(i) for i, name in enumerate(form.exponents)},
        refits=refits,
        tests=f_tests(problem, best) if thorough and form.axes else None,
        best=best,
    )
