"""The files of one run: attempts, checkpoints, metric rows, and the one commit of its result.

``runs/<run_id>/`` holds ``spec.json``, ``result.json`` (committed once, by create-if-absent) and ``attempts/<token>/``
with ``metrics.jsonl``, ``test_cells.parquet`` and ``checkpoints/{last,best}``. A checkpoint is a directory of
safetensors and JSON that appears in one rename. After the commit, the winner's files are moved up to
``runs/<run_id>/`` and the attempts go.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult
from scaling_ray.spec import RunSpec
from scaling_ray.storage import PARTIAL_PREFIX, create_if_absent, partial_directory, publish_directory, write_atomic

PUBLISHED = ("metrics.jsonl", "test_cells.parquet", "checkpoints")


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


class Attempt:
    """One try at a run, in a directory of its own, so that a writer that should be dead cannot disturb the next."""

    def __init__(self, run_directory: Path) -> None:
        self.token = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self.run_directory = run_directory
        earlier = sorted((run_directory / "attempts").glob("*")) if (run_directory / "attempts").is_dir() else []
        self.number = len(earlier) + 1
        self._earlier = list(reversed(earlier))
        self.directory = run_directory / "attempts" / self.token
        self.checkpoints = self.directory / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl")

    def save_last(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the state to resume from."""
        self._save("last", progress, tensors)

    def save_best(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Publish the weights chosen so far."""
        self._save("best", progress, tensors)

    def _save(self, name: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
        building = partial_directory(self.checkpoints / name)
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, building / "state.safetensors"
        )
        (building / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        publish_directory(building, self.checkpoints / name)

    def load_best(self) -> dict[str, Tensor]:
        """Tensors of the chosen checkpoint."""
        return load_file(self.checkpoints / "best" / "state.safetensors")

    def resume(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The newest whole checkpoint of the attempts before this one, with its rows and chosen weights taken over."""
        for attempt in self._earlier:
            last = next((found for place in _places(attempt, "last") if (found := _read_checkpoint(place))), None)
            if last is None:
                continue
            progress, tensors = last
            if progress.best_step:
                best = next((place for place in _places(attempt, "best") if _read_checkpoint(place)), None)
                if best is None:
                    continue
                building = partial_directory(self.checkpoints / "best")
                shutil.copytree(best, building, dirs_exist_ok=True)
                publish_directory(building, self.checkpoints / "best")
            kept = [
                row
                for row in read_metrics(attempt / "metrics.jsonl")
                if row["optimizer_steps"] <= progress.optimizer_steps
            ]
            write_atomic(self.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
            return progress, tensors
        return None


def _places(attempt: Path, name: str) -> list[Path]:
    """Where a checkpoint may stand: in its place or, after a kill while it was being replaced, beside it."""
    checkpoints = attempt / "checkpoints"
    return [checkpoints / name, *sorted(checkpoints.glob(f"{PARTIAL_PREFIX}{name}-*"))]


def _read_checkpoint(directory: Path) -> tuple[Progress, dict[str, Tensor]] | None:
    try:
        progress = Progress(**json.loads((directory / "progress.json").read_text(encoding="utf-8")))
        return progress, load_file(directory / "state.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError):
        return None


def prepare_run(run_directory: Path, run: RunSpec) -> None:
    """Write the run's own spec; BadInput if another one already stands there under the same name."""
    text = run.model_dump_json(indent=1) + "\n"
    path = run_directory / "spec.json"
    if path.is_file():
        try:
            there = RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(str(path), str(error).splitlines()[0], "is not a run's spec; remove it") from error
        identity = {"workers", "engine", "zero_stage", "micro_batch", "precision", "compile", "lr", "train"}
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
    shutil.rmtree(run_directory / "checkpoints" / "last", ignore_errors=True)
    shutil.rmtree(attempts, ignore_errors=True)
