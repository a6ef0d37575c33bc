"""The same fit without a part of the runs: each size in turn, or the largest size predicted before it is fitted.

A bootstrap of seeds cannot see that the form is wrong, or that the largest size was undertrained: every resample
shares the fault. Leaving one size out can, because the sizes disagree then. The shown interval is therefore the
union of the widened interval with those of the refits, of the same variance. A size counts by the part of its variance
that is misfit: noise moves a refit as well, and what noise does stands in the interval of all runs already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri

from scaling_ray.laws.fit import Floats, Points, Solution
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.valley import Scan, Valley

MOST_REFITS, MIN_VALUES = 12, 3


@dataclass(frozen=True)
class Basin:
    """The laws whose misfit is at most ``limit``, for one weighting of the settings."""

    valley: Valley
    scan: Scan
    weight: Floats
    limit: float
    misfit: float
    logs: Floats  # (q,) of the best exponents

    def interval(self, name: str) -> Interval:
        """Range of a parameter; an end that the edge of the search made is open."""
        if name in self.valley.names:
            i = self.valley.names.index(name)
            return self.valley.exponent(self.scan, i, self.limit, float(self.logs[i]))
        combined = self.valley.parameter_weights(self.scan, name)
        return self.valley.ends(self.scan, self.weight, combined, self.limit, open_at_edge=True)

    def value(self, name: str) -> float:
        """A parameter of the best law."""
        if name in self.valley.names:
            return float(np.exp(self.logs[self.valley.names.index(name)]))
        return self.valley.value(self.scan, self.valley.parameter_weights(self.scan, name))

    def best_loss_at(self, place: Mapping[str, float]) -> float:
        """Loss of the best law at a place."""
        return self.valley.value(self.scan, self.valley.place_weights(self.scan, place))

    def loss_at(self, place: Mapping[str, float]) -> Interval:
        """Range of the loss at a place (axis -> value)."""
        combined = self.valley.place_weights(self.scan, place)
        return self.valley.ends(self.scan, self.weight, combined, self.limit, open_at_edge=False)

    def difference(self, place: Mapping[str, float], other: Mapping[str, float]) -> Interval:
        """Range of the loss at one place less that at another."""
        one, two = (self.valley.place_weights(self.scan, p) for p in (place, other))
        combined = (one[0] - two[0], one[1] - two[1], one[2] - two[2])
        return self.valley.ends(self.scan, self.weight, combined, self.limit, open_at_edge=False)


def descend(valley: Valley, points: Points, weight: Floats, allowed: float, *, at: Solution | None = None) -> Basin:
    """The basin of a weighting (S,), up to ``allowed`` above its lowest misfit (found here unless ``at`` has it)."""
    coarse = valley.whole(points.loss, weight)
    if at is None:
        misfit, logs = valley.minimum(points.loss, weight, coarse)
    else:
        misfit, logs = at.misfit_rss, np.log(at.exponents)
    limit = misfit + allowed
    scan = valley.below(points.loss, weight, coarse, logs, limit)
    return Basin(valley, scan, weight, limit, misfit, logs)


@dataclass(frozen=True)
class Refit:
    """The fit with one value of an axis (of very many, a twelfth of them) left out, and its widened intervals.

    ``share`` is the part of what is left out that counts (0 to 1). ``moved`` says that the noise between runs does not
    explain how far the exponent went: that of all runs lies outside the refit's statistical interval at 1 - 0.05 /
    refits.
    """

    axis: str
    left_out: tuple[float, ...]
    exponent: str
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    share: float
    moved: bool
    basin: Basin

    @property
    def words(self) -> str:
        """What is left out, as a part of a sentence: "8,192", or "8,192 to 65,536" of neighbours that went together."""
        first, last = self.left_out[0], self.left_out[-1]
        return f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}"

    def counted(self, whole: float, interval: Interval) -> Interval:
        """The part of an interval of this refit that counts, seen from the value ``whole`` of all runs.

        An end that the refit leaves open stays open where misfit is the larger part of the variance.
        """
        low, high = interval.low, interval.high
        if self.share < 0.5:
            low, high = whole if low is None else low, whole if high is None else high
        ends = [None if end is None else whole + self.share * (end - whole) for end in (low, high)]
        return Interval(ends[0], ends[1])

    def counted_exponent(self, whole: float, interval: Interval) -> Interval:
        """The same on the logarithm of an exponent."""
        logs = Interval(*(None if end is None else float(np.log(end)) for end in (interval.low, interval.high)))
        found = self.counted(float(np.log(whole)), logs)
        return Interval(*(None if end is None else float(np.exp(end)) for end in (found.low, found.high)))


def leave_one_out(
    valley: Valley,
    points: Points,
    exponent: str,
    names: tuple[str, ...],
    allowed: float,
    statistical: float | None,
    shares: Floats,
    best: Solution,
) -> list[Refit]:
    """Refit without each value of ``exponent``'s own axis in turn; ``shares`` (S,) of the settings' variances count.

    Empty where a refit would leave fewer settings than parameters, or fewer than three values of the axis: two fix no
    exponent beside a floor, so such refits would say nothing of these runs.
    """
    form, axis = valley.form, valley.form.axis_of(exponent)
    values = points.distinct(axis)
    # Other people's tables may hold hundreds of distinct values: neighbours are then left out together.
    groups = np.array_split(values, min(values.size, MOST_REFITS))
    wider = float(fdtri(1, 200, 1 - 0.05 / len(groups)) / fdtri(1, 200, 0.95))
    index = form.exponents.index(exponent)
    whole = float(np.log(best.exponents[index]))
    refits = []
    for group in groups:
        kept = ~np.isin(points.axes[axis], group)
        if np.count_nonzero(kept) < len(form.parameters) or np.unique(points.axes[axis][kept]).size < MIN_VALUES:
            return []
        basin = descend(valley, points, points.weight * kept, allowed)
        refits.append(
            Refit(
                axis,
                tuple(float(value) for value in group),
                exponent,
                {name: basin.value(name) for name in names},
                {name: basin.interval(name) for name in names},
                float(np.mean(shares[~kept])),
                statistical is not None and _has_moved(basin, points, index, whole, statistical * wider),
                basin,
            )
        )
    return refits


def _has_moved(basin: Basin, points: Points, index: int, whole: float, allowed: float) -> bool:
    """Whether the exponent of all runs (a logarithm) costs the refit more than ``allowed``."""
    if abs(basin.logs[index] - whole) < 1e-5:
        return False
    valley = basin.valley
    grids = [
        np.linspace(max(log - 0.5, low), min(log + 0.5, high), 81)
        for log, (low, high) in zip(basin.logs, valley.ranges, strict=True)
    ]
    grids[index] = np.array([whole])
    held = valley.scan(points.loss, basin.weight, grids)
    return bool(held.along(index)[0] - basin.misfit > allowed)
