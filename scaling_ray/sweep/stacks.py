"""Which runs train as one process: stacks of models of one shape, cut to what the target can run at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from typing import Any, Literal

from scaling_ray.execution import choose_stack
from scaling_ray.runs import RunSpec, stack_mates
from scaling_ray.sizes import training_flops_per_cell


def plan_stacks(
    runs: list[RunSpec],
    processes: int,
    most: int | Literal["auto"],
    there: list[list[str]],
    per_group: bool = True,
) -> list[list[str]]:
    """Which runs train as one: lists of at least two run ids.

    Args:
        runs: of the sweep.
        processes: that train at the same time.
        most: members of a stack, or "auto": what pays for the shape and device.
        there: stacks of an earlier plan, which are kept.
        per_group: on one machine, runs that could be one stack are cut into as many as it has processes, for sizes
            train after each other there. On a cluster all units together fill it: stacks are cut, the longest first,
            only until there are as many units as processes.
    """
    taken = {run_id for stack in there for run_id in stack}
    groups: dict[str, list[RunSpec]] = {}
    names: dict[tuple[Any, ...], str] = {}
    alone = 0
    for run in runs:
        if run.run_id in taken:
            continue
        if run.execution.in_group:
            alone += 1
            continue
        kind = (run.role, run.size, run.genes, run.execution)
        if kind not in names:
            names[kind] = stack_mates(run)
        groups.setdefault(names[kind], []).append(run)
    counts = {}
    for name, group in groups.items():
        execution = group[0].execution
        pays = choose_stack(group[0].shape, execution.micro_batch, execution.device)
        least = -(-len(group) // (pays if most == "auto" else most))
        counts[name] = max(least, min(processes, len(group))) if per_group else least
    if not per_group:
        _cut_until(counts, groups, processes - alone - len(there))
    stacks = list(there)
    for name, group in groups.items():
        edges = [len(group) * part // counts[name] for part in range(counts[name] + 1)]
        cut = [group[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
        stacks += [[run.run_id for run in part] for part in cut if len(part) > 1]
    return stacks


def _cut_until(counts: dict[str, int], groups: Mapping[str, Sequence[RunSpec]], wanted: int) -> None:
    """Raise ``counts``, the number of stacks of each group, until there are ``wanted``: the longest stacks first."""

    def length(name: str) -> float:
        run = groups[name][0]
        flops = training_flops_per_cell(run.shape, run.genes, run.masked_genes_per_cell)
        return flops * run.train.total_steps * run.train.cells_per_step * len(groups[name]) / counts[name]

    queue = [(-length(name), name) for name, count in counts.items() if count < len(groups[name])]
    heapify(queue)
    units = sum(counts.values())
    while queue and units < wanted:
        name = queue[0][1]
        counts[name], units = counts[name] + 1, units + 1
        at_end = counts[name] >= len(groups[name])
        heapreplace(queue, (0.0 if at_end else -length(name), name))
        if at_end and queue[0][0] == 0.0:
            break
