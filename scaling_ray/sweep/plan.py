"""The plan of a sweep, from its spec alone: grid, parameters, FLOPs, memory, hours. No Ray, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from scaling_ray.errors import BadInput
from scaling_ray.execution import Device, choose_stack
from scaling_ray.runs import RunSpec, runs_of, stack_mates
from scaling_ray.sizes import training_bytes, training_flops_per_cell
from scaling_ray.spec import SweepSpec


def run_cost(
    run: RunSpec, gflops_per_cpu: float, rates: dict[str, float] | None = None, members: int = 1
) -> dict[str, Any]:
    """One line of a plan.

    Hours are those of the run's workers together: at its measured rate where ``rates`` has one (cells a second of one
    process, by ``rate_name``), else at an assumed rate of matrix FLOPs per CPU. A run in a stack of ``members`` has its
    part of the stack's hours.
    """
    masked = run.masked_genes_per_cell
    cells = run.train.total_steps * run.train.cells_per_step
    trained = cells * (1.0 + run.train.branched_share)
    flops = training_flops_per_cell(run.shape, run.genes, masked) * trained
    measured = (rates or {}).get(rate_name(run, members))
    cpus = run.execution.cpus * run.execution.workers
    seconds = trained / measured / run.execution.workers if measured else flops / (gflops_per_cpu * 1e9 * cpus)
    return {
        "run_id": run.run_id,
        "role": run.role,
        "size": run.size,
        "params": run.params,
        "params_without_embedding": run.params_without_embedding,
        "genes": run.genes,
        "cells": run.cells if run.cells is not None else "all",
        "donors": run.donors if run.donors is not None else "all",
        "seed": run.seed,
        "lr": run.lr,
        "lr_candidates": run.lr_candidates,
        "max_cells_seen": cells,
        "flops": flops,
        "bytes": training_bytes(run.shape, run.genes, run.execution.micro_batch),
        "disk_bytes": disk_bytes(run)[0],
        "workers": run.execution.workers,
        "execution": run.execution.model_dump(mode="json"),
        "hours": seconds / 3600,
        "hours_from": "measured" if measured else "assumed",
    }


def rate_name(run: RunSpec, members: int = 1) -> str:
    """The key of a measured throughput of such runs, or of stacks of them: everything that it depends on."""
    train, execution = run.train, run.execution
    shape = f"{run.width}x{run.layers}x{run.heads}x{run.feedforward} v{run.genes}"
    rates = f"dropout{train.dropout:g} mask{train.mask_fraction:g}"
    how = f"b{train.cells_per_step}/{execution.micro_batch} {execution.precision} {rates} threads{execution.cpus}"
    return f"{shape} {how}" + (f" stack{members}" if members > 1 else "")


def read_rates(path: Path) -> dict[str, float]:
    """Measured cells a second, as ``scaling-ray bench train --spec`` writes them; BadInput for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cells_per_second"]
        return {str(name): float(rate) for name, rate in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "holds no measured rates; write it with `scaling-ray bench train --spec SPEC.toml --out FILE`"
        raise BadInput("--rates", str(path), remedy) from error


def disk_bytes(run: RunSpec) -> tuple[int, int]:
    """(bytes that a run leaves, most that it takes while it trains: chosen weights again and three states more).

    It leaves its chosen weights, and a trunk with those chosen until then.
    """
    left = 4 * run.params + (16 * run.params if run.train.wsd is not None and run.role == "law" else 0)
    return left, left + 4 * run.params + 3 * 12 * run.params


def check_disk(spec: SweepSpec, runs: list[RunSpec]) -> None:
    """Raise BadInput where the sweep's checkpoints would take more than ``resources.disk_gib``."""
    if spec.resources.disk_gib is None:
        return
    at_once = max(1, spec.resources.cpus // spec.train.threads)
    training = sorted((disk_bytes(run)[1] for run in runs), reverse=True)[:at_once]
    needed = sum(disk_bytes(run)[0] for run in runs) + sum(training)
    if needed > spec.resources.disk_gib * 2**30:
        remedy = f"is less than the {needed / 2**30:.2f} GiB of this grid's checkpoints; raise it, or sweep fewer runs"
        raise BadInput("resources.disk_gib", spec.resources.disk_gib, remedy)


def as_planned(runs: list[RunSpec], plan: dict[str, Any] | None) -> list[RunSpec]:
    """The runs with the execution settings of an earlier plan, so that results stay bit-identical."""
    if plan is None:
        return runs
    there = {setting["run_id"]: setting["execution"] for setting in plan["settings"]}
    return [
        run.model_copy(update={"execution": run.execution.repeating(there[run.run_id])}) if run.run_id in there else run
        for run in runs
    ]


def plan_stacks(
    runs: list[RunSpec], processes: int, most: int | Literal["auto"], there: list[list[str]]
) -> list[list[str]]:
    """Which runs train as one: lists of at least two run ids.

    Args:
        runs: of the sweep.
        processes: that train at the same time: a group is cut into at least as many stacks.
        most: members of a stack, or "auto": what pays for the shape and device.
        there: stacks of an earlier plan, which are kept.
    """
    taken = {run_id for stack in there for run_id in stack}
    groups: dict[str, list[RunSpec]] = {}
    for run in runs:
        if run.execution.workers == 1 and run.run_id not in taken:
            groups.setdefault(stack_mates(run), []).append(run)
    stacks = list(there)
    for group in groups.values():
        execution = group[0].execution
        pays = choose_stack(group[0].shape, execution.micro_batch, execution.device)
        members = pays if most == "auto" else most
        count = max(-(-len(group) // members), min(processes, len(group)))
        edges = [len(group) * part // count for part in range(count + 1)]
        cut = [group[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
        stacks += [[run.run_id for run in part] for part in cut if len(part) > 1]
    return stacks


def make_plan(
    spec: SweepSpec,
    device: Device | None = None,
    earlier: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
) -> tuple[dict[str, Any], list[RunSpec]]:
    """The plan as it is written to plan.json (every run with its cost, stacks, totals over CPUs), and its runs.

    Args:
        spec: the sweep's.
        device: of runs that no earlier plan knows, as for ``runs_of``.
        earlier: plan.json of an earlier call on the same sweep; what it says of a run is repeated.
        rates: measured cells a second by ``rate_name``.
    """
    runs = as_planned(runs_of(spec, device), earlier)
    check_disk(spec, runs)
    processes = max(1, spec.resources.cpus // spec.train.threads)
    stacks = plan_stacks(runs, processes, spec.resources.stack, earlier["stacks"] if earlier else [])
    members = {name: len(stack) for stack in stacks for name in stack}
    runs = [run.carried_out(stack=members[run.run_id] if run.run_id in members else 1) for run in runs]
    settings = [run_cost(run, spec.resources.gflops_per_cpu, rates, run.execution.stack) for run in runs]
    cpu_hours = sum(
        setting["hours"] * run.execution.workers * run.execution.cpus
        for setting, run in zip(settings, runs, strict=True)
    )
    plan = {
        "version": 3,
        "name": spec.name,
        "device": runs[0].execution.device,
        "settings": settings,
        "stacks": stacks,
        "probed": earlier["probed"] if earlier else [],
        "totals": {
            "runs": len(settings),
            "flops": sum(setting["flops"] for setting in settings),
            "largest_bytes": max(setting["bytes"] for setting in settings),
            "disk_bytes": sum(setting["disk_bytes"] for setting in settings),
            "cpu_hours": cpu_hours,
            "hours": cpu_hours / spec.resources.cpus,
            "gflops_per_cpu": spec.resources.gflops_per_cpu,
        },
    }
    return plan, runs


def format_plan(plan: dict[str, Any]) -> str:
    """A plan as text for people."""
    lines = [f"{'run':56} {'params':>11} {'cells':>8} {'cells_seen':>10} {'TFLOP':>9} {'MiB':>8} {'hours':>7}"]
    for setting in plan["settings"]:
        lines.append(
            f"{setting['run_id']:56} {setting['params']:>11,} {setting['cells']!s:>8} {setting['max_cells_seen']:>10,} "
            f"{setting['flops'] / 1e12:>9.2f} {setting['bytes'] / 2**20:>8.0f} {setting['hours']:>7.3f}"
        )
    totals = plan["totals"]
    lines.append(
        f"{totals['runs']} runs, {totals['flops'] / 1e12:,.1f} TFLOP, {totals['cpu_hours']:.2f} CPU-hours, "
        f"{totals['hours']:.2f} hours{_hours_from(plan)}, {totals['disk_bytes'] / 2**20:,.0f} MiB on disk"
    )
    return "\n".join(lines)


def _hours_from(plan: dict[str, Any]) -> str:
    measured = sum(setting["hours_from"] == "measured" for setting in plan["settings"])
    if measured == len(plan["settings"]):
        return " at measured rates"
    assumed = f"{plan['totals']['gflops_per_cpu']:g} GFLOP/s per CPU"
    return f" at {assumed}" if not measured else f" ({measured} runs at measured rates, the others at {assumed})"
