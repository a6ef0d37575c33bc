"""What went wrong with a run: its class, and the one place where an error becomes a row instead of rising."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from scaling_ray.errors import BadInput, Diverged, Preempted, Stalled
from scaling_ray.records import RunFailure
from scaling_ray.spec import RunSpec
from scaling_ray.storage import write_atomic, write_json
from scaling_ray.train.checkpoint import attempts_begun

FailureClass = Literal["bug", "diverged", "out_of_memory", "lost", "stuck", "bad_input"]


def classify(error: BaseException) -> FailureClass:
    """The class of a failure; ``lost`` (a worker that died) is found by the sweep, not by the worker."""
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, BadInput):
        return "bad_input"
    if isinstance(error, Stalled):
        return "stuck"
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


def guarded(runs: dict[Path, RunSpec], work: Callable[[], None]) -> bool:
    """Do the work of runs (by directory); an error is recorded beside each without a result and stops no other run.

    Preempted alone rises: nothing has failed. True where the work was done.
    """
    for directory in runs:
        (directory / "failure.json").unlink(missing_ok=True)
    try:
        work()
    except Preempted:
        raise
    except Exception as error:  # noqa: BLE001 - the one boundary at which a run's error becomes its row
        where = traceback.format_exception(error)
        message = f"{type(error).__name__}: {error}\n{''.join(where[-6:])}"
        for directory, run in runs.items():
            if not (directory / "result.json").is_file():
                record_failure(directory, run, classify(error), message)
        return False
    return True


def within_memory(runs: list[RunSpec], directory: Path, work: Callable[[list[RunSpec]], None]) -> None:
    """Do ``work`` with the runs; where memory does not suffice, again from the last checkpoint with half micro-batches.

    The effective batch stays what it is. What was halved stands in ``directory/memory.json``, so that a later call
    begins there. Gives up where a micro-batch of 1 does not fit.
    """
    path = directory / "memory.json"
    while True:
        halved = json.loads(path.read_text(encoding="utf-8"))["micro_batch"] if path.is_file() else None
        fitting = [run.model_copy(update={"micro_batch": halved or run.micro_batch}) for run in runs]
        try:
            work(fitting)
            return
        except (MemoryError, torch.OutOfMemoryError) as error:
            micro_batch = fitting[0].micro_batch
            if micro_batch == 1:
                raise
            record = {"micro_batch": micro_batch // 2, "planned": runs[0].micro_batch, "error": str(error)[:200]}
            write_json(path, record)
        # what the failed try held is free only once the exception is gone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
