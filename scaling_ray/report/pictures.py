"""From runs, fits and learning curves to charts: what is drawn against what; :mod:`figures` knows how.

Whatever a law says of the runs is read from its fit: nothing is fitted or judged here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from scaling_ray.laws import units
from scaling_ray.laws.points import is_anchor
from scaling_ray.report import figures
from scaling_ray.report.forest import Estimate, draw_forest
from scaling_ray.report.svg import BUDGETS, CELLS, GREY, INK, SIZES, shades
from scaling_ray.report.sweep import Evaluation, Sweep
from scaling_ray.results.columns import Row

# Pixels that a figure is drawn for: first screen, column, half of it, above the table of choices, phone.
FIRST, WIDE, HALF, CHOICES, NARROW = 730, 1100, 540, 900, 348

_SIZE_CAPTION = (
    "Points are runs, one per seed; lines join the means, one line for each number of training cells D. Hollow points: "
    "anchor sizes, which no law uses. Hollow diamonds with bars: the largest size as the smaller ones predicted it "
    "before it was fitted, with the 95% prediction interval. Dashed: the shrunk Gaussian of each D in its colour; in "
    "grey what does not depend on D. All on the same test cells and masks."
)
_LAW_CAPTION = " Thin dotted: the law."
_FORECAST_CAPTION = " Filled diamonds: sizes that nobody has trained yet, predicted, with the 95% interval."
_SHARE_CAPTION = (
    "How far each size came from the mean of each gene (0) to the shrunk Gaussian (1), the best linear guess from the "
    "visible genes, at the largest D: mean over seeds, bars from the lowest to the highest seed. Beyond 1 a model "
    "knows something about cells that no covariance holds."
)
_CELLS_CAPTION = "Test loss against unique training cells D, one line per size; points are runs."
_SEEN_CAPTION = "Test loss against the cells each run saw (T), repeats counted; points are runs."
_FLOPS_CAPTION = "Test loss against exact training FLOPs; points are runs, colours are sizes."
_ISO_CAPTION = "Runs of equal FLOPs against size; diamonds: where the parabola through them is lowest."
_RESIDUAL_CAPTION = (
    "Test loss of each run less the best least-squares fit of the headline's form, whether that is supported or not."
)
_CHOICES_CAPTION = (
    "alpha under each declared choice, with its 95% interval; an arrow: open, or beyond the axis. Grey: for "
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


class _Run(NamedTuple):
    """A finished run as charts need it: its row, its test loss, and whether its size is an anchor."""

    row: Row
    loss: float
    anchor: bool


def draw_pictures(sweep: Sweep, fits: Mapping[int, dict[str, Any]], unit: str) -> list[Picture]:
    """The charts of each cohort (genes -> fit), losses in ``unit``; empty ones are left out."""
    found: list[Picture] = []
    for number, (genes, fit) in enumerate(fits.items()):
        done = [
            _Run(row, row.test_loss, is_anchor(row.size, row.width))
            for row in sweep.law_rows
            if row.is_finished and row.genes == genes and row.test_loss is not None
        ]
        suffix = "" if len(fits) == 1 else f"-{genes}-genes"
        where = "" if len(fits) == 1 else f" ({genes:,} genes)"
        colours = _Colours.of([run.row for run in done], fit)
        levels = _levels([run.row for run in done], colours)
        law = _LAW_CAPTION if fit["curves"] else ""
        by_size = _loss_against_size(done, levels, fit, colours, unit, where)
        law += _FORECAST_CAPTION if any(series.forecasts for series in by_size.series) else ""
        place = "first" if number == 0 else "loss"
        width = FIRST if number == 0 else HALF
        wide, narrow = figures.draw(by_size, width, 470), figures.draw(by_size, NARROW, 440)
        found.append(Picture(f"loss-by-size{suffix}", _SIZE_CAPTION + law, wide, narrow, place))
        by_seen = [(run, run.row.cells_seen) for run in done if run.row.cells_seen]
        by_flops = [(run, run.row.flops) for run in done if run.row.flops]
        for name, caption, chart, part in (
            ("loss-by-cells", _CELLS_CAPTION, _loss_against_cells(done, levels, fit, colours, unit, where), "loss"),
            ("loss-by-cells-seen", _SEEN_CAPTION, _loss_against(by_seen, "cells seen T", colours, unit, where), "loss"),
            ("loss-by-flops", _FLOPS_CAPTION, _loss_against(by_flops, "training FLOPs", colours, unit, where), "loss"),
            ("iso-flop", _ISO_CAPTION, _iso_flop(fit, colours, unit, where), "loss"),
            ("residuals", _RESIDUAL_CAPTION, _residuals(fit, colours, unit, where), "law"),
        ):
            wide, narrow = figures.draw(chart, HALF, 360), figures.draw(chart, NARROW, 340)
            found.append(Picture(f"{name}{suffix}", caption, wide, narrow, part))
        found += _shares(done, suffix)
        found += _forests(fit, suffix)
        panels, legend = _curve_panels([run.row for run in done], sweep.curves, colours)
        title = f"Validation loss against cells seen{where}"
        wide, narrow = (
            figures.small_multiples(title, panels, legend, "cells seen", f"validation {unit}", width)
            for width in (WIDE, NARROW)
        )
        found.append(Picture(f"learning-curves{suffix}", _CURVES_CAPTION, wide, narrow, "training"))
    return [picture for picture in found if picture.wide]


def _forests(fit: Mapping[str, Any], suffix: str) -> list[Picture]:
    """Choices, and what leaving out one size or number of cells does; a refused fit's own value is not among them."""
    head = fit["headline"]
    rows = [
        Estimate(c["name"], c["alpha"]["value"], c["alpha"]["low"], c["alpha"]["high"], not c["defensible"])
        for c in fit["choices"]
    ]
    found = []
    if rows:
        title = "alpha under each declared choice"
        wide, narrow = (draw_forest(title, "alpha", rows, width) for width in (CHOICES, NARROW))
        found.append(Picture(f"choices{suffix}", _CHOICES_CAPTION, wide, narrow, "choices"))
    for parameter in ("alpha", "beta", "E", "c"):
        refits = [r for r in fit["leave_one_out"] if r["headline"] and parameter in r["parameters"]]
        if not refits:
            continue
        left = [(r["without"], r["parameters"][parameter]) for r in refits]
        rows = [Estimate(f"without {name}", found["value"], found["low"], found["high"]) for name, found in left]
        caption = f"{parameter} of the headline's form, refitted without each size or number of cells in turn."
        band = None
        if head["verdict"] != "refused":
            own = head["parameters"][parameter]
            rows.insert(0, Estimate("all runs", own["value"], own["low"], own["high"]))
            if own["low"] is not None and own["high"] is not None:
                band = (own["low"], own["high"])
                caption += " Shaded: the shown interval, in which each refit counts by its misfit."
        title = f"{parameter}, leaving one out"
        wide, narrow = (draw_forest(title, parameter, rows, width, band=band) for width in (HALF, NARROW))
        found.append(Picture(f"leave-one-out-{parameter}{suffix}", caption, wide, narrow, "law"))
    return found


