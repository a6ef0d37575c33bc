"""From runs, fits and learning curves to charts: what is drawn against what; :mod:`figures` knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scaling_ray.report import figures
from scaling_ray.report.runs import Run, finite, is_baseline, is_point, mean

WIDE, NARROW = 920, 372  # pixels a figure is drawn for: a desktop column, a phone

_SIZE_CAPTION = (
    "Test loss against parameters. Points are runs, lines join the means over seeds, one line for each number of "
    "training cells; hollow points are baseline sizes, which no law uses. Dashed: losses to compare with, on the same "
    "test cells and masks, at the largest number of training cells."
)
_CELLS_CAPTION = "Test loss against unique training cells, one line per size."
_CURVES_CAPTION = "Validation loss during training, one panel per size, one curve per run; coloured by training cells."


class Picture(NamedTuple):
    """One chart, drawn as SVG for two widths of page."""

    name: str
    caption: str
    wide: str
    narrow: str


def draw_pictures(
    runs: Sequence[Run], fits: Sequence[tuple[int, dict[str, Any]]], curves: dict[str, list[dict[str, Any]]]
) -> list[Picture]:
    """Three charts per cohort (genes, fit), empty ones left out."""
    found = []
    for genes, fit in fits:
        done = [r for r in runs if is_point(r) and r["genes"] == genes and r["test_mse"]]
        suffix = "" if len(fits) == 1 else f"-{genes}-genes"
        where = "" if len(fits) == 1 else f" ({genes:,} genes)"
        levels = _levels(done)
        by_size = _loss_against_size(done, levels, fit, where)
        by_cells = _loss_against_cells(done, levels, where)
        found.append(_drawn(f"loss-by-size{suffix}", _SIZE_CAPTION, by_size, 500, 430))
        found.append(_drawn(f"loss-by-cells{suffix}", _CELLS_CAPTION, by_cells, 380, 360))
        panels, legend = _curve_panels(done, curves)
        title = f"Validation loss against cells seen{where}"
        wide, narrow = (
            figures.small_multiples(title, panels, legend, "cells seen", "validation MSE", width)
            for width in (WIDE, NARROW)
        )
        found.append(Picture(f"learning-curves{suffix}", _CURVES_CAPTION, wide, narrow))
    return [picture for picture in found if picture.wide]


def _drawn(name: str, caption: str, chart: figures.Chart, tall: int, short: int) -> Picture:
    return Picture(name, caption, figures.draw(chart, WIDE, tall), figures.draw(chart, NARROW, short))


def _levels(done: Sequence[Run]) -> list[figures.Level]:
    """Baselines and floors at the largest number of training cells, where they are lowest."""
    largest = max((r["cells"] or 0 for r in done), default=0)
    top = [r for r in done if (r["cells"] or 0) == largest]
    names = {
        "baseline_mse": "gene mean",
        "gaussian_mse": "Gaussian",
        "attainable_mse": "attainable",
        "bound_mse": "bound",
    }
    return [figures.Level(label, value) for name, label in names.items() if (value := mean(top, name)) is not None]


def _cells_label(cells: int | None) -> str:
    return "all runs" if cells is None else f"D = {cells:,}"


def _loss_against_size(
    done: Sequence[Run], levels: Sequence[figures.Level], fit: dict[str, Any], where: str
) -> figures.Chart:
    series = []
    for cells in sorted({r["cells"] for r in done}, key=lambda c: c or 0):
        here = [r for r in done if r["cells"] == cells]
        points = [(r["params"], r["test_mse"]) for r in here if not is_baseline(r)]
        hollow = [(r["params"], r["test_mse"]) for r in here if is_baseline(r)]
        series.append(figures.Series(_cells_label(cells), points, hollow, _law_curve(fit["headline"], cells, points)))
    names = sorted({(r["params"], r["size"]) for r in done})
    title = f"Test loss against model size{where}"
    return figures.Chart(title, "parameters", "test MSE per masked gene", series, levels, names)


def _law_curve(
    head: dict[str, Any], cells: int | None, points: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The headline's law over the sizes that were trained; nothing where it was refused."""
    if head["verdict"] != "supported" or not points or (head["cells"] is not None and head["cells"] != cells):
        return []
    value = {name: parameter["value"] for name, parameter in head["parameters"].items()}
    floor = value["E"] + value["b"] * float(cells or 1) ** -value["beta"] if "E" in value else value.get("c", 0.0)
    low, high = min(p for p, _ in points), max(p for p, _ in points)
    sizes = [low * (high / low) ** (i / 40) for i in range(41)]
    return [(p, floor + value["a"] * p ** -value["alpha"]) for p in sizes]


def _loss_against_cells(done: Sequence[Run], levels: Sequence[figures.Level], where: str) -> figures.Chart:
    series = []
    with_cells = [r for r in done if r["cells"]]
    if len({r["cells"] for r in with_cells}) > 1:
        for params, size in sorted({(r["params"], r["size"]) for r in with_cells if not is_baseline(r)}):
            points = [(r["cells"], r["test_mse"]) for r in with_cells if (r["params"], r["size"]) == (params, size)]
            series.append(figures.Series(size, points))
    return figures.Chart(
        f"Test loss against training cells{where}", "unique training cells", "test MSE", series, levels
    )


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
