"""A sweep on a cluster of several nodes: groups beside single runs, and what befalls them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fake_cluster import KINDS, FakeCluster, write_spec  # noqa: E402

from scaling_ray.results.read import read_rows  # noqa: E402
from scaling_ray.storage import open_place  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def wait_for(what: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def in_flight(out: Path) -> list[str]:
    """Units that train by now, as the sweep itself says."""
    try:
        found = json.loads((out / "queue.json").read_text())
    except (OSError, ValueError):
        return []
    return [one["unit"] for one in found["in_flight"] if one["trains"]]


def losses(out: Path) -> dict[str, tuple[float | None, float | None]]:
    return {row.run_id: (row.val_loss, row.test_loss) for row in read_rows(open_place(out))}


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended_well(process: subprocess.Popen[str], seconds: float = 420.0) -> str:
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == 0, said[-3000:]
    return said


def undisturbed(directory: Path, shards: Path) -> dict[str, tuple[float | None, float | None]]:
    spec, out = write_spec(directory / "spec.toml", singles=4, groups=4, cells_seen=30_000), directory / "out"
    with FakeCluster(3) as cluster:
        ended_well(cluster.sweep(spec, shards, out), 900)
    return losses(out)


def test_kills_of_every_kind_leave_the_same_losses(tiny_shards: Path, tmp_path: Path) -> None:
    """Three of each kind at random moments; after each of the driver's the same command."""
    expected, rng = undisturbed(tmp_path, tiny_shards), random.Random(1)
    (tmp_path / "chaos").mkdir()
    spec, out = write_spec(tmp_path / "chaos" / "spec.toml", 4, 4, cells_seen=30_000), tmp_path / "chaos" / "out"
    left = list(KINDS * 3)
    with FakeCluster(3) as cluster:
        sweep, deadline = cluster.sweep(spec, tiny_shards, out, said=tmp_path / "said"), time.monotonic() + 1_200
        while True:
            assert time.monotonic() < deadline, left
            pause = time.monotonic() + rng.uniform(8, 25)
            while time.monotonic() < pause and sweep.poll() is None:
                time.sleep(0.3)
            if sweep.poll() is not None:
                if sweep.returncode == 0:
                    break
                sweep = cluster.sweep(spec, tiny_shards, out, said=tmp_path / "said")
            elif left and cluster.strike(left[0], sweep, rng):
                left.pop(0)
    assert len(left) <= 2, "the sweep ended before it was disturbed"
    assert losses(out) == expected
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert {one["cause"] for one in events(out)} <= {"process lost", "node lost"}
    assert {row.status for row in read_rows(open_place(out))} == {"done"}


def test_groups_train_at_once_beside_single_runs(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=4, groups=3, cells_seen=24_000), tmp_path / "out"
    with FakeCluster(4) as cluster:
        process = cluster.sweep(spec, tiny_shards, out)
        most, deadline = 0, time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            most = max(most, sum("TWO" in unit for unit in in_flight(out)))
            time.sleep(0.5)
        said = ended_well(process, 60)
    rows = read_rows(open_place(out))
    assert {row.status for row in rows} == {"done"}
    assert {row.workers for row in rows if row.size == "TWO"} == {2}
    assert most >= 3, said


def test_a_node_that_is_lost_under_a_group_costs_an_attempt_and_nothing_else(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=1, groups=2, cells_seen=40_000), tmp_path / "out"
    with FakeCluster(3) as cluster:
        process = cluster.sweep(spec, tiny_shards, out)
        wait_for(lambda: sum("TWO" in unit for unit in in_flight(out)) == 2 and bool(cluster.workers("RayTrainWorker")))
        time.sleep(5)
        raylets = [node["raylet"] for node in cluster.nodes]
        hosts = {worker.ppid() for worker in cluster.workers("RayTrainWorker")} & set(raylets)
        os.kill(min(hosts), signal.SIGKILL)
        cluster.add()
        said = ended_well(process)
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    assert "Traceback" not in said
    assert [one["cause"] for one in events(out)].count("node lost") >= 1
    assert not {one["cause"] for one in events(out)} & {"bug"}


