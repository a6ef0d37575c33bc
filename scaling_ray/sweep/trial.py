"""The work of a trial: one run, one stack or one worker group, from the cells to committed results.

A trial never raises what befell its runs: it answers with an outcome. "ended": every run has a result or a recorded
failure. "stopped": the runs are saved. "lease": another driver works here. Otherwise it was cut off, by its cause.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scaling_ray.cluster import ray
from scaling_ray.errors import BadInput, LeaseHeld, Lost, Preempted, Stalled, StorageFailed
from scaling_ray.pulses import Pulse
from scaling_ray.records import ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import row_groups
from scaling_ray.shards.read import Cells, Feed
from scaling_ray.shards.stream import open_feed
from scaling_ray.storage import PARTIAL_PREFIX, Place
from scaling_ray.sweep.failures import guarded, storage_failure, within_memory
from scaling_ray.sweep.stopping import STOP_POLL_SECONDS
from scaling_ray.sweep.units import Unit, stack_name
from scaling_ray.tracking.ledger import local_folder
from scaling_ray.train.attempt import publish_winner
from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine, device_of
from scaling_ray.train.loop import RunData, run_to_result
from scaling_ray.train.sampling import sampled
from scaling_ray.train.stack_loop import stack_to_results
from scaling_ray.train.watchdog import STALL_SECONDS, Watchdog, stall_note


@dataclass(frozen=True)
class Surroundings:
    """What every trial of a sweep is told: where files and shards are, how much it may hold, whom to tell it lives.

    ``own_bytes`` of counts are a trial's own where runs do not share the training split, ``resident_bytes`` a worker
    group's. ``board`` is the actor of :mod:`scaling_ray.pulses`.
    """

    sweep: SweepFiles
    shards: Place
    manifest: str
    own_bytes: float
    resident_bytes: float
    board: Any


def train_unit(name: str, run_ids: Sequence[str], splits: dict[str, Any], around: Surroundings) -> dict[str, Any]:
    """Train the runs of a unit, whose specs the driver has left in their files.

    Returns:
        ``outcome``, ``reason`` and ``seconds``, as the head of this module says.
    """
    began = time.monotonic()
    outcome, reason = "ended", ""
    with Pulse(around.board, name):
        try:
            if around.sweep.stop_requested():
                raise Preempted("W051", "a stop was requested before the unit began; call again to go on")
            runs = [_spec_of(around.sweep, run_id) for run_id in run_ids]
            if Unit(tuple(runs)).kind == "group":
                _train_group(runs[0], around)
            else:
                _train_here(runs, splits, around)
        except Preempted as error:
            outcome, reason = "stopped", error.said
        except LeaseHeld as error:
            outcome, reason = "lease", error.said
        except Lost as error:
            outcome, reason = "node lost" if error.node_gone else "process lost", error.said
        except Stalled as error:
            outcome, reason = "stuck", error.said
        except StorageFailed as error:
            outcome, reason = "storage", error.said
        except (OSError, BadInput) as error:
            storage = storage_failure(error)
            if storage is None:
                raise
            outcome, reason = "storage", storage.said
    return {"outcome": outcome, "reason": reason, "seconds": time.monotonic() - began}


def _spec_of(sweep: SweepFiles, run_id: str) -> RunSpec:
    spec = sweep.run(run_id).spec()
    assert spec is not None, f"{run_id} was not prepared"
    return spec


def _train_here(runs: list[RunSpec], splits: dict[str, Any], around: Surroundings) -> None:
    record = ShardManifest.parse(around.manifest, "the shards' manifest")
    held = {name: ray.get(reference).narrowed(runs[0].genes) for name, reference in splits.items()}

    def feed(run: RunSpec) -> Feed:
        return open_feed(around.shards, record, run, around.own_bytes / len(runs), cpus=0.0)

    place, note = around.sweep.run(runs[0].run_id).place, stall_note(0)
    if place.exists(note):
        place.remove(note)
    is_local = local_folder(around.sweep.place) is not None
    with Watchdog(STALL_SECONDS, lambda text: place.write(note, text.encode())) as watchdog, sampled() as sampler:
        signals = Signals(
            around.sweep.stop_requested,
            beat=watchdog.beat,
            sample=sampler.row,
            ask_seconds=STOP_POLL_SECONDS[is_local],
        )
        Trial(around.sweep, around.shards, record, held, feed, signals).train(runs)


def _train_group(run: RunSpec, around: Surroundings) -> None:
    """One run on several processes, which Ray Train starts from here."""
    from scaling_ray.train.worker import train_in_worker_group

    files = around.sweep.run(run.run_id)
    with scratch_of(around.sweep, "workers") as storage:

        def fit(fitting: list[RunSpec]) -> None:
            train_in_worker_group(
                fitting[0], around.shards, around.sweep, storage, around.resident_bytes, board=around.board
            )

        guarded(around.sweep, [run], lambda: within_memory([run], files.place, fit))
    publish_winner(files)


@contextlib.contextmanager
def scratch_of(files: SweepFiles, name: str) -> Iterator[str]:
    """A folder or URI where Ray may write until the block ends: below the sweep, where every node can reach it.

    On S3, Ray Tune keeps its records on the driver's own disk; worker groups write below the sweep's URI.
    """
    folder = local_folder(files.place)
    if folder is None and name != "tune":
        yield f"{files.place.uri}/{name}"
        files.place.remove(f"{name}/")
        return
    below = tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{name}-", dir=folder)
    try:
        yield below
    finally:
        shutil.rmtree(below, ignore_errors=True)


@dataclass(frozen=True)
class Trial:
    """All that training in one process needs.

    ``splits`` are over the genes of the runs. Where "train" is not one of them, ``open_feed`` gives a run its batches.
    """

    sweep: SweepFiles
    shards: Place
    manifest: ShardManifest
    splits: dict[str, Cells]
    open_feed: Callable[[RunSpec], Feed]
    signals: Signals

    def train(self, runs: Sequence[RunSpec]) -> None:
        """Train a run, or several as a stack; an error is recorded for each run without a result and rises no further.

        Preempted and LeaseHeld rise: the runs have neither failed nor ended.
        """
        torch.set_num_threads(runs[0].execution.cpus)
        device = device_of(runs[0].execution)

        def work() -> None:
            if len(runs) == 1:
                place = self.sweep.run(runs[0].run_id).place
                within_memory(runs, place, lambda fitting: self._alone(fitting[0], device))
            else:
                place = self.sweep.stack(stack_name(list(runs)))
                within_memory(runs, place, lambda fitting: self._stacked(fitting, device, place))

        guarded(self.sweep, runs, work)
        for run in runs:
            publish_winner(self.sweep.run(run.run_id))

    def _data(self, run: RunSpec) -> RunData:
        train = self.splits["train"] if "train" in self.splits else self.open_feed(run)
        edges = row_groups(self.manifest, "train")
        return RunData(train, self.splits["val"], self.splits["test"], self.manifest.data_hash, edges)

    def _alone(self, run: RunSpec, device: torch.device) -> None:
        files = self.sweep.run(run.run_id)
        run_to_result(run, self._data(run), PlainEngine(run, device), files, self.signals)

    def _stacked(self, runs: list[RunSpec], device: torch.device, place: Place) -> None:
        stack_to_results(
            runs,
            [self._data(run).feed(run) for run in runs],
            self.splits["val"],
            self.splits["test"],
            self.manifest.data_hash,
            device,
            place,
            [self.sweep.run(run.run_id) for run in runs],
            lambda run, message: self.sweep.run(run.run_id).record_failure(run, "diverged", message),
            self.signals,
        )