class _Colours(NamedTuple):
    """What each number of training cells, size and budget is drawn in, the same on every chart."""

    cells: Mapping[float, str]
    sizes: Mapping[float, str]
    budgets: Mapping[float, str]

    @classmethod
    def of(cls, done: Sequence[Row], fit: Mapping[str, Any]) -> _Colours:
        return cls(
            shades(CELLS, [row.cells or 0 for row in done]),
            shades(SIZES, [row.params for row in done]),
            shades(BUDGETS, [budget["flops"] for budget in fit["iso_flop"]["budgets"]]),
        )


def _levels(done: Sequence[Row], colours: _Colours) -> list[figures.Level]:
    """Baselines and floors: those of each number of training cells in its colour, the others in grey."""
    counts = sorted({row.cells or 0 for row in done})
    found = []
    for cells in counts:
        losses = [row.gaussian_loss for row in done if (row.cells or 0) == cells and row.gaussian_loss is not None]
        if losses:
            label = "Gaussian" if len(counts) == 1 else f"Gaussian, {cells:,.0f}"
            found.append(figures.Level(label, statistics.fmean(losses), colours.cells[cells]))
    top = [row for row in done if (row.cells or 0) == (counts[-1] if counts else 0)]
    named = {
        "gene mean": [row.baseline_loss for row in top],
        "planted floor": [row.attainable_loss for row in top],
        "planted bound": [row.bound_loss for row in top],
    }
    known = {label: [loss for loss in losses if loss is not None] for label, losses in named.items()}
    return found + [figures.Level(label, statistics.fmean(losses)) for label, losses in known.items() if losses]


