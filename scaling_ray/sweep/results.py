"""The table of a sweep, put together from what each run left: results.parquet and results.csv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from scaling_ray.records import RunFailure, RunResult
from scaling_ray.sizes import parameters_without_embedding
from scaling_ray.spec import RunSpec
from scaling_ray.storage import write_atomic
from scaling_ray.sweep.references import per_gene_bits, read_closed_form, read_floor, reference_name
from scaling_ray.train.checkpoint import read_metrics, read_result

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("role", pa.string()),
        ("status", pa.string()),
        ("failure", pa.string()),
        ("size", pa.string()),
        ("width", pa.int64()),
        ("layers", pa.int64()),
        ("heads", pa.int64()),
        ("feedforward", pa.int64()),
        ("params", pa.int64()),
        ("params_without_embedding", pa.int64()),
        ("genes", pa.int64()),
        ("cells", pa.int64()),
        ("cells_requested", pa.string()),
        ("donors", pa.int64()),
        ("seed", pa.int64()),
        ("lr", pa.float64()),
        ("lr_at_edge", pa.bool_()),
        ("recipe", pa.string()),
        ("umi_fraction", pa.float64()),
        ("objective", pa.string()),
        ("schedule", pa.string()),
        ("max_cells_seen", pa.int64()),
        ("cells_seen", pa.int64()),
        ("masked_genes_seen", pa.int64()),
        ("optimizer_steps", pa.int64()),
        ("flops", pa.float64()),
        ("wall_seconds", pa.float64()),
        ("val_mse", pa.float64()),
        ("final_val_mse", pa.float64()),
        ("test_mse", pa.float64()),
        ("best_cells_seen", pa.int64()),
        ("stop_reason", pa.string()),
        ("undertrained", pa.bool_()),
        ("baseline_mse", pa.float64()),
        ("gaussian_mse", pa.float64()),
        ("attainable_mse", pa.float64()),
        ("bound_mse", pa.float64()),
        ("attainable_bits", pa.float64()),
        ("bound_bits", pa.float64()),
        ("bound_z", pa.float64()),
        ("test_per_gene_bits", pa.float64()),
        ("baseline_per_gene_bits", pa.float64()),
        ("precision", pa.string()),
        ("stacked", pa.int64()),
        ("attempts", pa.int64()),
        ("mlflow_run_id", pa.string()),
        ("data_hash", pa.string()),
        ("workers", pa.int64()),
        ("engine", pa.string()),
    ]
)


def run_row(sweep: Path, run: RunSpec, train_cells: int) -> dict[str, Any]:
    """One run as a row of the table; what is not known yet is None."""
    directory = sweep / "runs" / run.run_id
    row: dict[str, Any] = {name: None for name in SCHEMA.names}
    row |= run.model_dump(
        include={"run_id", "role", "size", "width", "layers", "heads", "feedforward", "genes", "donors", "seed", "lr"}
    )
    row |= {
        "status": "waiting",
        "params": run.params,
        "params_without_embedding": parameters_without_embedding(run.shape),
        "cells": min(run.cells or train_cells, train_cells) if run.donors is None else run.cells,
        "cells_requested": "all" if run.cells is None else str(run.cells),
        "recipe": run.train.recipe,
        "umi_fraction": run.train.umi_fraction,
        "objective": run.train.objective,
        "schedule": run.train.schedule,
        "max_cells_seen": run.train.max_cells_seen,
        "workers": run.workers,
        "engine": run.engine,
    }
    result = read_result(directory)
    if result is not None:
        row |= {"status": "done", **{k: v for k, v in result.model_dump().items() if k in row and k != "cells"}}
        row["cells"] = result.cells_resolved
    elif (directory / "failure.json").is_file():
        row |= {"status": "failed", "failure": RunFailure.read(directory / "failure.json").failure}
    elif (directory / "attempts").is_dir():
        row["status"] = "running"
    if (directory / "mlflow.json").is_file():
        row["mlflow_run_id"] = json.loads((directory / "mlflow.json").read_text(encoding="utf-8"))["mlflow_run_id"]
    closed = read_closed_form(sweep / "references", reference_name(run, train_cells))
    if closed:
        row |= {"baseline_mse": closed["test_gene_mean_mse"], "gaussian_mse": closed["test_gaussian_mse"]}
        row["baseline_per_gene_bits"] = closed["test_gene_mean_per_gene_bits"]
    if (directory / "test_genes.parquet").is_file():
        genes = pq.read_table(directory / "test_genes.parquet")
        row["test_per_gene_bits"] = per_gene_bits(genes["squared_error"].to_numpy(), genes["masked_genes"].to_numpy())
    if result is not None:
        row["undertrained"] = _undertrained(directory, result, closed["val_gene_mean_mse"] if closed else None)
    row |= _floors(sweep, run)
    return row


def is_undertrained(curve_mse: list[float], gene_mean_mse: float) -> bool:
    """Whether a run that ended with its budget was still learning.

    It was where the second half of its validation curve brought more than a tenth of all it gained over the gene mean.
    (The end of a decaying rate is flat in any case, so the last few evaluations say nothing.)
    """
    half = len(curve_mse) // 2
    if half < 1:
        return True
    return curve_mse[half - 1] - curve_mse[-1] > 0.1 * (gene_mean_mse - min(curve_mse))


def _undertrained(directory: Path, result: RunResult, gene_mean_mse: float | None) -> bool | None:
    if result.stop_reason == "early_stop":
        return False
    curve = [row["val_mse"] for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == "eval"]
    return is_undertrained(curve, gene_mean_mse) if curve and gene_mean_mse is not None else None


def _floors(sweep: Path, run: RunSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    floor = read_floor(sweep / "references", run.genes, run.train)
    if floor is None:
        return found
    masked = floor["masked_genes"].sum()
    for name in ("bound", "attainable"):
        found[f"{name}_mse"] = float(floor[f"{name}_squared_error"].sum() / masked)
        found[f"{name}_bits"] = float(floor[f"{name}_entropy_bits"].sum() / masked)
    errors = sweep / "runs" / run.run_id / "test_cells.parquet"
    if errors.is_file():
        table = pq.read_table(errors)
        if not np.array_equal(table["cell"].to_numpy(), floor["cell"]):
            raise ValueError(f"{errors}: its cells are not those of the planted floor")
        found["bound_z"] = paired_z(table["squared_error"].to_numpy() - floor["bound_squared_error"])
    return found


def paired_z(differences: np.ndarray) -> float | None:
    """Mean of per-cell differences over its standard error; None where they do not vary."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() / error) if error > 0 else None


def mark_rates_at_edge(rows: list[dict[str, Any]]) -> None:
    """Set ``lr_at_edge`` of law rows: whether the chosen rate is the lowest or highest of those that size tried."""
    tried: dict[tuple[str, int], set[float]] = {}
    for row in rows:
        if row["role"] == "rate":
            tried.setdefault((row["size"], row["genes"]), set()).add(row["lr"])
    for row in rows:
        rates = tried.get((row["size"], row["genes"]))
        if row["role"] == "law" and rates and row["lr"] is not None:
            row["lr_at_edge"] = row["lr"] in (min(rates), max(rates))


def write_results(sweep: Path, runs: list[RunSpec], train_cells: int) -> list[dict[str, Any]]:
    """Scan the runs and publish both tables; the rows."""
    rows = [run_row(sweep, run, train_cells) for run in runs]
    mark_rates_at_edge(rows)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(sweep / "results.parquet", sink.getvalue().to_pybytes())
    text = pa.BufferOutputStream()
    pcsv.write_csv(table, text)
    write_atomic(sweep / "results.csv", text.getvalue().to_pybytes())
    return rows
