"""From runs, fits and learning curves to charts: what is drawn against what; :mod:`figures` knows how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scaling_ray.laws.optimum import BUDGET_TOLERANCE
from scaling_ray.report import figures
from scaling_ray.report.evidence import law_of, leave_one_out, residuals
from scaling_ray.report.forest import Row, draw_forest
from scaling_ray.report.runs import Run, finite, is_baseline, is_point, mean

FIRST, WIDE, HALF, CHOICES, NARROW = (
    730,
    1100,
    540,
    430,
    348,
)  # pixels a figure is drawn for: first screen, column, half of it, phone

_SIZE_CAPTION = (
    "Points are runs, one per seed; lines join the means, one line for each number of training cells D. Hollow points: "
    "baseline sizes, which no law uses. Diamonds with bars: the largest size as the smaller ones predicted it before "
    "it was fitted, with the 95% prediction interval. Dashed grey: what to compare with, on the same test cells and "
    "masks, at the largest D."
)
_LAW_CAPTION = " Thin dotted: the law."
_CELLS_CAPTION = "Test loss against unique training cells D, one line per size; points are runs."
_SEEN_CAPTION = "Test loss against the cells each run saw (T), repeats counted; points are runs."
_FLOPS_CAPTION = "Test loss against exact training FLOPs; points are runs, colours are sizes."
_ISO_CAPTION = "Runs of equal FLOPs against size; diamonds: where the parabola through them is lowest."
_RESIDUAL_CAPTION = (
    "Test loss of each run less the best least-squares fit of the headline's form, whether that is supported or not."
)
_CHOICES_CAPTION = (
    "alpha under each declared choice, with 95% F-profile intervals; an arrow: open, or beyond the axis. Grey: for "
    "comparison only. No row is the answer; their spread is part of it."
)
_CURVES_CAPTION = "Validation loss during training, one panel per size, one curve per run; coloured by training cells."


class Picture(NamedTuple):
    """One chart, drawn as SVG for two widths of page, and the part of the page that it belongs to."""

    name: str
    caption: str
    wide: str
    narrow: str
    place: str


def draw_pictures(
    runs: Sequence[Run], fits: Sequence[tuple[int, dict[str, Any]]], curves: dict[str, list[dict[str, Any]]]
) -> list[Picture]:
    """The charts of each cohort (genes, fit); empty ones are left out."""
    found: list[Picture] = []
    for number, (genes, fit) in enumerate(fits):
        done = [r for r in runs if is_point(r) and r["genes"] == genes and r["test_mse"]]
        suffix = "" if len(fits) == 1 else f"-{genes}-genes"
        where = "" if len(fits) == 1 else f" ({genes:,} genes)"
        levels = _levels(done)
        law = _LAW_CAPTION if fit["headline"]["verdict"] == "supported" else ""
        by_size = _loss_against_size(done, levels, fit, where)
        place = "first" if number == 0 else "loss"
        width = FIRST if number == 0 else HALF
        wide, narrow = figures.draw(by_size, width, 470), figures.draw(by_size, NARROW, 440)
        found.append(Picture(f"loss-by-size{suffix}", _SIZE_CAPTION + law, wide, narrow, place))
        for name, caption, chart, part in (
            ("loss-by-cells", _CELLS_CAPTION, _loss_against_cells(done, levels, where), "loss"),
            ("loss-by-cells-seen", _SEEN_CAPTION, _loss_against(done, "cells_seen", "cells seen T", where), "loss"),
            ("loss-by-flops", _FLOPS_CAPTION, _loss_against(done, "flops", "training FLOPs", where), "loss"),
            ("iso-flop", _ISO_CAPTION, _iso_flop(done, fit, where), "loss"),
            ("residuals", _RESIDUAL_CAPTION, _residuals(runs, fit, genes, where), "law"),
        ):
            wide, narrow = figures.draw(chart, HALF, 360), figures.draw(chart, NARROW, 340)
            found.append(Picture(f"{name}{suffix}", caption, wide, narrow, part))
        found += _forests(fit, runs, suffix)
        panels, legend = _curve_panels(done, curves)
        title = f"Validation loss against cells seen{where}"
        wide, narrow = (
            figures.small_multiples(title, panels, legend, "cells seen", "validation MSE", width)
            for width in (WIDE, NARROW)
        )
        found.append(Picture(f"learning-curves{suffix}", _CURVES_CAPTION, wide, narrow, "training"))
    return [picture for picture in found if picture.wide]


def _forests(fit: Mapping[str, Any], runs: Sequence[Run], suffix: str) -> list[Picture]:
    """Choices, and what leaving out one size or number of cells does; a refused fit's own value is not among them."""
    head = fit["headline"]
    rows = [
        Row(c["name"], c["alpha"]["value"], c["alpha"]["low"], c["alpha"]["high"], not c["defensible"])
        for c in fit["choices"]
    ]
    found = []
    if rows:
        title = "alpha under each declared choice"
        wide, narrow = (draw_forest(title, "alpha", rows, width) for width in (CHOICES, NARROW))
        found.append(Picture(f"choices{suffix}", _CHOICES_CAPTION, wide, narrow, "choices"))
    for parameter, refits in leave_one_out(fit, runs).items():
        rows = [Row(f"without {r['without']}", r["value"], r["low"], r["high"]) for r in refits]
        caption = f"{parameter} of the headline's form, refitted without each size or number of cells in turn."
        band = None
        if head["verdict"] == "supported":
            own = head["parameters"][parameter]
            rows.insert(0, Row("all runs", own["value"], own["low"], own["high"]))
            if own["low"] is not None and own["high"] is not None:
                band = (own["low"], own["high"])
                caption += " Shaded: the interval of all runs."
        title = f"{parameter}, leaving one out"
        wide, narrow = (draw_forest(title, parameter, rows, width, band=band) for width in (HALF, NARROW))
        found.append(Picture(f"leave-one-out-{parameter}{suffix}", caption, wide, narrow, "law"))
    return found


