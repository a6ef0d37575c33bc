"""The grid of a sweep as a report shows it: cells over seeds, done of planned, rates, protocol, plan and actual."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaling_ray.laws import units
from scaling_ray.report.runs import Run, is_baseline, mean, values


def gather_cells(grid: Sequence[Run]) -> list[dict[str, Any]]:
    """The grid gathered over seeds: means, standard deviations, and the runs behind each cell."""
    keys = sorted(
        {(r["genes"], r["params"], r["size"], r["cells"] or 0, str(r["cells_requested"] or "")) for r in grid}
    )
    table = []
    for genes, params, size, cells, requested in keys:
        members = [
            r
            for r in grid
            if (r["genes"], r["params"], r["size"], r["cells"] or 0, str(r["cells_requested"] or ""))
            == (genes, params, size, cells, requested)
        ]
        done = [r for r in members if r["status"] == "done"]
        mse, gene_mean = mean(done, "test_mse"), mean(done, "baseline_mse")
        floor = mean(done, "attainable_mse")
        table.append(
            {
                "size": size,
                "params": params,
                "genes": genes,
                "cells": cells or None,
                "cells_requested": requested or None,
                "baseline_size": is_baseline(members[0]),
                "runs": len(members),
                "done": len(done),
                "lr": sorted({r["lr"] for r in done if r["lr"] is not None}),
                "test_mse": mse,
                "test_mse_sd": _sd(done, "test_mse"),
                "val_mse": mean(done, "val_mse"),
                "baseline_mse": gene_mean,
                "gaussian_mse": mean(done, "gaussian_mse"),
                "attainable_mse": floor,
                "gain_bits": gain(mse, gene_mean),
                "share_to_gaussian": share(mse, gene_mean, mean(done, "gaussian_mse")),
                "share_to_attainable": share(mse, gene_mean, floor),
                "cells_seen": mean(done, "cells_seen"),
                "wall_seconds": mean(done, "wall_seconds"),
                "undertrained": sum(1 for r in done if r["undertrained"]),
                "not_better_than_gene_mean": bool(mse and gene_mean and mse >= gene_mean),
                "run_ids": [r["run_id"] for r in members],
            }
        )
    return table


def share(mse: float | None, baseline: float | None, floor: float | None) -> float | None:
    """Share of the gap from baseline to floor that is closed; None where one of them is not known."""
    return units.share_of_gap(mse, baseline, floor) if mse and baseline and floor else None


def gain(mse: float | None, baseline: float | None) -> float | None:
    """Bits gained over the baseline; None where one of the two is not known."""
    return units.gain_bits(mse, baseline) if mse and baseline else None


def _sd(runs: Iterable[Run], name: str) -> float | None:
    known = values(runs, name)
    return statistics.stdev(known) if len(known) > 1 else None


def learning_rates(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per size: the rates tried with their validation loss, the one the grid used, and whether it is an edge."""
    table = []
    for genes, params, size in sorted({(r["genes"], r["params"], r["size"]) for r in runs}):
        here = [r for r in runs if (r["genes"], r["size"]) == (genes, size)]
        tried = sorted(
            (r["lr"], r["val_mse"], r["status"]) for r in here if r["role"] == "rate" and r["lr"] is not None
        )
        used = sorted({r["lr"] for r in here if r["role"] == "law" and r["lr"] is not None})
        edges = [r["lr_at_edge"] for r in here if r["role"] == "law" and r["lr_at_edge"] is not None]
        table.append(
            {
                "genes": genes,
                "size": size,
                "params": params,
                "tried": [{"lr": lr, "val_mse": val, "status": status} for lr, val, status in tried],
                "used": used,
                "at_edge": any(edges) if edges else None,
            }
        )
    return table


