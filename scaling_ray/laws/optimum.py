"""Gains of the next step, and the best split of a budget: sentences and tables, only where a law is answered.

Nothing here goes further than one step of the sampled ladder, or twice its cells. The split of a budget comes twice:
from the law L(P, D) with exact FLOPs interpolated over the sizes, and from the minima of isoFLOP parabolas, which need
no law but are biased where the curve is not a parabola (arXiv 2603.22339), so that both stand side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import stdtrit

from scaling_ray.laws.fit import Floats
from scaling_ray.laws.intervals import Interval
from scaling_ray.laws.law import Fitted
from scaling_ray.laws.many import Design
from scaling_ray.laws.points import Rows
from scaling_ray.laws.verdict import Judged

MAX_STEP = 10.0
BUDGET_TOLERANCE = 0.1  # runs whose FLOPs differ by less are of one budget
MAX_EPOCHS = 4.0
DRAWS = 400


def next_steps(headline: Judged) -> list[dict[str, Any]]:
    """Loss gained by the next size, and by twice the cells, under an answered law, with intervals.

    The interval is the union of the widened one of the difference with those of the leave-one-out refits.

    Returns:
        entries with ``what``, ``from``, ``to``, ``gain`` (loss units), ``low``, ``high``, ``sentence``; empty for a
        refused fit.
    """
    fit = headline.law
    if not headline.answered or fit.best is None or fit.basin is None:
        return []
    here = {axis: float(np.max(fit.points.axes[axis])) for axis in fit.form.axes}
    steps: list[tuple[str, str, float]] = []
    if "params" in here:
        sizes = fit.points.distinct("params")
        ratio = float(np.exp(np.median(np.diff(np.log(sizes)))))
        steps.append(("the next size", "params", here["params"] * min(ratio, MAX_STEP)))
    if "cells" in here:
        steps.append(("twice the cells", "cells", 2.0 * here["cells"]))
    found = []
    for what, axis, to in steps:
        there = here | {axis: to}
        gain = fit.form.loss_at(fit.parameters, here) - fit.form.loss_at(fit.parameters, there)
        interval = _gain(fit, gain, here, there)
        noun = "parameters" if axis == "params" else "cells"
        text = f"{what.capitalize()} ({here[axis]:,.0f} to {to:,.0f} {noun}) would buy {gain:.4f} of loss"
        if interval.low is not None and interval.high is not None:
            text += f" ({interval.low:.4f} to {interval.high:.4f})"
        entry = {"what": what, "axis": axis, "from": here[axis], "to": to, "gain": gain, "unit": "loss"}
        found.append(entry | {"low": interval.low, "high": interval.high, "sentence": text + "."})
    return found


def _gain(fit: Fitted, gain: float, here: dict[str, float], there: dict[str, float]) -> Interval:
    """Interval of the loss at one place less that at another."""
    return fit.over_refits(gain, lambda basin: basin.difference(here, there))


def flops_per_cell(rows: Rows) -> tuple[Floats, Floats] | None:
    """Sizes (S,) and the exact FLOPs that one cell seen costs each, (S,); None where the table does not hold them."""
    if "flops" not in rows or "cells_seen" not in rows:
        return None
    known = np.isfinite(rows["flops"]) & np.isfinite(rows["cells_seen"]) & (rows["cells_seen"] > 0)
    sizes = np.unique(rows["params"][known & (rows["flops"] > 0)])
    if sizes.size < 2:
        return None
    each = [
        np.sum(rows["flops"][known & (rows["params"] == p)]) / np.sum(rows["cells_seen"][known & (rows["params"] == p)])
        for p in sizes
    ]
    return sizes, np.array(each)


def compute_optimal(headline: Judged, rows: Rows) -> dict[str, Any]:
    """Best size, cells and loss for budgets inside the sampled range, from an answered L(P, D) with T = D.

    Returns:
        ``reason`` (why there is none) or ``budgets``: entries of ``flops``, ``params``, ``cells_seen`` and ``loss``,
        each with ``value``, ``low``, ``high`` (the union of refits to simulated seed noise with those of
        leave-one-out laws), and ``inside``, false where the optimum lies on the edge of the sampled sizes or cells.
    """
    fit = headline.law
    if not headline.answered or fit.best is None or fit.form.name != "params_cells":
        return {"budgets": [], "reason": "these runs support no law of size and data"}
    costs = flops_per_cell(rows)
    if costs is None:
        return {"budgets": [], "reason": "the table has no exact FLOPs and cells seen of at least two sizes"}
    sizes, cells = fit.points.distinct("params"), fit.points.distinct("cells")
    grid = np.geomspace(sizes[0], sizes[-1], 401)
    cost = np.exp(np.interp(np.log(grid), np.log(costs[0]), np.log(costs[1])))
    budgets = np.geomspace(cost[0] * cells[0] * 3, cost[-1] * cells[-1] / 3, 5)
    laws = _simulated_laws(fit)
    best = np.array([fit.parameters[n] for n in ("E", "a", "alpha", "b", "beta")])
    without = [[r.values[n] for n in ("E", "a", "alpha", "b", "beta")] for r in fit.refits]
    found = []
    for budget in budgets:
        seen = budget / cost
        allowed = (seen >= cells[0]) & (seen <= cells[-1])
        if not np.any(allowed):
            continue
        p, t = grid[allowed], seen[allowed]
        centre = _split(best[None, :], p, t)[0]
        drawn, others = _split(laws, p, t), _split(np.array(without).reshape(-1, 5), p, t)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        if len(others):
            low, high = np.minimum(low, others.min(axis=0)), np.maximum(high, others.max(axis=0))
        entry: dict[str, Any] = {"flops": float(budget), "inside": bool(p[0] < centre[0] < p[-1])}
        for i, name in enumerate(("params", "cells_seen", "loss")):
            ends = (float(min(low[i], centre[i])), float(max(high[i], centre[i])))
            entry[name] = {"value": float(centre[i]), "low": ends[0], "high": ends[1]}
        found.append(entry)
    seen_more = "cells_seen" in rows and bool(np.nanmax(rows["cells_seen"] / rows["cells"]) > 1.5)
    note = "cells seen once (T = D)"
    if seen_more:
        note += "; these runs saw their cells more than once, so a first epoch is assumed to be worth its D"
    return {"budgets": found, "reason": None, "assumes": note}


def _simulated_laws(fit: Fitted) -> Floats:
    """Parameters (DRAWS, 5) of refits to the law plus seed noise, fixed seed; widened variance, Student's width."""
    assert fit.best is not None
    problem, points = fit.problem, fit.points
    freedom = max(fit.width.freedom, 1.0)
    noise = np.sqrt(fit.width.variance / points.weight)
    rng = np.random.default_rng(20260215)
    wide = rng.chisquare(freedom, (DRAWS, 1)) / freedom
    draws = rng.standard_normal((DRAWS, points.n_settings)) * noise / np.sqrt(wide)
    law = problem.predict(fit.best, points.axes)
    found = Design(fit.form, points.axes, points.weight).fit(law + draws)
    e, a, b = found.coefficients.T
    return np.stack([e, a, found.exponents[:, 0], b, found.exponents[:, 1]], axis=1)


