"""Reproductions on a tracking server: an experiment per reference, a run per reproduction, and one run of lines.

The run of lines ("history") holds every figure as a metric over time with the ends of its interval, one point per tick
at the tick's own time: a missed tick is a gap. Only the holder of the lease of a reproduction's OUT writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages of traceback; whoever asked says it once

IDENTITY_TAG = "scaling_ray.identity"
LINES = "history"
_BATCH = 500


@dataclass(frozen=True)
class Figure:
    """One point of a line: a value, and the ends of its interval where they are known."""

    name: str
    value: float
    low: float | None
    high: float | None

    def metrics(self, time_ms: int, step: int) -> list[Metric]:
        """The metrics of this point."""
        kind, _, rest = self.name.partition("/")
        named = [(self.name, self.value), (f"{kind} low/{rest}", self.low), (f"{kind} high/{rest}", self.high)]
        return [Metric(name, value, time_ms, step) for name, value in named if value is not None]


@dataclass(frozen=True)
class Logged:
    """What one reproduction tells a tracking server; times in milliseconds since 1970."""

    reference: str
    identity: str
    due_ms: int
    started_ms: int
    ended_ms: int
    summary: str
    counts: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    figures: Sequence[Figure]
    files: Sequence[tuple[str, str]]


def log_reproduction(uri: str, logged: Logged, artifacts: str | None = None) -> str:
    """Log a reproduction; the same one again (by its identity) changes nothing twice. Returns its run's id.

    Args:
        uri: of the tracking server or database.
        logged: what is told.
        artifacts: where a new experiment keeps its files; None: where the server says.

    Raises:
        MlflowException: the server refuses.
    """
    client = MlflowClient(tracking_uri=uri)
    name = f"scaling_ray/reproduce/{logged.reference}"
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name, artifact_location=artifacts) if found is None else found.experiment_id
    run = _ensure_run(client, experiment, logged.identity, logged.tags["tick"], logged.started_ms)
    step = logged.due_ms // 60_000  # minutes: two ticks of one minute are one
    metrics = [Metric(key, value, logged.due_ms, 0) for key, value in logged.counts.items()]
    metrics += [Metric(each.name, each.value, logged.due_ms, 0) for each in logged.figures]
    params = [Param(key, value[:500]) for key, value in logged.params.items()]
    tags = [RunTag(key, value[:5000]) for key, value in logged.tags.items()]
    tags.append(RunTag("mlflow.note.content", logged.summary))
    _log(client, run, metrics, params, tags)
    for file, text in logged.files:
        client.log_text(run, text, file)
    client.set_terminated(run, "FINISHED", end_time=logged.ended_ms)
    lines = _ensure_run(client, experiment, f"{name}/{LINES}", LINES, logged.started_ms)
    told = {(point.step, point.value) for point in client.get_metric_history(lines, "verdict")}
    points = [Metric("verdict", logged.counts["verdict"], logged.due_ms, step)]
    points += [metric for each in logged.figures for metric in each.metrics(logged.due_ms, step)]
    if (step, logged.counts["verdict"]) not in told:
        _log(client, lines, points, [], [RunTag("mlflow.note.content", logged.summary)])
    return run


def _log(client: MlflowClient, run: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
    client.log_batch(run, params=params, tags=tags)
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[start : start + _BATCH])


def _ensure_run(client: MlflowClient, experiment: str, identity: str, name: str, started_ms: int) -> str:
    """The run of an identity, created where there is none; one that was created twice is removed."""
    query = f"tags.`{IDENTITY_TAG}` = '{identity}'"
    found = client.search_runs([experiment], query, order_by=["attributes.start_time ASC"])
    if not found:
        client.create_run(experiment, start_time=started_ms, tags={IDENTITY_TAG: identity}, run_name=name)
        found = client.search_runs([experiment], query, order_by=["attributes.start_time ASC"])
    for stray in found[1:]:
        client.delete_run(stray.info.run_id)
    return str(found[0].info.run_id)
