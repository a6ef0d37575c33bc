"""From a table of runs to ``fit.json``: the verdict first, then its evidence.

``fit_table`` is the one public way in. The shape of the table decides which law it fits, never the outcome:
with at least three numbers of cells the headline is L(P, D), otherwise L(P) with a floor at the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaling_ray.laws import entries, evidence, gates, optimum, units
from scaling_ray.laws.choices import declared_choices
from scaling_ray.laws.forms import (
    CELLS_LOG,
    CONSTANT,
    PARAMS_CELLS,
    POWER,
    POWER_FLOOR,
    POWER_FLOOR_FLOPS,
    POWER_FLOPS,
)
from scaling_ray.laws.gates import Refusal
from scaling_ray.laws.law import fit_law
from scaling_ray.laws.points import (
    ANCHORS,
    Agreement,
    Rows,
    Selected,
    at_cells,
    is_finished,
    read_by_laws,
    select_points,
    size_names,
    size_table,
    where,
)
from scaling_ray.laws.protocol import diverged_gate, leak_test, protocol_gates
from scaling_ray.laws.verdict import Judged, judge

FORMAT = 3
MANY_CELL_COUNTS = 12
CONDITIONAL_ON = (
    "Intervals are 95% F-profiles over the noise between seeds, conditional on this split: the held-out donors, "
    "genes and masks stay as they are. The headline interval is the union of the profile with those of the fits that "
    "leave one size (or one number of cells) out."
)
AICC_NOTE = (
    "AICc compares shapes of the same settings, counts sizes and not rows, and never rescues an exponent that a gate "
    "refuses."
)


def fit_table(
    columns: Mapping[str, Any],
    *,
    agreement: Agreement,
    anchors: Sequence[str] = ANCHORS,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fit laws to a table of runs and judge them; the result is the content of ``fit.json``.

    Args:
        columns: name -> values (R,), one entry per run. Needed: ``params`` and ``loss``. Read where there: ``cells``
            (unique training cells), what :data:`~scaling_ray.laws.points.NUMBERS` and ``WORDS`` name beside these,
            and whatever ``agreement`` names. An entry ``columns_used`` (name -> its source) is repeated.
        agreement: which columns may not differ within one law.
        anchors: names of sizes that are shown beside a law and never are its points; one of width 1 always is.
        progress: called with one line before each fit.

    Raises:
        BadInput: a needed column is missing, columns differ in length, or a number is none.
    """
    say = progress or (lambda line: None)
    runs = select_points(columns, anchors, agreement)
    rows = runs.points
    d_values = np.unique(rows["cells"]) if "cells" in rows else np.array([])
    protocol = protocol_gates(rows, agreement) + diverged_gate(runs.diverged)

    fitted: list[tuple[float | None, Judged]] = []
    for cells in _counts_to_fit(rows, d_values):
        here = at_cells(rows, cells)
        gates_here = protocol_gates(here, agreement) + diverged_gate(runs.diverged)
        for form in (CONSTANT, POWER, POWER_FLOOR):
            say(f"fitting {form.formula}" + ("" if cells is None else f" at {cells:,.0f} cells"))
            fitted.append((cells, judge(fit_law(form, here), gates_here)))
    if d_values.size >= 2:
        say(f"fitting {PARAMS_CELLS.formula}")
        fitted.append((None, judge(fit_law(PARAMS_CELLS, rows), protocol)))
    say("fitting the declared choices")
    choices = declared_choices(runs)
    chosen = len(fitted) - 1
    if d_values.size == 2:
        chosen -= 1  # two numbers of cells do not carry a term of their own
    cells, head = fitted[chosen]
    disagreement = gates.choices_gate(
        [c["alpha"] for c in choices if c["defensible"] and c["n_sizes"] >= gates.MIN_SIZES]
    )
    head = replace(head, refusals=[*head.refusals, *disagreement])
    fitted[chosen] = (cells, head)
    here = at_cells(rows, cells)
    say("fitting the other shapes and estimators")
    shapes = _in_compute(rows, d_values, protocol) + _against_cells(rows, d_values, protocol)
    fits = entries.with_aicc(fitted) + [entries.entry(at, judged) for at, judged in shapes]
    fits += [elbow for at, judged in fitted if (elbow := entries.elbow_entry(at, judged)) is not None]
    fits += entries.other_estimators(cells, head, here)
    names = size_names(rows)
    left_out = [
        evidence.left_out(at, judged.law, refit, names) | {"headline": judged is head}
        for at, judged in fitted
        for refit in judged.law.refits
    ]
    loss_unit = _loss_unit(rows)
    return {
        "format": FORMAT,
        "headline": entries.headline(cells, head),
        "loss_unit": loss_unit,
        "choices": choices,
        "fits": fits,
        "baselines": _baselines(rows),
        "anchors": size_table(_anchors(runs)),
        "leave_one_out": left_out,
        "held_out_largest": evidence.held_out(head.law, here),
        "residuals": evidence.residuals(head.law, here),
        "curves": evidence.curves(head, here),
        "leak_test": leak_test(runs.everyone),
        "next_steps": optimum.next_steps(head),
        "compute_optimal": optimum.compute_optimal(head, here),
        "iso_flop": optimum.iso_flop(rows),
        "planted_floor": evidence.planted_floor(head, here),
        "units": units.size_units(rows, loss_unit),
        "points": {"runs": len(rows["loss"]), "sizes": size_table(rows), "cells": [float(d) for d in d_values]},
        "excluded": runs.excluded,
        "notes": [CONDITIONAL_ON, AICC_NOTE, *_notes(rows)],
        "columns_used": _columns_used(columns, agreement),
    }


