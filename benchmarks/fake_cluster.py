"""A Ray cluster of several nodes on one machine, for benchmarks and tests: nodes come, are killed, and come again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

KINDS = ("driver", "process group", "trial", "train worker", "raylet")
"""What can be killed: the command, all that it started, an actor of a trial, a worker of a group, a node."""
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

nodes, cpus = int(sys.argv[1]), int(sys.argv[2])
head = {"num_cpus": 0, "resources": {"trial_driver": 64}, "object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
up = [cluster.add_node(num_cpus=cpus, object_store_memory=80 << 20) for _ in range(nodes)]
told = [{"raylet": node.all_processes["raylet"][0].process.pid, "id": node.node_id} for node in up]
print(json.dumps({"address": cluster.address, "nodes": told}), flush=True)
for line in sys.stdin:
    if line.strip() == "add":
        node = cluster.add_node(num_cpus=cpus, object_store_memory=80 << 20)
        print(json.dumps({"raylet": node.all_processes["raylet"][0].process.pid, "id": node.node_id}), flush=True)
cluster.shutdown()
"""


class FakeCluster:
    """A head without CPUs and nodes of a few, all on this machine, in a process of their own.

    Args:
        nodes: at the start.
        cpus: of each.
        more: further variables of the environment, of the cluster and of sweeps on it.
    """

    def __init__(self, nodes: int, cpus: int = 2, more: dict[str, str] | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = environment | {"RAY_worker_niceness": "0"} | (more or {})
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(nodes), str(cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )
        told = self.answer()
        self.address, self.nodes = told["address"], told["nodes"]

    def answer(self) -> Any:
        """What the cluster's process says next."""
        assert self.process.stdout is not None
        return json.loads(next(line for line in self.process.stdout if line.startswith("{")))

    def add(self) -> None:
        """One node more."""
        assert self.process.stdin is not None
        print("add", file=self.process.stdin, flush=True)
        self.nodes.append(self.answer())

    def close(self) -> None:
        """End the cluster."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sweep(self, spec: Path, shards: Path, out: Path, said: Path | None = None) -> subprocess.Popen[str]:
        """The command, started as a user starts it on a head; what it says goes to a pipe, or is added to a file."""
        line = ["sweep", str(spec), "--shards", str(shards), "--out", str(out)]
        with open(said or os.devnull, "a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "scaling_ray.cli", *line],
                env=self.environment | {"RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if said is None else file,
                text=True,
                process_group=0,
            )

    def strike(self, kind: str, sweep: subprocess.Popen[str], chance: random.Random) -> bool:
        """Kill a process of a kind with -9; False where there is none now. A node that is lost comes again."""
        if kind == "driver":
            sweep.kill()
            return True
        if kind == "process group":
            os.killpg(sweep.pid, signal.SIGKILL)
            return True
        if kind == "raylet":
            node = chance.choice(self.nodes)
            os.kill(node["raylet"], signal.SIGKILL)
            self.nodes.remove(node)
            self.add()
            return True
        found = self.workers("ImplicitFunc" if kind == "trial" else "RayTrainWorker")
        if found:
            chance.choice(found).kill()
        return bool(found)

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of Ray's below this cluster whose title has some words."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def write_spec(path: Path, singles: int, groups: int, cells_seen: int, more: str = "") -> Path:
    """Single runs of one size and groups of two workers of another."""
    sizes = {"ONE": singles, "TWO": groups}
    text = 'name = "cluster"\n[data]\ngenes = 64\n[grid]\ngenes = [64]\ncells = ["all"]\n'
    text += f"sizes = {[name for name, count in sizes.items() if count]}\n"
    text += f"seeds = {list(range(1, max(singles, groups) + 1))}\n"
    for name in sizes:
        text += f"[sizes.{name}]\nwidth = 8\nlayers = 1\nheads = 2\nfeedforward = 1\n"
    text += f"[train]\nmax_cells_seen = {cells_seen}\ncells_per_step = 8\nmicro_batch = 4\npatience_evaluations = 0\n"
    text += 'checkpoint_seconds = 1.0\n[lr]\nrule = "fixed"\nrates = [0.01]\n'
    text += f"[resources]\nstack = 1\nworkers = {{ TWO = 2 }}\n{more}"
    path.write_text(text)
    return path
