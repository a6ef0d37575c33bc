"""Measure what `scaling-ray plan` counts with: seconds of updates and evaluations over shapes, panels, batches, stacks.

Writes reports/benchmarks/planning.json: a row per kind of run with the CPU seconds of one update on one thread (a
machine with other work on it lengthens a clock's seconds more than a CPU's). Of kinds that --results has already, the
faster of both measurements stays: other work only slows. ``--refit`` measures nothing: it fits the
terms of ``scaling_ray.sweep.speed`` to the rows of an earlier file and prints them with their scatter.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, say
from scipy.optimize import nnls

from scaling_ray.execution import cpu_here
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.sizes import Shape
from scaling_ray.spec import parse_spec
from scaling_ray.storage import write_json
from scaling_ray.sweep.speed import CPU, Terms, work_of_update
from scaling_ray.train.batches import evaluation_batches
from scaling_ray.train.bench import MADE_CELLS, made_cells, made_updates
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.evaluation import evaluate

SHAPES = {
    "XXS": (1, 1, 1, 1),
    "W4": (4, 1, 1, 1),
    "W8": (8, 1, 2, 1),
    "TINY": (16, 1, 1, 1),
    "W16": (16, 1, 4, 1),
    "W24": (24, 1, 6, 2),
    "W32": (32, 1, 8, 2),
    "W48": (48, 1, 12, 4),
    "XS": (64, 2, 4, 4),
    "S": (128, 4, 8, 4),
    "M": (512, 6, 8, 4),
}
KINDS = [
    *product(("XXS", "W4", "W8", "TINY", "W16", "W24", "W32", "W48"), (128, 256, 512), (16,), (0.0,), (1,)),
    *product(("XXS", "TINY", "W32"), (512, 1024), (32,), (0.0,), (1,)),
    *product(("XXS", "TINY", "W16", "W32", "XS"), (512,), (32,), (0.1,), (1,)),
    *product(("XXS", "W4"), (128, 256, 512), (16,), (0.0,), (6,)),
    *product(("W8", "W16", "TINY"), (128, 256), (16,), (0.0,), (4,)),
    *product(("XS",), (128, 256, 512), (16,), (0.0,), (1,)),
    ("S", 128, 16, 0.0, 1),
    ("S", 256, 16, 0.0, 1),
    ("S", 512, 8, 0.0, 1),
    ("S", 512, 8, 0.1, 1),
    ("M", 128, 8, 0.0, 1),
    ("M", 512, 4, 0.0, 1),
]
"""Kinds of runs: size, genes, cells of an update, dropout, models trained as one."""

SETTLED, LARGE = 16, 100_000
"""Updates between two looks at the losses, as training does it; of models above so many parameters one."""


def run_of(size: str, genes: int, cells_per_step: int, dropout: float) -> RunSpec:
    """A run as this machine carries it out, in the precision that it chooses."""
    width, layers, heads, feedforward = SHAPES[size]
    shape = f"width = {width}\nlayers = {layers}\nheads = {heads}\nfeedforward = {feedforward}"
    spec = parse_spec(
        f'name = "planning"\n[data]\ngenes = {genes}\n[grid]\nsizes = ["{size}"]\ngenes = [{genes}]\ncells = ["all"]\n'
        f"seeds = [1]\n[lr]\nrates = [1e-3]\n[train]\ncells_per_step = {cells_per_step}\ndropout = {dropout}\n"
        f"[sizes.{size}]\n{shape}\n"
    )
    return runs_of(spec, cpu_here())[0]


def cpu_seconds(run: RunSpec, members: int, seconds: float) -> tuple[float, float]:
    """(CPU seconds, clock seconds) of one update of a run, or of a stack of them, over at least ``seconds``."""
    update, wait = made_updates(run, members, torch.device("cpu"))
    update()
    wait()
    # a single update of a large model is long enough
    settled = SETTLED if members * run.params < LARGE else 1
    done, cpu, clock = 0, time.process_time(), time.perf_counter()
    while done % settled or time.process_time() - cpu < seconds:
        update()
        done += 1
        if done % settled == 0:
            wait()
    return (time.process_time() - cpu) / done, (time.perf_counter() - clock) / done


def evaluation_seconds(run: RunSpec, seconds: float) -> float:
    """CPU seconds of evaluating one cell, batches made before."""
    cells = made_cells(MADE_CELLS, run.genes).rows(slice(0, 256))
    engine = PlainEngine(run, torch.device("cpu"))
    made = evaluation_batches(cells, run.train, run.execution.micro_batch, engine.device)
    done, cpu = 0, time.process_time()
    while time.process_time() - cpu < seconds:
        evaluate(engine, cells, run, made)
        done += len(cells)
    return (time.process_time() - cpu) / done


def measure(seconds: float) -> list[dict[str, Any]]:
    """A row per kind."""
    torch.set_num_threads(1)
    rows = []
    for size, genes, cells_per_step, dropout, members in KINDS:
        run = run_of(size, genes, cells_per_step, dropout)
        cpu, clock = cpu_seconds(run, members, seconds)
        row = {
            "size": size,
            "shape": SHAPES[size],
            "genes": genes,
            "cells_per_step": cells_per_step,
            "dropout": dropout,
            "stack": members,
            "micro_batch": run.execution.micro_batch,
            "precision": run.execution.precision,
            "update_cpu_seconds": cpu,
            "update_clock_seconds": clock,
            "cells_per_second": members * cells_per_step / cpu,
        }
        if members == 1 and dropout == 0.0 and genes <= 512:
            row["evaluation_cpu_seconds_per_cell"] = evaluation_seconds(run, seconds / 2)
        rows.append(row)
        say(f"{size:5} V {genes:4} batch {cells_per_step} x{members}: {row['cells_per_second']:,.0f} cells/s")
    return rows


def fastest(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind the faster of two measurements, update and evaluation apart."""

    def kind(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("size", "genes", "cells_per_step", "dropout", "stack", "precision"))

    known = {kind(row): row for row in earlier}
    merged = []
    for row in rows:
        other = known[kind(row)] if kind(row) in known else row
        best = dict(min(row, other, key=lambda one: float(one["update_cpu_seconds"])))
        name = "evaluation_cpu_seconds_per_cell"
        merged.append(best | ({name: min(row[name], other[name])} if name in row and name in other else {}))
    return merged


