"""The desk of a sweep: which unit goes next, what becomes of one that was lost, and when to pause or to end. No Ray.

All that must outlive this process is in the sweep's files. What the desk itself remembers (how often a unit was tried
in this call) only bounds how long one call tries.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from scaling_ray.errors import BudgetSpent, ScalingRayError, StorageFailed
from scaling_ray.results.sweep_files import EVENTS, QUEUE
from scaling_ray.runs import RunSpec
from scaling_ray.sweep.budget import Budget
from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.failures import halve, storage_failure
from scaling_ray.sweep.queue import Item, Queue, bundle
from scaling_ray.sweep.state import SweepState
from scaling_ray.sweep.stopping import STOP_POLL_SECONDS
from scaling_ray.sweep.units import Unit
from scaling_ray.tracking.ledger import local_folder

Cause = Literal["node lost", "preempted", "process lost", "stuck", "host memory", "storage"]
"""Why an attempt ended without a result and without an error of the run's own."""

STUCK_RETRIES = 2
PAUSE_SECONDS, PATIENCE_SECONDS = 20.0, 600.0
"""Time between two looks at a file system that failed, and how long the sweep waits for it altogether."""
SAY_SECONDS, WRITE_SECONDS = 60.0, 10.0


@dataclass(frozen=True)
class Attempt:
    """One attempt at a unit that was cut off: why, in whose words, and the last lines of its log."""

    unit: Unit
    cause: Cause
    reason: str
    log: str = ""


