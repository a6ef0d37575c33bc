"""A cluster that grows from no workers and shrinks to none again: Ray's own autoscaler over nodes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fake_cluster import write_spec  # noqa: E402
from test_orchestrator import in_flight, wait_for

from scaling_ray.results.read import read_rows
from scaling_ray.storage import open_place

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""What Ray's provider of nodes on one machine takes for the head."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class AutoscaledCluster:
    """A head without CPUs, and up to ``most`` worker nodes of one kind that come when something asks for them."""

    def __init__(self, worker: dict[str, float], most: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sr-as-", dir="/tmp"))
        host = next(
            address.address
            for each in psutil.net_if_addrs().values()
            for address in each
            if address.family == socket.AF_INET and not address.address.startswith("127.")
        )
        self.address = f"{host}:{free_port()}"
        config: dict[str, Any] = {
            "cluster_name": "fake",
            "max_workers": most,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10.0,
            "provider": {
                "type": "fake_multinode",
                "disable_node_updaters": True,
                "use_node_id_as_ip": True,  # all nodes share an address here, and would be told apart by it
                "head_node_id": HEAD_NODE_ID,
                "gcs_address": self.address,
            },
            "auth": {"ssh_user": "nobody"},
            "available_node_types": {
                "ray.head.default": {
                    "resources": {"CPU": 0, "trial_driver": 64},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": 0,
                },
                "worker": {
                    "resources": worker | {"object_store_memory": 80 << 20},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                },
            },
            "head_node_type": "ray.head.default",
            "file_mounts": {},
            "cluster_synced_files": [],
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }
        self.file = self.folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(config))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
        head = ["start", "--head", "--block", f"--port={self.address.rpartition(':')[2]}", f"--node-ip-address={host}"]
        head += ["--num-cpus=0", '--resources={"trial_driver": 64}', "--include-dashboard=false"]
        head += [f"--autoscaling-config={self.file}", f"--temp-dir={self.folder}", f"--object-store-memory={80 << 20}"]
        own = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
            "RAY_enable_autoscaler_v2": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *head],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment | own,
        )
        wait_for(self._answers, 120)

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with socket.socket() as trial:
            return trial.connect_ex((host, int(port))) == 0 and len(self._raylets()) == 1

    def _processes(self) -> list[psutil.Process]:
        """What belongs to this cluster: everything that names its folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and any(str(self.folder) in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _raylets(self) -> list[psutil.Process]:
        found = []
        for process in self._processes():
            try:
                if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    @property
    def workers(self) -> int:
        """How many worker nodes are up."""
        return len(self._raylets()) - 1

    def sweep(self, spec: Path, shards: Path, out: Path) -> subprocess.Popen[str]:
        line = ["sweep", str(spec), "--shards", str(shards), "--out", str(out), "--cluster", str(self.file)]
        return subprocess.Popen(
            [sys.executable, "-m", "scaling_ray.cli", *line],
            env=self.environment | {"RAY_ADDRESS": self.address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> AutoscaledCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while (left := self._processes()) and time.monotonic() < deadline:
            for process in left:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(0.5)
        shutil.rmtree(self.folder, ignore_errors=True)


def watched(process: subprocess.Popen[str], look: Callable[[], int], seconds: float = 900.0) -> tuple[list[int], str]:
    """What ``look`` saw while the sweep ran, and what the sweep said; it must end well."""
    seen, deadline = [], time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not end: {process.communicate()[1][-3000:]}")
        seen.append(look())
        time.sleep(0.5)
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    return seen, said


def test_workers_come_from_none_and_go_again(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path / "spec.toml", singles=3, groups=3, cells_seen=6_000), tmp_path / "out"
    at_once: list[int] = []

    def look() -> int:
        at_once.append(sum("TWO" in unit for unit in in_flight(out)))
        return cluster.workers

    with AutoscaledCluster({"CPU": 2}, most=4) as cluster:
        assert cluster.workers == 0
        seen, said = watched(cluster.sweep(spec, tiny_shards, out), look)
        wait_for(lambda: cluster.workers == 0, 240)  # what Ray Data asked for stays asked for a minute
    assert max(seen) >= 3 and max(at_once) >= 2, (seen, said)
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    assert not (out / "events.jsonl").exists() and "Traceback" not in said


def test_four_tiny_runs_share_a_gpu_that_comes_for_them(tiny_shards: Path, tmp_path: Path) -> None:
    """The node has a GPU by name only: its runs train on its CPUs, which they hold too."""
    spec, out = write_spec(tmp_path / "spec.toml", singles=4, groups=0, cells_seen=60_000), tmp_path / "out"
    spec.write_text(spec.read_text().replace("stack = 1", 'stack = 1\ndevice = "cuda"'))
    with AutoscaledCluster({"CPU": 4, "GPU": 1}, most=1) as cluster:
        assert cluster.workers == 0
        seen, said = watched(cluster.sweep(spec, tiny_shards, out), lambda: len(in_flight(out)))
    assert max(seen) == 4, said
    settings = json.loads((out / "plan.json").read_text())["settings"]
    assert {setting["execution"]["gpus"] for setting in settings} == {0.125}
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
