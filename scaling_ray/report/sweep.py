"""One sweep, read for a report: rows, learning curves, spec, plan and manifest, from a disk or from S3."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scaling_ray.errors import BadInput
from scaling_ray.records import ShardManifest
from scaling_ray.results.columns import Row
from scaling_ray.results.read import read_results
from scaling_ray.results.sweep_files import MANIFEST, MLFLOW, PLAN, RESULTS, SPEC, SweepFiles, read_sealed
from scaling_ray.spec import SweepSpec
from scaling_ray.storage import Place, open_place


class Evaluation(NamedTuple):
    """One point of a learning curve."""

    cells_seen: int
    val_loss: float
    timestamp_ms: float


class Planned(NamedTuple):
    """The entry of one run in plan.json; plans of version 3 have no interval."""

    hours: float
    hours_from: str
    flops: float
    workers: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sweep:
    """One sweep's files, read.

    ``folder`` is how a command names the sweep: the last part of a directory's path, or a whole ``s3://`` URI.
    ``spec`` is None, ``planned`` empty and a hash None where the sweep has no such file; ``links`` holds runs that a
    browser finds.
    """

    folder: str
    files: SweepFiles
    rows: Sequence[Row]
    spec: SweepSpec | None
    planned: Mapping[str, Planned]
    manifest: ShardManifest
    curves: Mapping[str, list[Evaluation]]
    links: Mapping[str, str]
    sha256: Mapping[str, str | None]

    @property
    def law_rows(self) -> list[Row]:
        """The runs of the grid, without those that chose a rate."""
        return [row for row in self.rows if row.role == "law"]

    @property
    def split_noun(self) -> str:
        """Noun for the groups that make up the splits."""
        noun = self.manifest.split_by
        return {"donor_id": "donor", "dataset_id": "data set"}.get(noun, noun)

    @property
    def held_out(self) -> str:
        """What test cells are."""
        if self.manifest.split_by == "cell":
            return "held out one by one: others of the same donors are in training"
        return f"of held-out {self.split_noun}s"


def read_sweep(source: Path | str | Place) -> Sweep:
    """Read all that a report needs of the sweep at a path or URI.

    Raises:
        BadInput: no results.parquet or shards_manifest.json, or a file that is none of this version.
    """
    place = open_place(source, "sweep")
    results = read_results(place)
    files = SweepFiles(place)
    plan = files.plan()
    runs = {row.run_id: files.run(row.run_id) for row in results.rows}
    tracked = {run_id: read_sealed(run.place, MLFLOW) for run_id, run in runs.items()}
    metrics = {run_id: run.rows() for run_id, run in runs.items()}
    spec = None if place.size(SPEC) is None else files.spec()
    manifest = files.known_manifest()
    for split in ("train", "val", "test"):
        if split not in manifest.splits:
            raise BadInput(
                "R001", MANIFEST, f"splits.{split}", "is missing; run the sweep again to write the file anew"
            )
    links = {run_id: tracking_link(found) for run_id, found in tracked.items()}
    folder = str(place)
    return Sweep(
        folder=folder if "://" in folder else PurePosixPath(folder).name,
        files=files,
        rows=results.rows,
        spec=spec,
        planned=_planned(plan) if plan else {},
        manifest=manifest,
        curves={run_id: _curve(rows) for run_id, rows in metrics.items()},
        links={run_id: link for run_id, link in links.items() if link is not None},
        sha256={SPEC: _sha256(place, SPEC), PLAN: _sha256(place, PLAN), RESULTS: results.sha256},
    )


def _sha256(place: Place, name: str) -> str | None:
    return hashlib.sha256(place.read(name)).hexdigest() if place.size(name) is not None else None


def _planned(plan: Mapping[str, Any]) -> dict[str, Planned]:
    try:
        return {
            setting["run_id"]: Planned(
                float(setting["hours"]),
                str(setting["hours_from"]),
                float(setting["flops"]),
                int(setting["execution"]["workers"]),
                *(float(setting[name]) if name in setting else None for name in ("hours_low", "hours_high")),
            )
            for setting in plan["settings"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            "R002", PLAN, repr(error), "is no plan of this version; run the sweep again to write it anew"
        ) from error


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations among the rows of a metrics.jsonl."""
    found = [
        Evaluation(row["cells_seen"], row["val_loss"], row["timestamp_ms"]) for row in rows if row["kind"] == "eval"
    ]
    return [evaluation for evaluation in found if math.isfinite(evaluation.val_loss)]


def tracking_link(tracked: Mapping[str, Any] | None) -> str | None:
    """Web address of a run from its mlflow.json; None unless it is on a tracking server that takes no password."""
    if tracked is None:
        return None
    uri, name = str(tracked["uri"]).rstrip("/"), str(tracked["mlflow_run_id"])
    host = uri.split("://", 1)[-1].split("/", 1)[0]
    # A user and password in the address stay out of a page that is shown around.
    if not uri.startswith(("http://", "https://")) or "@" in host or not name.isalnum():
        return None
    return f"{uri}/#/runs/{name}"
