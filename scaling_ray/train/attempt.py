"""An attempt at a run: its rows of metrics, its checkpoints, its claim on the run's result, and the one commit of it.

Each attempt has files of its own below ``attempts/<token>/``, so that a process that outlives its kill cannot disturb
the next attempt. After the commit, the winner's files move up to ``runs/<run_id>/`` and all attempts are removed.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from scaling_ray.records import RunResult
from scaling_ray.results.sweep_files import (
    ATTEMPTS,
    CHECKPOINTS,
    METRICS,
    RESULT,
    TEST_CELLS,
    TEST_GENES,
    AttemptName,
    RunFiles,
    read_rows,
)
from scaling_ray.rules import TrainingRules
from scaling_ray.runs import RunSpec, differing, trunk_name
from scaling_ray.storage import Place
from scaling_ray.train.checkpoint import (
    KEPT,
    Checkpoint,
    Checkpoints,
    Progress,
    check_identity,
    newest,
    progress_facts,
)
from scaling_ray.train.schedule import decay_start
from scaling_ray.train.sharded import UNREADABLE

LAST, BEST, TRUNK = "last", "best", "trunk"


class MetricsLog:
    """Appends rows to a metrics.jsonl; a row's time is fixed when it is first written."""

    def __init__(self, place: Place, kept: list[dict[str, Any]] | None = None) -> None:
        """Start the file anew with the rows ``kept``; without them, append to the rows that are there."""
        lines = None if kept is None else "".join(json.dumps(row) + "\n" for row in kept)
        self._log = place.log(METRICS, lines)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._log.write(json.dumps(row | {"timestamp_ms": time.time_ns() // 1_000_000}) + "\n")

    def flush(self) -> None:
        """Make sure that every row has reached the file; on a disk each row is there once it is written."""
        self._log.flush()


class Attempt:
    """One attempt at a run. Given ``run``, it records that identity in checkpoints and refuses those of another run."""

    def __init__(self, files: RunFiles, run: RunSpec | None = None) -> None:
        self.files = files
        self._earlier = AttemptName.all_of(files.place)
        name = AttemptName.next_of(files.place)
        self.number, self.token = name.number, name.token
        self._identity = run.identity if run is not None else None
        self._run = run
        self._trunks: Checkpoints | None = None
        if run is not None and run.train.wsd is not None and run.role == "law" and files.trunks is not None:
            self._trunks = Checkpoints(files.trunks.below(trunk_name(run)))
        self._orphans: list[AttemptName] = []
        self.place = files.place.below(f"{ATTEMPTS}/{self.token}")
        self._claim = files.place.claim(RESULT, self.token)
        self.checkpoints = Checkpoints(self.place.below(CHECKPOINTS))
        self.metrics = MetricsLog(self.place, [])
        self._best_of: dict[int, int] = {}

    def save_last(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the state to resume from; the previous one is kept too."""
        self.checkpoints.save(LAST, progress.optimizer_steps, self._facts(progress), tensors)
        self._saved(progress)

    def publish_last(self, progress: Progress) -> None:
        """Publish the state to resume from, once all ranks have written its files."""
        self.checkpoints.publish(LAST, progress.optimizer_steps, self._facts(progress))
        self._saved(progress)

    def save_best(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the weights chosen so far."""
        self.checkpoints.save(BEST, progress.best_step, self._facts(progress), tensors)
        self.checkpoints.drop(BEST, {progress.best_step, *self._best_of.values()})

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {"progress": progress_facts(progress), "identity": self._identity}

    def _saved(self, progress: Progress) -> None:
        self.metrics.flush()
        kept = self.checkpoints.steps_of(LAST)[:KEPT]
        self.checkpoints.drop(LAST, set(kept))
        self._best_of = {step: self._best_of[step] for step in kept if step in self._best_of}
        self._best_of[progress.optimizer_steps] = progress.best_step
        for orphan in self._orphans:
            self.files.place.remove(f"{ATTEMPTS}/{orphan.token}/")
        self._orphans = []

    def save_trunk(self, progress: Progress, tensors: dict[str, Tensor], best: dict[str, Tensor]) -> None:
        """Leave the state that a larger budget goes on from, the chosen weights so far, and this attempt's rows."""
        if self._trunks is None or progress.optimizer_steps <= max(self._trunks.steps_of(TRUNK), default=0):
            return
        self.metrics.flush()
        if progress.best_step:
            self._trunks.save(BEST, progress.best_step, self._facts(progress), best)
        rows = read_rows(self.place)
        self._trunks.save(TRUNK, progress.optimizer_steps, self._facts(progress) | {"rows": rows}, tensors)
        self._trunks.drop(TRUNK, {progress.optimizer_steps})
        self._trunks.drop(BEST, {progress.best_step})

    def find_trunk(self) -> tuple[Progress, Checkpoint] | None:
        """Find the longest trunk that a run of a smaller budget left, if it ends before this one decays."""
        if self._trunks is None or self._run is None:
            return None
        train = self._run.train
        for steps in self._trunks.steps_of(TRUNK):
            if steps > decay_start(train):
                continue
            try:
                found = self._trunks.read(TRUNK, steps)
                progress = Progress(**found.facts["progress"])
            except UNREADABLE:
                continue
            if progress.best_step and not self._take_over_best(self._trunks, progress.best_step):
                continue
            rows = [row for row in found.facts["rows"] if row["kind"] != "note"]
            self.metrics = MetricsLog(self.place, rows)
            self.note(["goes on from the trunk of a smaller budget"], steps)
            return replace(progress, branches=[_of_budget(branch, train) for branch in progress.branches]), found
        return None

    def begin_anew(self) -> None:
        """Forget the rows that ``find_trunk`` took over."""
        self.metrics = MetricsLog(self.place, [])

    def load_best(self, progress: Progress) -> dict[str, Tensor]:
        """Tensors of the chosen checkpoint."""
        return self.checkpoints.read(BEST, progress.best_step).tensors()

    def find(self) -> tuple[Progress, Checkpoint] | None:
        """Find the newest whole checkpoint of earlier attempts, and take over its rows and chosen weights.

        Each damaged checkpoint that is passed over gets a row of kind "note". Attempts older than the one that is
        resumed are removed once this one has saved a checkpoint of its own. Raises BadInput for a checkpoint of
        another run.
        """
        notes: list[str] = []
        for age, attempt in enumerate(self._earlier):
            place = self.files.place.below(f"{ATTEMPTS}/{attempt.token}")
            found = self._find_in(Checkpoints(place.below(CHECKPOINTS)), notes)
            if found is not None:
                self._orphans = self._earlier[age + 1 :]
                self.take_over_rows(place, found[0].optimizer_steps)
                self.note(notes, found[0].optimizer_steps)
                return found
        self.note(notes, 0)
        return None

    def take_over_rows(self, place: Place, steps: int) -> None:
        """Start this attempt's rows with those of an earlier attempt, up to update number ``steps``."""
        self.metrics = MetricsLog(self.place, [row for row in read_rows(place) if row["optimizer_steps"] <= steps])

    def note(self, notes: list[str], steps: int) -> None:
        """Write a row of kind "note" for each."""
        for note in notes:
            self.metrics.write({"kind": "note", "optimizer_steps": steps, "note": note})

    def _find_in(self, checkpoints: Checkpoints, notes: list[str]) -> tuple[Progress, Checkpoint] | None:
        for steps in checkpoints.steps_of(LAST):
            where = str(checkpoints.folder(LAST, steps)).removeprefix(f"{self.files.place}/")
            try:
                found = checkpoints.read(LAST, steps)
                progress = Progress(**found.facts["progress"])
            except UNREADABLE as error:
                notes.append(f"passed over {where}, which is damaged: {' '.join(str(error).split())}")
                continue
            identity = found.facts["identity"]
            if self._identity is not None and identity is not None:
                check_identity(found, self._identity, differing(identity, self._identity))
            if not progress.best_step or self._take_over_best(checkpoints, progress.best_step):
                return progress, found
            notes.append(f"passed over {where}: its chosen weights are damaged")
        return None

    def _take_over_best(self, checkpoints: Checkpoints, steps: int) -> bool:
        try:
            best = checkpoints.read(BEST, steps)
        except UNREADABLE:
            return False
        best.copy_to(self.checkpoints.folder(BEST, steps))
        return True

    def commit(self, result: RunResult) -> bool:
        """Commit the run's result once; False where another attempt came first."""
        self.metrics.flush()
        return self.files.place.commit(RESULT, self._claim, result.to_json().encode())


def _of_budget(branch: dict[str, Any], train: TrainingRules) -> dict[str, Any]:
    """A branch of a smaller budget's trunk, as a share of this one's."""
    wsd, steps = train.wsd, branch["optimizer_steps"]
    shares = wsd.branches if wsd is not None else []
    share = next((one for one in shares if round(one * train.total_steps) == steps), steps / train.total_steps)
    return branch | {"share": share}


def publish_winner(files: RunFiles) -> None:
    """Move the files of the attempt that committed up to the run and remove all attempts; safe to repeat."""
    attempts = files.place.names(f"{ATTEMPTS}/")
    if not attempts:
        return
    result = files.result()
    if result is None:
        return
    winner = files.place.below(f"{ATTEMPTS}/{result.attempt}")
    there = winner.names()
    best = newest(Checkpoints(winner.below(CHECKPOINTS)), BEST, [])
    if best is not None:
        best.copy_to(files.place.below(f"{CHECKPOINTS}/{BEST}"))
    for name in (TEST_CELLS, TEST_GENES, METRICS):
        if name in there:
            winner.copy(name, files.place, name)
    files.place.remove(f"{ATTEMPTS}/")
