"""Tasks that find out what only the training machines know: their device, and the fastest micro-batches."""

from __future__ import annotations

import os
from typing import Any

from scaling_ray.cluster import has_gpus, run_on_worker
from scaling_ray.execution import Device, cpu_here
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec


def choose_device(spec: SweepSpec) -> Device:
    """The device of a sweep's runs: the spec's, else the one that a worker of the connected cluster finds.

    The task that looks holds a GPU where the cluster has any; the driver's own machine says nothing of the workers.
    """
    if spec.resources.device != "auto":
        return spec.resources.device
    gpus = 1.0 if has_gpus() else 0.0
    found: Device = run_on_worker(_device_there, gpus > 0, cpus=1, gpus=gpus)
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
