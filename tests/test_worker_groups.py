"""Worker groups on a real Ray, disturbed: ranks that lag, a stop at any moment, a rank that fails, one that freezes."""

from __future__ import annotations

import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import rows_at, small_run, synthetic_cells, write_cells_as_shards
from safetensors import SafetensorError

from scaling_ray.errors import BadInput, Preempted, Stalled
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import SPLITS
from scaling_ray.storage import open_place
from scaling_ray.train.attempt import Attempt

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LEAST_SECONDS, LEAST_UPDATES = 60.0, 2_000
ENDLESS = "max_cells_seen = 8000000\ncells_per_step = 8\nmicro_batch = 2\nevaluations = 10000\ncurve_cells = 16"


def group(engine: str, stage: int, ranks: int) -> RunSpec:
    """A run of a million updates."""
    run = small_run(ENDLESS + "\ncheckpoint_seconds = 0.5\npatience_evaluations = 0", genes=32)
    return run.carried_out(workers=ranks, engine=engine, zero_stage=stage)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("group") / "shards"
    cells = {name: synthetic_cells(200, genes=32, first_id=10_000 * i) for i, name in enumerate(SPLITS)}
    write_cells_as_shards(directory, cells)
    return directory


@pytest.fixture(scope="module")
def four_cpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray that counts four CPUs, whatever this machine has."""
    from scaling_ray.cluster import ray, ray_session

    if ray.is_initialized():  # the Ray that other tests share counts two; whoever comes later starts another
        ray.shutdown()
    with ray_session(4, at_least=True):
        yield


def workers() -> list[psutil.Process]:
    """The processes of the worker group that trains now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def updates(directory: Path) -> int:
    """The newest update that a row of the run speaks of."""
    rows = [row for path in directory.glob("runs/*/attempts/*/metrics.jsonl") for row in rows_at(path.parent)]
    return max((row["optimizer_steps"] for row in rows), default=0)


def train(run: RunSpec, shards: Path, tmp_path: Path, stall_seconds: float = 60.0) -> None:
    from scaling_ray.train.worker import train_in_worker_group

    sweep = SweepFiles.at(tmp_path)
    train_in_worker_group(run, open_place(shards), sweep, str(tmp_path / "ray"), 2**30, stall_seconds=stall_seconds)


class Disturbance(threading.Thread):
    """Does something to a group once it trains; what goes wrong in it fails the test."""

    def __init__(self, directory: Path, ranks: int, act: Callable[[list[psutil.Process]], None]) -> None:
        super().__init__(daemon=True)
        self._directory, self._ranks, self._act, self.problem = directory, ranks, act, ""

    def run(self) -> None:
        deadline = time.monotonic() + 180
        while updates(self._directory) < 50 or len(workers()) != self._ranks:
            if time.monotonic() > deadline:
                self.problem = f"{len(workers())} workers, {updates(self._directory)} updates"
                return
            time.sleep(0.2)
        self._act(workers())


ENGINES = [("ddp", 0), *(("deepspeed", stage) for stage in range(4))]
GROUPS = [(engine, stage, ranks) for ranks in (2, 4) for engine, stage in ENGINES]


@pytest.mark.parametrize(("engine", "stage", "ranks"), GROUPS)
def test_ranks_that_lag_at_random_hang_nothing_and_a_stop_is_heard(
    four_cpus: None, shards: Path, tmp_path: Path, engine: str, stage: int, ranks: int
) -> None:
    rng = random.Random(f"{engine} {stage} {ranks}")
    reached: list[int] = []

    def lag(processes: list[psutil.Process]) -> None:
        began = time.monotonic()
        while time.monotonic() - began < LEAST_SECONDS or updates(tmp_path) < LEAST_UPDATES:
            one = rng.choice(processes)
            one.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.1, 2.0))
            one.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0.5, 3.0))
        reached.append(updates(tmp_path))
        time.sleep(rng.uniform(0.0, 2.0))
        SweepFiles.at(tmp_path).request_stop()

    disturbance = Disturbance(tmp_path, ranks, lag)
    disturbance.start()
    run = group(engine, stage, ranks)
    with pytest.raises(Preempted, match="saved at update"):
        train(run, shards, tmp_path)
    disturbance.join(60)
    assert not disturbance.problem and reached and reached[0] >= LEAST_UPDATES
    found = Attempt(SweepFiles.at(tmp_path).run(run.run_id), run).find()
    assert found is not None and found[0].optimizer_steps >= reached[0]


@pytest.mark.parametrize(("engine", "stage", "rank"), [("ddp", 0, None), ("deepspeed", 1, 0), ("deepspeed", 1, 1)])
def test_a_rank_that_fails_ends_the_group_with_its_own_error(
    four_cpus: None, shards: Path, tmp_path: Path, engine: str, stage: int, rank: int | None
) -> None:
    def forbid_writing(processes: list[psutil.Process]) -> None:
        for index, process in enumerate(processes):
            if rank in (None, index):
                process.rlimit(resource.RLIMIT_FSIZE, (0, 0))

    disturbance = Disturbance(tmp_path, 2, forbid_writing)
    disturbance.start()
    with pytest.raises((OSError, SafetensorError, BadInput), match="File too large"):
        train(group(engine, stage, 2), shards, tmp_path)
    disturbance.join(60)
    assert not disturbance.problem


@pytest.mark.parametrize(("engine", "stage"), [("ddp", 0), ("deepspeed", 3)])
def test_a_frozen_rank_is_a_failure_that_says_so(
    four_cpus: None, shards: Path, tmp_path: Path, engine: str, stage: int
) -> None:
    disturbance = Disturbance(tmp_path, 2, lambda processes: processes[0].send_signal(signal.SIGSTOP))
    disturbance.start()
    with pytest.raises(Stalled, match=r"stood still\nrank [01]: no progress for 10 s after \d+ beats"):
        train(group(engine, stage, 2), shards, tmp_path, stall_seconds=10.0)
    disturbance.join(60)
    assert not disturbance.problem
