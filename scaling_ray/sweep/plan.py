"""The plan of a sweep, from its spec alone: grid, parameters, FLOPs, memory, shapes, hours, money. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.execution import Device, gpu_here, gpus_here
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.spec import SweepSpec
from scaling_ray.sweep.budget_plan import left_undone
from scaling_ray.sweep.capacity import UNBOUNDED, Capacity
from scaling_ray.sweep.cost import GROUP_SECONDS, TRIAL_SECONDS, RatesFile, Speeds
from scaling_ray.sweep.makespan import Demand, Job, schedule
from scaling_ray.sweep.offers import Placed, offers_of, place, priced_capacity
from scaling_ray.sweep.speed import GPUS, gpu_named
from scaling_ray.sweep.stacks import plan_stacks

VERSION = 4
ASSUMED_TRAINING_CELLS = 20_000
"""Training cells of shards that nobody has seen, where a spec names no number of cells."""


@dataclass(frozen=True)
class SplitCells:
    """Cells of each split of the shards; ``known`` where they were counted and not assumed."""

    train: int
    val: int
    test: int
    known: bool = True

    @classmethod
    def assumed(cls, spec: SweepSpec) -> SplitCells:
        """From the largest number of training cells that the spec names, and its fractions."""
        named = [cells for cells in (*spec.grid.cells, spec.lr.choose_cells) if cells != "all"]
        train, shares = max(named, default=ASSUMED_TRAINING_CELLS), spec.data.fractions
        val, test = (round(train * share / shares.train) for share in (shares.val, shares.test))
        return cls(train, val, test, known=False)


def run_cost(run: RunSpec, gflops_per_cpu: float | None = None) -> dict[str, Any]:
    """One line of a plan for a run by itself, on this machine or one of its device."""
    placed = place(run, 1, offers_of(None, None), Speeds((), gflops_per_cpu), 0, 0)
    return _setting(run, placed, 1)


def _setting(run: RunSpec, placed: Placed, members: int) -> dict[str, Any]:
    """A line of a plan.

    Hours are those inside the trial, of the run's workers together; a member has its part of its stack's. GPU-hours,
    CPU-hours and cost count the start of the process too.
    """
    cells = run.train.total_steps * run.train.cells_per_step
    trained = cells * (1.0 + run.train.branched_share)
    hours = placed.seconds / members / 3600
    execution = run.execution
    held = hours + start_seconds(run) / members / 3600
    return {
        "run_id": run.run_id,
        "role": run.role,
        "size": run.size,
        "params": run.params,
        "params_without_embedding": run.params_without_embedding,
        "genes": run.genes,
        "cells": run.cells if run.cells is not None else "all",
        "donors": run.donors if run.donors is not None else "all",
        "seed": run.seed,
        "lr": run.lr,
        "lr_candidates": run.lr_candidates,
        "max_cells_seen": cells,
        "flops": training_flops_per_cell(run.shape, run.genes, run.masked_genes_per_cell) * trained,
        "bytes": placed.memory.device_bytes,
        "host_bytes": placed.memory.host_bytes,
        "disk_bytes": disk_bytes(run)[0],
        "workers": execution.workers,
        "execution": execution.model_dump(mode="json"),
        "hours": hours,
        "hours_low": placed.low / members / 3600,
        "hours_high": placed.high / members / 3600,
        "hours_from": placed.source,
        "gpu_hours": held * execution.workers * execution.gpus,
        "cpu_hours": held * execution.workers * execution.cpus,
        "node": placed.offer.name,
        "cost": None if placed.cost_per_second is None else placed.cost_per_second * held * 3600,
    }


def start_seconds(run: RunSpec) -> float:
    """Seconds between the start of the run's processes and that of its own clock."""
    return GROUP_SECONDS if run.execution.in_group else TRIAL_SECONDS


def disk_bytes(run: RunSpec) -> tuple[int, int]:
    """(bytes that a run leaves, most that it takes while it trains: chosen weights again and three states more).

    It leaves its chosen weights, and a trunk with those chosen until then.
    """
    left = 4 * run.params + (16 * run.params if run.train.wsd is not None and run.role == "law" else 0)
    return left, left + 4 * run.params + 3 * 12 * run.params