def _split(laws: Floats, params: Floats, cells: Floats) -> Floats:
    """Best (P, T, loss) of each of N laws (N, 5) along one budget's curve: (N, 3)."""
    e, a, alpha, b, beta = (laws[:, i, None] for i in range(5))
    loss = e + a * params**-alpha + b * cells**-beta
    k = np.argmin(loss, axis=1)
    return np.stack([params[k], cells[k], loss[np.arange(len(laws)), k]], axis=1)


def iso_flop(rows: Rows) -> dict[str, Any]:
    """Minima of parabolas in log P through runs of equal FLOPs: P*, T* and loss of each budget, and P*'s growth.

    A budget needs four sizes (three fix a parabola and leave nothing to judge it), at most :data:`MAX_EPOCHS` epochs,
    and its vertex must lie inside the sizes; others are listed with the reason. Runs of more than one epoch flag it.
    """
    if "flops" not in rows or "cells_seen" not in rows:
        return {"budgets": [], "growth": None, "reason": "the table has no exact FLOPs and cells seen"}
    known = np.isfinite(rows["flops"]) & (rows["flops"] > 0) & (rows["cells_seen"] > 0)
    epochs = rows["cells_seen"] / rows["cells"] if "cells" in rows else np.ones(known.size)
    known &= ~(epochs > MAX_EPOCHS)
    order = np.flatnonzero(known)[np.argsort(rows["flops"][known], kind="stable")]
    groups: list[list[int]] = []
    for i in order:
        if groups and rows["flops"][i] <= rows["flops"][groups[-1][0]] * (1 + BUDGET_TOLERANCE):
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    vertices = [_vertex(rows, np.array(group), epochs) for group in groups]
    budgets = [vertex for vertex in vertices if vertex is not None]
    if not budgets:
        return {"budgets": [], "growth": None, "reason": "no budget was trained at four sizes within four epochs"}
    good = [b for b in budgets if b["reason"] is None]
    growth = None
    if len(good) >= 3:
        slope = np.polyfit(np.log([b["flops"] for b in good]), np.log([b["params"]["value"] for b in good]), 1)[0]
        growth = {"value": float(slope), "of": "P* ~ C^growth", "budgets": len(good)}
    return {"budgets": budgets, "growth": growth, "reason": None}


