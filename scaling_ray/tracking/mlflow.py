"""Log runs to MLflow from their files alone: a parent run per sweep, a child per run.

Only the driver that holds the sweep's lease writes. ``sync`` may be called at any time and again: it creates what is
missing and logs rows a run does not have yet, so a replay after the fact is the same code as following live.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from scaling_ray.errors import BadInput, ScalingRayError  # noqa: E402
from scaling_ray.records import ShardManifest  # noqa: E402
from scaling_ray.results.sweep_files import MLFLOW, RUN_SPEC, RunFiles, SweepFiles, read_sealed, write_sealed  # noqa: E402
from scaling_ray.runs import RunSpec  # noqa: E402
from scaling_ray.spec import SweepSpec, content_hash  # noqa: E402
from scaling_ray.storage import Place  # noqa: E402
from scaling_ray.tracking.ledger import local_folder, record_tracked, tracking_uri  # noqa: E402

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)

PARENT_TAG = "mlflow.parentRunId"
IDENTITY_TAG = "scaling_ray.identity"
FINAL_METRICS = ("val_loss", "final_val_loss", "test_loss", "flops", "wall_seconds", "train_seconds", "best_cells_seen")
BATCH = 500


class Tracker:
    """Keeps one sweep's MLflow runs in step with its files."""

    def __init__(self, sweep: SweepFiles, spec: SweepSpec, manifest: ShardManifest) -> None:
        self._sweep, self._spec, self._manifest = sweep, spec, manifest
        self._uri = known_uri(sweep)
        self._client = MlflowClient(tracking_uri=self._uri)
        self._experiment: str | None = None
        self._parent: str | None = None
        self._logged: dict[str, dict[str, int]] = {}
        self._finished: set[str] = set()
        self._failed: dict[str, int] = {}

    def sync(self, runs: list[RunSpec]) -> None:
        """Log what the files hold and MLflow does not; raises MlflowException where the server refuses."""
        if self._parent is None:
            self._parent = self._ensure_run(self._sweep.place, self._spec.name, None)
        begun = {name.split("/")[1] for name in self._sweep.place.names("runs/") if not name.endswith(RUN_SPEC)}
        for run in runs:
            if run.run_id in begun and run.run_id not in self._finished:
                self._sync_run(run, self._sweep.run(run.run_id))
        record_tracked(self._sweep, self._finished)

    def close(self, failed: bool) -> None:
        """Mark the parent run as ended."""
        if self._parent is not None:
            self._client.set_terminated(self._parent, "FAILED" if failed else "FINISHED")

    def _sync_run(self, run: RunSpec, files: RunFiles) -> None:
        run_id = self._ensure_run(files.place, run.run_id, self._parent)
        if run.run_id not in self._logged:
            inputs = self._client.get_run(run_id).inputs
            if inputs is None or not inputs.dataset_inputs:
                self._describe(run, run_id)
            self._logged[run.run_id] = {
                "train": self._last_step(run_id, "train_loss"),
                "eval": self._last_step(run_id, "val_loss_curve"),
            }
        self._log_rows(run, files, run_id)
        result = files.result()
        if result is not None:
            values = result.model_dump()
            final = [
                Metric(name, float(values[name]), result.ended_ms, result.optimizer_steps)
                for name in FINAL_METRICS
                if values[name] is not None
            ]
            tags = [RunTag("data_hash", result.data_hash), RunTag("stop_reason", result.stop_reason)]
            self._client.log_batch(run_id, metrics=final, params=[Param("lr", repr(result.lr))], tags=tags)
            self._client.set_terminated(run_id, "FINISHED")
            self._finished.add(run.run_id)
        elif (failure := files.failure()) is not None and self._failed.get(run.run_id) != failure.attempts:
            self._failed[run.run_id] = failure.attempts
            self._client.set_terminated(run_id, "FAILED")

    def _describe(self, run: RunSpec, run_id: str) -> None:
        shown = run.train.model_dump() | run.model_dump(
            exclude={"train", "execution", "lr", "lr_candidates", "lr_factor", "run_id"}
        )
        shown |= run.execution.model_dump()
        shown |= {"params": run.params, "cells": "all" if run.cells is None else run.cells}
        shown |= {"loss_unit": run.train.loss_unit}
        params = [Param(name, str(value)) for name, value in shown.items()]
        self._client.log_batch(run_id, params=params)
        dataset = Dataset(
            name=self._manifest.name,
            digest=self._manifest.data_hash[:32],
            source_type="shards",
            source=json.dumps({"census": self._manifest.census, "data_hash": self._manifest.data_hash}),
            profile=json.dumps({name: split.cells for name, split in self._manifest.splits.items()}),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _log_rows(self, run: RunSpec, files: RunFiles, run_id: str) -> None:
        logged = dict(self._logged[run.run_id])
        metrics = []
        for row in files.rows():
            step = row["optimizer_steps"]
            if row["kind"] not in logged or step <= self._logged[run.run_id][row["kind"]]:
                continue
            logged[row["kind"]] = step
            for name, value in row.items():
                if name in ("kind", "timestamp_ms", "optimizer_steps", "cells_seen"):
                    continue
                key = "val_loss_curve" if name == "val_loss" else name
                metrics.append(Metric(key, float(value), row["timestamp_ms"], step))
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        # Set last: rows of a batch that failed are sent again with the same time and value, which MLflow keeps once.
        self._logged[run.run_id] = logged

    def _last_step(self, run_id: str, key: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(run_id, key)), default=0)

    def _ensure_run(self, record: Place, name: str, parent: str | None) -> str:
        """The id in the mlflow.json of ``record`` for this server; without one a run is found or created, and recorded.

        Only the holder of the sweep's lease writes. A creation whose answer was lost leaves a second run with the same
        identity: such strays are deleted.
        """
        recorded = read_sealed(record, MLFLOW)
        if recorded is not None and recorded["uri"] == self._uri:
            return str(recorded["mlflow_run_id"])
        experiment = self._ensure_experiment()
        # Two sweeps of one spec may lie in folders of one name: the whole place tells them apart.
        identity = f"{content_hash(str(self._sweep))[:16]}/{name}" if parent is None else f"{parent}/{name}"
        found = self._search(experiment, identity)
        if not found:
            tags = {IDENTITY_TAG: identity, "data_hash": self._manifest.data_hash}
            if parent is not None:
                tags[PARENT_TAG] = parent
            self._client.create_run(experiment, tags=tags, run_name=name)
            found = self._search(experiment, identity)
        write_sealed(record, MLFLOW, {"mlflow_run_id": found[0], "uri": self._uri})
        for stray in found[1:]:
            self._client.delete_run(stray)
        return found[0]

    def _search(self, experiment: str, identity: str) -> list[str]:
        runs = self._client.search_runs(
            [experiment], f"tags.`{IDENTITY_TAG}` = '{identity}'", order_by=["attributes.start_time ASC"]
        )
        return [run.info.run_id for run in runs]

    def _ensure_experiment(self) -> str:
        if self._experiment is None:
            name = f"scaling_ray/{self._spec.name}"
            found = self._client.get_experiment_by_name(name)
            if found is None:
                place = None
                if self._uri.startswith("sqlite:") and (sweep := local_folder(self._sweep.place)) is not None:
                    place = (sweep.parent / "mlartifacts").resolve().as_uri()
                self._experiment = self._client.create_experiment(name, artifact_location=place)
            else:
                self._experiment = found.experiment_id
        return self._experiment


