"""Keep a sweep's MLflow runs in step with its files: a parent for the sweep, a child for each run.

Only the driver that holds the sweep's lease writes. ``sync`` may be called at any time and again: it creates what is
missing and logs what a run does not have yet, so that a replay after the fact is the same code as following live.

Identity. A run carries its identity as a tag. It is searched, created where it is missing, searched again and written
to mlflow.json; whatever else has that identity (a creation whose answer was lost, or that came late) is deleted. After
any error nothing that was known of the server is taken for granted: the next call asks again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scaling_ray import __version__
from scaling_ray.records import RunResult, ShardManifest
from scaling_ray.results.sweep_files import RUN_SPEC, SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec, content_hash
from scaling_ray.storage import Place
from scaling_ray.tracking import shown, story
from scaling_ray.tracking.ledger import (
    Tracked,
    known_uri,
    local_folder,
    read_tracked,
    record_tracked,
    sweep_key,
    write_tracked,
)
from scaling_ray.tracking.mlflow import (
    IDENTITY_TAG,
    NOTE_TAG,
    PARENT_TAG,
    SWEEP_TAG,
    Seen,
    Server,
    commit_here,
    said_of,
)
from scaling_ray.tracking.shown import FAILED, FINISHED, KILLED, RUNNING, Point
from scaling_ray.tracking.told import RunTold
from scaling_ray.tracking.view import KIND, KIND_TAG, VIEW_TAG, how_to_open, view_of

FILES_TAG = "scaling_ray.files"
"""A hash of the artifacts that a run was given: it is compared before they are sent again."""


class Tracker:
    """One sweep on one tracking server.

    Args:
        sweep: its files, fenced by its lease.
        spec: the sweep's.
        manifest: of its shards.
        uri: of the server; the sweep's own if left out.
    """

    def __init__(self, sweep: SweepFiles, spec: SweepSpec, manifest: ShardManifest, uri: str | None = None) -> None:
        self._sweep, self._spec, self._manifest = sweep, spec, manifest
        self.uri = uri or known_uri(sweep)
        self._server = Server(self.uri)
        self._cells = shown.train_cells(manifest)
        self.key = sweep_key(sweep)
        self._ends: dict[str, tuple[str, int]] = {}
        self._starts: dict[str, int] = {}
        self._results: dict[str, RunResult] = {}
        self._finished: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Take nothing of the server for granted."""
        self._experiment: str | None = None
        self._there: dict[str, list[Seen]] = {}
        self._ids: dict[str, str] = {}
        self._parent: Seen | None = None
        self._logged: dict[str, dict[str, int]] = {}
        self._told: dict[str, float] = {}

    def sync(self, runs: list[RunSpec]) -> None:
        """Log what the files hold and MLflow does not; nothing before the first run has begun.

        Raises what MLflow's client raises where the server refuses or does not answer.
        """
        begun = {name.split("/")[1] for name in self._sweep.place.names("runs/") if not name.endswith(RUN_SPEC)}
        todo = [run for run in runs if run.run_id in begun and run.run_id not in self._finished]
        if not begun or (not todo and self._parent is not None):
            return
        try:
            self._sync(todo, runs)
        except Exception:
            self._forget()
            raise
        record_tracked(self._sweep, self._results, self.uri)

    def _sync(self, todo: list[RunSpec], runs: list[RunSpec]) -> None:
        told = {run.run_id: RunTold(self._sweep, run, self._cells) for run in todo}
        self._starts |= {name: one.started for name, one in told.items() if one.started is not None}
        if self._parent is None:
            self._open(min(self._starts.values(), default=0))
        names = shown.names_of(runs, self._cells)
        for run in todo:
            if run.run_id in self._starts:
                self._sync_run(told[run.run_id], names[run.run_id])
        self._tell_parent(story.metrics_of(list(self._results.values()), self._sweep.plan()))

    def _open(self, start_ms: int) -> None:
        """Find or create the experiment and the parent, and see which of the sweep's runs are there."""
        place = None
        if self.uri.startswith("sqlite:") and (folder := local_folder(self._sweep.place)) is not None:
            place = (folder.parent / "mlartifacts").resolve().as_uri()
        tags = {KIND_TAG: KIND, NOTE_TAG: story.NOTE_OF_EXPERIMENT}
        self._experiment = self._server.experiment(f"scaling_ray/{self._spec.name}", tags, place)
        for seen in self._server.runs(self._experiment, SWEEP_TAG, self.key):
            self._there.setdefault(seen.identity, []).append(seen)
        tags = story.first_tags(self._spec, self._manifest) | _made_with()
        parent = self._ensure(self._sweep.place, self.key, self._spec.name, start_ms, tags)
        self._told = dict(parent.metrics)
        if parent.status != RUNNING:
            self._server.reopen(parent.run_id)
        self._server.tag_experiment(self._experiment, VIEW_TAG + self.key, view_of(self.key, self._spec.name))
        self._parent = parent

    def _sync_run(self, told: RunTold, name: str) -> None:
        run, parent = told.run, self._parent
        assert parent is not None and told.started is not None
        identity = f"{self.key}/{run.run_id}"
        params = shown.params_of(told.spec, self._cells, told.result)
        tags = shown.tags_of(told.spec, self._cells, self._manifest, told.result, told.failure)
        tags |= {PARENT_TAG: parent.run_id}
        seen = self._ensure(told.files.place, identity, name, told.started, tags | _made_with())
        first = run.run_id not in self._logged
        if first:
            keys = {kind: key for kind, key in shown.FIRST_CURVE.items() if key in seen.metrics}
            reached = {kind: self._last_step(seen.run_id, key) for kind, key in keys.items()}
            self._logged[run.run_id] = dict.fromkeys(shown.FIRST_CURVE, -1) | reached
            if seen.name != name:
                self._server.rename(seen.run_id, name)
            if not seen.has_dataset:
                self._log_dataset(seen.run_id)
        points = self._new_points(run.run_id, told.rows)
        final = shown.final_points(told.result, told.closed) if told.result is not None else []
        known = dict(seen.metrics)
        final = [point for point in final if point.key not in known or known[point.key] != point.value]
        self._server.log(
            seen.run_id,
            [*points, *([final] if final else [])],
            {key: value for key, value in params.items() if key not in seen.params},
            {key: value for key, value in tags.items() if key not in seen.tags or seen.tags[key] != value},
        )
        self._logged[run.run_id] |= _reached(told.rows)
        status, end_ms = told.end
        if told.result is not None or told.failure is not None:
            self._write_story(seen, told)
        if status == RUNNING and seen.status != RUNNING:
            self._server.reopen(seen.run_id)
        elif status != RUNNING and (seen.status, seen.end_ms) != (status, end_ms):
            self._server.end(seen.run_id, status, end_ms)
        self._there[identity] = [_after(seen, params, tags, final, status, end_ms)]
        self._ends[run.run_id] = told.end
        if told.result is not None:
            self._results[run.run_id] = told.result
            if not told.lacks_references:
                self._finished.add(run.run_id)

    def _new_points(self, run_id: str, rows: Sequence[dict[str, Any]]) -> list[list[Point]]:
        logged = self._logged[run_id]
        new = [row for row in rows if row["kind"] in shown.FIRST_CURVE and row["cells_seen"] > logged[row["kind"]]]
        return shown.row_points(new)

    def _last_step(self, run_id: str, key: str) -> int:
        return max((point.step for point in self._server.history(run_id, key)), default=-1)

    def _log_dataset(self, run_id: str) -> None:
        manifest = self._manifest
        source = {"census": manifest.census, "data_hash": manifest.data_hash}
        profile = {name: {"cells": split.cells} for name, split in manifest.splits.items()}
        schema = shown.schema_of(manifest)
        self._server.log_dataset(run_id, manifest.name, manifest.data_hash, source, schema, profile)

    def _write_story(self, seen: Seen, told: RunTold) -> None:
        whole = shown.whole_story(told.spec, told.result, told.failure)
        digest = content_hash(whole)[:16]
        if seen.tags.get(FILES_TAG) != digest:
            self._server.write_artifacts(seen.run_id, {"run.json": (json.dumps(whole, indent=1) + "\n").encode()})
            self._server.log(seen.run_id, tags={FILES_TAG: digest})

    def _tell_parent(self, values: dict[str, float]) -> None:
        """Log the parent's metrics where they changed; their step is the number of runs that are done."""
        assert self._parent is not None
        at, step = max((end for _, end in self._ends.values()), default=self._parent.start_ms), len(self._results)
        new = [Point(key, value, at, step) for key, value in values.items() if self._told.get(key) != value]
        if new:
            self._server.log(self._parent.run_id, [new])
            self._told |= values

    def close(self, failed: bool) -> None:
        """Mark the parent as ended, and runs that were cut off; delete what a late answer left behind."""
        if self._parent is None or self._experiment is None:
            return
        try:
            for run_id, (status, end_ms) in self._ends.items():
                if status == RUNNING:
                    self._server.end(self._ids[f"{self.key}/{run_id}"], KILLED, end_ms)
            end_ms = max((end for _, end in self._ends.values()), default=self._parent.start_ms)
            self._server.end(self._parent.run_id, FAILED if failed else FINISHED, end_ms)
            # By the files, not by what this tracker remembers: it forgets at every error.
            places = [self._sweep.place, *(self._sweep.run(name).place for name in self._sweep.run_ids())]
            recorded = {tracked.mlflow_run_id for place in places if (tracked := read_tracked(place)) is not None}
            for seen in self._server.runs(self._experiment, SWEEP_TAG, self.key):
                if seen.run_id not in recorded:
                    self._server.delete(seen.run_id)
        except Exception:
            self._forget()
            raise

    def report(self, told: story.Reported) -> None:
        """Give the parent what a report says: verdicts and law as metrics and tags, a description, the files."""
        parent = self._parent
        assert parent is not None
        tags = story.report_tags(told) | {NOTE_TAG: story.note_of(told, self.where())}
        self._tell_parent(story.report_metrics(told))
        changed = {key: value for key, value in tags.items() if parent.tags.get(key) != value}
        files = story.artifacts_of(told, self._sweep)
        digest = story.digest_of(files)
        if parent.tags.get(FILES_TAG) != digest:
            self._server.write_artifacts(parent.run_id, files)
            changed[FILES_TAG] = digest
        self._server.log(parent.run_id, tags=changed)

    def where(self) -> str:
        """One line that says how to look at the sweep in MLflow's pages."""
        assert self._experiment is not None
        return how_to_open(self.uri, self._experiment, self.key)

    @property
    def is_open(self) -> bool:
        """Whether the sweep has runs on the server, as far as this tracker saw."""
        return self._parent is not None

    def _ensure(self, place: Place, identity: str, name: str, start_ms: int, tags: dict[str, str]) -> Seen:
        """The one run of an identity, found or created, and recorded in the mlflow.json of ``place``."""
        assert self._experiment is not None
        recorded = read_tracked(place)
        known = recorded.mlflow_run_id if recorded is not None and recorded.uri == self.uri else None
        found = self._there[identity] if identity in self._there else []
        if not found:
            self._server.create(self._experiment, name, start_ms, tags | {IDENTITY_TAG: identity, SWEEP_TAG: self.key})
            found = self._server.runs(self._experiment, IDENTITY_TAG, identity)
        kept = next((seen for seen in found if seen.run_id == known), found[0])
        new = Tracked(kept.run_id, self.uri, self.key, self._experiment, start_ms)
        if recorded != new:
            write_tracked(place, new)
        for stray in {seen.run_id for seen in found} | ({known} if known is not None else set()):
            if stray is not None and stray != kept.run_id:
                self._server.delete(stray)
        self._there[identity] = [kept]
        self._ids[identity] = kept.run_id
        return kept


