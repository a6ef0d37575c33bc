"""The files of one run: attempts, checkpoints, metric rows, and the one commit of its result.

``runs/<run_id>/`` holds ``spec.json``, ``result.json`` (committed once, by create-if-absent) and ``attempts/<token>/``
with ``metrics.jsonl``, ``test_cells.parquet`` and ``checkpoints/{last,previous,best}``. A checkpoint is a directory of
safetensors and JSON that appears in one rename; "previous" is what "last" was before, should that be damaged. After
the commit, the winner's files are moved up to ``runs/<run_id>/`` and the attempts go.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult
from scaling_ray.spec import NUMERICS_VERSION, RunSpec, content_hash
from scaling_ray.storage import PARTIAL_PREFIX, create_if_absent, partial_directory, publish_directory, write_atomic
from scaling_ray.train.sharded import UNREADABLE, WHOLE, check_state, read_state, write_tensors

PUBLISHED = ("metrics.jsonl", "test_cells.parquet", "test_genes.parquet", "checkpoints")


@dataclass
class Progress:
    """Where a run stands; together with weights, optimizer and generator state it is all that resuming needs.

    ``row_squared_error`` and ``row_masked_genes`` are the sums since the last row of kind "train".
    """

    optimizer_steps: int = 0
    cells_seen: int = 0
    masked_genes_seen: int = 0
    train_seconds: float = 0.0
    curve_mse: list[float] = field(default_factory=list)
    best_smoothed_mse: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    row_squared_error: float = 0.0
    row_masked_genes: float = 0.0

    def add_evaluation(self, val_mse: float, smoothing_evaluations: int) -> tuple[float, bool]:
        """Put a value on the validation curve: (smoothed, whether it is the best smoothed so far)."""
        self.curve_mse.append(val_mse)
        recent = self.curve_mse[-smoothing_evaluations:]
        smoothed = sum(recent) / len(recent)
        best = self.best_smoothed_mse is None or smoothed < self.best_smoothed_mse
        if best:
            self.best_smoothed_mse, self.best_step, self.evaluations_without_gain = smoothed, self.optimizer_steps, 0
        else:
            self.evaluations_without_gain += 1
        return smoothed, best

    def has_stalled(self, patience_evaluations: int) -> bool:
        """Whether the smoothed value has not fallen for so many evaluations (never, for 0)."""
        return 0 < patience_evaluations <= self.evaluations_without_gain


class MetricsLog:
    """Appends rows to a metrics.jsonl; a row's time is fixed when it is first written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row | {"timestamp_ms": time.time_ns() // 1_000_000}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


@dataclass(frozen=True)
class Found:
    """A whole checkpoint: its directory and what its progress.json says."""

    directory: Path
    progress: Progress
    spec: dict[str, Any] | None
    spec_hash: str | None