def _shares(done: Sequence[_Run], suffix: str) -> list[Picture]:
    """Each size between gene mean and shrunk Gaussian, at the largest number of training cells."""
    largest = max((run.row.cells or 0 for run in done), default=0)
    rows = []
    for params, size in sorted({(run.row.params, run.row.size) for run in done}):
        here = [run for run in done if run.row.params == params and (run.row.cells or 0) == largest]
        each = [units.share_of_gap(run.loss, run.row.baseline_loss, run.row.gaussian_loss) for run in here]
        known = [share for share in each if share is not None]
        if known:
            rows.append(Estimate(size, statistics.fmean(known), min(known), max(known), all(r.anchor for r in here)))
    if not rows:
        return []
    title, lines = "From gene mean (0) to shrunk Gaussian (1)", ((0.0, "gene mean"), (1.0, "Gaussian"))
    wide, narrow = (draw_forest(title, "share of the way", rows, width, lines=lines) for width in (CHOICES, NARROW))
    return [Picture(f"share-to-gaussian{suffix}", _SHARE_CAPTION, wide, narrow, "best")]


def _forecasts(fit: Mapping[str, Any], axis: str, here: Mapping[str, float | None]) -> list[figures.Prediction]:
    """Predictions along one axis (``params`` or ``cells``) whose other axis is ``here``, or is not read by the law."""
    found = []
    for entry in fit["headline"]["predictions"]["entries"]:
        along = "cells" if "cells" in entry["what"] else "params"
        other = "params" if axis == "cells" else "cells"
        if along == axis and entry["verdict"] != "refused" and entry[other] in (None, here[other]):
            found.append((entry[axis], entry["value"], entry["low"], entry["high"]))
    return found


def _cells_label(cells: float | None) -> str:
    return "all runs" if cells is None else f"D = {cells:,.0f}"


def _loss_against_size(
    done: Sequence[_Run],
    levels: Sequence[figures.Level],
    fit: Mapping[str, Any],
    colours: _Colours,
    unit: str,
    where: str,
) -> figures.Chart:
    series = []
    largest = max((run.row.cells or 0 for run in done), default=None)
    headline_cells = fit["headline"]["cells"]
    for cells in sorted({run.row.cells for run in done}, key=lambda c: c or 0):
        here = [run for run in done if run.row.cells == cells]
        points = [(run.row.params, run.loss) for run in here if not run.anchor]
        hollow = [(run.row.params, run.loss) for run in here if run.anchor]
        bars = [
            (held["params"], held["predicted"], held["low"], held["high"])
            for held in fit["held_out_largest"]
            if (held["cells"] or headline_cells) in (None, cells)
        ]
        law = [c for c in fit["curves"] if c["cells"] in (None, cells)]
        curve = [place for c in law for place in zip(c["params"], c["loss"], strict=True)]
        # A law that does not read the number of cells predicts for all of them: drawn at the largest.
        ahead = _forecasts(fit, "params", {"cells": cells}) if headline_cells or cells == largest else []
        series.append(
            figures.Series(_cells_label(cells), points, colours.cells[cells or 0], hollow, curve, bars, ahead)
        )
    names = sorted({(run.row.params, run.row.size) for run in done})
    title = f"Test loss against model size{where}"
    return figures.Chart(title, "parameters P", f"test {unit} per masked gene", series, levels, names)