def _after(
    seen: Seen, params: dict[str, str], tags: dict[str, str], final: list[Point], status: str, end_ms: int
) -> Seen:
    """A run as the server has it after these were logged."""
    return Seen(
        seen.run_id,
        seen.identity,
        seen.name,
        status,
        seen.start_ms,
        end_ms if status != RUNNING else seen.end_ms,
        dict(seen.params) | params,
        dict(seen.tags) | tags,
        dict(seen.metrics) | {point.key: point.value for point in final},
        True,
    )


def _reached(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Kind of row -> the cells seen at its last row."""
    return {
        kind: max(r["cells_seen"] for r in rows if r["kind"] == kind)
        for kind in {r["kind"] for r in rows} & shown.FIRST_CURVE.keys()
    }


def _made_with() -> dict[str, str]:
    """Tags that say which code created a run on the server: of a sweep that is followed, the code that trains."""
    commit = commit_here()
    tags = {"scaling_ray.version": __version__, "mlflow.source.name": "scaling-ray", "mlflow.source.type": "JOB"}
    return tags | ({"mlflow.source.git.commit": commit, "commit": commit} if commit is not None else {})


def replay(
    sweep: SweepFiles,
    spec: SweepSpec,
    manifest: ShardManifest,
    runs: list[RunSpec],
    uri: str | None = None,
    told: story.Reported | None = None,
) -> str | None:
    """Log all that a sweep's files hold and MLflow does not.

    Returns:
        one line that says where to look at it; None for a sweep of which no run has begun.

    Raises:
        ScalingRayError: the server refuses or does not answer.
    """
    uri = uri or known_uri(sweep)
    try:
        tracker = Tracker(sweep, spec, manifest, uri)
        tracker.sync(runs)
        if not tracker.is_open:
            return None
        if told is not None:
            tracker.report(told)
        tracker.close(failed=any(sweep.run(run.run_id).result() is None for run in runs))
        return tracker.where()
    except Exception as error:
        raise said_of(uri, error) from error