class Desk:
    """Decides for a scheduler, which carries out.

    Args:
        state: the sweep's.
        units: that still need training, of all roles.
        capacity: what the cluster can become.
        driver: what a worker group's driver holds beside its workers' shares.
        clock: seconds that run on.
    """

    def __init__(
        self,
        state: SweepState,
        units: Sequence[Unit],
        capacity: Capacity,
        driver: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state, self.capacity, self._clock = state, capacity, clock
        self._units = {unit.name: unit for unit in units}
        seconds = planned_seconds(state.files.plan())
        trains = {run.run_id: unit.name for unit in units for run in unit.runs}
        items = [
            Item(
                unit.name,
                bundles_of(unit, driver),
                sum(seconds[run.run_id] for run in unit.runs if run.run_id in seconds),
                frozenset(trains[name] for name in unit.candidates if name in trains),
            )
            for unit in units
        ]
        self.queue = Queue(items, capacity.each_node())
        self._homeless = homeless(units, capacity)
        self.budget = Budget(state.spec, state.files, {run.run_id: run for run in state.runs})
        self.problem: ScalingRayError | None = None
        self._tries: Counter[tuple[str, Cause]] = Counter()
        self._paused_since: float | None = None
        self._stopping, self._asked = False, -math.inf
        self._look_again = self._said = self._written = self._clock()
        self._admitted: dict[str, float] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested, as of a moment ago: over S3 every look is a request."""
        now, every = self._clock(), STOP_POLL_SECONDS[local_folder(self.state.files.place) is not None]
        if self.state.stopping.requested:
            self._stopping = True
        elif not self._stopping and now - self._asked > every:
            self._asked, self._stopping = now, self.state.files.stop_requested()
        return self._stopping

    @property
    def is_over(self) -> bool:
        """Whether no unit will start any more: all have ended, a stop was requested, or something went wrong."""
        return self.problem is not None or self.queue.is_empty or self.stop_requested

    def next(self) -> Unit | None:
        """The next unit to start, its runs prepared; None while none may."""
        if self.is_over or self._is_paused():
            return None
        while (item := self.queue.admit(self._clock())) is not None:
            unit = self._with_rates(item.name)
            obstacle = self._obstacle(unit)
            if obstacle is None:
                if self._carefully(partial(self._prepare, unit)):
                    self._admitted[unit.name] = self._clock()
                    return unit
                self.queue.again(unit.name)
                return None
            self._fail(unit, "bad_input", obstacle)
        self._drop_what_never_fits()
        return None

    def began(self, name: str, workers: int | None = None) -> None:
        """A unit in flight has its resources; of a group, so many workers live."""
        if name in self.queue.in_flight:
            self.queue.began(name, self._clock())
            self.budget.began(self._units[name], self._clock(), workers)

    def ended(self, name: str, seconds: float) -> None:
        """A unit's runs have results or recorded failures, after so many seconds."""
        self.budget.began(self._units[name], self._clock() - seconds)  # where it was too short to be seen
        self._left(name)
        for run in self._with_rates(name).runs:
            self._carefully(partial(self.state.announce, run, seconds))
        self._carefully(self.state.choose_rates)
        self.queue.ended(name)

    def stopped(self, name: str) -> None:
        """A unit's runs were saved and ended because a stop was requested."""
        self._left(name)
        self.queue.again(name)

    def cut_off(self, attempt: Attempt) -> None:
        """An attempt was cut off: the unit goes on later, or its failure is written down."""
        name = attempt.unit.name
        self._left(name)
        self._carefully(lambda: self._record(attempt))
        if attempt.cause == "storage":
            self.pause(attempt.reason)
            self.queue.again(name)
            return
        self._tries[name, attempt.cause] += 1
        if self._may_go_on(attempt):
            self.queue.again(name)
            if not self.stop_requested:
                self.state.progress(f"{name}: {attempt.cause} ({attempt.reason}); it goes on from its checkpoint")
            return
        tries = self._tries[name, attempt.cause]
        times = f"its process was lost {tries} times" if attempt.cause == "process lost" else f"{attempt.cause}"
        failure = {"stuck": "stuck", "host memory": "out_of_memory"}.get(attempt.cause, "lost")
        self._fail(attempt.unit, failure, f"{times}; last: {attempt.reason}\n{attempt.log}".rstrip())

    def _may_go_on(self, attempt: Attempt) -> bool:
        tries = self._tries[attempt.unit.name, attempt.cause]
        if attempt.cause in ("node lost", "preempted"):
            return True
        if attempt.cause == "stuck":
            return tries <= STUCK_RETRIES
        if attempt.cause == "host memory":
            files, unit = self.state.files, attempt.unit
            place = files.stack(unit.name) if unit.kind == "stack" else files.run(unit.name).place
            return halve(list(unit.runs), place, attempt.reason)
        return tries <= self.state.spec.resources.max_failures

    def pause(self, reason: str) -> None:
        """The file system fails: nothing starts until it does not."""
        if self._paused_since is None:
            self._paused_since = self._clock()
            self.state.progress(
                f"{self.state.files}: {reason}; the sweep pauses and goes on by itself once there is room "
                f"(after {PATIENCE_SECONDS / 60:.0f} minutes it stops, and the same command goes on)"
            )
        self._look_again = self._clock() + PAUSE_SECONDS

    def _is_paused(self) -> bool:
        if self._paused_since is None:
            return False
        now = self._clock()
        if now < self._look_again:
            return True
        try:
            self.state.files.place.write(".room", bytes(1 << 20))
            self.state.files.place.remove(".room")
        except (OSError, ScalingRayError) as error:
            failure = storage_failure(error)
            if failure is None:
                raise
            if now - self._paused_since > PATIENCE_SECONDS:
                self.problem = StorageFailed(
                    "W021",
                    f"{self.state.files}: {failure.said}; what was trained is saved; make room and call again to go on",
                )
            self._look_again = now + PAUSE_SECONDS
            return True
        self.state.progress(f"{self.state.files}: there is room again; the sweep goes on")
        self._paused_since = None
        return False

    def tick(self, up: Mapping[str, float]) -> None:
        """To be called every second or so: limits of the budget, a line for what waits, the state for ``status``.

        ``up`` is what the cluster's nodes of the moment offer in all.
        """
        now = self._clock()
        self._carefully(lambda: self._spend(now))
        if now - self._said > SAY_SECONDS:
            self._said = now
            late = [name for name, since in self._admitted.items() if now - since > SAY_SECONDS]
            late = [name for name in late if self.queue.in_flight[name].began is None]
            if late:
                waits = "1 unit waits" if len(late) == 1 else f"{len(late)} units wait"
                self.state.progress(f"{waits} for room or nodes, first {late[0]} for {self._wants(late[0], up)}")
        if now - self._written > WRITE_SECONDS:
            self._written = now
            self._carefully(self.write)

    def _spend(self, now: float) -> None:
        over = self.budget.over(now)
        if over is not None and self.problem is None:
            left = len(self.state.waiting())
            self.problem = BudgetSpent(
                "W022",
                f"{self.state.files}: {over}; {left} of {len(self.state.runs)} runs to go, all saved; "
                "raise it and call again to go on",
            )
            self.state.files.request_stop()
            self._stopping = True

    def _wants(self, name: str, up: Mapping[str, float]) -> str:
        unit, wanted = self._units[name], []
        for kind, amount in unit.worker.items():
            there = up[kind] if kind in up else 0.0
            wanted.append(f"{unit.workers * amount:g} {kind}s (the nodes that are up have {there:g})")
        return " and ".join(wanted)

    def write(self) -> None:
        """Leave what waits and what is in flight for ``scaling-ray status``."""
        waiting = self.queue.waiting()
        first = dict(list(waiting.items())[:200])
        told = {
            "time_ms": time.time_ns() // 1_000_000,
            "waiting_units": len(waiting),
            "waiting": [{"unit": name, "for": what} for name, what in first.items()],
            "in_flight": [
                {"unit": name, "trains": flight.began is not None} for name, flight in self.queue.in_flight.items()
            ],
            "spent": self.budget.spent(self._clock()),
        }
        self.state.files.place.write(QUEUE, json.dumps(told, indent=1).encode())
        self.budget.write(self._clock())

    def _left(self, name: str) -> None:
        self._admitted.pop(name, None)
        self.budget.ended(name, self._clock())

    def _with_rates(self, name: str) -> Unit:
        """A unit with the rates of its runs as they are known by now."""
        by_id = self.state.by_id
        unit = Unit(tuple(by_id[run.run_id] for run in self._units[name].runs))
        self._units[name] = unit
        return unit

    def _prepare(self, unit: Unit) -> None:
        for run in unit.runs:
            self.state.files.run(run.run_id).prepare(run)

    def _obstacle(self, unit: Unit) -> str | None:
        """Why a unit cannot train, or None."""
        if any(run.lr is None for run in unit.runs):
            return "no learning rate could be chosen: a learning-rate run of this size has no result"
        return None

    def _drop_what_never_fits(self) -> None:
        """Units that the cluster could not place even empty fail; Ray would wait for ever, and say little."""
        waiting = self.queue.waiting() if self._homeless else {}
        for name in [name for name in self._homeless if waiting.get(name) == "room"]:
            self.queue.drop(name)
            self._fail(self._units[name], "bad_input", self._homeless.pop(name))

    def _fail(self, unit: Unit, failure: Any, message: str) -> None:
        def record() -> None:
            for run in unit.runs:
                files = self.state.files.run(run.run_id)
                if files.result() is None:
                    files.record_failure(run, failure, message)
                self.state.announce(run, 0.0)

        self._carefully(record)
        self._carefully(self.state.choose_rates)
        self.queue.ended(unit.name)

    def _record(self, attempt: Attempt) -> None:
        """A line of events.jsonl for each attempt that was cut off."""
        told = {
            "time_ms": time.time_ns() // 1_000_000,
            "unit": attempt.unit.name,
            "runs": [run.run_id for run in attempt.unit.runs],
            "cause": attempt.cause,
            "reason": attempt.reason,
            "log": attempt.log,
        }
        there = self.state.files.place.read_if_there(EVENTS) or b""
        self.state.files.place.write(EVENTS, there + (json.dumps(told) + "\n").encode())

    def _carefully(self, act: Callable[[], Any]) -> bool:
        """Do something that writes, and say whether it was done.

        A full disk pauses the sweep, an error of this package ends it. Ray Tune swallows what its callbacks raise, so
        errors wait in ``problem``.
        """
        try:
            act()
        except (ScalingRayError, OSError) as error:
            storage = storage_failure(error)
            if storage is not None:
                self.pause(storage.said)
            elif self.problem is None:
                if not isinstance(error, ScalingRayError):
                    raise
                self.problem = error
            return False
        return True


def bundles_of(unit: Unit, driver: Mapping[str, float]) -> tuple[tuple[tuple[str, float], ...], ...]:
    """What a unit holds: a share for each worker, and for a group what its driver holds."""
    shares = (bundle(unit.worker),) * unit.workers
    return (bundle(driver), *shares) if unit.kind == "group" and driver else shares


def never_fits(unit: Unit, capacity: Capacity) -> str | None:
    """Why a unit could never be placed on a cluster, or None."""
    if capacity.fits([unit.worker] * unit.workers):
        return None
    run: RunSpec = unit.runs[0]
    group = f"resources.workers.{run.size} = {unit.workers} with train.threads = {run.execution.cpus}"
    for kind, each in unit.worker.items():
        needed, there = unit.workers * each, capacity.total(kind)
        if there < needed:
            return (
                f"{group} needs {needed:g} {kind}s, the cluster can have {there:g}; "
                f"use fewer workers or threads, or more {kind}s"
            )
    share = " and ".join(f"{amount:g} {kind}s" for kind, amount in unit.worker.items())
    return f"{group} needs {share} on one node, and no kind of node has room; use fewer threads, or larger nodes"


def homeless(units: Sequence[Unit], capacity: Capacity) -> dict[str, str]:
    """The units that a cluster could never place, by name, and why; a shape is looked at once."""
    shapes: dict[tuple[Any, ...], str | None] = {}
    found = {}
    for unit in units:
        shape = (unit.runs[0].size, unit.workers, *unit.worker.items())
        if shape not in shapes:
            shapes[shape] = never_fits(unit, capacity)
        sentence = shapes[shape]
        if sentence is not None:
            found[unit.name] = sentence
    return found


def planned_seconds(plan: dict[str, Any] | None) -> dict[str, float]:
    """Seconds that each run is planned to train, by run id."""
    return {setting["run_id"]: 3600.0 * setting["hours"] for setting in plan["settings"]} if plan is not None else {}