def _vertex(rows: Rows, group: np.ndarray, epochs: Floats) -> dict[str, Any] | None:
    params, loss = rows["params"][group], rows["loss"][group]
    if np.unique(params).size < 4:
        return None
    centre = float(np.mean(np.log(params)))
    x = np.log(params) - centre
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    solved = np.linalg.lstsq(design, loss, rcond=None)[0]
    entry: dict[str, Any] = {"flops": float(np.median(rows["flops"][group])), "runs": int(group.size)}
    entry["points"] = [[float(p), float(y)] for p, y in zip(params, loss, strict=True)]
    entry |= {"sizes": int(np.unique(params).size), "more_than_one_epoch": bool(np.any(epochs[group] > 1.0))}
    blank = {"params": None, "cells_seen": None, "loss": None}
    if solved[2] <= 0:
        return entry | blank | {"reason": "the losses of this budget have no minimum"}
    vertex = -solved[1] / (2 * solved[2])
    if not x.min() < vertex < x.max():
        return entry | blank | {"reason": "the minimum lies outside the sizes sampled at this budget"}
    low, high = _fieller(design, loss, solved)
    work = np.median(rows["flops"][group])
    per_cell = np.polyfit(x, np.log(rows["flops"][group] / rows["cells_seen"][group]), 1)
    ends = [None if end is None or not x.min() < end < x.max() else float(np.exp(end + centre)) for end in (low, high)]
    p_star = {"value": float(np.exp(vertex + centre)), "low": ends[0], "high": ends[1]}
    cells_seen = float(work / np.exp(np.polyval(per_cell, vertex)))
    lowest = float(solved[0] + solved[1] * vertex + solved[2] * vertex**2)
    return entry | {"params": p_star, "cells_seen": cells_seen, "loss": lowest, "reason": None}


def _fieller(design: Floats, loss: Floats, solved: Floats) -> tuple[float | None, float | None]:
    """95% interval of the vertex: where the slope is within noise of zero (Fieller); None where it is open."""
    freedom = len(loss) - 3
    if freedom < 1:
        return None, None
    variance = np.sum((loss - design @ solved) ** 2) / freedom
    covariance = np.linalg.inv(design.T @ design) * variance
    t2 = float(stdtrit(freedom, 0.975)) ** 2
    b, c = solved[1], solved[2]
    square = 4 * (c**2 - t2 * covariance[2, 2])
    linear = 4 * (b * c - t2 * covariance[1, 2])
    rest = b**2 - t2 * covariance[1, 1]
    inside = linear**2 - 4 * square * rest
    if square <= 0 or inside < 0:
        return None, None
    root = np.sqrt(inside)
    return float((-linear - root) / (2 * square)), float((-linear + root) / (2 * square))
