"""Points of a law: the runs of a table that it is fitted to, and the reasons why others are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.errors import BadInput

Rows = Mapping[str, NDArray]
"""Runs as columns, each (R,)."""

ANCHORS = ("XXS",)
"""Names of sizes that no law uses and that are shown beside it; a size of width 1 is always one of them."""

NUMBERS = (
    "params",
    "params_without_embedding",
    "cells",
    "cells_seen",
    "loss",
    "val_loss",
    "final_val_loss",
    "flops",
    "width",
    "baseline_loss",
    "gaussian_loss",
    "attainable_loss",
    "bound_loss",
    "bound_z",
    "test_per_gene_bits",
    "count_bits",
    "nb_bits",
    "multinomial_bits",
    "beta_binomial_bits",
)
"""Columns that a law reads as numbers."""
WORDS = (
    "run_id",
    "role",
    "status",
    "failure",
    "size",
    "seed",
    "loss_unit",
    "undertrained",
    "lr_at_edge",
    "lr_check_ratio",
)
"""Columns that a law reads as they stand."""
_PROTOCOL = ("max_cells_seen", "lr")
_GONE_WITHOUT_VALUES = frozenset(
    ("baseline_loss", "gaussian_loss", "attainable_loss", "bound_loss", "bound_z", "final_val_loss", "val_loss")
)


@dataclass(frozen=True)
class Agreement:
    """Columns that must not differ within one law; those of ``by_size`` may follow the size and the data only."""

    within_law: tuple[str, ...] = ()
    by_size: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selected:
    """The finished runs of a table.

    A law is fitted to ``points``; ``everyone`` holds the anchor sizes too. ``excluded`` counts other runs by reason,
    ``diverged`` has ``params`` and ``cells`` of those of the grid that diverged. Both tables have a column ``row``: the
    row's number, from 1.
    """

    points: Rows
    everyone: Rows
    excluded: list[dict[str, Any]]
    diverged: Rows


def read_by_laws(agreement: Agreement) -> tuple[str, ...]:
    """Every column that a fit looks at."""
    return tuple(dict.fromkeys((*NUMBERS, *WORDS, *_PROTOCOL, *agreement.within_law, *agreement.by_size)))


def is_finished(role: Any, status: Any) -> bool:
    """Whether a run belongs to the grid and is done; a table that does not say has nothing but such runs."""
    return role in (None, "", "law") and status in (None, "", "done")


def is_anchor(size: str | None, width: float | None, anchors: Sequence[str] = ANCHORS) -> bool:
    """Whether a size is shown beside a law and never one of its points."""
    return size in anchors or (bool(anchors) and width == 1)


def select_points(columns: Mapping[str, Any], anchors: Sequence[str], agreement: Agreement) -> Selected:
    """Take the runs that a law can be fitted to out of a table.

    Raises:
        BadInput: a needed column is missing, columns differ in length, a number is none, a run stands there twice, or
            no run is left.
    """
    for name, meaning in (("params", "trainable parameters of each run"), ("loss", "its loss on held-out cells")):
        if name not in columns:
            raise BadInput("T003", name, sorted(columns), f"the table needs a column {name}; add it: {meaning}")
    names = [name for name in read_by_laws(agreement) if name in columns]
    count = len(columns["loss"])
    for name in names:
        if len(columns[name]) != count:
            raise BadInput(
                "T004", name, len(columns[name]), f"has another number of rows than loss ({count}); make them equal"
            )
    text = {name: np.array(["" if v is None else str(v) for v in columns[name]]) for name in names}
    excluded: list[dict[str, Any]] = []
    keep, diverged = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)

    def drop(mask: NDArray, reason: str) -> None:
        mask = mask & keep
        if np.any(mask):
            excluded.append({"reason": reason, "runs": int(mask.sum()), **_ids(text, mask)})
            keep[mask] = False

    if "role" in text:
        drop(np.isin(text["role"], ["rate"]), "learning-rate selection")
    if "status" in text:
        if "failure" in text:
            diverged = keep & (text["status"] == "failed") & (text["failure"] == "diverged")
            drop(diverged, "failed: diverged")
        for status in np.unique(text["status"][keep]):
            if status not in ("done", ""):
                drop(text["status"] == status, str(status))
    if "run_id" in text:
        ids, seen = np.unique(text["run_id"][keep & (text["run_id"] != "")], return_counts=True)
        if np.any(seen > 1):
            raise BadInput(
                "T005", "run_id", str(ids[seen > 1][0]), "stands in the table more than once; keep one row per run"
            )
    values = {name: _numbers(columns[name], name, keep) for name in NUMBERS if name in columns}
    for name in ("params", "loss", "cells"):
        if name in values:
            _refuse_bad(name, columns[name], np.flatnonzero(keep & ~(np.isfinite(values[name]) & (values[name] > 0))))
    sizes = text["size"] if "size" in text else [None] * count
    widths = values["width"] if "width" in values else [None] * count
    everyone = keep.copy()
    aside = np.array([is_anchor(size, width, anchors) for size, width in zip(sizes, widths, strict=True)])
    drop(aside, "anchor size, never a point")
    if not np.any(keep):
        raise BadInput(
            "T006", "table", count, "no finished run is left that could be a point of a law; finish some runs"
        )
    table = {name: values[name] if name in values else text[name] for name in names} | {"row": np.arange(count) + 1}
    axes = [name for name in ("params", "cells") if name in table and name in _known(table, keep)]
    lost: Rows = {str(name): table[name][diverged & ~aside] for name in axes}
    return Selected(_known(table, keep), _known(table, everyone), excluded, lost)


def _known(table: Rows, keep: NDArray) -> Rows:
    """The kept rows, without columns that hold no value in them."""
    rows = {name: values[keep] for name, values in table.items()}
    empty = [name for name in _GONE_WITHOUT_VALUES if name in rows and not np.any(np.isfinite(rows[name]))]
    return {name: values for name, values in rows.items() if name not in empty}


def _numbers(column: Sequence[Any], name: str, keep: NDArray) -> NDArray:
    """A column as float64 (R,), unknown values as NaN; BadInput for a value among ``keep`` that is no number."""
    values = np.full(len(column), np.nan)
    for i, value in enumerate(column):
        if value is None or value == "":
            continue
        try:
            values[i] = float(value)
        except (TypeError, ValueError) as error:
            if keep[i]:
                raise BadInput("T007", name, value, f"row {i + 1}: not a number; correct it") from error
    return values


def _refuse_bad(name: str, column: Sequence[Any], bad: NDArray) -> None:
    if not bad.size:
        return
    shown = ", ".join(str(i + 1) for i in bad[:8]) + (", ..." if bad.size > 8 else "")
    way_out = "correct it, or leave the row out"
    if name == "loss":
        way_out += " (a run that diverged: status failed, failure diverged)"
    what = f"row {shown}" if bad.size == 1 else f"rows {shown}"
    raise BadInput("T008", name, str(column[bad[0]]), f"{what}: must be a positive finite number; {way_out}")


def _ids(text: Rows, mask: NDArray) -> dict[str, Any]:
    if "run_id" in text:
        return {"run_ids": [str(v) for v in text["run_id"][mask]]}
    return {"rows": [int(i) + 1 for i in np.flatnonzero(mask)]}


def at_cells(rows: Rows, cells: float | None) -> Rows:
    """The runs with that number of training cells; all of them where None."""
    return rows if cells is None or "cells" not in rows else where(rows, rows["cells"] == cells)


def where(rows: Rows, mask: NDArray) -> Rows:
    """The runs of a mask (R,)."""
    return {name: values[mask] for name, values in rows.items()}


def size_names(rows: Rows) -> dict[float, str]:
    """Parameters of each size to its name: the table's, or the parameters themselves."""
    named = rows["size"] if "size" in rows else [f"{p:,.0f} parameters" for p in rows["params"]]
    return {float(params): str(name) for params, name in zip(rows["params"], named, strict=True)}


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
