"""What a sweep left in its directory, as a report reads it: runs, manifest, specification, learning curves."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput

_NEEDED = ("run_id", "role", "status", "size", "params", "genes", "cells", "seed", "val_mse", "test_mse")
_OPTIONAL = (
    "failure width layers heads feedforward params_without_embedding cells_requested donors lr lr_at_edge recipe "
    "umi_fraction objective schedule max_cells_seen cells_seen masked_genes_seen optimizer_steps flops "
    "wall_seconds final_val_mse best_cells_seen stop_reason undertrained baseline_mse gaussian_mse attainable_mse "
    "bound_mse attainable_bits bound_bits bound_z attempts mlflow_run_id data_hash workers engine"
).split()

Run = dict[str, Any]
"""One row of results.parquet."""


def read_runs(sweep_dir: Path) -> list[Run]:
    """Every row of results.parquet, all columns a report asks for in each: unknown values and NaN are None.

    Raises:
        BadInput: no such file, not Parquet, without rows, or without a needed column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = sweep_dir / "results.parquet"
    if not path.exists():
        raise BadInput("sweep", str(sweep_dir), "holds no results.parquet; run the sweep first")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput("results.parquet", str(path), f"is not a Parquet file ({error}); run the sweep again") from error
    missing = [name for name in _NEEDED if name not in table.column_names]
    if missing:
        raise BadInput("results.parquet", ", ".join(missing), "columns are missing; run the sweep again to rewrite it")
    if table.num_rows == 0:
        raise BadInput("results.parquet", str(path), "has no rows; run the sweep first")
    blank: Run = dict.fromkeys(_OPTIONAL)
    return [blank | clean(row) for row in table.to_pylist()]


def read_manifest(sweep_dir: Path) -> dict[str, Any]:
    """The copy of the shards' manifest that the sweep kept.

    Raises:
        BadInput: not there, not JSON, or without a needed key.
    """
    path = sweep_dir / "shards_manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("shards_manifest.json", str(path), "cannot be read; run the sweep again to write it") from error
    missing = [key for key in ("data_hash", "splits", "split_by", "genes") if key not in manifest]
    missing += [
        f"splits.{s}.cells" for s in ("train", "val", "test") if "cells" not in manifest.get("splits", {}).get(s, {})
    ]
    if missing:
        raise BadInput(
            "shards_manifest.json", ", ".join(missing), "is missing; run the sweep again to rewrite the file"
        )
    return dict(manifest)


def read_spec(sweep_dir: Path) -> dict[str, Any]:
    """The specification as it was written; empty where the sweep kept none.

    Raises:
        BadInput: not TOML.
    """
    path = sweep_dir / "spec.toml"
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("spec.toml", str(path), f"is not TOML ({error})") from error


def read_curve(sweep_dir: Path, run_id: str) -> list[dict[str, Any]]:
    """The evaluations of one run; a last line cut short by a kill is left out."""
    path = sweep_dir / "runs" / run_id / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "eval" and finite(row.get("val_mse")):
            rows.append(row)
    return rows


def is_point(run: Run) -> bool:
    """A finished run of the grid: one that a law is fitted to or that a chart shows."""
    return bool(run["role"] == "law" and run["status"] == "done")


def is_baseline(run: Run) -> bool:
    """A size that stands for comparison only; no law uses it."""
    return bool(run["width"] == 1 or run["size"] == "XXS")


def values(runs: Iterable[Run], name: str) -> list[float]:
    """Column ``name`` of the runs that have it."""
    return [float(run[name]) for run in runs if run[name] is not None]


def mean(runs: Iterable[Run], name: str) -> float | None:
    """Mean of column ``name`` over the runs that have it; None where none has."""
    known = values(runs, name)
    return statistics.fmean(known) if known else None


def finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def clean(value: Any) -> Any:
    """The same with NaN and infinity as None: JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value
