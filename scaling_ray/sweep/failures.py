"""Failures of runs: their classes, and the one place where an error becomes a row of the results."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence

import torch

from scaling_ray.errors import BadInput, Diverged, LeaseHeld, Preempted, Stalled
from scaling_ray.records import FailureClass
from scaling_ray.results.sweep_files import MEMORY, SweepFiles, read_sealed, write_sealed
from scaling_ray.runs import RunSpec
from scaling_ray.storage import Place
from scaling_ray.train.memory import is_out_of_memory


def classify(error: BaseException) -> FailureClass:
    """The class of a failure; ``lost`` (a worker that died) is found by the sweep, not by the worker."""
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, BadInput):
        return "bad_input"
    if isinstance(error, Stalled):
        return "stuck"
    if is_out_of_memory(error):
        return "out_of_memory"
    return "bug"


def guarded(sweep: SweepFiles, runs: Sequence[RunSpec], work: Callable[[], None]) -> bool:
    """Do the work of ``runs``; an error is recorded for each of them without a result, and stops no other run.

    Only Preempted and LeaseHeld rise, since nothing has failed then. Returns True where the work was done.
    """
    for run in runs:
        sweep.run(run.run_id).clear_failure()
    try:
        work()
    except (Preempted, LeaseHeld):
        raise
    except Exception as error:  # noqa: BLE001 - the one boundary at which a run's error becomes its row
        where = traceback.format_exception(error)
        message = f"{type(error).__name__}: {error}\n{''.join(where[-6:])}"
        for run in runs:
            files = sweep.run(run.run_id)
            if files.result() is None:
                files.record_failure(run, classify(error), message)
        return False
    return True


def within_memory(runs: Sequence[RunSpec], place: Place, work: Callable[[list[RunSpec]], None]) -> None:
    """Do ``work`` with the runs; where memory does not suffice, again from the last checkpoint with half micro-batches.

    The effective batch stays the same. ``memory.json`` in ``place`` keeps the halved micro-batch, so that a later call
    begins with it. The error rises where even a micro-batch of 1 does not fit.
    """
    while True:
        found = read_sealed(place, MEMORY)
        halved = found["micro_batch"] if found is not None else None
        fitting = [run.carried_out(micro_batch=halved) if halved else run for run in runs]
        try:
            work(fitting)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            micro_batch = fitting[0].execution.micro_batch
            if micro_batch == 1:
                raise
            planned = runs[0].execution.micro_batch
            record = {"micro_batch": micro_batch // 2, "planned": planned, "error": str(error)[:200]}
            write_sealed(place, MEMORY, record)
        # memory of the failed attempt is free only once the exception is gone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
