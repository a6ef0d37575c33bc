"""Which rows of a table are points of a law, and which are not and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.errors import BadInput
from scaling_ray.laws.columns import numbers

Rows = dict[str, NDArray]

_NUMBERS: tuple[str, ...] = (
    "params",
    "params_without_embedding",
    "cells",
    "cells_seen",
    "loss",
    "validation_loss",
    "final_loss",
    "flops",
    "width",
)
_NUMBERS += ("baseline", "gaussian", "attainable", "bound", "bound_z")
_NUMBERS += ("per_gene_bits", "count_bits", "nb_bits", "multinomial_bits", "beta_binomial_bits")


def points_of(columns: Mapping[str, Any], baselines: Sequence[str]) -> tuple[Rows, list[dict[str, Any]], int]:
    """The runs that are points of a law, what was left out and why, and how many of the grid diverged."""
    for name, meaning in (("params", "trainable parameters of each run"), ("loss", "its loss on held-out cells")):
        if name not in columns:
            raise BadInput(name, sorted(columns), f"the table needs a column {name}: {meaning}")
    names = [name for name in columns if name != "columns_used"]
    count = len(columns["loss"])
    for name in names:
        if len(columns[name]) != count:
            raise BadInput(name, len(columns[name]), f"has another number of rows than loss ({count})")
    everything = np.ones(count, dtype=bool)
    text = {name: np.array(["" if v is None else str(v) for v in columns[name]]) for name in names}
    excluded, keep, diverged = [], everything.copy(), 0

    def drop(mask: NDArray, reason: str) -> None:
        mask = mask & keep
        if np.any(mask):
            excluded.append({"reason": reason, "runs": int(mask.sum()), **_ids(text, mask)})
            keep[mask] = False

    if "role" in text:
        drop(np.isin(text["role"], ["rate"]), "learning-rate selection")
    if "status" in text:
        if "failure" in text:
            failed = keep & (text["status"] == "failed") & (text["failure"] == "diverged")
            diverged = int(failed.sum())
            drop(failed, "failed: diverged")
        for status in np.unique(text["status"][keep]):
            if status not in ("done", ""):
                drop(text["status"] == status, str(status))
    if "run_id" in text:
        ids, seen = np.unique(text["run_id"][keep & (text["run_id"] != "")], return_counts=True)
        if np.any(seen > 1):
            raise BadInput("run_id", str(ids[seen > 1][0]), "stands in the table more than once; keep one row per run")
    values = {name: numbers(columns, name, keep) for name in _NUMBERS if name in columns}
    drop(_is_baseline(values, text, baselines), "baseline size, never a point")
    for name in ("params", "loss", *(n for n in ("cells",) if n in values)):
        bad = np.flatnonzero(keep & ~(np.isfinite(values[name]) & (values[name] > 0)))
        if bad.size:
            shown = ", ".join(str(i + 1) for i in bad[:8]) + (", ..." if bad.size > 8 else "")
            way_out = "correct it, or leave the row out"
            if name == "loss":
                way_out += " (a run that diverged: status failed, failure diverged)"
            what = f"row {shown}" if bad.size == 1 else f"rows {shown}"
            raise BadInput(name, str(columns[name][bad[0]]), f"{what}: must be a positive finite number; {way_out}")
    if not np.any(keep):
        raise BadInput("table", count, "no finished run is left that could be a point of a law")
    rows: Rows = {name: (values[name] if name in values else text[name])[keep] for name in names}
    for name in ("baseline", "gaussian", "attainable", "bound", "bound_z", "final_loss", "validation_loss"):
        if name in rows and not np.any(np.isfinite(rows[name])):
            del rows[name]
    return rows, excluded, diverged


def _is_baseline(values: Mapping[str, NDArray], text: Mapping[str, NDArray], baselines: Sequence[str]) -> NDArray:
    mask = np.zeros(len(values["loss"]), dtype=bool)
    if "size" in text:
        mask |= np.isin(text["size"], list(baselines))
    if "width" in values and baselines:
        mask |= values["width"] == 1
    return mask


def _ids(text: Mapping[str, NDArray], mask: NDArray) -> dict[str, Any]:
    if "run_id" in text:
        return {"run_ids": [str(v) for v in text["run_id"][mask]]}
    return {"rows": [int(i) + 1 for i in np.flatnonzero(mask)]}


def at_cells(rows: Rows, cells: float | None) -> Rows:
    """The runs with that number of training cells; all of them where None."""
    if cells is None or "cells" not in rows:
        return rows
    mask = rows["cells"] == cells
    return {name: values[mask] for name, values in rows.items()}


def where(rows: Rows, mask: NDArray) -> Rows:
    """The runs of a mask (R,)."""
    return {name: values[mask] for name, values in rows.items()}


def size_table(rows: Rows) -> list[dict[str, Any]]:
    """Each size with its runs and their mean loss."""
    table = []
    for params in np.unique(rows["params"]):
        here = rows["params"] == params
        name = str(rows["size"][here][0]) if "size" in rows else None
        losses = rows["loss"][here]
        table.append(
            {"size": name, "params": float(params), "runs": int(here.sum()), "mean_loss": float(losses.mean())}
        )
    return table