def _levels(done: Sequence[Run]) -> list[figures.Level]:
    """Baselines and floors at the largest number of training cells, where they are lowest."""
    largest = max((r["cells"] or 0 for r in done), default=0)
    top = [r for r in done if (r["cells"] or 0) == largest]
    names = {
        "baseline_mse": "gene mean",
        "gaussian_mse": "shrunk Gaussian",
        "attainable_mse": "planted floor",
        "bound_mse": "planted bound",
    }
    return [figures.Level(label, value) for name, label in names.items() if (value := mean(top, name)) is not None]


def _cells_label(cells: int | None) -> str:
    return "all runs" if cells is None else f"D = {cells:,}"


def _loss_against_size(
    done: Sequence[Run], levels: Sequence[figures.Level], fit: dict[str, Any], where: str
) -> figures.Chart:
    series = []
    head = fit["headline"]
    for cells in sorted({r["cells"] for r in done}, key=lambda c: c or 0):
        here = [r for r in done if r["cells"] == cells]
        points = [(r["params"], r["test_mse"]) for r in here if not is_baseline(r)]
        hollow = [(r["params"], r["test_mse"]) for r in here if is_baseline(r)]
        bars = [
            (held["params"], held["predicted"], held["low"], held["high"])
            for held in fit["held_out_largest"]
            if (held["cells"] or head["cells"]) in (None, cells)
        ]
        curve = _law_curve(head, cells, points)
        series.append(figures.Series(_cells_label(cells), points, hollow, curve, bars))
    names = sorted({(r["params"], r["size"]) for r in done})
    title = f"Test loss against model size{where}"
    return figures.Chart(title, "parameters P", "test MSE per masked gene", series, levels, names)


def _law_curve(
    head: dict[str, Any], cells: int | None, points: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The headline's law over the sizes that were trained; nothing where it was refused."""
    if head["verdict"] != "supported" or not points or (head["cells"] is not None and head["cells"] != cells):
        return []
    low, high = min(p for p, _ in points), max(p for p, _ in points)
    sizes = [low * (high / low) ** (i / 40) for i in range(41)]
    return [(p, law_of(head["parameters"], p, cells)) for p in sizes]


def _loss_against_cells(done: Sequence[Run], levels: Sequence[figures.Level], where: str) -> figures.Chart:
    series = []
    with_cells = [r for r in done if r["cells"]]
    if len({r["cells"] for r in with_cells}) > 1:
        for params, size in sorted({(r["params"], r["size"]) for r in with_cells if not is_baseline(r)}):
            points = [(r["cells"], r["test_mse"]) for r in with_cells if (r["params"], r["size"]) == (params, size)]
            series.append(figures.Series(size, points))
    return figures.Chart(f"Test loss against training cells{where}", "training cells D", "test MSE", series, levels)


def _loss_against(done: Sequence[Run], column: str, label: str, where: str) -> figures.Chart:
    """Every run's test loss against a quantity that each has its own of; baseline sizes are left out."""
    series = []
    known = [r for r in done if r[column] and not is_baseline(r)]
    for params, size in sorted({(r["params"], r["size"]) for r in known}):
        points = [(r[column], r["test_mse"]) for r in known if (r["params"], r["size"]) == (params, size)]
        series.append(figures.Series(size, points, joined=False))
    return figures.Chart(f"Test loss against {label}{where}", label, "test MSE", series)


def _iso_flop(done: Sequence[Run], fit: Mapping[str, Any], where: str) -> figures.Chart:
    series = []
    for budget in fit["iso_flop"]["budgets"]:
        near = [
            (r["params"], r["test_mse"])
            for r in done
            if r["flops"] and not is_baseline(r) and abs(r["flops"] / budget["flops"] - 1) <= BUDGET_TOLERANCE
        ]
        if near:
            star = budget["params"]
            lowest = [] if star is None else [(star["value"], budget["loss"])]
            series.append(figures.Series(f"{budget['flops']:.1e}", near, marks=lowest))
    return figures.Chart(f"Loss at equal FLOPs{where}", "parameters P", "test MSE", series)


def _residuals(runs: Sequence[Run], fit: Mapping[str, Any], genes: int, where: str) -> figures.Chart:
    found = residuals(runs, fit, genes)
    series = []
    for cells in sorted({entry["cells"] for entry in found}, key=lambda c: c or 0):
        points = [(entry["params"], entry["residual"]) for entry in found if entry["cells"] == cells]
        series.append(figures.Series(_cells_label(cells), points, joined=False))
    levels = [figures.Level("", 0.0)] if series else []
    return figures.Chart(f"Residuals by run{where}", "parameters P", "test MSE less fit", series, levels)


def _curve_panels(
    done: Sequence[Run], curves: dict[str, list[dict[str, Any]]]
) -> tuple[list[figures.Panel], list[tuple[int, str]]]:
    counts = sorted({r["cells"] for r in done if curves[r["run_id"]]}, key=lambda c: c or 0)
    panels = []
    for params, size in sorted({(r["params"], r["size"]) for r in done}):
        drawn = []
        for run in done:
            rows = [r for r in curves[run["run_id"]] if finite(r.get("cells_seen"))]
            if (run["params"], run["size"]) == (params, size) and len(rows) > 1:
                drawn.append((counts.index(run["cells"]), [(r["cells_seen"], r["val_mse"]) for r in rows]))
        if drawn:
            panels.append(figures.Panel(size, drawn))
    return panels, [(i, _cells_label(cells)) for i, cells in enumerate(counts)]
