"""Predicted losses with a verdict of their own: no exponent is needed to say what the next size will do.

A prediction is the law's, widened as every shown interval is, and by each rival that describes the settings as well;
its interval is for the mean of as many runs as the settings have. It is given where the same procedure, without the
largest size, predicted that size within its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_ray.laws.forms import Form
from scaling_ray.laws.gates import AXIS_NOUNS, SIZE_EFFECT_P, counted
from scaling_ray.laws.intervals import OPEN, Interval
from scaling_ray.laws.law import fit_law
from scaling_ray.laws.points import Rows, where
from scaling_ray.laws.verdict import APPROXIMATE, REFUSED, SUPPORTED, Judged, judge

MAX_STEP = 10.0
_NOUNS = {"params": "parameters", "cells": "cells"}


@dataclass(frozen=True)
class HeldOut:
    """A setting of the largest size, predicted by a fit that never saw it; ``low``..``high`` is for its mean."""

    params: float
    cells: float | None
    observed: float
    predicted: float
    low: float | None
    high: float | None

    @property
    def covered(self) -> bool | None:
        """Whether the observed mean lies in the prediction interval (None where that is open)."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.observed <= self.high


def predict_at(judged: Judged, place: Mapping[str, float], runs: float) -> tuple[float, Interval]:
    """Predicted mean loss of ``runs`` runs at a place, and its 95% interval."""
    law = judged.law
    value, interval = law.loss_at(place)
    if interval.low is None or interval.high is None:
        return value, OPEN
    others = [rival.loss_in(place) for rival in judged.rivals if rival.as_good]
    low = min([interval.low, *(one.low for one in others if one.low is not None)])
    high = max([interval.high, *(one.high for one in others if one.high is not None)])
    reach = law.reach_of_mean(place, runs)
    low = value - float(np.hypot(value - min(low, value), reach))
    return value, Interval(max(low, 0.0), value + float(np.hypot(max(high, value) - value, reach)))


def hold_out_largest(form: Form, rows: Rows) -> list[HeldOut]:
    """Predict each setting of the largest size (or largest D) from the others; empty where those do not suffice."""
    axis = form.axes[0]
    largest = float(np.max(rows[axis]))
    kept = rows[axis] < largest
    if np.unique(rows[axis][kept]).size < 2:
        return []
    reduced = judge(fit_law(form, where(rows, kept), only=form.exponents), [])
    if reduced.law.best is None:
        return []
    held, unseen = [], where(rows, ~kept)
    keys = np.stack([unseen[name] for name in form.axes], axis=1)
    for key in np.unique(keys, axis=0):
        here = np.all(keys == key, axis=1)
        place = {name: float(value) for name, value in zip(form.axes, key, strict=True)}
        predicted, interval = predict_at(reduced, place, float(here.sum()))
        held.append(
            HeldOut(
                float(np.max(unseen["params"][here])),
                place.get("cells"),
                float(np.mean(unseen["loss"][here])),
                predicted,
                interval.low,
                interval.high,
            )
        )
    return held


def predict(judged: Judged, held: list[HeldOut], fixed: Mapping[str, float]) -> dict[str, Any]:
    """``headline.predictions``: a verdict, its reasons, and an entry per place.

    Args:
        judged: the headline's law.
        held: its largest size, held out.
        fixed: axes that the law does not read but its settings share (the cells of a law of size).

    Returns:
        ``verdict``, ``reasons``, ``held_out`` (covered and all settings) and ``entries``: ``what``, ``params``,
        ``cells``, ``value``, ``low``, ``high``, ``gain`` and ``verdict``; an interval wider than all that the sweep
        gained refuses its entry.
    """
    law = judged.law
    covered, total = sum(h.covered is True for h in held), len(held)
    found: dict[str, Any] = {"held_out": {"covered": covered, "settings": total}, "entries": []}
    reasons = _against(judged, held)
    if law.best is not None and law.width.allowed is not None and not any(r[0] for r in reasons):
        found["entries"] = _entries(judged, fixed)
    if not reasons and not any(entry["verdict"] != REFUSED for entry in found["entries"]):
        reasons.append((False, "every interval is wider than all that these runs gained"))
    supported = judged.verdict == SUPPORTED and not any(rival.as_good for rival in judged.rivals)
    verdict = REFUSED if reasons else SUPPORTED if supported else APPROXIMATE
    if reasons:
        found["entries"] = []
    return {"verdict": verdict, "reasons": [reason for _, reason in reasons]} | found