def protocol(grid: Sequence[Run], spec: dict[str, Any]) -> dict[str, Any]:
    """How each size was trained, and what all runs share."""
    rows = []
    for params, size in sorted({(r["params"], r["size"]) for r in grid}):
        here = [r for r in grid if r["size"] == size]
        done = [r for r in here if r["status"] == "done"]
        epochs = [r["cells_seen"] / r["cells"] for r in done if r["cells_seen"] and r["cells"]]
        rows.append(
            {
                "size": size,
                "params": params,
                "max_cells_seen": sorted({r["max_cells_seen"] for r in here if r["max_cells_seen"] is not None}),
                "mean_cells_seen": mean(done, "cells_seen"),
                "epochs_low": min(epochs, default=None),
                "epochs_high": max(epochs, default=None),
                "optimizer_steps": mean(done, "optimizer_steps"),
                "flops": mean(done, "flops"),
                "done": len(done),
                "stopped_early": sum(1 for r in done if r["stop_reason"] not in (None, "budget")),
                "undertrained": sum(1 for r in done if r["undertrained"]),
            }
        )
    same = {
        name: sorted({str(r[name]) for r in grid if r[name] is not None})
        for name in ("recipe", "objective", "schedule")
    }
    return {
        "sizes": rows,
        **same,
        "train": spec.get("train", {}),
        "grid": spec.get("grid", {}),
        "lr": spec.get("lr", {}),
    }


def unfinished(grid: Sequence[Run]) -> list[str]:
    """A line per state that is not done."""
    left: dict[str, int] = {}
    for run in grid:
        if run["status"] != "done":
            state = f"failed ({run['failure']})" if run["status"] == "failed" and run["failure"] else run["status"]
            left[state] = left.get(state, 0) + 1
    return [f"{count} run{'s' if count > 1 else ''} of the grid still {state}" for state, count in sorted(left.items())]


def completeness(grid: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs done of runs planned, size by number of training cells: one matrix per number of genes."""
    found = []
    for genes in sorted({run["genes"] for run in grid}):
        here = [run for run in grid if run["genes"] == genes]
        columns = sorted({run["cells"] or 0 for run in here})
        rows = []
        for params, size in sorted({(run["params"], run["size"]) for run in here}):
            line = []
            for cells in columns:
                cell = [r for r in here if (r["params"], r["size"], r["cells"] or 0) == (params, size, cells)]
                done = sum(r["status"] == "done" for r in cell)
                line.append({"done": done, "planned": len(cell), "failed": sum(r["status"] == "failed" for r in cell)})
            rows.append({"size": size, "params": params, "cells": line})
        found.append({"genes": genes, "cells": [cells or None for cells in columns], "rows": rows})
    return found


def plan_against_actual(runs: Sequence[Run], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per size and role: hours and FLOPs that the plan gave its finished runs, and what they took; empty without plan.

    A run in a stack took its part of the stack's time; early stopping leaves a part of the planned budget unused.
    """
    planned = {cell["run_id"]: cell for cell in plan.get("cells", [])}
    members = {name: len(stack) for stack in plan.get("stacks", []) for name in stack}
    table = []
    for params, size, role in sorted({(r["params"], r["size"], r["role"]) for r in runs}):
        done = [
            r
            for r in runs
            if (r["params"], r["size"], r["role"]) == (params, size, role)
            and r["status"] == "done"
            and r["run_id"] in planned
            and r["wall_seconds"] is not None
        ]
        if not done:
            continue
        cells = [planned[r["run_id"]] for r in done]
        hours = sum(cell["hours"] * cell.get("workers", 1) for cell in cells)
        together = [r["stacked"] or members.get(r["run_id"], 1) for r in done]
        took = sum(r["wall_seconds"] * (r["workers"] or 1) / n for r, n in zip(done, together, strict=True)) / 3600
        flops, spent = sum(cell["flops"] for cell in cells), sum(values(done, "flops"))
        sources = sorted({str(cell.get("hours_from", "assumed")) for cell in cells})
        table.append(
            {
                "size": size,
                "params": params,
                "role": role,
                "runs": len(done),
                "planned_hours": hours,
                "actual_hours": took,
                "hours_ratio": took / hours if hours else None,
                "hours_from": sources,
                "planned_flops": flops,
                "actual_flops": spent,
                "flops_ratio": spent / flops if flops else None,
            }
        )
    return table