def _loss_against_cells(
    done: Sequence[_Run],
    levels: Sequence[figures.Level],
    fit: Mapping[str, Any],
    colours: _Colours,
    unit: str,
    where: str,
) -> figures.Chart:
    known = [(run, run.row.cells) for run in done if run.row.cells and not run.anchor]
    several = len({run.row.cells for run in done if run.row.cells}) > 1
    series = _by_size(known, colours, joined=True) if several else []
    largest = max((run.row.params for run, _ in known), default=0)
    ahead = _forecasts(fit, "cells", {"params": largest})
    series = [
        replace(one, forecasts=ahead) if one.colour == colours.sizes.get(largest) and one is series[-1] else one
        for one in series
    ]
    grey = [level for level in levels if level.colour == GREY]
    return figures.Chart(f"Test loss against training cells{where}", "training cells D", f"test {unit}", series, grey)


def _loss_against(
    places: Sequence[tuple[_Run, float]], label: str, colours: _Colours, unit: str, where: str
) -> figures.Chart:
    """Every run's test loss against a quantity that each has its own of; anchor sizes are left out."""
    series = _by_size([(run, x) for run, x in places if not run.anchor], colours, joined=False)
    return figures.Chart(f"Test loss against {label}{where}", label, f"test {unit}", series)


def _by_size(places: Sequence[tuple[_Run, float | None]], colours: _Colours, *, joined: bool) -> list[figures.Series]:
    """One series for each size, of runs and where they stand on the axis."""
    series = []
    for params, size in sorted({(run.row.params, run.row.size) for run, _ in places}):
        points = [
            (x, run.loss) for run, x in places if x is not None and (run.row.params, run.row.size) == (params, size)
        ]
        series.append(figures.Series(size, points, colours.sizes[params], joined=joined))
    return series


def _iso_flop(fit: Mapping[str, Any], colours: _Colours, unit: str, where: str) -> figures.Chart:
    series = []
    for budget in fit["iso_flop"]["budgets"]:
        star = budget["params"]
        lowest = [] if star is None else [(star["value"], budget["loss"])]
        colour = colours.budgets[budget["flops"]]
        series.append(figures.Series(f"{budget['flops']:.1e}", budget["points"], colour, marks=lowest))
    return figures.Chart(f"Loss at equal FLOPs{where}", "parameters P", f"test {unit}", series)


def _residuals(fit: Mapping[str, Any], colours: _Colours, unit: str, where: str) -> figures.Chart:
    found = fit["residuals"]
    series = []
    for cells in sorted({entry["cells"] for entry in found}, key=lambda c: c or 0):
        points = [(entry["params"], entry["residual"]) for entry in found if entry["cells"] == cells]
        series.append(figures.Series(_cells_label(cells), points, colours.cells.get(cells or 0, INK), joined=False))
    levels = [figures.Level("", 0.0)] if series else []
    return figures.Chart(f"Residuals by run{where}", "parameters P", f"test {unit} less fit", series, levels)


def _curve_panels(
    done: Sequence[Row], curves: Mapping[str, Sequence[Evaluation]], colours: _Colours
) -> tuple[list[figures.Panel], list[tuple[str, str]]]:
    counts = sorted({row.cells for row in done if curves[row.run_id]}, key=lambda c: c or 0)
    panels = []
    for params, size in sorted({(row.params, row.size) for row in done}):
        drawn = []
        for row in done:
            curve = [(float(one.cells_seen), one.val_loss) for one in curves[row.run_id]]
            if (row.params, row.size) == (params, size) and len(curve) > 1:
                drawn.append((colours.cells[row.cells or 0], curve))
        if drawn:
            panels.append(figures.Panel(size, drawn))
    return panels, [(colours.cells[cells or 0], _cells_label(cells)) for cells in counts]
