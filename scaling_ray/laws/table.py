"""From a table of runs to ``fit.json``: the verdicts first, then their evidence.

``fit_table`` is the one public way in. The headline is the law of size and data where the table has three numbers of
cells and both make a difference, the law of size or of data alone where one does, and the law along the ray where D
follows P; the rule by which it is judged is the docstring of :mod:`verdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling_ray.laws import entries, evidence, gates, optimum, units
from scaling_ray.laws.choices import declared_choices
from scaling_ray.laws.contrasts import contrasts
from scaling_ray.laws.forms import (
    CELLS_FLOOR,
    CELLS_LOG,
    CONSTANT,
    PARAMS_CELLS,
    POWER,
    POWER_FLOOR,
    POWER_FLOOR_FLOPS,
    POWER_FLOPS,
    Form,
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
from scaling_ray.laws.predictions import HeldOut, hold_out_largest, predict
from scaling_ray.laws.protocol import flagged_runs, leak_test, protocol_gates, rate_doubts
from scaling_ray.laws.sensitivity import huber_parameters, without_flagged, without_outlying
from scaling_ray.laws.sentences import sentences
from scaling_ray.laws.verdict import Judged, judge

FORMAT = 4
MANY_CELL_COUNTS = 12
RAY_TOLERANCE = 0.02  # how far log D may lie from a line in log P and still be one, as a share of its span (or of 1)
CONDITIONAL_ON = (
    "Intervals are 95% and conditional on this split: the held-out donors, genes and masks stay as they are. The shown "
    "interval is as wide as the larger of the noise between runs and the misfit of the law makes it, and is the union "
    "with those of the fits that leave one size (or one number of cells) out; the statistical one is of noise alone."
)
AICC_NOTE = (
    "AICc compares shapes of the same settings, counts sizes and not rows, and never rescues an exponent that a gate "
    "refuses."
)


@dataclass(frozen=True)
class Headline:
    """The law that the verdict is about, with the runs that it was fitted to."""

    judged: Judged
    cells: float | None
    rows: Rows
    sensitivity: list[dict[str, Any]]
    notes: list[str]


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

    fitted: list[tuple[float | None, Judged]] = []
    for cells in _counts_to_fit(rows, d_values):
        for form in (CONSTANT, POWER, POWER_FLOOR):
            say(f"fitting {form.formula}" + ("" if cells is None else f" at {cells:,.0f} cells"))
            fitted.append((cells, _judged(form, runs, cells, agreement).judged))
    say("choosing the headline's law")
    head, both = _headline(runs, agreement, fitted)
    if both is not None:
        fitted.append((None, both))
    say("fitting the declared choices")
    choices = declared_choices(runs, head.judged.law.form, head.cells)
    disagreement = gates.choices_gate(
        [c["alpha"] for c in choices if c["defensible"] and c["n_sizes"] >= gates.MIN_SIZES]
    )
    say("setting runs aside that Huber's loss leaves far outside")
    huber = huber_parameters(head.judged.law, head.rows)
    robust = without_outlying(head.judged.law.form, head.rows, head.judged.law, huber)
    if robust.entries:
        again = judge(fit_law(head.judged.law.form, robust.rows), _standing(head.judged))
        fit_only = {doubt.reason for doubt in gates.fit_doubts(head.judged.law)}
        standing = [doubt for doubt in head.judged.doubts if doubt.reason not in fit_only]
        doubts = [*robust.doubts, *standing, *again.doubts]
        judged = replace(again, doubts=doubts)
        head = Headline(judged, head.cells, robust.rows, [*head.sensitivity, *robust.entries], head.notes)
    judged = replace(head.judged, refusals=[*head.judged.refusals, *disagreement])
    head = replace(head, judged=judged)
    key = (head.cells, judged.law.form.name)
    fitted = [(at, judged if (at, one.law.form.name) == key else one) for at, one in fitted]
    if not any(one is judged for _, one in fitted):
        fitted.append((head.cells, judged))
    here = head.rows
    say("fitting the other shapes and estimators")
    protocol = protocol_gates(rows, agreement)
    shapes = _in_compute(rows, d_values, protocol) + _against_cells(rows, d_values, protocol)
    fits = entries.with_aicc(fitted) + [entries.entry(at, other) for at, other in shapes]
    fits += [elbow for at, one in fitted if (elbow := entries.elbow_entry(at, one)) is not None]
    fits += entries.other_estimators(head.cells, judged, here, huber)
    names = size_names(rows)
    left_out = [
        evidence.left_out(at, one.law, refit, names) | {"headline": one is judged}
        for at, one in fitted
        for refit in one.law.refits
    ]
    loss_unit = _loss_unit(rows)
    say("predicting the largest size from the others")
    held = hold_out_largest(judged.law.form, here) if judged.law.best is not None else []
    bought = {
        "size": contrasts(rows, "params", names, _residual_sd(judged)),
        "data": contrasts(rows, "cells", {}, _residual_sd(judged)),
    }
    return {
        "format": FORMAT,
        "headline": _headline_entry(head, held, bought, rows),
        "loss_unit": loss_unit,
        "contrasts": bought,
        "sensitivity": head.sensitivity,
        "rivals": [
            {"axis": rival.axis, "formula": rival.formula, "excess": rival.excess}
            | {"preferred": rival.preferred, "as_good": rival.as_good}
            for rival in judged.rivals
        ],
        "choices": choices,
        "fits": fits,
        "baselines": _baselines(rows),
        "anchors": size_table(_anchors(runs)),
        "leave_one_out": left_out,
        "held_out_largest": evidence.held_out(judged.law.form.name, held),
        "residuals": evidence.residuals(judged.law, here),
        "curves": evidence.curves(judged, here),
        "leak_test": leak_test(runs.everyone),
        "next_steps": optimum.next_steps(judged),
        "compute_optimal": optimum.compute_optimal(judged, here),
        "iso_flop": optimum.iso_flop(rows),
        "planted_floor": evidence.planted_floor(judged, here),
        "units": units.size_units(rows, loss_unit),
        "points": {"runs": len(rows["loss"]), "sizes": size_table(rows), "cells": [float(d) for d in d_values]},
        "excluded": runs.excluded,
        "notes": [CONDITIONAL_ON, AICC_NOTE, *head.notes, *_notes(rows, judged)],
        "columns_used": _columns_used(columns, agreement),
    }


def _standing(judged: Judged) -> list[Refusal]:
    """Refusals by protocol and flags, which stand whatever runs are set aside."""
    fit = gates.fit_gates(judged.law) + gates.count_gates(judged.law.form, judged.law.points)
    by_fit = {refusal.reason for refusal in fit + gates.rival_gates(judged.law, judged.rivals)}
    return [refusal for refusal in judged.refusals if refusal.reason not in by_fit]


def _judged(form: Form, runs: Selected, cells: float | None, agreement: Agreement) -> Headline:
    """A form fitted at one number of cells (or to all), with flagged runs as a sensitivity."""
    rows, lost = at_cells(runs.points, cells), at_cells(runs.diverged, cells)
    compared = without_flagged(form, rows, flagged_runs(rows, lost))
    judged = judge(fit_law(form, compared.rows), [*protocol_gates(rows, agreement), *compared.refusals])
    judged = replace(judged, doubts=[*compared.doubts, *rate_doubts(rows), *judged.doubts])
    return Headline(judged, cells, compared.rows, compared.entries, [])


def _headline(
    runs: Selected, agreement: Agreement, fitted: Sequence[tuple[float | None, Judged]]
) -> tuple[Headline, Judged | None]:
    """The headline, and the law of size and data where the table has one.

    Both where there are three numbers of cells and both make a difference beyond noise; the law of the one that does
    otherwise; along the ray where D follows P; of size at the largest number of cells where there are fewer.
    """
    rows = runs.points
    sizes = np.unique(rows["params"])
    counts = np.unique(rows["cells"]) if "cells" in rows else np.array([])
    largest = float(counts[-1]) if counts.size else None
    if counts.size < gates.MIN_CELL_COUNTS:
        ladders = [d for d in counts if np.unique(rows["params"][rows["cells"] == d]).size >= gates.MIN_SIZES]
        if not ladders or largest is None or ladders[-1] == largest:
            return _judged(POWER_FLOOR, runs, largest, agreement), None
        note = f"The law is of {ladders[-1]:,.0f} cells, the most that {gates.MIN_SIZES} sizes or more were trained on."
        return replace(_judged(POWER_FLOOR, runs, float(ladders[-1]), agreement), notes=[note]), None
    if sizes.size == 1:
        note = "Only the number of cells varies, so the law is one of data alone."
        return replace(_judged(CELLS_FLOOR, runs, None, agreement), notes=[note]), None
    if (ray := _ray(rows)) is not None:
        return replace(_judged(POWER_FLOOR, runs, None, agreement), notes=[ray]), None
    both = _judged(PARAMS_CELLS, runs, None, agreement)
    tests = both.judged.law.tests
    if tests is None:
        return _judged(POWER_FLOOR, runs, largest, agreement), both.judged
    size_p, data_p = tests.effect_p["params"], tests.effect_p["cells"]
    if size_p is not None and data_p is not None:
        if size_p < gates.SIZE_EFFECT_P <= data_p:
            note = (
                f"The number of cells makes no difference beyond noise here (F-test p = {data_p:.2g}), so the law is "
                "one of size, over all numbers of cells."
            )
            return replace(_judged(POWER_FLOOR, runs, None, agreement), notes=[note]), both.judged
        if data_p < gates.SIZE_EFFECT_P <= size_p:
            note = (
                f"The size makes no difference beyond noise here (F-test p = {size_p:.2g}), so the law is one of data, "
                "over all sizes."
            )
            return replace(_judged(CELLS_FLOOR, runs, None, agreement), notes=[note]), both.judged
    return both, both.judged


def _ray(rows: Rows) -> str | None:
    """What to say where D is a power of P in every run, so that no law can part the two; None elsewhere."""
    x, y = np.log(rows["params"]), np.log(rows["cells"])
    slope, level = np.polyfit(x, y, 1)
    if np.max(np.abs(y - slope * x - level)) > RAY_TOLERANCE * max(1.0, float(np.ptp(y))):
        return None
    if abs(slope - 1.0) < RAY_TOLERANCE:
        ratio = float(np.exp(np.mean(y - x)))
        follows = f"in proportion to the size (D = {ratio:.3g} P)"
    else:
        follows = f"as a power of the size (D ~ P^{slope:.3g})"
    return (
        f"The number of cells follows the size here, {follows}: the law is of the loss along that ray, P and D growing "
        "together, and neither can be told apart from the other."
    )


def _residual_sd(judged: Judged) -> float | None:
    """Standard deviation of one run by the residuals of the law, where no replicates show it."""
    law = judged.law
    if law.best is None or law.tests is None or not law.tests.by_residuals:
        return None
    return float(np.sqrt(law.width.variance)) * law.noise.least_misfit


def _headline_entry(head: Headline, held: Sequence[HeldOut], bought: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """``headline``: the verdict on the law, on size, on data, on predictions; then what is true in any case."""
    judged = head.judged
    fixed = {} if head.cells is None else {"cells": head.cells}
    if "params" not in judged.law.form.axes:
        fixed["params"] = float(np.max(rows["params"]))
    predictions = predict(judged, list(held), fixed)
    lines = [one["sentence"] for one in bought.values() if one["sentence"]]
    return entries.headline(head.cells, judged) | {
        "size": entries.of_axis(judged, "params", bought["size"], head.notes),
        "data": entries.of_axis(judged, "cells", bought["data"], head.notes),
        "predictions": predictions,
        "sentences": sentences(judged, predictions, lines),
    }


def nothing_to_fit(reason: str, columns: Mapping[str, Any], agreement: Agreement) -> dict[str, Any]:
    """The content of ``fit.json`` for a table that :func:`fit_table` cannot take: refused, for that reason."""
    head: dict[str, Any] = {"verdict": "refused", "reasons": [f"there is nothing to fit ({reason})"]}
    head |= {"settles": ["runs that finish"], "form": POWER_FLOOR.name, "formula": POWER_FLOOR.formula, "cells": None}
    no_axis = {"verdict": "refused", "reasons": head["reasons"], "exponent": None, "parameter": None, "sentence": None}
    no_contrast: dict[str, Any] = {
        "neighbours": [],
        "bounds": [],
        "settled_from": None,
        "sentence": None,
        "reason": reason,
    }
    head |= {"estimator": "least_squares", "size": no_axis, "data": no_axis}
    head["predictions"] = {"verdict": "refused", "reasons": head["reasons"], "entries": []}
    head["predictions"] |= {"held_out": {"covered": 0, "settings": 0}}
    head["sentences"] = [
        f"Refused: there is nothing to fit ({reason}).",
        "What would settle it first: runs that finish.",
    ]
    blank = {"budgets": [], "reason": "there is nothing to fit"}
    return {
        "format": FORMAT,
        "headline": head,
        "loss_unit": None,
        **{name: [] for name in ("choices", "fits", "anchors", "leave_one_out", "held_out_largest", "residuals")},
        **{name: [] for name in ("curves", "next_steps", "excluded", "notes", "sensitivity", "rivals")},
        "contrasts": {
            "size": {"axis": "params"} | no_contrast,
            "data": {"axis": "cells"} | no_contrast,
        },
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


def _notes(rows: Rows, judged: Judged) -> list[str]:
    notes = []
    if judged.law.tests is not None and judged.law.tests.by_residuals:
        notes.append(
            "Too few settings were repeated to show the noise between runs: what the law leaves over stands in for it, "
            "so that lack of fit cannot be told from noise."
        )
    if "max_cells_seen" in rows and len(np.unique(rows["max_cells_seen"])) > 1:
        notes.append(
            "The budget of cells seen follows the size (or the data): it is part of the protocol, and the law is a law "
            "of this protocol and not of size alone."
        )
    if "lr" in rows and len(np.unique(rows["lr"])) > 1:
        notes.append("The learning rate was chosen per size or data and is part of the protocol.")
    return notes
