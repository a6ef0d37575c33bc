"""A tracking server as the rest of this room sees it: find, create, log, end. The only file that knows MLflow."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Set before MLflow is imported. A dead server costs seconds, not minutes, and no line per run is printed.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.git_utils import get_git_commit  # noqa: E402

import scaling_ray  # noqa: E402
from scaling_ray.errors import ScalingRayError  # noqa: E402
from scaling_ray.tracking.database import check_database, why_unusable  # noqa: E402
from scaling_ray.tracking.ledger import shown_uri  # noqa: E402
from scaling_ray.tracking.shown import Point  # noqa: E402

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages of traceback; whoever asked says it once

PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
SWEEP_TAG, IDENTITY_TAG = "scaling_ray.sweep", "scaling_ray.identity"
BATCH_METRICS, BATCH_PARAMS, PAGE = 500, 100, 500


@dataclass(frozen=True)
class Seen:
    """A run as the server has it; times are in milliseconds since 1970, ``metrics`` are the latest of each key."""

    run_id: str
    identity: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    has_dataset: bool


class Server:
    """One tracking URI. Every method raises what MLflow's client raises, unless its docstring says otherwise.

    Raises:
        BadInput: a sqlite database that cannot be used.
    """

    def __init__(self, uri: str) -> None:
        check_database(uri)
        self.uri = uri
        try:
            self._client = MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise why_unusable(uri, error) or error from error

    def experiment(self, name: str, tags: Mapping[str, str], artifacts: str | None = None) -> str:
        """The id of an experiment, created (with its artifacts at a URI) where there is none; it gets missing tags."""
        try:
            found = self._client.get_experiment_by_name(name)
        except Exception as error:
            raise why_unusable(self.uri, error) or error from error
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts, tags=dict(tags)))
            except MlflowException:
                # Names are unique: an answer that was lost, or another sweep of this name that was first.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        for key in tags.keys() - found.tags.keys():
            self._client.set_experiment_tag(found.experiment_id, key, tags[key])
        return str(found.experiment_id)

    def known_experiment(self, name: str) -> str | None:
        """The id of an experiment, None where there is none."""
        found = self._client.get_experiment_by_name(name)
        return None if found is None else str(found.experiment_id)

    def tag_experiment(self, experiment: str, key: str, value: str) -> None:
        """Set a tag of an experiment."""
        if self._client.get_experiment(experiment).tags.get(key) != value:
            self._client.set_experiment_tag(experiment, key, value)

    def runs(self, experiment: str, tag: str, value: str) -> list[Seen]:
        """Every run with a tag of this value that was not deleted, the earliest first."""
        found: list[Seen] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [experiment],
                f"tags.`{tag}` = '{value}'",
                max_results=PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += [_seen(run) for run in page]
            token = page.token
            if not token:
                return found

    def run(self, run_id: str) -> Seen:
        """A run by its id."""
        return _seen(self._client.get_run(run_id))

    def create(self, experiment: str, name: str, start_ms: int, tags: Mapping[str, str]) -> None:
        """Create a run. Where the answer is lost there may be two; a search by identity shows them."""
        self._client.create_run(experiment, start_time=start_ms, tags=dict(tags), run_name=name)

    def delete(self, run_id: str) -> None:
        """Delete a run, as MLflow deletes: it can be restored. One that is not there is no error."""
        try:
            self._client.delete_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise

    def log(
        self,
        run_id: str,
        points: Sequence[Sequence[Point]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log metrics, parameters and tags.

        The points of one row reach the server together or not at all. Points that are there already, to the
        millisecond, are kept once.
        """
        told = [Param(key, value) for key, value in (params or {}).items()]
        marked = [RunTag(key, value) for key, value in (tags or {}).items()]
        if told or marked:
            self._client.log_batch(run_id, params=told[:BATCH_PARAMS], tags=marked)
        for batch in _batches(points):
            metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in batch]
            self._client.log_batch(run_id, metrics=metrics)

    def log_dataset(
        self, run_id: str, name: str, digest: str, source: Mapping[str, object], schema: object, profile: object
    ) -> None:
        """Log what a run was trained on; the same again changes nothing."""
        dataset = Dataset(
            name=name,
            digest=digest[:32],
            source_type="shards",
            source=json.dumps(source),
            schema=json.dumps(schema),
            profile=json.dumps(profile),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def end(self, run_id: str, status: str, end_ms: int) -> None:
        """Mark a run as ended, at a time of its own."""
        self._client.set_terminated(run_id, status, end_time=end_ms)

    def reopen(self, run_id: str) -> None:
        """Mark a run as running again."""
        self._client.update_run(run_id, status="RUNNING")

    def rename(self, run_id: str, name: str) -> None:
        """Give a run another name."""
        self._client.update_run(run_id, name=name)

    def history(self, run_id: str, key: str) -> list[Point]:
        """Every value of a metric of a run."""
        return [
            Point(key, float(metric.value), int(metric.timestamp), int(metric.step))
            for metric in self._client.get_metric_history(run_id, key)
        ]

    def write_artifacts(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Put files below a run, in place of those of the same names."""
        with tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
            for name, data in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self._client.log_artifacts(run_id, folder)

    def artifacts(self, run_id: str, folder: str | None = None) -> set[str]:
        """Names of the files and folders directly below a run, or a folder of it."""
        return {entry.path for entry in self._client.list_artifacts(run_id, folder)}


def _seen(run: Run) -> Seen:
    tags = dict(run.data.tags)
    return Seen(
        run_id=run.info.run_id,
        identity=tags[IDENTITY_TAG] if IDENTITY_TAG in tags else "",
        name=run.info.run_name,
        status=run.info.status,
        start_ms=int(run.info.start_time),
        end_ms=int(run.info.end_time) if run.info.end_time is not None else None,
        params=dict(run.data.params),
        tags=tags,
        metrics=dict(run.data.metrics),
        has_dataset=run.inputs is not None and bool(run.inputs.dataset_inputs),
    )


def _batches(rows: Sequence[Sequence[Point]]) -> Iterator[list[Point]]:
    """Rows in batches that a server takes at once; only a row that is too long for one is cut."""
    batch: list[Point] = []
    for row in rows:
        if batch and len(batch) + len(row) > BATCH_METRICS:
            yield batch
            batch = []
        batch += row
        while len(batch) > BATCH_METRICS:
            yield list(islice(batch, BATCH_METRICS))
            batch = batch[BATCH_METRICS:]
    if batch:
        yield batch


def commit_here() -> str | None:
    """The git commit of this package, None where it was installed without one."""
    package = Path(scaling_ray.__file__).parent
    # A repository further up is somebody else's.
    return get_git_commit(str(package)) if (package.parent / ".git").exists() else None


def said_of(uri: str, error: Exception) -> ScalingRayError:
    """Whatever a server or its client raised, as one line that names the server."""
    if isinstance(error, ScalingRayError):
        return error
    lines = str(error).strip().splitlines() or [""]
    return ScalingRayError("K007", f"{shown_uri(uri)}: {type(error).__name__}: {lines[0][:200]}")