class Attempt:
    """One try at a run, in a directory of its own, so that a writer that should be dead cannot disturb the next.

    With ``run`` its checkpoints say which spec they belong to, and those of another one are refused.
    """

    def __init__(self, run_directory: Path, run: RunSpec | None = None) -> None:
        self.run_directory = run_directory
        self.number = attempts_begun(run_directory) + 1
        self.token = f"{time.time_ns():020d}-{self.number:04d}-{uuid.uuid4().hex[:8]}"
        self._identity = _identity(run) if run is not None else None
        self._earlier = sorted((run_directory / "attempts").glob("*"), reverse=True)
        self._orphans: list[Path] = []
        self.directory = run_directory / "attempts" / self.token
        self.checkpoints = self.directory / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl")

    def save_last(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the state to resume from; the one before is kept as "previous"."""
        self._save("last", progress, tensors)

    def save_best(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the weights chosen so far."""
        self._save("best", progress, tensors)

    def _save(self, name: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
        building = self.begin(name)
        write_tensors(building / WHOLE, tensors)
        self.publish(building, name, progress)

    def begin(self, name: str) -> Path:
        """An unfinished directory to write the files of the checkpoint ``name`` into."""
        return partial_directory(self.checkpoints / name)

    def publish(self, building: Path, name: str, progress: Progress) -> None:
        """Make the checkpoint ``name`` of what ``begin`` gave and others filled."""
        written: dict[str, Any] = asdict(progress)
        if self._identity is not None:
            written |= {"spec": self._identity, "spec_hash": content_hash(self._identity)}
        (building / "progress.json").write_text(json.dumps(written), encoding="utf-8")
        kept = self.checkpoints / "previous" if name == "last" else None
        publish_directory(building, self.checkpoints / name, kept)
        if name == "last":
            for orphan in self._orphans:
                shutil.rmtree(orphan, ignore_errors=True)
            self._orphans = []

    def load_best(self) -> dict[str, Tensor]:
        """Tensors of the chosen checkpoint."""
        return read_state(self.checkpoints / "best")

    def resume(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What ``find`` finds, with its whole state, shared out or not."""
        found = self.find()
        return (found.progress, read_state(found.directory)) if found is not None else None

    def find(self) -> Found | None:
        """The newest whole checkpoint of the attempts before this one, with its rows and chosen weights taken over.

        A row of kind "note" tells of each damaged one that was passed over. Attempts older than the one it is from go
        when this one has saved a checkpoint of its own. Raises BadInput for a checkpoint of another spec.
        """
        notes: list[str] = []
        found = None
        kept: list[dict[str, Any]] = []
        for age, attempt in enumerate(self._earlier):
            found = self._find_in(attempt, notes)
            if found is not None:
                self._orphans = self._earlier[age + 1 :]
                rows = read_metrics(attempt / "metrics.jsonl")
                kept = [row for row in rows if row["optimizer_steps"] <= found.progress.optimizer_steps]
                break
        if kept:
            write_atomic(self.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        for note in notes:
            step = found.progress.optimizer_steps if found is not None else 0
            self.metrics.write({"kind": "note", "optimizer_steps": step, "note": note})
        return found

    def _find_in(self, attempt: Path, notes: list[str]) -> Found | None:
        for name in ("last", "previous"):
            directory = attempt / "checkpoints" / name
            if not directory.is_dir():
                continue
            try:
                found = _read_checkpoint(directory)
            except UNREADABLE as error:
                where = directory.relative_to(self.run_directory)
                notes.append(f"passed over {where}, which is damaged: {' '.join(str(error).split())}")
                continue
            if self._identity is not None and found.spec is not None:
                _check_identity(directory, found, self._identity)
            if not found.progress.best_step or self._take_over_best(attempt):
                return found
            notes.append(f"passed over {directory.relative_to(self.run_directory)}: its chosen weights are damaged")
        return None

    def _take_over_best(self, attempt: Path) -> bool:
        for place in _places(attempt, "best"):
            try:
                _read_checkpoint(place)
            except UNREADABLE:
                continue
            building = self.begin("best")
            shutil.copytree(place, building, dirs_exist_ok=True)
            publish_directory(building, self.checkpoints / "best")
            return True
        return False


def attempts_begun(run_directory: Path) -> int:
    """How many attempts at a run were begun, those included whose directories are gone."""
    there = [path.name for path in (run_directory / "attempts").glob("*")]
    numbered = (re.fullmatch(r"\d{20}-(\d{4,})-[0-9a-f]{8}", name) for name in there)
    return max([len(there), *(int(match[1]) for match in numbered if match)])


def _places(attempt: Path, name: str) -> list[Path]:
    """Where a checkpoint may stand: in its place or, after a kill while it was being replaced, beside it."""
    checkpoints = attempt / "checkpoints"
    return [checkpoints / name, *sorted(checkpoints.glob(f"{PARTIAL_PREFIX}{name}-*"))]


def _read_checkpoint(directory: Path) -> Found:
    """A checkpoint's progress, its state checked for being whole; one of UNREADABLE where it is not."""
    written = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    spec, spec_hash = written.pop("spec", None), written.pop("spec_hash", None)
    check_state(directory)
    return Found(directory, Progress(**written), spec, spec_hash)


def _identity(run: RunSpec) -> dict[str, Any]:
    """What of a run's spec a checkpoint must agree with, as JSON.

    Not what it may use, nor the micro-batch, which adds up to the same update; ``run_id`` stands for the rest.
    """
    free: Any = {
        "workers": True,
        "engine": True,
        "zero_stage": True,
        "offload_optimizer": True,
        "micro_batch": True,
        "precision": True,
        "compile": True,
        "train": {"checkpoint_seconds", "micro_batch"},
    }
    return {"numerics": NUMERICS_VERSION} | run.model_dump(mode="json", exclude=free)


def _check_identity(directory: Path, found: Found, identity: dict[str, Any]) -> None:
    if found.spec_hash == content_hash(identity):
        return
    there, here = _flat(found.spec or {}), _flat(identity)
    differing = [name for name in sorted(set(there) | set(here)) if there.get(name) != here.get(name)]
    # the run id differs with anything that does: it is named where nothing else can be
    name = next((name for name in differing if name != "run_id"), "run_id")
    remedy = f"the run has {here.get(name)!r}, {directory} is of another spec; remove it or sweep into a new directory"
    raise BadInput(f"checkpoint.{name}", there.get(name), remedy)


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat


def prepare_run(run_directory: Path, run: RunSpec) -> None:
    """Write the run's own spec; BadInput if another one already stands there under the same name."""
    text = run.model_dump_json(indent=1) + "\n"
    path = run_directory / "spec.json"
    if path.is_file():
        try:
            there = RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(str(path), str(error).splitlines()[0], "is not a run's spec; remove it") from error
        identity = {"workers", "engine", "zero_stage", "offload_optimizer", "micro_batch", "precision", "compile"}
        identity |= {"lr", "train"}
        if there.model_dump(exclude=identity) != run.model_dump(exclude=identity):
            raise BadInput("run_id", run.run_id, "stands for another spec in this directory; sweep into a new one")
    write_atomic(path, text)


def read_result(run_directory: Path) -> RunResult | None:
    """The committed result of a run, or None."""
    path = run_directory / "result.json"
    return RunResult.read(path) if path.is_file() else None


def commit_result(run_directory: Path, result: RunResult) -> bool:
    """Commit once; False where another attempt came first."""
    return create_if_absent(run_directory / "result.json", result.to_json())


def publish_winner(run_directory: Path) -> None:
    """Move the files of the attempt that committed up to the run and remove all attempts; safe to repeat."""
    result = read_result(run_directory)
    attempts = run_directory / "attempts"
    if result is None or not attempts.is_dir():
        return
    winner = attempts / result.attempt
    for name in PUBLISHED:
        if (winner / name).exists():
            target = run_directory / name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(winner / name, target)
    for name in ("last", "previous"):
        shutil.rmtree(run_directory / "checkpoints" / name, ignore_errors=True)
    shutil.rmtree(attempts, ignore_errors=True)
