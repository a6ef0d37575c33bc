"""Evidence for a headline: its law at the sizes trained, residuals run by run, and fits that leave something out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ray.laws.law import Fitted
from scaling_ray.laws.points import Rows, at_cells
from scaling_ray.laws.predictions import HeldOut
from scaling_ray.laws.refits import Refit
from scaling_ray.laws.verdict import Judged

CURVE_PLACES = 41


def residuals(law: Fitted, rows: Rows) -> list[dict[str, Any]]:
    """Loss less the law's value for each run that it was fitted to, whatever its verdict; empty without estimates."""
    if law.best is None:
        return []
    found = []
    for i, loss in enumerate(rows["loss"]):
        place = {axis: float(rows[axis][i]) for axis in law.form.axes}
        predicted = law.form.loss_at(law.parameters, place)
        cells = float(rows["cells"][i]) if "cells" in rows else None
        entry: dict[str, Any] = {"row": int(rows["row"][i]), "params": float(rows["params"][i]), "cells": cells}
        if "run_id" in rows:
            entry["run_id"] = str(rows["run_id"][i])
        found.append(entry | {"predicted": predicted, "residual": float(loss) - predicted})
    return found


def curves(headline: Judged, rows: Rows) -> list[dict[str, Any]]:
    """An answered headline's law over the sizes trained at each number of cells; nothing where it is refused."""
    law = headline.law
    if not headline.answered or "params" not in law.form.axes:
        return []
    found = []
    for cells in np.unique(rows["cells"]).tolist() if "cells" in rows else [None]:
        params = at_cells(rows, cells)["params"]
        low, high = float(np.min(params)), float(np.max(params))
        sizes = [low * (high / low) ** (i / (CURVE_PLACES - 1)) for i in range(CURVE_PLACES)]
        data = {} if cells is None else {"cells": float(cells)}
        loss = [law.form.loss_at(law.parameters, {"params": size} | data) for size in sizes]
        found.append({"cells": cells, "params": sizes, "loss": loss})
    return found


def left_out(cells: float | None, law: Fitted, refit: Refit, names: Mapping[float, str]) -> dict[str, Any]:
    """One refit as ``leave_one_out`` of fit.json has it; ``without`` names the size or the number of cells."""
    first, last = refit.left_out[0], refit.left_out[-1]
    if refit.axis != "params":
        name = f"D = {refit.words}"
    elif first == last:
        name = names.get(first, f"{refit.words} parameters")
    else:
        name = " to ".join(names.get(value, f"{value:,.0f} parameters") for value in (first, last))
    return {
        "form": law.form.name,
        "cells": cells,
        "without": name,
        "axis": refit.axis,
        "left_out": list(refit.left_out),
        "parameters": {
            name: {"value": refit.values[name], "low": refit.intervals[name].low, "high": refit.intervals[name].high}
            for name in refit.values
        },
    }


def held_out(form: str, held: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """Each setting of the largest size as the smaller sizes predict it."""
    return [
        {
            "form": form,
            "params": one.params,
            "cells": one.cells,
            "observed": one.observed,
            "predicted": one.predicted,
            "low": one.low,
            "high": one.high,
            "covered": one.covered,
        }
        for one in held
    ]


def planted_floor(headline: Judged, rows: Rows) -> dict[str, Any] | None:
    """Whether the planted attainable floor contradicts the law's: a floor of the law may not lie below it."""
    floor = headline.law.form.floor
    if "attainable_loss" not in rows or floor is None:
        return None
    attainable = float(np.nanmean(rows["attainable_loss"]))
    if not headline.answered:
        return {"attainable": attainable, "verdict": "refused", "covered": None, "above": None}
    interval = headline.law.headline_interval(floor)
    above = interval.high is not None and attainable > interval.high
    found = {"attainable": attainable, "verdict": headline.verdict, "covered": not interval.excludes(attainable)}
    return found | {"above": above, "low": interval.low, "high": interval.high}