def test_a_group_trains_on_what_there_is(tiny_shards: Path, tmp_path: Path) -> None:
    """One node is up, then two, then one again: the group has two workers, four, and two."""
    spec, out = write_spec(tmp_path / "spec.toml", singles=0, groups=1, cells_seen=200_000), tmp_path / "out"
    spec.write_text(spec.read_text().replace("TWO = 2", "TWO = [2, 4]").replace("micro_batch = 4", "micro_batch = 2"))

    def workers() -> int:
        return len(cluster.workers("RayTrainWorker")) if in_flight(out) else 0

    with FakeCluster(1) as cluster:
        process = cluster.sweep(spec, tiny_shards, out)
        wait_for(lambda: workers() == 2)
        time.sleep(20)
        cluster.add()
        wait_for(lambda: workers() == 4)
        time.sleep(20)
        os.kill(cluster.nodes[1]["raylet"], signal.SIGKILL)
        said = ended_well(process, 600)
    (row,) = read_rows(open_place(out))
    assert (row.status, row.workers, row.worker_counts) == ("done", 2, "2 4 2"), said
    assert [one["cause"] for one in events(out)] == ["node lost"]
    assert "Traceback" not in said


def test_a_frozen_process_is_killed_and_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=2, groups=0, cells_seen=120_000), tmp_path / "out"
    with FakeCluster(1) as cluster:
        process = cluster.sweep(spec, tiny_shards, out)
        wait_for(lambda: len(in_flight(out)) == 2)
        frozen = cluster.workers("ImplicitFunc.train")[0]
        frozen.send_signal(signal.SIGSTOP)
        said = ended_well(process)
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    assert [one["cause"] for one in events(out)] == ["stuck"]
    assert "has not answered" in said and "Traceback" not in said


def test_a_sweep_waits_for_nodes_and_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=1, groups=1, cells_seen=4_000), tmp_path / "out"
    with FakeCluster(0) as cluster:
        process = cluster.sweep(spec, tiny_shards, out)
        time.sleep(305)
        assert process.poll() is None
        cluster.add()
        said = ended_well(process)
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    assert "waits for nodes" in said and not events(out)


def test_what_no_node_can_ever_hold_is_refused_before_anything_starts(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=1, groups=1, cells_seen=4_000), tmp_path / "out"
    spec.write_text(spec.read_text().replace("TWO = 2", "TWO = 8"))
    with FakeCluster(1) as cluster:
        cluster_file = tmp_path / "cluster.yaml"
        cluster_file.write_text(
            "max_workers: 2\navailable_node_types:\n"
            "  head: {resources: {CPU: 0, trial_driver: 64}, max_workers: 0}\n"
            "  worker: {resources: {CPU: 2}, max_workers: 2}\nhead_node_type: head\n"
        )
        line = ["sweep", str(spec), "--shards", str(tiny_shards), "--out", str(out), "--cluster", str(cluster_file)]
        done = subprocess.run(
            [sys.executable, "-m", "scaling_ray.cli", *line],
            env=cluster.environment | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2, done.stderr
    assert "resources.workers.TWO: 8: each asks for 1 CPUs on one node" in done.stderr.splitlines()[-1]
    assert not (out / "runs").exists()


def test_a_budget_ends_a_sweep_at_a_checkpoint_and_more_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=3, groups=0, cells_seen=60_000), tmp_path / "out"
    grid = spec.read_text()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def call(budget: str) -> subprocess.CompletedProcess[str]:
        spec.write_text(grid + budget)
        line = ["sweep", str(spec), "--shards", str(tiny_shards), "--out", str(out)]
        return subprocess.run(
            [sys.executable, "-m", "scaling_ray.cli", *line],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )

    done = call("[budget]\nmax_cpu_hours = 0.003\n")
    assert done.returncode == 4, done.stderr
    assert "budget.max_cpu_hours = 0.003 is spent" in done.stderr.splitlines()[-1]
    assert any(row.status != "done" for row in read_rows(open_place(out)))
    again = call("[budget]\nmax_cpu_hours = 0.003\n")
    assert again.returncode == 4, again.stderr
    done = call("")
    assert done.returncode == 0, done.stderr
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
