"""What a sweep's runs train on is asked of the machines that will train, never of the driver's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import TINY_SWEEP

from scaling_ray.runs import runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.sweep.plan import make_plan

PROGRAM = """
import json, os, sys
from scaling_ray.cluster import ray
from ray.cluster_utils import Cluster

head = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
gpus = int(sys.argv[1])
cluster.add_node(num_cpus=1, num_gpus=gpus, object_store_memory=80 << 20)
ray.init(address=cluster.address, log_to_driver=False)
try:
    from scaling_ray.spec import parse_spec
    from scaling_ray.sweep.probing import capacity_here, choose_device

    spec = parse_spec(sys.stdin.read())
    print(json.dumps({"device": choose_device(spec, capacity_here(None)), "driver": os.path.exists("/dev/nvidia0")}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("gpus", [0, 1])
def test_a_head_without_gpus_plans_for_those_of_its_workers(gpus: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CUDA"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(gpus)],
        input=TINY_SWEEP,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if found["driver"]:
        pytest.skip("this machine has a GPU of its own")
    assert (found["device"] == "cuda") == bool(gpus)


def test_a_spec_that_names_its_device_asks_nobody() -> None:
    from scaling_ray.sweep.capacity import Capacity
    from scaling_ray.sweep.probing import choose_device

    spec = parse_spec(TINY_SWEEP + '[resources]\ndevice = "cuda"\n')
    assert choose_device(spec, Capacity.local(2)) == "cuda", "no cluster is connected, and none is needed"
    plan, runs = make_plan(spec)
    assert plan["device"] == "cuda" and {run.execution.gpus for run in runs} == {1 / 8}, "tiny runs share a GPU"


def test_identities_are_those_of_any_device() -> None:
    spec = parse_spec(TINY_SWEEP)
    assert [run.identity for run in runs_of(spec, "cuda")] == [run.identity for run in runs_of(spec, "cpu_bf16")]
    assert {run.execution.gpus for run in runs_of(spec, "cuda")} == {1.0}
