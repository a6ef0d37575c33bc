"""Units of scheduling: a run, a stack of runs or a worker group, and what each needs to start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scaling_ray.runs import RunSpec
from scaling_ray.spec import content_hash


@dataclass(frozen=True)
class Unit:
    """Runs that start, fail and are tried again together."""

    runs: tuple[RunSpec, ...]

    @property
    def kind(self) -> Literal["run", "stack", "group"]:
        """One run in one process, several runs in one process, or one run in several processes."""
        if len(self.runs) > 1:
            return "stack"
        return "group" if self.runs[0].execution.in_group else "run"

    @property
    def name(self) -> str:
        """The id of the unit's run, or the name of its stack."""
        return self.runs[0].run_id if len(self.runs) == 1 else stack_name(list(self.runs))

    @property
    def worker(self) -> dict[str, float]:
        """What each process of the unit holds, on one node."""
        execution = self.runs[0].execution
        return {"CPU": float(execution.cpus)} | ({"GPU": execution.gpus} if execution.gpus else {})

    @property
    def workers(self) -> int:
        """Processes that train."""
        return self.runs[0].execution.workers

    @property
    def candidates(self) -> set[str]:
        """Ids of the runs among whose rates a rate must be chosen before the unit can start."""
        return {name for run in self.runs if run.lr is None for name in run.lr_candidates}


def stack_name(runs: list[RunSpec]) -> str:
    """The name of a stack's folder: it follows from its members."""
    return f"{runs[0].role}-{runs[0].size}-{content_hash([run.run_id for run in runs])[:8]}"


def units_of(runs: list[RunSpec], stacks: Iterable[list[str]], waiting: set[str]) -> list[Unit]:
    """The units that hold waiting runs: whole stacks first, then runs that are in no stack."""
    by_id = {run.run_id: run for run in runs}
    together = [stack for stack in stacks if by_id.keys() >= set(stack)]
    stacked = {run_id for stack in stacks for run_id in stack}
    units = [Unit(tuple(by_id[run_id] for run_id in stack)) for stack in together]
    units += [Unit((run,)) for run in runs if run.run_id not in stacked]
    return [unit for unit in units if waiting & {run.run_id for run in unit.runs}]
