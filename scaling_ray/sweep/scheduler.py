"""The scheduler trains units on a cluster: runs and stacks as trials of Ray Tune, worker groups with Ray Train.

A unit's work leaves its results and failures in the sweep's own files; the scheduler keeps no state of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from scaling_ray.cluster import ray  # before ray.tune: it sets what ray reads once
from scaling_ray.errors import LeaseHeld, Preempted, ScalingRayError
from scaling_ray.records import ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Feed
from scaling_ray.shards.stream import open_feed
from scaling_ray.storage import PARTIAL_PREFIX, Place
from scaling_ray.sweep.failures import guarded, within_memory
from scaling_ray.sweep.state import SweepState
from scaling_ray.sweep.trial import Trial
from scaling_ray.sweep.units import Unit
from scaling_ray.tracking.ledger import local_folder
from scaling_ray.train.attempt import publish_winner
from scaling_ray.train.driver import Signals

STOP_POLL_SECONDS = {True: 1.0, False: 5.0}
"""Time between two checks for a stop request; True for a sweep on a disk, False for one on S3."""


class Scheduler:
    """Trains units and announces each run that ended.

    Args:
        state: the sweep's.
        splits: object references of the splits that all runs share, by name.
        own_bytes: of counts that each of the runs training at the same time may hold for itself.
    """

    def __init__(self, state: SweepState, splits: dict[str, Any], own_bytes: float) -> None:
        self._state, self._splits, self._own_bytes = state, splits, own_bytes

    def train(self, units: Sequence[Unit]) -> None:
        """Train every unit to results or recorded failures, or until a stop is requested."""
        ready = [unit for unit in units if self._is_ready(unit)]
        for unit in ready:
            for run in unit.runs:
                self._state.files.run(run.run_id).prepare(run)
        trials = [unit for unit in ready if unit.kind != "group"]
        if trials:
            self._tune(trials)
        for unit in ready:
            if unit.kind == "group" and not self._state.files.stop_requested():
                self._worker_group(unit.runs[0])

    def _is_ready(self, unit: Unit) -> bool:
        """Whether a unit can start; where it cannot, a failure is recorded for each of its runs."""
        obstacle = _obstacle(unit)
        for run in unit.runs if obstacle else ():
            self._state.files.run(run.run_id).record_failure(run, "bad_input", obstacle or "")
            self._state.announce(run, 0.0)
        return obstacle is None

    def _tune(self, units: list[Unit]) -> None:
        from ray import tune

        state = self._state
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                splits=self._splits,
                sweep=state.files,
                shards=state.shards,
                manifest=state.manifest.to_json(),
                own_bytes=self._own_bytes,
            ),
            lambda config: tune.PlacementGroupFactory([config["unit"]["request"]]),
        )
        configs = [
            {
                "request": {"CPU": unit.request.cpus} | ({"GPU": unit.request.gpus} if unit.request.gpus else {}),
                "runs": [run.model_dump_json() for run in unit.runs],
            }
            for unit in units
        ]
        ended = Ended(state)
        with scratch_of(state.files, "tune") as storage:
            tune.Tuner(
                trainable,
                param_space={"unit": tune.grid_search(configs)},
                tune_config=tune.TuneConfig(reuse_actors=True),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=storage,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=state.spec.resources.max_failures),
                    callbacks=[_announcing(ended)],
                    stop=_stopping(ended),
                ),
            ).fit()
        ended.raise_problem()
        if state.files.stop_requested():
            return
        for run in state.waiting([run for unit in units for run in unit.runs]):
            if state.row(run).status != "failed":
                attempts = 1 + state.spec.resources.max_failures
                message = f"its worker process died {attempts} times"
                state.files.run(run.run_id).record_failure(run, "lost", message)
                state.ended(run)

    def _worker_group(self, run: RunSpec) -> None:
        from scaling_ray.train.worker import train_in_worker_group

        state, began = self._state, time.monotonic()
        resident_bytes = state.spec.resources.resident_gib * 2**30
        with scratch_of(state.files, "workers") as storage:

            def fit(fitting: list[RunSpec]) -> None:
                train_in_worker_group(fitting[0], state.shards, state.files, storage, resident_bytes)

            def work() -> None:
                within_memory([run], state.files.run(run.run_id).place, fit)

            guarded(state.files, [run], work)
        publish_winner(state.files.run(run.run_id))
        state.announce(run, time.monotonic() - began)


def _obstacle(unit: Unit) -> str | None:
    """Why a unit cannot train, or None."""
    if any(run.lr is None for run in unit.runs):
        return "no learning rate could be chosen: a learning-rate run of this size has no result"
    from scaling_ray.train.worker import preflight

    return next((found for run in unit.runs if (found := preflight(run, ray.cluster_resources()))), None)


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


def _trial(
    config: dict[str, Any],
    splits: dict[str, Any],
    sweep: SweepFiles,
    shards: Place,
    manifest: str,
    own_bytes: float,
) -> None:
    """The body of a Tune trial: train one run, or one stack, to committed results or recorded failures."""
    from ray import tune

    began = time.monotonic()
    runs = [RunSpec.model_validate_json(text) for text in config["unit"]["runs"]]
    if not sweep.stop_requested():
        record = ShardManifest.parse(manifest, "the shards' manifest")
        held = {name: ray.get(reference).narrowed(runs[0].genes) for name, reference in splits.items()}

        def feed(run: RunSpec) -> Feed:
            return open_feed(shards, record, run, own_bytes / len(runs), cpus=0.0)

        signals = Signals(sweep.stop_requested, ask_seconds=STOP_POLL_SECONDS[local_folder(sweep.place) is not None])
        # Where the lease was lost, another driver goes on with these runs.
        with contextlib.suppress(Preempted, LeaseHeld):
            Trial(sweep, shards, record, held, feed, signals).train(runs)
    tune.report({"seconds": time.monotonic() - began})


class Ended:
    """Announces runs that ended. Ray Tune swallows what its callbacks raise: the first error waits here."""

    def __init__(self, state: SweepState) -> None:
        self._state = state
        self.problem: ScalingRayError | None = None

    def announce(self, runs: Sequence[RunSpec], seconds: float) -> None:
        """Say so of each; nothing more once something went wrong: a lost lease, a disk that is full."""
        try:
            for run in runs if self.problem is None else ():
                self._state.announce(run, seconds)
        except ScalingRayError as error:
            self.problem = error

    def raise_problem(self) -> None:
        """Let the error that waits rise."""
        if self.problem is not None:
            raise self.problem


def _announcing(ended: Ended) -> Any:
    from ray import tune

    class Announce(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            runs = [RunSpec.model_validate_json(text) for text in trial.config["unit"]["runs"]]
            ended.announce(runs, float((trial.last_result or {"seconds": 0.0})["seconds"]))

    return Announce()


def _stopping(ended: Ended) -> Any:
    """Ends the experiment once an announcement failed: whatever still trains could not be told of either."""
    from ray import tune

    class Stop(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return ended.problem is not None

    return Stop()
