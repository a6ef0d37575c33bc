"""What a sweep will do and cost, from the spec alone: grid, parameters, FLOPs, memory, hours. No Ray, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from scaling_ray.errors import BadInput
from scaling_ray.execution import Device, choose_stack
from scaling_ray.sizes import parameters_without_embedding, training_bytes, training_flops_per_cell
from scaling_ray.spec import RunSpec, SweepSpec, content_hash


def masked_genes_per_cell(run: RunSpec) -> float:
    """Masked genes of a cell in which every gene of the panel was measured (the mean of it for ``published``)."""
    if run.train.recipe == "corrected":
        return float(int(run.genes * run.train.mask_fraction + 0.5))
    return run.genes * run.train.mask_fraction


def run_cost(
    run: RunSpec, gflops_per_cpu: float, rates: dict[str, float] | None = None, members: int = 1
) -> dict[str, Any]:
    """One line of a plan.

    Hours are those of the run's workers together: at its measured rate where ``rates`` has one (cells a second of one
    process, by ``rate_name``), else at an assumed rate of matrix FLOPs per CPU. A run in a stack of ``members`` has its
    part of the stack's hours.
    """
    masked = masked_genes_per_cell(run)
    cells = run.train.total_steps * run.train.cells_per_step
    flops = training_flops_per_cell(run.shape, run.genes, masked) * cells
    measured = (rates or {}).get(rate_name(run, members))
    cpus = run.train.threads * run.workers
    seconds = cells / measured / run.workers if measured else flops / (gflops_per_cpu * 1e9 * cpus)
    return {
        "run_id": run.run_id,
        "role": run.role,
        "size": run.size,
        "params": run.params,
        "params_without_embedding": parameters_without_embedding(run.shape),
        "genes": run.genes,
        "cells": run.cells if run.cells is not None else "all",
        "donors": run.donors if run.donors is not None else "all",
        "seed": run.seed,
        "lr": run.lr,
        "lr_candidates": run.lr_candidates,
        "max_cells_seen": run.train.max_cells_seen,
        "flops": flops,
        "bytes": training_bytes(run.shape, run.genes, run.micro_batch),
        "disk_bytes": disk_bytes(run)[0],
        "workers": run.workers,
        "engine": run.engine,
        "micro_batch": run.micro_batch,
        "precision": run.precision,
        "compile": run.compile,
        "hours": seconds / 3600,
        "hours_from": "measured" if measured else "assumed",
    }


def rate_name(run: RunSpec, members: int = 1) -> str:
    """Under which a measured rate of such runs, or of stacks of them, is kept: everything that it depends on."""
    train = run.train
    shape = f"{run.width}x{run.layers}x{run.heads}x{run.feedforward} v{run.genes}"
    rates = f"dropout{train.dropout:g} mask{train.mask_fraction:g}"
    how = f"b{train.cells_per_step}/{run.micro_batch} {run.precision} {rates} threads{train.threads}"
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
    """Bytes that a run leaves (its chosen weights), and most that it takes while it trains (three states beside)."""
    return 4 * run.params, 4 * run.params * 2 + 3 * 12 * run.params


def check_disk(spec: SweepSpec, runs: list[RunSpec]) -> None:
    """BadInput where the sweep's checkpoints would take more than ``resources.disk_gib``."""
    if spec.resources.disk_gib is None:
        return
    at_once = max(1, spec.resources.cpus // spec.train.threads)
    training = sorted((disk_bytes(run)[1] for run in runs), reverse=True)[:at_once]
    needed = sum(disk_bytes(run)[0] for run in runs) + sum(training)
    if needed > spec.resources.disk_gib * 2**30:
        remedy = f"is less than the {needed / 2**30:.2f} GiB of this grid's checkpoints; raise it, or sweep fewer runs"
        raise BadInput("resources.disk_gib", spec.resources.disk_gib, remedy)


def as_planned(runs: list[RunSpec], plan: dict[str, Any]) -> list[RunSpec]:
    """The runs, carried out as an earlier plan says: what may move a digit stays what it was."""
    kept = ("micro_batch", "precision", "compile")
    there = {cell["run_id"]: {name: cell[name] for name in kept} for cell in plan.get("cells", [])}
    return [run.model_copy(update=there.get(run.run_id, {})) for run in runs]


def plan_stacks(
    runs: list[RunSpec], processes: int, most: int | Literal["auto"], device: Device, there: list[list[str]]
) -> list[list[str]]:
    """Which runs train as one: lists of run ids, those of one only left out.

    Args:
        runs: of the sweep.
        processes: that train at the same time: a group is cut into at least as many stacks.
        most: members of a stack, or "auto": what pays for the shape.
        device: that they train on.
        there: stacks of an earlier plan, which stay as they are.
    """
    taken = {run_id for stack in there for run_id in stack}
    groups: dict[str, list[RunSpec]] = {}
    own = {"run_id", "cells", "donors", "seed", "lr", "lr_candidates"}
    for run in runs:
        if run.workers == 1 and run.run_id not in taken:
            groups.setdefault(run.model_dump_json(exclude=own), []).append(run)
    stacks = list(there)
    for group in groups.values():
        members = choose_stack(group[0].shape, group[0].micro_batch, device) if most == "auto" else most
        count = max(-(-len(group) // members), min(processes, len(group)))
        edges = [len(group) * part // count for part in range(count + 1)]
        cut = [group[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
        stacks += [[run.run_id for run in part] for part in cut if len(part) > 1]
    return stacks


def stack_name(runs: list[RunSpec]) -> str:
    """The name of a stack's directory: it follows from its members."""
    return f"{runs[0].role}-{runs[0].size}-{content_hash([run.run_id for run in runs])[:8]}"


def make_plan(
    spec: SweepSpec, earlier: dict[str, Any] | None = None, rates: dict[str, float] | None = None
) -> dict[str, Any]:
    """The plan as it is written to plan.json: every run with its cost, stacks, and totals over CPUs in parallel.

    Args:
        spec: the sweep's.
        earlier: plan.json of an earlier call on the same sweep, which is repeated where it says something.
        rates: measured cells a second by ``rate_name``.
    """
    runs = as_planned(spec.runs(), earlier or {})
    check_disk(spec, runs)
    processes = max(1, spec.resources.cpus // spec.train.threads)
    stacks = plan_stacks(runs, processes, spec.resources.stack, spec.device, (earlier or {}).get("stacks", []))
    members = {name: len(stack) for stack in stacks for name in stack}
    cells = [run_cost(run, spec.resources.gflops_per_cpu, rates, members.get(run.run_id, 1)) for run in runs]
    cpu_hours = sum(cell["hours"] * cell["workers"] for cell in cells)
    return {
        "version": 2,
        "name": spec.name,
        "device": spec.device,
        "cells": cells,
        "stacks": stacks,
        "probed": (earlier or {}).get("probed", []),
        "totals": {
            "runs": len(cells),
            "flops": sum(cell["flops"] for cell in cells),
            "largest_bytes": max(cell["bytes"] for cell in cells),
            "disk_bytes": sum(cell["disk_bytes"] for cell in cells),
            "cpu_hours": cpu_hours,
            "hours": cpu_hours / spec.resources.cpus,
            "gflops_per_cpu": spec.resources.gflops_per_cpu,
        },
    }


def format_plan(plan: dict[str, Any]) -> str:
    """A plan for people."""
    lines = [f"{'run':56} {'params':>11} {'cells':>8} {'cells_seen':>10} {'TFLOP':>9} {'MiB':>8} {'hours':>7}"]
    for cell in plan["cells"]:
        lines.append(
            f"{cell['run_id']:56} {cell['params']:>11,} {cell['cells']!s:>8} {cell['max_cells_seen']:>10,} "
            f"{cell['flops'] / 1e12:>9.2f} {cell['bytes'] / 2**20:>8.0f} {cell['hours']:>7.3f}"
        )
    totals = plan["totals"]
    lines.append(
        f"{totals['runs']} runs, {totals['flops'] / 1e12:,.1f} TFLOP, {totals['cpu_hours']:.2f} CPU-hours, "
        f"{totals['hours']:.2f} hours{_hours_from(plan)}, {totals['disk_bytes'] / 2**20:,.0f} MiB on disk"
    )
    return "\n".join(lines)


def _hours_from(plan: dict[str, Any]) -> str:
    measured = sum(cell["hours_from"] == "measured" for cell in plan["cells"])
    if measured == len(plan["cells"]):
        return " at measured rates"
    assumed = f"{plan['totals']['gflops_per_cpu']:g} GFLOP/s per CPU"
    return f" at {assumed}" if not measured else f" ({measured} runs at measured rates, the others at {assumed})"
