"""One run in a Ray Train worker group: the loop of ``train.loop`` on several processes, with DDP or DeepSpeed.

Every worker reads the shards itself, or streams them, and takes its slice of the global plan, so nothing is fed to the
group and no rank waits for another's rows. Progress is in the run's own files; Ray keeps no checkpoints of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from scaling_ray.cluster import ray  # isort: skip  (first: it sets what ray reads once)
from ray.train import LoggingConfig, ScalingConfig, WorkerGroupError, get_context, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import RayTrainError

from scaling_ray.errors import Lost, Preempted, ScalingRayError, Stalled
from scaling_ray.pulses import Pulse
from scaling_ray.results.sweep_files import RunFiles, SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import read_manifest
from scaling_ray.shards.read import read_split
from scaling_ray.shards.stream import open_feed
from scaling_ray.storage import Place
from scaling_ray.train.choice import build_engine
from scaling_ray.train.driver import Signals
from scaling_ray.train.elastic import LOOK_SECONDS, PATIENCE_SECONDS, Growth, shares_of, workers_to_start
from scaling_ray.train.loop import RunData, run_to_result
from scaling_ray.train.memory import is_out_of_memory
from scaling_ray.train.sampling import sampled
from scaling_ray.train.watchdog import STALL_SECONDS, Watchdog, stall_note

_TRANSPORT = ("gloo/transport", "closed by peer", "reset by peer", "Broken pipe", "NCCL")
"""Words of the errors that ranks raise when another one is gone."""

NODE_DEATH_SECONDS = 30.0
"""How long after a group broke Ray may take to say that a node is gone (it asks nodes every few seconds)."""

PREEMPTION_FAILURES = 20
"""Number of drained nodes that a run survives within one call; each time it resumes from its last checkpoint."""


def train_in_worker_group(
    run: RunSpec,
    shards: Place,
    sweep: SweepFiles,
    storage_path: str,
    resident_bytes: float,
    stall_seconds: float = STALL_SECONDS,
    board: Any = None,
) -> None:
    """Train ``run`` on workers of the connected cluster, until its files in ``sweep`` hold its result.

    ``shards`` and ``sweep`` must be the same places on every node. Ray writes below ``storage_path`` only, a directory
    or a URI. A worker holds training cells of up to its part of ``resident_bytes`` and streams more. At a notice that a
    node is about to go, the state is saved and training goes on: Ray starts the group again elsewhere once the node has
    gone. Where nodes are missing the group waits for them, without end. ``board`` is told of each rank's life.

    A run of ``least_workers`` starts on the most workers that there is room for, and once there is room for more it is
    saved and goes on with them.

    Raises:
        Preempted: a stop was requested of the sweep; the state has been saved.
        Stalled: a rank did nothing for ``stall_seconds``; the group has been ended.
        Lost: a process died without an error of its own, alone or with its node.
        Exception: a worker's own error (BadInput, Diverged, a bug's class), at once and without another attempt.
    """
    if not ray.is_initialized():
        raise RuntimeError("no connection to Ray; call this within cluster.ray_session")
    patience = PATIENCE_SECONDS
    while True:
        count = workers_to_start(run, patience)
        config = {
            "run": run.carried_out(workers=count).model_dump_json(serialize_as_any=True),
            "missing": min((more - count for more in run.worker_counts if more > count), default=0),
            "shards": shards,
            "resident_bytes": resident_bytes / count,
            "sweep": sweep.place,
            "stall_seconds": stall_seconds,
            "board": board,
        }
        try:
            return _fit(run.carried_out(workers=count), config, sweep, storage_path)
        except Preempted:
            if sweep.stop_requested() or not run.execution.least_workers:
                raise
            patience = LOOK_SECONDS  # it ended since there was room for more workers


def _fit(run: RunSpec, config: dict[str, Any], sweep: SweepFiles, storage_path: str) -> None:
    """Train with as many workers as ``run`` names, each of which is told ``config``."""
    execution, files = run.execution, sweep.run(run.run_id)
    threads, use_gpu = str(execution.cpus), execution.gpus > 0
    trainer = TorchTrainer(
        _work,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=execution.workers,
            use_gpu=use_gpu,
            resources_per_worker=shares_of(run),
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # RunConfig of V1 is what the signature still names
            name=run.run_id,
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=-1,  # Ray counts a minute without nodes as a failure
                max_preemption_failures=PREEMPTION_FAILURES,
            ),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    for rank in range(execution.workers):
        files.place.remove(stall_note(rank))
    nodes = _nodes(alive=True)
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise _first_cause(error.worker_failures) or _stalled(run, files) or _lost(error, nodes) from error


def _nodes(alive: bool) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] == alive}


def _lost(error: WorkerGroupError, nodes: set[str]) -> Lost:
    """A group broke and no rank says why: with one of ``nodes``, or a process alone."""
    died = next((f for f in error.worker_failures.values() if isinstance(f, ray.exceptions.RayActorError)), None)
    deadline = time.monotonic() + NODE_DEATH_SECONDS
    while not (gone := nodes & _nodes(alive=False)) and time.monotonic() < deadline:
        if died is not None and "node has died" not in str(died) and "node_ip" in str(died):
            break  # the node itself told of the death
        time.sleep(1.0)
    if gone:
        return Lost("M047", f"node {min(gone)[:8]} is gone", node_gone=True)
    return Lost("M048", "a process of the group died, and it alone", node_gone=False)


def _stalled(run: RunSpec, files: RunFiles) -> Stalled | None:
    """The failure that the watchdogs of a group noted; None where none ended its process."""
    notes = [(rank, files.place.read_if_there(stall_note(rank))) for rank in range(run.execution.workers)]
    left = [f"rank {rank}: {note.decode()}" for rank, note in notes if note is not None]
    return Stalled("M049", f"{run.run_id}: the worker group stood still\n" + "\n".join(left)) if left else None


def _first_cause(failures: Mapping[int, Exception]) -> Exception | None:
    """The failure that brought the group down; None where a worker died without raising one.

    Where one rank fails, the others see their connections break: those are consequences.
    """
    ranked = [failures[rank] for rank in sorted(failures)]
    for failure in ranked:
        if isinstance(failure, ScalingRayError) or is_out_of_memory(failure):
            return failure
    consequences = (ray.exceptions.RayError, RayTrainError, torch.distributed.DistError)
    causes = [f for f in ranked if not isinstance(f, consequences)]
    causes = [f for f in causes if not any(word in str(f) for word in _TRANSPORT)]
    return causes[0] if causes else None


def _work(config: dict[str, Any]) -> None:
    """The body of one worker: open the data, build the engine, train."""
    run = RunSpec.model_validate_json(config["run"])
    torch.set_num_threads(run.execution.cpus)
    context = get_context()
    shards, sweep = config["shards"], SweepFiles(config["sweep"])
    files = sweep.run(run.run_id)
    manifest = read_manifest(shards)
    train = open_feed(shards, manifest, run, config["resident_bytes"], cpus=0.0)
    val, test = (read_split(shards, manifest, name, run.genes) for name in ("val", "test"))
    engine = build_engine(run, get_device(), context.get_world_rank(), context.get_world_size())
    data, note = RunData(train, val, test, manifest.data_hash), stall_note(context.get_world_rank())
    name = f"{run.run_id}/{context.get_world_rank()}"
    watchdog = Watchdog(config["stall_seconds"], lambda text: files.place.write(note, text.encode()))
    growth = Growth(run, config["missing"] if context.get_world_rank() == 0 else 0)
    with Pulse(config["board"], name), watchdog, sampled() as sampler, growth:
        ends = lambda: sweep.stop_requested() or growth.came  # noqa: E731
        signals = Signals(ends, _once_per_notice(), beat=watchdog.beat, sample=sampler.row)
        run_to_result(run, data, engine, files, signals)


def _once_per_notice() -> Callable[[], bool]:
    """A function that is true at the first call after a notice that this group is about to lose a node.

    Every rank asks at the same update: in Ray 2.60 the question is a broadcast from rank 0 that all ranks wait for.
    """
    told: list[object] = []

    def notice() -> bool:
        found = get_preemption_info()
        if found is None or found in told:
            return False
        told.append(found)
        return True

    return notice
