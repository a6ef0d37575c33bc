"""Failures of runs: their classes, and the one place where an error becomes a row of the results."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from scaling_ray.errors import BadInput, Diverged, LeaseHeld, Lost, Preempted, ScalingRayError, Stalled, StorageFailed
from scaling_ray.records import FailureClass
from scaling_ray.results.sweep_files import MEMORY, SweepFiles, read_sealed, write_sealed
from scaling_ray.runs import RunSpec
from scaling_ray.storage import Place
from scaling_ray.train.memory import is_out_of_memory

STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE})
"""What the system says where a file system is full, read-only or gone; no fault of the run that hit it."""

NO_FAILURE = (Preempted, LeaseHeld, Lost, Stalled, StorageFailed)
"""Errors after which the runs have not failed: whoever schedules decides when they go on."""


def storage_failure(error: BaseException) -> StorageFailed | None:
    """The failure of the file system behind an error, None where it is another one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageFailed):
            return cause
        if isinstance(cause, OSError) and cause.errno in STORAGE_ERRNOS:
            where = f"{cause.filename}: " if cause.filename else ""
            return StorageFailed("W023", f"{where}{cause.strerror}")
        # libraries that write files themselves (safetensors, pyarrow) pass on the system's words alone
        said = [os.strerror(code) for code in STORAGE_ERRNOS if os.strerror(code) in str(cause)]
        if said and not isinstance(cause, ScalingRayError):
            return StorageFailed("W024", said[0])
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def storage_errors(files: SweepFiles) -> Iterator[None]:
    """Errors of the file system, wherever a driver meets them, as one line with the way out."""
    try:
        yield
    except (OSError, ScalingRayError) as error:
        found = storage_failure(error)
        if found is None or isinstance(error, StorageFailed):
            raise
        way_out = "what was trained is saved; make room or mount it again, and call again to go on"
        raise StorageFailed("W052", f"{files}: {found.said}; {way_out}") from error


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

    ``NO_FAILURE`` rises, and with it StorageFailed in place of an error of the file system. Returns True where the work
    was done.
    """
    try:
        for run in runs:
            sweep.run(run.run_id).clear_failure()
        work()
    except NO_FAILURE:
        raise
    except Exception as error:  # noqa: BLE001 - the one boundary at which a run's error becomes its row
        storage = storage_failure(error)
        if storage is not None:
            raise storage from error
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
            if not is_out_of_memory(error) or not halve(runs, place, str(error)):
                raise
        # memory of the failed attempt is free only once the exception is gone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halve(runs: Sequence[RunSpec], place: Place, error: str) -> bool:
    """Write down that the next attempt at ``runs`` takes half of this one's micro-batches; False where that was 1."""
    found = read_sealed(place, MEMORY)
    planned = runs[0].execution.micro_batch
    micro_batch = found["micro_batch"] if found is not None else planned
    if micro_batch == 1:
        return False
    write_sealed(place, MEMORY, {"micro_batch": micro_batch // 2, "planned": planned, "error": error[:200]})
    return True
