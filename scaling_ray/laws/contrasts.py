"""What sizes and cells bought inside the grid, and what more of them can buy at most: answers that need no law.

Differences of mean losses between sizes at the same cells (or between cells at the same sizes), with intervals that
hold all at once (Bonferroni over all pairs) from the modelled noise between runs. An upper end is a bound, and not a
shrug: "from W8 on a larger model lowers the loss by at most 0.004".
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy.special import stdtrit

from scaling_ray.laws.fit import Floats, gather
from scaling_ray.laws.noise import drop_of, model_noise
from scaling_ray.laws.points import Rows

MOST_VALUES = 60
_WORDS = {"params": ("a larger model lowers", "sizes"), "cells": ("more cells lower", "numbers of cells")}


def contrasts(rows: Rows, axis: str, names: Mapping[float, str], residual: float | None) -> dict[str, Any]:
    """Contrasts along one axis, ``params`` or ``cells``.

    Args:
        rows: the runs.
        axis: along which values are compared; the other is held.
        names: value of the axis -> its name.
        residual: standard deviation of one run where no replicates show it; None where that is not known either.

    Returns:
        ``neighbours`` (``from``, ``to``, ``gain``, ``low``, ``high``); ``bounds`` (``from``, ``at_most``: by how much
        any larger value lowers the loss, ``up_to`` the largest that was compared); ``settled_from`` (the bound of the
        smallest value above which no gain is beyond noise); ``sentence``; and ``reason`` where there is none.
    """
    empty: dict[str, Any] = {"axis": axis, "neighbours": [], "bounds": [], "settled_from": None}
    keys = [name for name in ("params", "cells") if name in rows]
    if axis not in keys:
        return empty | {"sentence": None, "reason": f"the table has no column {axis}"}
    points = gather({name: rows[name] for name in keys}, rows["loss"])
    values, drop = points.distinct(axis), drop_of(points)
    if values.size < 2:
        return empty | {"sentence": None, "reason": f"there is one value of {axis} only"}
    if values.size > MOST_VALUES:
        return empty | {"sentence": None, "reason": f"{values.size} {_WORDS[axis][1]} are too many to compare pairwise"}
    noise = model_noise(points)
    known = noise.variance is not None
    freedom = noise.freedom
    variance: Floats | None = noise.variance / points.runs if noise.variance is not None else None
    if not known and residual is not None:
        variance, freedom = residual**2 / points.runs, 200.0
    other = [name for name in keys if name != axis]
    at = points.axes[other[0]] if other else np.zeros(points.n_settings)
    pairs = {}
    for i, j in combinations(range(values.size), 2):
        one = {float(at[k]): k for k in np.flatnonzero(points.axes[axis] == values[i])}
        two = {float(at[k]): k for k in np.flatnonzero(points.axes[axis] == values[j])}
        shared = sorted(set(one) & set(two))
        if shared:
            first, second = np.array([one[k] for k in shared]), np.array([two[k] for k in shared])
            gain = float(np.mean(points.loss[first] - points.loss[second]))
            sd = None
            if variance is not None:
                sd = float(np.sqrt(np.sum(variance[first] + variance[second]))) / len(shared)
            pairs[i, j] = (gain, sd)
    if not pairs:
        return empty | {"sentence": None, "reason": f"no two {_WORDS[axis][1]} were trained under the same conditions"}
    reach = float(stdtrit(freedom, 1 - 0.025 / len(pairs))) if variance is not None else None

    def entry(i: int, j: int) -> dict[str, Any]:
        gain, sd = pairs[i, j]
        wide = None if sd is None or reach is None else reach * sd
        ends = (None, None) if wide is None else (gain - wide, gain + wide)
        named = {"from": float(values[i]), "to": float(values[j]), "from_name": names.get(float(values[i]))}
        named["to_name"] = names.get(float(values[j]))
        return named | {"gain": gain, "low": ends[0], "high": ends[1]}

    neighbours = [entry(i, i + 1) for i in range(values.size - 1) if (i, i + 1) in pairs]
    bounds, settled = [], None
    for i in range(values.size - 1):
        above = [entry(i, j) for j in range(i + 1, values.size) if (i, j) in pairs]
        highs = [e["high"] for e in above if e["high"] is not None]
        if not above or not highs:
            continue
        bound = {"from": float(values[i]), "from_name": names.get(float(values[i])), "at_most": max(0.0, *highs)}
        bound["up_to"] = max(e["to"] for e in above)
        bounds.append(bound)
        # A bound that leaves half of all that was gained is a shrug, unless nothing was gained beyond noise at all.
        if settled is None and not any(e["low"] > 0 for e in above) and (i == 0 or bound["at_most"] <= 0.5 * drop):
            settled = bound
    found = {"axis": axis, "neighbours": neighbours, "bounds": bounds, "settled_from": settled, "reason": None}
    return found | {"sentence": _sentence(axis, neighbours, settled, names)}


def _sentence(
    axis: str, neighbours: list[dict[str, Any]], settled: dict[str, Any] | None, names: Mapping[float, str]
) -> str | None:
    does = _WORDS[axis][0]
    rises = [step for step in neighbours if step["high"] is not None and step["high"] < 0]
    raised = ""
    if rises:
        up = rises[-1]
        steps = f"{_named(axis, up['from'], names)} to {_named(axis, up['to'], names)}"
        raised = f" {steps} raised it by {-up['gain']:.3g} ({-up['high']:.3g} to {-up['low']:.3g}, 95%)."
    if settled is not None:
        name = _named(axis, settled["from"], names)
        top = _named(axis, settled["up_to"], names)
        if settled["at_most"] <= 0:
            return f"From {name} up to {top} nothing lowered the loss.{raised}"
        return f"From {name} up to {top} {does} the loss by at most {settled['at_most']:.2g} (95%).{raised}"
    if not neighbours:
        return None
    last = neighbours[-1]
    step = f"The last step, {_named(axis, last['from'], names)} to {_named(axis, last['to'], names)}, "
    if last["low"] is None:
        return f"{step}changed the loss by {-last['gain']:+.3g}; with too few repeated settings it has no interval."
    if last in rises:
        return raised.strip().replace(" raised it by", " raised the loss by")
    return f"{step}lowered the loss by {last['gain']:.3g} ({last['low']:.3g} to {last['high']:.3g}, 95%).{raised}"


def _named(axis: str, value: float, names: Mapping[float, str]) -> str:
    return names[value] if value in names else f"{value:,.0f} {'cells' if axis == 'cells' else 'parameters'}"
