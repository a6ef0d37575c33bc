"""What a sweep will do and cost, from the spec alone: grid, parameters, FLOPs, memory, hours. No Ray, no torch."""

from __future__ import annotations

from typing import Any

from scaling_ray.model.sizes import parameters_without_embedding, training_bytes, training_flops_per_cell
from scaling_ray.spec import RunSpec, SweepSpec


def masked_genes_per_cell(run: RunSpec) -> float:
    """Masked genes of a cell in which every gene of the panel was measured (the mean of it for ``published``)."""
    if run.train.recipe == "corrected":
        return float(int(run.genes * run.train.mask_fraction + 0.5))
    return run.genes * run.train.mask_fraction


def run_cost(run: RunSpec, gflops_per_cpu: float) -> dict[str, Any]:
    """One line of a plan: hours are one worker's, at the spec's assumed rate of matrix FLOPs per CPU."""
    masked = masked_genes_per_cell(run)
    flops = training_flops_per_cell(run.shape, run.genes, masked) * run.train.total_steps * run.train.cells_per_step
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
        "workers": run.workers,
        "engine": run.engine,
        "hours": flops / (gflops_per_cpu * 1e9 * run.train.threads * run.workers) / 3600,
    }


def make_plan(spec: SweepSpec) -> dict[str, Any]:
    """The plan as it is written to plan.json: every run with its cost, and totals over CPUs in parallel."""
    cells = [run_cost(run, spec.resources.gflops_per_cpu) for run in spec.runs()]
    cpu_hours = sum(cell["hours"] * cell["workers"] for cell in cells)
    return {
        "version": 1,
        "name": spec.name,
        "cells": cells,
        "totals": {
            "runs": len(cells),
            "flops": sum(cell["flops"] for cell in cells),
            "largest_bytes": max(cell["bytes"] for cell in cells),
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
        f"{totals['hours']:.2f} hours at {totals['gflops_per_cpu']:g} GFLOP/s per CPU"
    )
    return "\n".join(lines)
