"""What went wrong with a run: its class, and the one place where an error becomes a row instead of rising."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from scaling_ray.errors import BadInput, Diverged
from scaling_ray.records import RunFailure
from scaling_ray.spec import RunSpec
from scaling_ray.storage import write_atomic
from scaling_ray.train.checkpoint import attempts_begun

FailureClass = Literal["bug", "diverged", "out_of_memory", "lost", "bad_input"]


def classify(error: BaseException) -> FailureClass:
    """The class of a failure; ``lost`` (a worker that died) is found by the sweep, not by the worker."""
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, BadInput):
        return "bad_input"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out_of_memory"
    return "bug"


def record_failure(run_directory: Path, run: RunSpec, failure: FailureClass, message: str) -> None:
    """Leave ``failure.json`` beside the run; a later success supersedes it."""
    count = attempts_begun(run_directory)
    record = RunFailure(run_id=run.run_id, failure=failure, message=message, attempts=count)
    write_atomic(run_directory / "failure.json", record.to_json())


def recorded_failure(run_directory: Path) -> FailureClass | None:
    """The class of the failure recorded beside a run, or None."""
    path = run_directory / "failure.json"
    return RunFailure.read(path).failure if path.is_file() else None


def guarded(run: RunSpec, run_directory: Path, work: Callable[[], None]) -> bool:
    """Do a run's work; an error is recorded beside the run and stops no other run. True where it succeeded."""
    (run_directory / "failure.json").unlink(missing_ok=True)
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the one boundary at which a run's error becomes its row
        where = traceback.format_exception(error)
        record_failure(run_directory, run, classify(error), f"{type(error).__name__}: {error}\n{''.join(where[-6:])}")
        return False
    return True
