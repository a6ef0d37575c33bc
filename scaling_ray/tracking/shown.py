"""What MLflow shows of a run: its name, few parameters and first metrics, tags, curves, times. Needs no MLflow.

All of it is a function of the run's own files, so that following a sweep live, replaying it and checking a server
against the files are one description.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scaling_ray.laws.units import gain_bits
from scaling_ray.records import RunFailure, RunResult, ShardManifest
from scaling_ray.results.references import UNIT, read_closed_form, reference_name
from scaling_ray.results.sweep_files import AttemptName, RunFiles, SweepFiles
from scaling_ray.runs import RunSpec

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
FIRST_CURVE = {"train": "curve/train_loss", "eval": "curve/val_loss", "system": "system/cpu_percent"}
"""Kind of a row -> a metric that each such row has: how far it reaches on a server says which rows are there."""

_CURVES = {
    "train": ("train_loss", "lr", "grad_norm", "cells_per_second", "optimizer_steps"),
    "eval": ("val_loss", "val_loss_smoothed"),
}
TAKEN_OVER = "from the trunk of a smaller budget"
"""What a note says where a run goes on from another one's rows."""
_NOT_SHOWN = ("kind", "timestamp_ms", "optimizer_steps", "cells_seen")


class Point(NamedTuple):
    """One value of a metric. ``step`` is the cells seen by then: what a curve is drawn against."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def train_cells(manifest: ShardManifest) -> int:
    """Cells of the training split."""
    return manifest.splits["train"].cells


def names_of(runs: Sequence[RunSpec], cells: int) -> dict[str, str]:
    """Run id -> name, such as "TINY 200 s1": size, unique training cells, seed, and what else tells runs apart.

    Args:
        runs: all of a sweep.
        cells: of the training split.
    """
    panels = len({run.genes for run in runs}) > 1
    names = {run.run_id: _name(run, cells, panels) for run in runs}
    counts = Counter(names.values())
    for run in runs:
        if counts[names[run.run_id]] > 1:
            names[run.run_id] += f" lr {run.lr:g}" if run.lr is not None else f" {run.run_id[-8:]}"
    return names


def _name(run: RunSpec, cells: int, panels: bool) -> str:
    genes = f" v{run.genes}" if panels else ""
    if run.role == "rate":
        return f"{run.size}{genes} rate {run.lr:g}"
    return f"{setting_of(run, cells)}{genes} s{run.seed}"


def setting_of(run: RunSpec, cells: int) -> str:
    """A setting of the grid by its size and cells: what the seeds of one setting have in common."""
    donors = f" of {run.donors} donors" if run.donors is not None else ""
    asked = "all" if run.cells is None and run.donors is not None else str(min(run.cells or cells, cells))
    return f"{run.size} {asked}{donors}"


def params_of(run: RunSpec, cells: int, result: RunResult | None) -> dict[str, str]:
    """The few parameters that runs are compared by, all numbers; what only a result says is left out before it."""
    known: dict[str, float | None] = {
        "params": run.params,
        "cells": _resolved(run, cells, result),
        "genes": run.genes,
        "width": run.width,
        "seed": run.seed,
        "lr": run.lr if result is None else result.lr,
    }
    return {name: repr(value) for name, value in known.items() if value is not None}


def _resolved(run: RunSpec, cells: int, result: RunResult | None) -> int | None:
    if run.donors is not None:
        return result.cells_resolved if result is not None else None
    return min(run.cells or cells, cells)


def tags_of(
    run: RunSpec, cells: int, manifest: ShardManifest, result: RunResult | None, failure: RunFailure | None
) -> dict[str, str]:
    """What runs are filtered and grouped by."""
    execution = run.execution
    units = f"{execution.gpus:g} GPU" if execution.gpus else f"{execution.cpus} CPU"
    group = f"{execution.workers} x " if execution.workers > 1 else ""
    tags = {
        "kind": "run" if run.role == "law" else "rate",
        "run_id": run.run_id,
        "size": run.size,
        "setting": setting_of(run, cells),
        "recipe": run.train.recipe,
        "objective": run.train.objective,
        "loss_unit": run.train.loss_unit,
        "engine": execution.engine,
        "node_type": f"{group}{execution.device}, {units}",
        "data_hash": manifest.data_hash,
        "failure": failure.failure if failure is not None and result is None else "none",
    }
    if result is not None:
        tags |= {"node": result.host, "attempt": str(result.attempts), "stop_reason": result.stop_reason}
    elif failure is not None:
        tags["attempt"] = str(failure.attempts)
    return tags


def final_points(result: RunResult, closed: Mapping[str, Any] | None) -> list[Point]:
    """The first metrics of a finished run; gains are in bits per masked gene, against baselines where these are known.

    A run that chose a rate has no test loss, and so no gain.
    """
    values = {
        "test_loss": result.test_loss,
        "gain_over_gene_mean": _short(gain_bits(result.test_loss, closed["test_gene_mean_loss"]) if closed else None),
        "gain_over_gaussian": _short(gain_bits(result.test_loss, closed["test_gaussian_loss"]) if closed else None),
        "cells_per_second": _short(result.cells_seen / result.train_seconds if result.train_seconds > 0 else None),
        "val_loss": result.val_loss,
        "wall_seconds": result.wall_seconds,
        "flops": result.flops,
    }
    known = {name: float(value) for name, value in values.items() if value is not None}
    return [Point(name, value, result.ended_ms, result.cells_seen) for name, value in known.items()]


def _short(value: float | None) -> float | None:
    """Four significant digits of what is derived and not measured: columns are narrow."""
    return None if value is None else float(f"{value:.4g}")


def closed_form_of(sweep: SweepFiles, run: RunSpec, cells: int) -> dict[str, Any] | None:
    """The baselines that a run is set against, None where they are not there (yet) or have another unit."""
    return read_closed_form(sweep.references, reference_name(run, cells)) if run.train.loss_unit == UNIT else None


def row_points(rows: Iterable[Mapping[str, Any]]) -> list[list[Point]]:
    """The points of each row of a metrics.jsonl that has any: rows of training, of evaluations and of the system."""
    found = [_points(row) for row in rows if row["kind"] in FIRST_CURVE]
    return [points for points in found if points]


def _points(row: Mapping[str, Any]) -> list[Point]:
    at, step = int(row["timestamp_ms"]), int(row["cells_seen"])
    if row["kind"] == "system":
        values = {f"system/{name}": row[name] for name in row if name not in _NOT_SHOWN}
    else:
        values = {f"curve/{name}": row[name] for name in _CURVES[row["kind"]]}
    return [
        Point(key, float(value), at, step)
        for key, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def started_ms(files: RunFiles, rows: Sequence[Mapping[str, Any]], result: RunResult | None) -> int | None:
    """When a run began, in milliseconds since 1970; None for one that has not.

    The earliest of the attempts that are still known and, where an earlier one was cut off, of the training that its
    first row tells of.
    """
    tokens = [name.token for name in AttemptName.all_of(files.place)] + ([result.attempt] if result is not None else [])
    known = [int(token.split("-")[1]) // 1_000_000 for token in tokens if token.count("-") == 2]
    first = next((row for row in rows if row["kind"] == "train"), None)
    # Rows that were taken over from a run of a smaller budget are older than this run.
    taken_over = any(row["kind"] == "note" and TAKEN_OVER in row["note"] for row in rows)
    if first is not None and not taken_over:
        took = first["cells_seen"] / first["cells_per_second"] if first["cells_per_second"] > 0 else 0.0
        known.append(int(first["timestamp_ms"] - 1000 * took))
    return min(known, default=None)


def ended_ms(rows: Sequence[Mapping[str, Any]], failure: RunFailure | None, started: int) -> int:
    """When a run without a result was last heard of."""
    if failure is not None and failure.ended_ms is not None:
        return failure.ended_ms
    return max([started, *(int(row["timestamp_ms"]) for row in rows)])


def whole_story(run: RunSpec, result: RunResult | None, failure: RunFailure | None) -> dict[str, Any]:
    """All that is known of a run, for the one artifact that holds what no column does."""
    return {
        "spec": run.model_dump(mode="json"),
        "result": result.model_dump(mode="json") if result is not None else None,
        "failure": failure.model_dump(mode="json") if failure is not None and result is None else None,
    }


DATASET_COLUMNS = ("cell", "raw_sum", "dataset_id", "donor_id", "cell_type", "disease", "tissue", "assay")


def schema_of(manifest: ShardManifest) -> dict[str, Any]:
    """The shards' columns in the form that MLflow shows: counts are raw, one column per gene of the panel."""
    columns = [{"name": name, "type": "long", "required": True} for name in DATASET_COLUMNS]
    counts = {"name": f"counts of {manifest.genes} genes (uint16)", "type": "integer", "required": True}
    return {"mlflow_colspec": [counts, *columns]}