def refit(rows: list[dict[str, Any]]) -> tuple[Terms, list[float]]:
    """(seconds of each kind of work, modelled over measured seconds of each row), by least squares of relative errors.

    Matrix FLOPs keep the rate of square products: too few rows are long in them.
    """
    work = np.array([work_of(row) for row in rows])
    measured = np.array([row["update_cpu_seconds"] for row in rows])
    fixed = np.array([0.0] * (work.shape[1] - 2) + list(CPU[-2:]))
    free = fixed == 0
    found, modelled = fixed, measured
    for _ in range(30):  # errors relative to the mean of both, which a term too large cannot hide in
        weight = 1 / np.sqrt(measured * modelled)
        columns = work[:, free] * weight[:, None]
        scale = np.where(columns.max(0) > 0, columns.max(0), 1)
        seconds, _ = nnls(columns / scale, np.maximum(measured - work @ fixed, 0) * weight)
        found = fixed.copy()
        found[free] = seconds / scale
        modelled = work @ found
    return Terms(*found.tolist()), (modelled / measured).tolist()


def work_of(row: dict[str, Any]) -> Terms:
    """The work of one update of a row."""
    shape, genes = Shape(*row["shape"]), row["genes"]
    return work_of_update(
        shape,
        genes,
        round(0.15 * genes),
        row["cells_per_step"],
        row["micro_batch"],
        row["stack"],
        row["dropout"],
        row["precision"],
    )


def show(rows: list[dict[str, Any]]) -> None:
    """Print a refit: terms, scatter, and each row that is off by more than a fifth."""
    terms, ratios = refit(rows)
    for name, seconds in terms._asdict().items():
        print(f"{name:15} {seconds:.3g}")
    logs = np.log(ratios)
    evaluated = [row for row in rows if "evaluation_cpu_seconds_per_cell" in row]
    shares = [row["evaluation_cpu_seconds_per_cell"] * row["cells_per_second"] for row in evaluated]
    print(f"scatter of the logarithm {logs.std():.3f}, evaluation over training {np.median(shares):.2f}")
    for row, ratio in zip(rows, ratios, strict=True):
        if abs(ratio - 1) > 0.2:
            print(
                f"{ratio:.2f} of measured: {row['size']} V {row['genes']} batch {row['cells_per_step']} x{row['stack']}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/planning.json"))
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds of each kind, at least")
    parser.add_argument("--refit", action="store_true", help="fit the terms to the rows of --results instead")
    options = parser.parse_args()
    there = json.loads(options.results.read_text())["rows"] if options.results.is_file() else []
    if options.refit:
        show(there)
    else:
        write_json(options.results, {"rows": fastest(measure(options.seconds), there), "machine": machine()})
