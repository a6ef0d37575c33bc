"""The grid as a report shows it: settings over seeds, done of planned, rates, protocol."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scaling_ray.laws import units
from scaling_ray.laws.points import is_anchor
from scaling_ray.results.columns import Row
from scaling_ray.spec import SweepSpec


def gather_settings(grid: Sequence[Row]) -> list[dict[str, Any]]:
    """The grid gathered over seeds: means, standard deviations, and the runs behind each setting."""
    by_setting: dict[tuple[int, int, str, int, str], list[Row]] = {}
    for r in grid:
        key = (r.genes, r.params, r.size, r.cells or 0, r.cells_requested or "")
        by_setting.setdefault(key, []).append(r)
    table = []
    for (genes, params, size, cells, requested), members in sorted(by_setting.items()):
        done = [r for r in members if r.status == "done"]
        losses = _known(r.test_loss for r in done)
        loss, gene_mean = _mean(losses), _mean(r.baseline_loss for r in done)
        gaussian, floor = _mean(r.gaussian_loss for r in done), _mean(r.attainable_loss for r in done)
        in_bits = all(units.is_mse(r.loss_unit) for r in done)
        table.append(
            {
                "size": size,
                "params": params,
                "genes": genes,
                "cells": cells or None,
                "cells_requested": requested or None,
                "anchor": is_anchor(size, members[0].width),
                "runs": len(members),
                "done": len(done),
                "lr": sorted({r.lr for r in done if r.lr is not None}),
                "test_loss": loss,
                "test_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "val_loss": _mean(r.val_loss for r in done),
                "baseline_loss": gene_mean,
                "gaussian_loss": gaussian,
                "attainable_loss": floor,
                "gain_bits": units.gain_bits(loss, gene_mean) if in_bits else None,
                "share_to_gaussian": units.share_of_gap(loss, gene_mean, gaussian),
                "share_to_attainable": units.share_of_gap(loss, gene_mean, floor),
                "cells_seen": _mean(r.cells_seen for r in done),
                "wall_seconds": _mean(r.wall_seconds for r in done),
                "undertrained": sum(1 for r in done if r.undertrained),
                "not_better_than_gene_mean": bool(loss and gene_mean and loss >= gene_mean),
                "run_ids": [r.run_id for r in members],
            }
        )
    return table


def learning_rates(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per size: the rates tried with their validation loss, the one the grid used, and whether it is an edge."""
    table = []
    for genes, params, size in sorted({(r.genes, r.params, r.size) for r in rows}):
        here = [r for r in rows if (r.genes, r.size) == (genes, size)]
        tried = sorted(
            ((r.lr, r) for r in here if r.role == "rate" and r.lr is not None), key=lambda rate_and_row: rate_and_row[0]
        )
        edges = [r.lr_at_edge for r in here if r.role == "law" and r.lr_at_edge is not None]
        table.append(
            {
                "genes": genes,
                "size": size,
                "params": params,
                "tried": [{"lr": lr, "val_loss": r.val_loss, "status": r.status} for lr, r in tried],
                "used": sorted({r.lr for r in here if r.role == "law" and r.lr is not None}),
                "at_edge": any(edges) if edges else None,
            }
        )
    return table


def protocol(grid: Sequence[Row], spec: SweepSpec | None) -> dict[str, Any]:
    """The protocol of each size, and the rules that all runs share."""
    rows = []
    for params, size in sorted({(r.params, r.size) for r in grid}):
        here = [r for r in grid if r.size == size]
        done = [r for r in here if r.status == "done"]
        epochs = [r.cells_seen / r.cells for r in done if r.cells_seen and r.cells]
        rows.append(
            {
                "size": size,
                "params": params,
                "max_cells_seen": sorted({r.max_cells_seen for r in here if r.max_cells_seen is not None}),
                "mean_cells_seen": _mean(r.cells_seen for r in done),
                "epochs_low": min(epochs, default=None),
                "epochs_high": max(epochs, default=None),
                "optimizer_steps": _mean(r.optimizer_steps for r in done),
                "flops": _mean(r.flops for r in done),
                "done": len(done),
                "stopped_early": sum(1 for r in done if r.stop_reason not in (None, "budget")),
                "undertrained": sum(1 for r in done if r.undertrained),
            }
        )
    return {
        "sizes": rows,
        "recipe": sorted({r.recipe for r in grid if r.recipe is not None}),
        "objective": sorted({r.objective for r in grid if r.objective is not None}),
        "schedule": sorted({r.schedule for r in grid if r.schedule is not None}),
        **{
            part: {} if spec is None else getattr(spec, part).model_dump(mode="json")
            for part in ("train", "grid", "lr")
        },
    }


def unfinished(grid: Sequence[Row]) -> list[str]:
    """A line per state that is not done."""
    left: dict[str, int] = {}
    for r in grid:
        if r.status != "done":
            state = f"failed ({r.failure})" if r.status == "failed" and r.failure else r.status
            left[state] = left.get(state, 0) + 1
    return [f"{count} run{'s' if count > 1 else ''} of the grid still {state}" for state, count in sorted(left.items())]


def completeness(grid: Sequence[Row]) -> list[dict[str, Any]]:
    """Runs done of runs planned, size by number of training cells: one matrix per number of genes."""
    found = []
    for genes in sorted({r.genes for r in grid}):
        here = [r for r in grid if r.genes == genes]
        columns = sorted({r.cells or 0 for r in here})
        rows = []
        for params, size in sorted({(r.params, r.size) for r in here}):
            line = []
            for cells in columns:
                runs = [r for r in here if (r.params, r.size, r.cells or 0) == (params, size, cells)]
                done = sum(r.status == "done" for r in runs)
                line.append({"done": done, "planned": len(runs), "failed": sum(r.status == "failed" for r in runs)})
            rows.append({"size": size, "params": params, "settings": line})
        found.append({"genes": genes, "cells": [cells or None for cells in columns], "rows": rows})
    return found


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None
