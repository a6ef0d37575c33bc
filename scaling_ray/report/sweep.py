"""What a sweep left in its directory, as a report reads it: runs, manifest, specification, learning curves."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.spec import parse_spec

_NEEDED = ("run_id", "role", "status", "size", "params", "genes", "cells", "seed", "val_mse", "test_mse")
_OPTIONAL = (
    "failure width layers heads feedforward params_without_embedding cells_requested donors lr lr_at_edge recipe "
    "umi_fraction objective schedule max_cells_seen cells_seen masked_genes_seen optimizer_steps flops "
    "wall_seconds final_val_mse best_cells_seen stop_reason undertrained baseline_mse gaussian_mse attainable_mse "
    "bound_mse attainable_bits bound_bits bound_z test_per_gene_bits baseline_per_gene_bits precision stacked attempts "
    "mlflow_run_id data_hash workers engine"
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
    """The specification with every default, or as it was written where this version cannot read it; empty without one.

    Raises:
        BadInput: not TOML.
    """
    path = sweep_dir / "spec.toml"
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        written = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise BadInput("spec.toml", str(path), f"is not TOML ({error})") from error
    try:
        # Resources may follow the machine that reads the file, and stay as they were written.
        whole = parse_spec(text, str(path)).model_dump(mode="json", include={"data", "grid", "train", "lr"})
    except BadInput:
        whole = {}
    return clean(written | whole)


def read_plan(sweep_dir: Path) -> dict[str, Any]:
    """The plan of the sweep; empty where it kept none.

    Raises:
        BadInput: not JSON.
    """
    path = sweep_dir / "plan.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadInput("plan.json", str(path), f"is not JSON ({error})") from error


def read_mlflow_link(sweep_dir: Path, run_id: str) -> str | None:
    """Where a browser finds the run: only of a tracking server, not of a database file."""
    path = sweep_dir / "runs" / run_id / "mlflow.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        uri, name = str(found["uri"]).rstrip("/"), str(found["mlflow_run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    host = uri.split("://", 1)[-1].split("/", 1)[0]
    # A user and password in the address stay out of a page that is shown around.
    if not uri.startswith(("http://", "https://")) or "@" in host or not name.isalnum():
        return None
    return f"{uri}/#/runs/{name}"


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


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