def nothing_to_fit(reason: str, columns: Mapping[str, Any], agreement: Agreement) -> dict[str, Any]:
    """The content of ``fit.json`` for a table that :func:`fit_table` cannot take: refused, for that reason."""
    head: dict[str, Any] = {"verdict": "refused", "reasons": [f"there is nothing to fit ({reason})"]}
    head |= {"settles": ["runs that finish"], "form": POWER_FLOOR.name, "formula": POWER_FLOOR.formula, "cells": None}
    blank = {"budgets": [], "reason": "there is nothing to fit"}
    return {
        "format": FORMAT,
        "headline": head,
        "loss_unit": None,
        **{name: [] for name in ("choices", "fits", "anchors", "leave_one_out", "held_out_largest", "residuals")},
        **{name: [] for name in ("curves", "next_steps", "excluded", "notes")},
        "baselines": {"by_cells": []},
        "leak_test": _leak_test_of(columns),
        "compute_optimal": blank,
        "iso_flop": blank | {"growth": None},
        "planted_floor": None,
        "units": {"names": {}, "conditional_on": None, "by_setting": []},
        "points": {"runs": 0, "sizes": [], "cells": []},
        "columns_used": _columns_used(columns, agreement),
    }


def _leak_test_of(columns: Mapping[str, Any]) -> dict[str, Any] | None:
    """The leak test of a table's finished runs; it needs no law."""
    if "bound_z" not in columns:
        return None
    count = len(columns["bound_z"])
    unsaid = [None] * count
    state = zip(columns.get("role", unsaid), columns.get("status", unsaid), strict=True)
    finished = [i for i, (role, status) in enumerate(state) if is_finished(role, status)]
    scores = np.array([np.nan if columns["bound_z"][i] is None else float(columns["bound_z"][i]) for i in finished])
    names = columns.get("run_id", unsaid)
    return leak_test({"bound_z": scores, "run_id": np.array([str(names[i]) for i in finished])})


def _columns_used(columns: Mapping[str, Any], agreement: Agreement) -> dict[str, str]:
    read = [name for name in read_by_laws(agreement) if name in columns]
    return {name: dict(columns["columns_used"])[name] if "columns_used" in columns else name for name in read}


def _loss_unit(rows: Rows) -> str | None:
    """The unit that every point's loss is in; None where the table does not say, or says several."""
    units_found = set(rows["loss_unit"].astype(str).tolist()) if "loss_unit" in rows else set()
    return units_found.pop() or None if len(units_found) == 1 else None


def _counts_to_fit(rows: Rows, d_values: np.ndarray) -> Sequence[float | None]:
    """Numbers of cells that get laws of size of their own; of very many, those with sizes enough for an exponent."""
    if not d_values.size:
        return [None]
    if d_values.size <= MANY_CELL_COUNTS:
        return [float(d) for d in d_values]
    sizes = {d: np.unique(rows["params"][rows["cells"] == d]).size for d in d_values}
    return [float(d) for d in d_values if sizes[d] >= gates.MIN_SIZES][-MANY_CELL_COUNTS:]


def _in_compute(rows: Rows, d_values: np.ndarray, protocol: Sequence[Refusal]) -> list[tuple[float | None, Judged]]:
    """The laws of size again, with exact FLOPs as the axis: the sizes at the largest number of cells."""
    largest = float(d_values[-1]) if d_values.size else None
    here = at_cells(rows, largest)
    if "flops" not in here or not np.all(np.isfinite(here["flops"]) & (here["flops"] > 0)):
        return []
    # Early stopping gives each seed FLOPs of its own; runs of a size share their mean, so that seeds show the noise.
    flops = np.array([np.mean(here["flops"][here["params"] == p]) for p in here["params"]])
    forms = (POWER_FLOPS, POWER_FLOOR_FLOPS)
    return [(largest, judge(fit_law(form, {**here, "flops": flops}), protocol)) for form in forms]


def _against_cells(rows: Rows, d_values: np.ndarray, protocol: Sequence[Refusal]) -> list[tuple[float | None, Judged]]:
    """Loss against the logarithm of the cells, for the largest size."""
    if d_values.size < gates.MIN_CELL_COUNTS:
        return []
    here = where(rows, rows["params"] == np.max(rows["params"]))
    return [(None, judge(fit_law(CELLS_LOG, here), protocol))]


def _baselines(rows: Rows) -> dict[str, Any]:
    """Mean loss of each baseline over the points that have it, by number of cells."""
    names = {"baseline_loss": "gene_mean", "gaussian_loss": "shrunk_gaussian"}
    names |= {"attainable_loss": "attainable_floor", "bound_loss": "bound"}
    by_cells = []
    for cells in [float(d) for d in np.unique(rows["cells"])] if "cells" in rows else [None]:
        here = at_cells(rows, cells)
        found: dict[str, Any] = {"cells": cells}
        for name, title in names.items():
            values = here[name][np.isfinite(here[name])] if name in here else np.array([])
            found[title] = float(np.mean(values)) if values.size else None
        by_cells.append(found)
    return {"by_cells": by_cells}


def _anchors(runs: Selected) -> Rows:
    """The runs of sizes that are no points."""
    return where(runs.everyone, ~np.isin(runs.everyone["params"], runs.points["params"]))


def _notes(rows: Rows) -> list[str]:
    notes = []
    if "max_cells_seen" in rows and len(np.unique(rows["max_cells_seen"])) > 1:
        notes.append(
            "The budget of cells seen follows the size (or the data): it is part of the protocol, and the law is a law "
            "of this protocol and not of size alone."
        )
    if "lr" in rows and len(np.unique(rows["lr"])) > 1:
        notes.append("The learning rate was chosen per size or data and is part of the protocol.")
    return notes