def known_uri(sweep: SweepFiles) -> str:
    """The tracking URI of a sweep; raises BadInput where it has none."""
    uri = tracking_uri(sweep)
    if uri is None:
        remedy = "is not set, and a sweep on S3 has no database beside it; name a tracking server in it"
        raise BadInput("MLFLOW_TRACKING_URI", None, remedy)
    return uri


def replay(sweep: SweepFiles, spec: SweepSpec, manifest: ShardManifest, runs: list[RunSpec]) -> None:
    """Log all that a sweep's files hold and MLflow does not; raises ScalingRayError where the server refuses."""
    tracker = Tracker(sweep, spec, manifest)
    try:
        tracker.sync(runs)
        tracker.close(failed=any(sweep.run(run.run_id).result() is None for run in runs))
    except MlflowException as error:
        raise ScalingRayError(f"{known_uri(sweep)}: {str(error).splitlines()[0]}") from error


class Follower:
    """A thread that keeps a tracker in step while a sweep runs; whatever the server does, the sweep goes on."""

    def __init__(
        self,
        open_tracker: Callable[[], Tracker],
        runs: Callable[[], list[RunSpec]],
        warn: Callable[[str], None],
        seconds: float = 5.0,
    ) -> None:
        self._open, self._runs, self._warn, self._seconds = open_tracker, runs, warn, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)
        self._problem: str | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def finish(self, failed: bool, timeout_seconds: float = 120.0) -> None:
        """Log the rest and stop; warns once about what could not be logged, and names the command that logs it."""
        self._failed = failed
        self._stop.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() or self._problem:
            why = self._problem or f"no answer within {timeout_seconds:.0f} s"
            self._warn(f"tracking is behind ({why}); `scaling-ray track replay` logs the rest")

    def _follow(self) -> None:
        tracker: Tracker | None = None
        while True:
            last = self._stop.wait(self._seconds)
            try:
                tracker = tracker or self._open()
                tracker.sync(self._runs())
                if last:
                    tracker.close(self._failed)
                self._problem = None
            except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the sweep goes on
                self._problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if last:
                return
