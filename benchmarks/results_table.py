"""What one ended run costs a sweep that has many: reading it and writing both tables, at 200 and 2,000 finished runs.

The rows of finished runs stay in memory, so the cost is that of one run's files and of writing the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import machine

from scaling_ray.records import RunResult
from scaling_ray.results.sweep_files import METRICS, RESULT, TEST_CELLS, TEST_GENES, SweepFiles, write_table
from scaling_ray.results.write import ResultsTable
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.storage import write_json

SPEC = """
name = "many"
[grid]
sizes = ["XXS", "TINY"]
genes = [64]
cells = ["all"]
seeds = [{seeds}]
[lr]
rates = [1e-3]
"""
TRAIN_CELLS = 1_000


def finished(sweep: SweepFiles, run: RunSpec) -> None:
    """Leave what a finished run leaves, its weights apart."""
    rng, files = np.random.default_rng(run.seed), sweep.run(run.run_id)
    files.prepare(run)
    losses = rng.gamma(2.0, 1.0, 64)
    result = RunResult(
        run_id=run.run_id,
        attempt="a",
        attempts=1,
        data_hash="d" * 64,
        lr=run.lr or 1e-3,
        cells_resolved=TRAIN_CELLS,
        cells_seen=100_000,
        masked_genes_seen=1_000_000,
        optimizer_steps=3_125,
        flops=1e12,
        loss_unit="mse",
        val_loss=float(losses.mean()),
        final_val_loss=float(losses.mean()),
        best_curve_loss=float(losses.min()),
        best_cells_seen=100_000,
        test_loss=float(losses.mean()),
        test_loss_sum=float(losses.sum()),
        test_masked_genes=640,
        stop_reason="budget",
        wall_seconds=1.0,
        train_seconds=1.0,
        workers=1,
        engine="plain",
        micro_batch=32,
        precision="fp32",
        stacked=1,
        host="host",
        ended_ms=0,
    )
    rows = [{"kind": "eval", "optimizer_steps": i, "cells_seen": i, "val_loss": 1.0 / i} for i in range(1, 21)]
    files.place.write(METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    masked = np.full(64, 10, np.int32)
    write_table(files.place, TEST_GENES, pa.table({"gene": np.arange(64), "loss": losses, "masked_genes": masked}))
    write_table(files.place, TEST_CELLS, pa.table({"cell": np.arange(64), "loss": losses, "masked_genes": masked}))
    files.place.write(RESULT, result.to_json().encode())


def seconds_per_end(runs: int, repeats: int) -> dict[str, Any]:
    """Median seconds of one announcement in a sweep of so many finished runs, and of reading them all at its start."""
    spec = parse_spec(SPEC.format(seeds=", ".join(str(seed) for seed in range(runs // 2))))
    with tempfile.TemporaryDirectory() as folder:
        sweep, all_runs = SweepFiles.at(Path(folder)), runs_of(spec)
        for run in all_runs:
            finished(sweep, run)
        began = time.perf_counter()
        table = ResultsTable(sweep, all_runs, TRAIN_CELLS)
        start = time.perf_counter() - began
        took = []
        for number in range(repeats):
            began = time.perf_counter()
            table.refresh([all_runs[number].run_id])
            table.write()
            took.append(time.perf_counter() - began)
    return {"runs": len(all_runs), "announcement_seconds": statistics.median(took), "start_seconds": start}


def main() -> int:
    """Print both, and their ratio, as JSON; keep them where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="announcements of which the median is taken")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to keep the figures in")
    options = parser.parse_args()
    few, many = (seconds_per_end(runs, options.repeats) for runs in (200, 2_000))
    ratio = many["announcement_seconds"] / few["announcement_seconds"]
    found = {"few": few, "many": many, "ratio": ratio, "machine": machine()}
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