def _against(judged: Judged, held: list[HeldOut]) -> list[tuple[bool, str]]:
    """Reasons to give no prediction, each with whether the law cannot even be evaluated."""
    law = judged.law
    if law.best is None or law.width.allowed is None or law.tests is None:
        return [(True, "the settings cannot fix the parameters of a law and leave something over to judge it by")]
    blind = [refusal.reason for refusal in judged.refusals if refusal.spoils_losses]
    if blind:
        return [(True, reason) for reason in blind]
    still = [axis for axis, p in law.tests.effect_p.items() if p is not None and p >= SIZE_EFFECT_P]
    if len(still) == len(law.form.axes):
        return [(True, "no effect beyond the noise of the runs, so there is nothing to extrapolate")]
    if not held:
        return [(False, "the largest size cannot be held out: the others do not suffice to predict it")]
    if all(h.covered is None for h in held):
        return [(False, "too few sizes are left without the largest to test a prediction of it")]
    missed = [h for h in held if h.covered is not True]
    allowed = 0 if len(held) < 10 else int(0.1 * len(held))
    if len(missed) > allowed:
        return [
            (
                False,
                f"the largest {AXIS_NOUNS[law.form.axes[0]]}, held out, lay outside its predicted interval in "
                f"{len(missed)} of {counted(len(held), 'setting')}",
            )
        ]
    return []


def _entries(judged: Judged, fixed: Mapping[str, float]) -> list[dict[str, Any]]:
    law = judged.law
    points = law.points
    here = {axis: float(np.max(points.axes[axis])) for axis in law.form.axes}
    runs = float(np.median(points.runs))
    drop = float(np.max(points.loss) - np.min(points.loss))
    now, _ = law.loss_at(here)
    places: list[tuple[str, dict[str, float]]] = []
    if "params" in here:
        sizes = points.distinct("params")
        ratio = float(np.exp(np.median(np.diff(np.log(sizes)))))
        places.append(("the next size", here | {"params": here["params"] * min(max(ratio, 1.5), MAX_STEP)}))
        places.append(("ten times the largest size used", here | {"params": here["params"] * 10.0}))
    if "cells" in here:
        places.append(("twice the cells", here | {"cells": here["cells"] * 2.0}))
        if "params" not in here:
            places.append(("ten times the cells", here | {"cells": here["cells"] * 10.0}))
    entries = []
    for what, place in places:
        value, interval = predict_at(judged, place, runs)
        narrow = interval.low is not None and interval.high is not None and interval.high - interval.low < drop
        where_to = {name: place.get(name, fixed.get(name)) for name in ("params", "cells")}
        ends = {"low": interval.low, "high": interval.high, "runs": runs}
        text = None
        if interval.low is not None and interval.high is not None:
            axis = "cells" if "cells" in what else "params"
            other = "params" if axis == "cells" else "cells"
            beside = where_to[other]
            at = "" if beside is None else f" at {beside:,.0f} {_NOUNS[other]}"
            text = f"{what.capitalize()} ({place[axis]:,.0f} {_NOUNS[axis]}{at}): loss {value:.4g}, "
            text += f"{interval.low:.4g} to {interval.high:.4g} (95%)."
        entries.append(
            {"what": what, **where_to, "value": value, **ends, "gain": now - value}
            | {"verdict": REFUSED if not narrow else judged.verdict if judged.answered else APPROXIMATE}
            | {"sentence": text}
        )
    return entries
