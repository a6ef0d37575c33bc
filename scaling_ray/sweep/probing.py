"""Tasks that find out what only the training machines know: their device, and the fastest micro-batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scaling_ray.cluster import each_node_up, nodes_up, run_on_worker
from scaling_ray.execution import Device, cpu_here
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec
from scaling_ray.sweep.capacity import Capacity, NodeType

TO_COME, IMAGINED_NODES = "to come", 64
"""Nodes that a cluster of unknown limits is thought to have; with GPUs for a spec that asks for them by name."""

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where ``ray up`` leaves its file on a head."""


def capacity_here(cluster: Path | None) -> Capacity:
    """What the connected cluster can become: by its file, by the head's own copy of it, or by the nodes that are up.

    Ray itself does not tell a driver how far its autoscaler goes. A cluster that was joined and whose head offers no
    CPU has work for nodes to come: there, without a file, more nodes like the largest are thought to be had.
    """
    bootstrap, joined = Path(BOOTSTRAP).expanduser(), bool(os.environ.get("RAY_ADDRESS"))
    if cluster is None and joined and bootstrap.is_file():
        cluster = bootstrap
    if cluster is not None:
        return Capacity.of_file(cluster)
    up = [NodeType(f"node {number}", resources, 1) for number, resources in enumerate(each_node_up())]
    head = next((node for node in up if node.offers("node:__internal_head__")), None)
    if not joined or head is None or head.offers("CPU"):
        return Capacity(tuple(up))
    largest = {name: max(8.0, *(node.offers(name) for node in up)) for name in ("CPU", "GPU")}
    return Capacity((*up, NodeType(TO_COME, largest, IMAGINED_NODES)))


def choose_device(spec: SweepSpec, capacity: Capacity) -> Device:
    """The device of a sweep's runs: the spec's, else a GPU where the cluster can have any.

    The nodes of the moment say nothing of those to come, and the driver's own machine nothing of the workers. Where
    the cluster has CPUs only, a worker looks what they are.
    """
    if spec.resources.device != "auto":
        return spec.resources.device
    gpus = Capacity(tuple(node for node in capacity.nodes if node.name != TO_COME)).total("GPU")
    if gpus and not nodes_up().get("GPU"):
        return "cuda"
    found: Device = run_on_worker(_device_there, gpus > 0, cpus=1, gpus=1.0 if gpus else 0.0)
    return found


def _device_there(holds_gpu: bool) -> Device:
    return "cuda" if holds_gpu and os.environ.get("CUDA_VISIBLE_DEVICES") else cpu_here()


def probe_micro_batches(files: SweepFiles, runs: list[RunSpec], plan: dict[str, Any]) -> dict[str, Any]:
    """Measure micro-batches where ``plan`` has none, once for runs that are alike; write and return the plan."""
    unknown = [run for run in runs if run.run_id not in plan["probed"]]
    if not unknown:
        return plan
    names = {run.run_id: probe_name(run) for run in unknown}
    one_of = {names[run.run_id]: run for run in unknown}
    found = {}
    for name, run in one_of.items():  # one after the other: two at a time would measure each other
        found[name] = run_on_worker(_probe, run.model_dump_json(), cpus=run.execution.cpus, gpus=run.execution.gpus)
    for setting in plan["settings"]:
        if setting["run_id"] in names:
            setting["execution"]["micro_batch"] = found[names[setting["run_id"]]]
    plan = plan | {"probed": plan["probed"] + list(names)}
    files.write_plan(plan)
    return plan


def probe_name(run: RunSpec) -> str:
    """Name, for people, of the runs that share one measurement."""
    return f"{run.size} of {run.genes} genes"


def _probe(run: str) -> int:
    from scaling_ray.train.bench import probe_micro_batch

    return probe_micro_batch(RunSpec.model_validate_json(run))
