"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaling_ray.console import plain, table

SHOWN_RUNS = 120
"""Most runs that are listed one by one; of more, sizes alone are."""


def format_plan(plan: Mapping[str, Any]) -> str:
    """Runs where they are few, then sizes, totals, and what a budget leaves undone."""
    lines = _runs(plan) if len(plan["settings"]) <= SHOWN_RUNS else []
    return "\n".join([*lines, *_sizes(plan), *_totals(plan), *_budget(plan)])


def _runs(plan: Mapping[str, Any]) -> list[str]:
    head = ("run", "params", "cells", "cells_seen", "TFLOP", "MiB", "hours")
    rows = [
        (
            setting["run_id"],
            f"{setting['params']:,}",
            str(setting["cells"]),
            f"{setting['max_cells_seen']:,}",
            f"{setting['flops'] / 1e12:.2f}",
            f"{setting['bytes'] / 2**20:.0f}",
            f"{setting['hours']:.3f}",
        )
        for setting in plan["settings"]
    ]
    return [*plain(table(head, rows, right=range(1, len(head)))), ""]


def _sizes(plan: Mapping[str, Any]) -> list[str]:
    priced = plan["totals"]["cost"] is not None
    head = ["size", "genes", "params", "runs", "TFLOP", "MiB", "shape", "hours", "from"]
    rows = []
    for size in plan["sizes"]:
        row = [
            size["size"],
            f"{size['genes']:,}",
            f"{size['params']:,}",
            str(size["runs"]),
            f"{size['flops'] / 1e12:.2f}",
            f"{size['bytes'] / 2**20:.0f}",
            shape_of(size),
            f"{size['hours']:.2f} ({size['hours_low']:.2f} to {size['hours_high']:.2f})",
            ", ".join(size["hours_from"]),
        ]
        rows.append([*row, f"{size['cost']:.2f}", size["node"]] if priced else row)
    head += [plan["totals"]["currency"], "node"] if priced else []
    return [*plain(table(head, rows, right=(1, 2, 3, 4, 5, 7, 9))), ""]


def shape_of(size: Mapping[str, Any]) -> str:
    """Where a run of a size trains: "1 CPU", "1/8 GPU, 1 CPU", "4 workers of 1 GPU, 2 CPUs"; and how many as one."""
    gpus, cpus = size["gpus"], f"{size['cpus']} CPU{'s' if size['cpus'] > 1 else ''}"
    share = f"1/{round(1 / gpus)} GPU, " if 0 < gpus < 1 else f"{gpus:g} GPU, " if gpus else ""
    group = f"{size['workers']} workers of " if size["workers"] > 1 else ""
    return f"{group}{share}{cpus}" + (f", {size['most_stacked']} as one" if size["most_stacked"] > 1 else "")


def _totals(plan: Mapping[str, Any]) -> list[str]:
    totals = plan["totals"]
    spent = f"{totals['gpu_hours']:,.2f} GPU-hours, " if totals["gpu_hours"] else ""
    store = f"{totals['object_store_bytes'] / 2**20:,.0f} MiB in the object store"
    lines = [
        f"{totals['runs']} runs, {totals['flops'] / 1e12:,.1f} TFLOP, {spent}{totals['cpu_hours']:.2f} CPU-hours, "
        f"{totals['hours']:.2f} hours ({totals['hours_low']:.2f} to {totals['hours_high']:.2f}){_hours_from(plan)}, "
        f"{totals['disk_bytes'] / 2**20:,.0f} MiB on disk, {store}{'' if totals['cells_known'] else ' (cells assumed)'}"
    ]
    if totals["cost"] is not None:
        lines.append(
            f"{totals['cost']:,.2f} {totals['currency']} ({totals['cost_low']:,.2f} to {totals['cost_high']:,.2f}) at "
            f"prices of {totals['prices_as_of']}, spot where it is priced, nodes shared and full"
        )
    return lines


def _hours_from(plan: Mapping[str, Any]) -> str:
    measured, runs = sum(setting["hours_from"] == "measured" for setting in plan["settings"]), len(plan["settings"])
    if measured == runs:
        return " at measured rates"
    given = plan["totals"]["gflops_per_cpu"]
    model = "a model of this device's speed" if given is None else f"a model of CPUs of {given:g} GFLOP/s"
    return f" by {model}" if not measured else f" ({measured} runs at measured rates, the others by {model})"


def _budget(plan: Mapping[str, Any]) -> list[str]:
    budget = plan["budget"]
    if budget is None:
        return []
    limits = ", ".join(f"{name} = {value:g}" for name, value in budget["limits"].items())
    if not budget["left"]:
        return [f"the budget ({limits}) suffices for all runs"]
    taken = [f"{budget['left_hours']:.2f} hours of runs"]
    taken += [f"{budget['left_gpu_hours']:.2f} GPU-hours"] if budget["left_gpu_hours"] else []
    cost = budget["left_cost"]
    taken += [f"{cost:,.2f} {plan['totals']['currency']}"] if cost is not None else []
    left = budget["left"]
    shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return [
        f"the budget ({limits}) ends at {budget['stopped_by']} after {budget['done']} runs and leaves {len(left)}, "
        f"which would take {', '.join(taken)}: {shown}"
    ]
