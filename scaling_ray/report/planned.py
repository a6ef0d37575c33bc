"""Plan against actual: hours and FLOPs that the plan gave finished runs, and what they took, by size and by setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scaling_ray.report.sweep import Planned
from scaling_ray.results.columns import Row


def plan_by_size(rows: Sequence[Row], planned: Mapping[str, Planned]) -> list[dict[str, Any]]:
    """An entry per size and role, and with several of them one of all ("all sizes"); empty without a plan."""
    known = _known(rows, planned)
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in sorted(known, key=lambda row: (row.params, row.size, row.role)):
        groups.setdefault((row.params, row.size, row.role), []).append(row)
    table = [
        {"size": size, "params": params, "role": role} | _compared(here, planned)
        for (params, size, role), here in groups.items()
    ]
    if len(table) > 1:
        table.append({"size": "all sizes", "params": None, "role": "all"} | _compared(known, planned))
    return table


def plan_by_setting(rows: Sequence[Row], planned: Mapping[str, Planned]) -> list[dict[str, Any]]:
    """An entry per setting of the grid: its seeds together."""
    groups: dict[tuple[int, str, int, int], list[Row]] = {}
    for row in _known(rows, planned):
        if row.role == "law":
            groups.setdefault((row.params, row.size, row.genes, row.cells or 0), []).append(row)
    return [
        {"size": size, "params": params, "genes": genes, "cells": cells or None} | _compared(here, planned)
        for (params, size, genes, cells), here in sorted(groups.items())
    ]


def _known(rows: Sequence[Row], planned: Mapping[str, Planned]) -> list[Row]:
    return [row for row in rows if row.status == "done" and row.run_id in planned]


def _compared(rows: Sequence[Row], planned: Mapping[str, Planned]) -> dict[str, Any]:
    """Sums over finished runs. A run in a stack took its part of the stack's time.

    ``hours_ratio`` is of the whole plan: early stopping leaves a part of it unused. ``hours_ratio_by_cells`` counts of
    each run's planned hours only the share of the cells that it saw, and is None where a run does not say.
    """
    plans = [planned[row.run_id] for row in rows]
    hours = sum(plan.hours * plan.workers for plan in plans)
    took = sum((row.wall_seconds or 0.0) * (row.workers or 1) / (row.stacked or 1) for row in rows) / 3600
    shares = [_share_of_budget(row) for row in rows]
    spent = [share * plan.hours * plan.workers for share, plan in zip(shares, plans, strict=True) if share is not None]
    by_cells = sum(spent) if len(spent) == len(rows) else None
    below = [plan.low * plan.workers for plan in plans if plan.low is not None]
    above = [plan.high * plan.workers for plan in plans if plan.high is not None]
    has_interval = len(below) == len(above) == len(plans)
    flops, done_flops = sum(plan.flops for plan in plans), sum(row.flops or 0.0 for row in rows)
    return {
        "runs": len(rows),
        "planned_hours": hours,
        "planned_hours_low": sum(below) if has_interval else None,
        "planned_hours_high": sum(above) if has_interval else None,
        "actual_hours": took,
        "hours_ratio": took / hours if hours else None,
        "hours_ratio_by_cells": took / by_cells if by_cells else None,
        "hours_from": sorted({plan.hours_from for plan in plans}),
        "planned_flops": flops,
        "actual_flops": done_flops,
        "flops_ratio": done_flops / flops if flops else None,
    }


def _share_of_budget(row: Row) -> float | None:
    if not row.max_cells_seen or row.cells_seen is None:
        return None
    return min(1.0, row.cells_seen / row.max_cells_seen)
