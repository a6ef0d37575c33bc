"""The scheduler carries out what the desk decides: every unit is a trial of one Ray Tune experiment.

Tune is a thin queue: it is asked for one trial at a time, of the shape that the unit has, and what a trial leaves is in
the sweep's own files. A worker group's trial holds next to nothing itself and starts Ray Train inside, which reserves
the group's shares (in Tune's own placement group they would be reserved twice, ray#47439).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from scaling_ray.cluster import DRIVERS, log_tail, nodes_up, ray  # before ray.tune: it sets what ray reads once
from scaling_ray.errors import LeaseHeld
from scaling_ray.pulses import Board, Sign
from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.desk import Attempt, Cause, Desk
from scaling_ray.sweep.state import SweepState
from scaling_ray.sweep.trial import Surroundings, scratch_of, train_unit
from scaling_ray.sweep.units import Unit
from scaling_ray.train.memory import killed_for_memory
from scaling_ray.train.watchdog import stall_note

HEAD = "node:__internal_head__"
"""What a worker group's driver holds a bit of where the cluster has no ``DRIVERS``."""

LOOK_SECONDS = 5.0
"""Time between two looks at signs of life and at the nodes that are up."""


class Scheduler:
    """Trains units and announces each run that ended.

    Args:
        state: the sweep's.
        splits: object references of the splits that all runs share, by name.
        own_bytes: of counts that each of the runs training at the same time may hold for itself.
        capacity: what the cluster can become.
    """

    def __init__(self, state: SweepState, splits: dict[str, Any], own_bytes: float, capacity: Capacity) -> None:
        self._state, self._capacity = state, capacity
        self._splits, self._own_bytes = splits, own_bytes
        self._board: Board | None = None
        self._trials: dict[str, Unit] = {}
        self._frozen: set[str] = set()
        self._ticked = self._looked = 0.0
        self._up: dict[str, float] = {}

    def train(self, units: Sequence[Unit]) -> None:
        """Train every unit to results or recorded failures, or until a stop is requested.

        Raises:
            BudgetSpent: the sweep has used what its spec allows; all is saved.
            StorageFailed: nothing could be written for too long.
        """
        from ray import tune

        if not units:
            return
        driver = {DRIVERS: 1.0} if self._capacity.total(DRIVERS) else {HEAD: 0.001}
        self._desk = Desk(self._state, units, self._capacity, driver if DRIVERS in driver else {})
        self._board = Board()
        surroundings = Surroundings(
            self._state.files,
            self._state.shards,
            self._state.manifest.to_json(),
            self._own_bytes,
            self._state.spec.resources.resident_gib * 2**30,
            self._board.handle,
        )
        trainable = tune.with_resources(
            tune.with_parameters(_trial, splits=self._splits, surroundings=surroundings),
            lambda config: tune.PlacementGroupFactory([config["holds"]]),
        )
        # A process that Tune keeps for the next trial holds CPUs that a group's workers would wait for in vain.
        reuse = not any(unit.kind == "group" for unit in units)
        with scratch_of(self._state.files, "tune") as storage, _quiet_tune(), _killed_actors_are_dead():
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(search_alg=_feed(self, driver), num_samples=-1, reuse_actors=reuse),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=storage,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=0),
                    callbacks=[_listener(self)],
                    stop=_stopper(self),
                ),
            ).fit()
        self._desk.write()
        if self._desk.problem is not None:
            raise self._desk.problem

    def next_trial(self, trial_id: str, driver: Mapping[str, float]) -> dict[str, Any] | None:
        """What the next trial is; None while none may start, {} where none will any more."""
        self.tick()
        unit = self._desk.next()
        if unit is None:
            return {} if self._desk.is_over else None
        self._trials[trial_id] = unit
        return {
            "unit": unit.name,
            "runs": [run.run_id for run in unit.runs],
            "holds": dict(driver) if unit.kind == "group" else unit.worker,
        }

    def completed(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial came to its own end."""
        unit = self._trials.pop(trial_id)
        outcome = result["outcome"] if "outcome" in result else "stopped"  # a trial that was ended before it began
        if outcome == "ended":
            self._desk.ended(unit.name, float(result["seconds"]))
        elif outcome == "stopped":
            self._desk.stopped(unit.name)
        elif outcome == "lease":
            self._desk.stopped(unit.name)
            self._desk.problem = self._desk.problem or LeaseHeld("W049", str(result["reason"]))
        else:
            self._desk.cut_off(Attempt(unit, cast(Cause, outcome), str(result["reason"])))

    def broke(self, trial_id: str, words: str) -> None:
        """The process of a trial went away."""
        unit = self._trials.pop(trial_id)
        assert self._board is not None
        sign = self._board.read().get(unit.name)
        self._board.forget(unit.name)
        self._desk.cut_off(self._attempt(unit, words, sign))

    def _attempt(self, unit: Unit, words: str, sign: Sign | None) -> Attempt:
        """Why an attempt was cut off, from what Ray says and from what the process left."""
        up = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        reason = _essence(words)
        cause: Cause = "process lost"
        if (sign is not None and sign.node not in up) or "node has died" in words or "node was terminated" in words:
            cause = "preempted" if "preempt" in words.lower() or "drain" in words.lower() else "node lost"
            return Attempt(unit, cause, reason)
        note = self._state.files.run(unit.runs[0].run_id).place.read_if_there(stall_note(0))
        if unit.name in self._frozen:
            self._frozen.discard(unit.name)
            return Attempt(unit, "stuck", "its process did not answer and was killed")
        if note is not None:
            return Attempt(unit, "stuck", note.decode().splitlines()[0], note.decode())
        if killed_for_memory(words):
            cause, reason = "host memory", "its node ran short of memory, and Ray killed it"
        log = log_tail(sign.node, sign.pid) if sign is not None else ""
        return Attempt(unit, cause, reason, log)

    def tick(self) -> None:
        """What is to be done once a second, whatever the trials do."""
        now = time.monotonic()
        if now - self._ticked < 1.0:
            return
        self._ticked = now
        if now - self._looked > LOOK_SECONDS and self._board is not None:
            self._looked = now
            self._up = nodes_up()
            signs = self._board.read()
            groups = {unit.name for unit in self._trials.values() if unit.kind == "group"}
            ranks = Counter(name.partition("/")[0] for name in signs if "/" in name)
            alone = {name for name in signs if "/" not in name} - groups
            for name in alone | ranks.keys():
                self._desk.began(name, ranks[name] or None)
            doomed = self._board.kill_silent(signs)
            self._frozen |= {name.partition("/")[0] for name in doomed}
            for name in doomed:
                self._state.progress(
                    f"{name}: its process has not answered for a minute; it is killed and goes on anew"
                )
        self._desk.tick(self._up)

    @property
    def ends_now(self) -> bool:
        """Whether the experiment is to end although trials are left: nothing trains that could still be saved."""
        if not self._desk.is_over:
            return False
        if self._desk.problem is not None and not self._desk.stop_requested:
            return True
        return not any(flight.began is not None for flight in self._desk.queue.in_flight.values())


def _essence(words: str) -> str:
    """The one line of a traceback of Ray's that says what happened."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line or "killed" in line or "Error" in line]
    said = (telling or lines or ["it went away"])[-1]
    said = said.partition(" Some common causes")[0]
    return (said.partition("Worker exit detail: ")[2] or said)[:300]


def _trial(config: dict[str, Any], splits: dict[str, Any], surroundings: Surroundings) -> dict[str, Any]:
    """The body of a trial; its answer is the trial's last result."""
    return train_unit(config["unit"], config["runs"], splits, surroundings)


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune keeps no tables of its own and says nothing: what became of a trial is said once, by the desk."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its own would end the experiment without a word to the runs
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # the gate decides what waits for room
        "TUNE_RESULT_BUFFER_LENGTH": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(settings)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _killed_actors_are_dead() -> Iterator[None]:
    """Let Tune take a trial that Ray killed for its node's memory for what it is: one whose actor died.

    Ray gives such an actor's task an OutOfMemoryError. Tune 2.60 foresees RayActorError and errors of the task's own
    there, and ends the whole experiment at any other.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager

    managers: Any = RayActorManager
    foreseen = managers._actor_task_failed

    def failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, ray.exceptions.OutOfMemoryError):
            exception = ray.exceptions.RayActorError(error_msg=f"OutOfMemoryError: {exception}")
        foreseen(manager, tracked_actor_task, exception)

    managers._actor_task_failed = failed
    try:
        yield
    finally:
        managers._actor_task_failed = foreseen


def _feed(scheduler: Scheduler, driver: Mapping[str, float]) -> Any:
    """What Tune asks for trials."""
    from ray.tune.search import Searcher

    class Feed(Searcher):
        def suggest(self, trial_id: str) -> Any:
            found = scheduler.next_trial(trial_id, driver)
            return Searcher.FINISHED if found == {} else found

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

        def __getstate__(self) -> dict[str, Any]:
            # Tune writes its searcher down; nothing here is ever read back
            return {}

    return Feed()


def _listener(scheduler: Scheduler) -> Any:
    from ray import tune

    class Listen(tune.Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            scheduler.tick()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            scheduler.completed(trial.trial_id, trial.last_result or {})

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            with open(trial.error_file, encoding="utf-8") as file:
                scheduler.broke(trial.trial_id, file.read())

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Listen()


def _stopper(scheduler: Scheduler) -> Any:
    from ray import tune

    class Stop(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return scheduler.ends_now

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Stop()