def check_disk(spec: SweepSpec, runs: list[RunSpec]) -> None:
    """Raise BadInput where the sweep's checkpoints would take more than ``resources.disk_gib``."""
    if spec.resources.disk_gib is None:
        return
    at_once = max(1, spec.resources.cpus // spec.train.threads)
    training = sorted((disk_bytes(run)[1] for run in runs), reverse=True)[:at_once]
    needed = sum(disk_bytes(run)[0] for run in runs) + sum(training)
    if needed > spec.resources.disk_gib * 2**30:
        remedy = f"is less than the {needed / 2**30:.2f} GiB of this grid's checkpoints; raise it, or sweep fewer runs"
        raise BadInput("W038", "resources.disk_gib", spec.resources.disk_gib, remedy)


def as_planned(runs: list[RunSpec], plan: Mapping[str, Any] | None) -> list[RunSpec]:
    """The runs with the execution settings of an earlier plan, so that results stay bit-identical."""
    if plan is None:
        return runs
    there = {setting["run_id"]: setting["execution"] for setting in plan["settings"]}
    return [
        run.model_copy(update={"execution": run.execution.repeating(there[run.run_id])}) if run.run_id in there else run
        for run in runs
    ]


def make_plan(
    spec: SweepSpec,
    device: Device | None = None,
    earlier: Mapping[str, Any] | None = None,
    rates: Sequence[RatesFile] = (),
    capacity: Capacity | None = None,
    cells: SplitCells | None = None,
) -> tuple[dict[str, Any], list[RunSpec]]:
    """The plan as it is written to plan.json (every run with its cost, stacks, sizes, totals), and its runs.

    Args:
        spec: the sweep's.
        device: of runs that no earlier plan knows, as for ``runs_of``.
        earlier: plan.json of an earlier call on the same sweep; what it says of a run's execution, and of stacks, is
            repeated. One of version 3 will do.
        rates: measured cells a second, a file per kind of machine.
        capacity: what the target can become; None takes the nodes of ``[prices]``, else one machine of
            ``resources.cpus``.
        cells: of the shards; None assumes them.

    Raises:
        BadInput: a shape that the target can never hold, too little disk, a limit in money without prices.
    """
    if spec.budget.max_cost is not None and spec.prices is None:
        raise BadInput("W039", "budget.max_cost", spec.budget.max_cost, "needs prices; add a table [prices]")
    runs = as_planned(runs_of(spec, device), earlier)
    check_disk(spec, runs)
    is_known = capacity is not None or spec.prices is not None
    on_gpu = runs[0].execution.device == "cuda"
    if capacity is None:
        gpus = max(1, gpus_here()) if on_gpu else 0
        capacity = priced_capacity(spec.prices) if spec.prices else Capacity.local(spec.resources.cpus, gpus)
    offers, speeds = offers_of(spec.prices, _gpu_kind(on_gpu)), Speeds(tuple(rates), spec.resources.gflops_per_cpu)
    split = cells if cells is not None else SplitCells.assumed(spec)
    there = [list(stack) for stack in earlier["stacks"]] if earlier else []
    runs = [as_far_as_it_fits(run, capacity) for run in runs]
    processes = max(1, int(min(capacity.total("CPU"), UNBOUNDED)) // spec.train.threads)
    if is_known and processes >= UNBOUNDED // spec.train.threads:
        processes = 1  # no bound is known, so nothing is cut to fill it
    stacks = plan_stacks(runs, processes, spec.resources.stack, there, per_group=not is_known)
    members = {name: len(stack) for stack in stacks for name in stack}
    placed: dict[tuple[Any, ...], Placed] = {}
    carried = []
    for run in runs:
        count = members[run.run_id] if run.run_id in members else 1
        kind = _kind(run, count)
        if kind not in placed:
            placed[kind] = place(run, count, offers, speeds, split.val, split.test)
        carried.append(run.carried_out(stack=count, gpus=placed[kind].gpus))
    where = [placed[_kind(run, new.execution.stack)] for run, new in zip(runs, carried, strict=True)]
    if is_known:
        check_shapes(carried, capacity)
    settings = [_setting(run, one, run.execution.stack) for run, one in zip(carried, where, strict=True)]
    plan = {
        "version": VERSION,
        "name": spec.name,
        "device": carried[0].execution.device,
        "settings": settings,
        "stacks": stacks,
        "probed": earlier["probed"] if earlier else [],
        "sizes": _by_size(settings),
    }
    units, jobs = _jobs(carried, where, stacks)
    spans = schedule(jobs, capacity)
    plan["budget"] = left_undone(spec.budget, settings, units, spans)
    plan["totals"] = _totals(spec, settings, max(span.end for span in spans) / 3600, split)
    return plan, carried


def _kind(run: RunSpec, members: int) -> tuple[Any, ...]:
    """What the cost of a run depends on: rules of training follow role and size."""
    return run.role, run.size, run.genes, run.execution, members


def _gpu_kind(on_gpu: bool) -> str | None:
    """The kind of this machine's GPU, None where it has none or one that a plan does not know."""
    name = gpu_here() if on_gpu else None
    if name is None or not any(kind.lower() in name.lower() for kind in GPUS):
        return None
    return gpu_named(name, "GPU")


def bundles_of(run: RunSpec) -> list[dict[str, float]]:
    """What the run's workers hold, in Ray's names: a bundle each. What leads a worker group is not among them."""
    execution = run.execution
    each = {"CPU": float(execution.cpus)} | ({"GPU": execution.gpus} if execution.gpus else {})
    return [each] * execution.workers


def as_far_as_it_fits(run: RunSpec, capacity: Capacity) -> RunSpec:
    """The run with the most workers that the nodes can hold, of those that it may have; the same where none can be."""
    if not run.execution.least_workers:
        return run
    each = bundles_of(run)[:1]
    return next(
        (run.carried_out(workers=count) for count in run.worker_counts if capacity.fits(each * count)),
        run,
    )


def check_shapes(runs: Sequence[RunSpec], capacity: Capacity) -> None:
    """Raise BadInput for the first run whose workers the nodes can never hold at once, whatever else runs."""
    seen: set[tuple[Any, ...]] = set()
    for run in runs:
        execution = run.execution
        shape = (execution.cpus, execution.gpus, execution.workers)
        if shape in seen:
            continue
        seen.add(shape)
        if capacity.fits(bundles_of(run)):
            continue
        asked = f"{execution.cpus} CPUs" + (f" and {execution.gpus:g} GPU" if execution.gpus else "")
        remedy = f"asks for {asked} on one node, and the cluster has {capacity.described()}"
        if execution.in_group:
            fewest = execution.least_workers or execution.workers
            raise BadInput("W040", f"resources.workers.{run.size}", fewest, f"each {remedy}; use fewer, or more nodes")
        if execution.gpus and not capacity.total("GPU"):
            raise BadInput(
                "W041", "resources.device", execution.device, f"{remedy}; add nodes with GPUs, or name a cpu"
            )
        raise BadInput(
            "W042", "train.threads", execution.cpus, f"a run of {run.size} {remedy}; lower it, or add larger nodes"
        )


def _jobs(runs: list[RunSpec], placed: list[Placed], stacks: list[list[str]]) -> tuple[list[list[int]], list[Job]]:
    """(positions of the runs of each unit, its job): a size's law runs wait for the runs that choose their rate."""
    place_of = {run.run_id: place for place, run in enumerate(runs)}
    stacked = {name for stack in stacks for name in stack}
    units = [[place_of[name] for name in stack] for stack in stacks if all(name in place_of for name in stack)]
    units += [[place] for place, run in enumerate(runs) if run.run_id not in stacked]
    units.sort()
    unit_of = {place: number for number, unit in enumerate(units) for place in unit}
    jobs = []
    for unit in units:
        run, execution = runs[unit[0]], runs[unit[0]].execution
        needs = {unit_of[place_of[name]] for name in run.lr_candidates}
        demand = Demand(float(execution.cpus * execution.workers), execution.gpus * execution.workers)
        jobs.append(Job(placed[unit[0]].seconds + start_seconds(run), demand, tuple(sorted(needs))))
    return units, jobs


def _by_size(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each size takes in all, and on what: sizes in the order of the grid."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for setting in settings:
        groups.setdefault((setting["size"], setting["genes"]), []).append(setting)
    found = []
    for (size, genes), here in groups.items():
        execution = here[0]["execution"]
        found.append(
            {
                "size": size,
                "genes": genes,
                "params": here[0]["params"],
                "runs": len(here),
                "flops": sum(setting["flops"] for setting in here),
                "bytes": max(setting["bytes"] for setting in here),
                "workers": execution["workers"],
                "cpus": execution["cpus"],
                "gpus": execution["gpus"],
                "most_stacked": max(setting["execution"]["stack"] for setting in here),
                "node": here[0]["node"],
                "hours_from": sorted({setting["hours_from"] for setting in here}),
                **{name: sum(setting[name] for setting in here) for name in SUMMED},
                "cost": _sum_of_costs(here),
            }
        )
    return found


SUMMED = ("hours", "hours_low", "hours_high", "gpu_hours", "cpu_hours")


def _sum_of_costs(settings: list[dict[str, Any]]) -> float | None:
    costs = [setting["cost"] for setting in settings]
    return None if None in costs else sum(costs)


def _totals(spec: SweepSpec, settings: list[dict[str, Any]], span_hours: float, split: SplitCells) -> dict[str, Any]:
    """Sums over all runs. ``hours`` pass on the target from first start to last end; intervals keep the runs' ratio."""
    sums = {name: sum(setting[name] for setting in settings) for name in SUMMED}
    below, above = (sums[name] / sums["hours"] for name in ("hours_low", "hours_high"))
    cost = _sum_of_costs(settings)
    most_genes, resident = max(setting["genes"] for setting in settings), spec.resources.resident_gib * 2**30
    train_bytes = 2 * most_genes * split.train
    held_bytes = 2 * most_genes * (split.val + split.test) + (train_bytes if train_bytes <= resident else 0)
    return {
        "runs": len(settings),
        "flops": sum(setting["flops"] for setting in settings),
        "largest_bytes": max(setting["bytes"] for setting in settings),
        "disk_bytes": sum(setting["disk_bytes"] for setting in settings),
        "object_store_bytes": held_bytes,
        "cells_known": split.known,
        "cpu_hours": sums["cpu_hours"],
        "gpu_hours": sums["gpu_hours"],
        "run_hours": sums["hours"],
        "hours": span_hours,
        "hours_low": span_hours * below,
        "hours_high": span_hours * above,
        "gflops_per_cpu": spec.resources.gflops_per_cpu,
        "cost": cost,
        "cost_low": None if cost is None else cost * below,
        "cost_high": None if cost is None else cost * above,
        "currency": spec.prices.currency if spec.prices else None,
        "prices_as_of": spec.prices.as_of if spec.prices else None,
    }
