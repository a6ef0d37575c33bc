"""What a budget would leave undone, by the schedule of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scaling_ray.resources import BudgetSpec
from scaling_ray.sweep.makespan import Span

SPENT = {"max_gpu_hours": "gpu_hours", "max_cpu_hours": "cpu_hours", "max_cost": "cost"}
"""Limit -> what each setting of a plan takes of it."""


def left_undone(
    budget: BudgetSpec, settings: Sequence[dict[str, Any]], units: Sequence[Sequence[int]], spans: Sequence[Span]
) -> dict[str, Any] | None:
    """Which runs the limits leave undone, and what they would take; None without limits.

    Units count in the order in which they start: of what is ready, the longest first. The first that would end beyond a
    limit, and all that start after it, are left.

    Args:
        budget: the limits.
        settings: of the plan, each with what it takes.
        units: positions of the settings that train as one.
        spans: when each unit starts and ends, in seconds.
    """
    if not budget.is_limited:
        return None
    limits = {name: getattr(budget, name) for name in SPENT if getattr(budget, name) is not None}
    spent = dict.fromkeys(limits, 0.0)
    order = sorted(range(len(units)), key=lambda number: (spans[number].start, spans[number].end, number))
    left: list[int] = []
    stopped_by: str | None = None
    for number in order:
        if stopped_by is None:
            spent = {
                name: spent[name] + sum(settings[place][SPENT[name]] for place in units[number]) for name in limits
            }
            over = [name for name in limits if spent[name] > limits[name]]
            wall = budget.max_wall_hours
            if wall is not None and spans[number].end > 3600 * wall:
                over.append("max_wall_hours")
            stopped_by = over[0] if over else None
        if stopped_by is not None:
            left += units[number]
    undone = [settings[place] for place in left]
    costs = [setting["cost"] for setting in undone]
    return {
        "limits": {name: value for name, value in budget.model_dump().items() if value is not None},
        "stopped_by": stopped_by,
        "done": len(settings) - len(undone),
        "left": [setting["run_id"] for setting in undone],
        "left_hours": sum(setting["hours"] for setting in undone),
        "left_gpu_hours": sum(setting["gpu_hours"] for setting in undone),
        "left_cpu_hours": sum(setting["cpu_hours"] for setting in undone),
        "left_cost": None if None in costs else sum(costs),
    }
