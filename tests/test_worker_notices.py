"""``scaling-ray node-watch`` on a real Ray of several nodes: a notice drains one, and what trains there goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import free_port, rows_at, small_run, synthetic_cells, write_cells_as_shards
from metadata_server import INSTANCE_ACTION, FakeMetadata, metadata_of

from scaling_ray.errors import Preempted
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.shards.format import SPLITS
from scaling_ray.storage import open_place

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ENDLESS = """max_cells_seen = 8000000
cells_per_step = 8
micro_batch = 2
evaluations = 10000
curve_cells = 16
patience_evaluations = 0
checkpoint_seconds = 3600"""
"""A run of a million updates that saves its state for a notice or a stop only."""


class Watcher:
    """A running ``scaling-ray node-watch`` and its lines."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "scaling_ray.cli", "node-watch", "--every", "0.2", *arguments]
        self.process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip())

    def saying(self, text: str) -> list[str]:
        return [line for line in list(self.lines) if text in line]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self._reader.join(20)


@contextmanager
def watching(*arguments: str, **environment: str) -> Iterator[Watcher]:
    watcher = Watcher(list(arguments), environment)
    try:
        yield watcher
    finally:
        watcher.end()


def until(there: Callable[[], Any], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def once(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scaling_ray.cli", "node-watch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def take_back(server: FakeMetadata, seconds: float) -> datetime:
    """The cloud gives notice; returns the time it names."""
    at = (datetime.now(UTC) + timedelta(seconds=seconds)).replace(microsecond=0)
    server.items[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    return at


@pytest.fixture
def aws() -> Iterator[FakeMetadata]:
    with metadata_of("aws") as server:
        yield server


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head has no CPU; RAY_ADDRESS names it, and token mode is on."""
    from scaling_ray.cluster import ray

    if ray.is_initialized():  # the Ray that other tests share; whoever comes later starts another
        ray.shutdown()
    from ray.cluster_utils import Cluster

    assert os.environ["RAY_AUTH_MODE"] == "token"
    made = Cluster(initialize_head=True, head_node_args=node(cpus=0))
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def node(cpus: int) -> dict[str, Any]:
    return {"num_cpus": cpus, "object_store_memory": 100 << 20, "include_dashboard": False}


def train_workers(node: Any) -> list[psutil.Process]:
    """The processes of a worker group on a node: children of its raylet."""
    (raylet,) = node.all_processes["raylet"]
    there = psutil.Process(raylet.process.pid).children()
    return [process for process in there if "RayTrainWorker" in " ".join(process.cmdline())]


@contextmanager
def a_task_that_never_ends() -> Iterator[None]:
    """Work on the one node that has a CPU: without any, a drained node leaves at once."""
    from scaling_ray.cluster import Pending, ray

    def sleep() -> None:  # pickled by value: workers cannot import this file
        time.sleep(600)

    ray.init(address="auto", log_to_driver=False)
    try:
        Pending().start(sleep)
        until(lambda: "CPU" not in ray.available_resources(), "the task has not started")
        yield
    finally:
        ray.shutdown()


def test_a_notice_drains_this_node_once(cluster: Any, aws: FakeMetadata) -> None:
    from scaling_ray.cluster import draining_nodes

    head, worker = cluster.head_node.node_id, cluster.add_node(**node(cpus=1)).node_id
    several = once("--metadata-url", aws.url, "--once")
    assert several.returncode == 2 and head in several.stderr and worker in several.stderr
    assert "--node-id" in several.stderr and len(several.stderr.splitlines()) == 1
    with (
        a_task_that_never_ends(),
        watching("--metadata-url", aws.url, "--node-id", worker) as watcher,
        watching("--metadata-url", aws.url, "--node-id", worker, RAY_AUTH_TOKEN="f" * 64) as stranger,
    ):
        until(lambda: watcher.saying(f"for node {worker}"), "the watcher has not found its node")
        assert draining_nodes() == {}
        at = take_back(aws, 120)
        until(draining_nodes, "no node drains")
        assert draining_nodes() == {worker: int(at.timestamp() * 1000)}, "Ray knows when the node goes"
        answered = aws.answered
        until(lambda: aws.answered > answered + 20, "the watcher has stopped asking")
        assert len(watcher.saying("notice of aws")) == len(watcher.saying("drains")) == 1
        again = once("--metadata-url", aws.url, "--node-id", worker, "--once")
        assert again.returncode == 0 and f"node {worker} drains already" in again.stderr
        until(lambda: stranger.saying("token"), "a wrong token is not said")
        assert len(stranger.saying("token")) == 1 and not stranger.saying("drains")


def test_the_node_of_this_machine_is_found_and_leaves_when_told(cluster: Any, aws: FakeMetadata) -> None:
    from scaling_ray.cluster import node_is_alive

    head = cluster.head_node.node_id
    looked = once("--metadata-url", aws.url, "--once")
    assert looked.returncode == 0 and f"for node {head}" in looked.stderr and "no notice" in looked.stderr
    worker = cluster.add_node(**node(cpus=1))
    with a_task_that_never_ends():
        busy = once("--drain-now", "--deadline", "6", "--node-id", worker.node_id)
    assert busy.returncode == 0 and "still has work after 6 s" in busy.stderr
    until(lambda: not node_is_alive(worker.node_id), "a drained node without work stays")
    idle = cluster.add_node(**node(cpus=1)).node_id
    began = time.monotonic()
    left = once("--drain-now", "--deadline", "100", "--node-id", idle)
    assert left.returncode == 0 and f"node {idle} has left" in left.stderr and not node_is_alive(idle)
    assert time.monotonic() - began < 90, "it waits for the node and not for the deadline"
    gone = once("--drain-now", "--node-id", idle)
    assert gone.returncode == 1 and f"no living node {idle}" in gone.stderr


def test_what_fails_is_said_once_and_tried_again(aws: FakeMetadata) -> None:
    port = free_port()
    with watching("--metadata-url", aws.url, RAY_ADDRESS=f"127.0.0.1:{port}") as watcher:
        until(lambda: watcher.saying("Ray is not up here"), "that Ray is not up is not said")
        aws.broken = True
        until(lambda: watcher.saying("answers 503; trying again"), "that the metadata fails is not said")
        answered = aws.answered
        until(lambda: aws.answered >= answered + 3, "the watcher has given up")
        aws.broken = False
        until(lambda: watcher.saying("answers again"), "that the metadata answers again is not said")
        take_back(aws, 120)
        until(lambda: watcher.saying("notice of aws"), "the notice is not heard")
        assert watcher.process.poll() is None
    assert len(watcher.lines) == 4, watcher.lines


def test_a_group_saves_at_the_notice_and_goes_on_on_another_node(
    cluster: Any, aws: FakeMetadata, tmp_path: Path
) -> None:
    from scaling_ray.cluster import draining_nodes, ray_session
    from scaling_ray.train.worker import train_in_worker_group

    cells = {name: synthetic_cells(200, genes=32, first_id=10_000 * i) for i, name in enumerate(SPLITS)}
    write_cells_as_shards(tmp_path / "shards", cells)
    run = small_run(ENDLESS, genes=32).carried_out(workers=2, engine="ddp", zero_stage=0)
    sweep, nodes = SweepFiles.at(tmp_path / "sweep"), [cluster.add_node(**node(cpus=2)) for _ in range(2)]
    attempts = tmp_path / "sweep" / "runs" / run.run_id / "attempts"
    problems: list[str] = []
    taken: list[tuple[int, float]] = []
    """(the update that the notice made it save, when the node went, in milliseconds since 1970)"""

    def rows() -> list[dict[str, Any]]:
        """Of the newest attempt; one that goes on begins with the rows of the one before, up to its state."""
        there = sorted(attempts.iterdir()) if attempts.is_dir() else []
        return rows_at(there[-1]) if there else []

    def saved() -> list[int]:
        """Updates that a state to go on from was saved at."""
        return sorted(
            int(path.parent.name.split("-")[1]) for path in attempts.glob("*/checkpoints/last-*/progress.json")
        )

    def gone_on() -> bool:
        return any(row["timestamp_ms"] > taken[0][1] and row["optimizer_steps"] > taken[0][0] + 50 for row in rows())

    def disturb() -> None:
        try:
            until(lambda: any(row["optimizer_steps"] > 50 for row in rows()), "nothing trains", 180)
            (doomed,) = [each for each in nodes if train_workers(each)]
            (other,) = [each for each in nodes if each is not doomed]
            with watching("--metadata-url", aws.url, "--node-id", doomed.node_id) as watcher:
                until(lambda: watcher.saying("for node"), "the watcher has not found its node")
                assert not saved(), "the run has saved before the notice"
                take_back(aws, 60)
                until(lambda: doomed.node_id in draining_nodes(), "the node does not drain")
                until(saved, "the run does not save")
            cluster.remove_node(doomed, allow_graceful=False)
            taken.append((saved()[0], 1000 * time.time()))
            until(gone_on, "it does not go on", 180)
            assert len(train_workers(other)) == 2
        except AssertionError as error:
            problems.append(str(error))
        finally:
            sweep.request_stop()

    disturbance = threading.Thread(target=disturb)
    disturbance.start()
    with ray_session(2), pytest.raises(Preempted, match="saved at update"):
        train_in_worker_group(run, open_place(tmp_path / "shards"), sweep, str(tmp_path / "ray"), 2**30)
    disturbance.join(60)
    assert not problems and taken
    update, at_ms = taken[0]
    before = [row["optimizer_steps"] for row in rows() if row["timestamp_ms"] < at_ms]
    assert before and update - before[0] < max(before) <= update, (
        "it goes on from the state that the notice made it save"
    )
