"""What a sweep has spent, over all its calls, and whether ``[budget]`` allows more. No Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping

from scaling_ray.results.sweep_files import SPENT, SweepFiles, read_sealed, write_sealed
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec
from scaling_ray.sweep.units import Unit

KINDS = ("cpu_hours", "gpu_hours", "cost")


class Budget:
    """Counts what units hold while they train; ``spent.json`` carries it from call to call.

    A kill loses what was counted since it was written last, ten seconds or so.

    Args:
        spec: the sweep's.
        files: the sweep's.
        runs: all runs by id.
    """

    def __init__(self, spec: SweepSpec, files: SweepFiles, runs: Mapping[str, RunSpec]) -> None:
        self._limits, self._files = spec.budget, files
        there = read_sealed(files.place, SPENT)
        self._spent = {kind: float(there[kind]) if there is not None else 0.0 for kind in KINDS}
        # the sweep's first start: wall time counts from then, whoever called
        self._began_ms = int(there["began_ms"]) if there is not None else time.time_ns() // 1_000_000
        self._cost_per_hour = _cost_per_hour(files)
        self._training: dict[str, tuple[Unit, float, int]] = {}

    def began(self, unit: Unit, since: float, workers: int | None = None) -> None:
        """A unit holds its resources since then; a later call says only with how many workers, where that changed."""
        if unit.name not in self._training:
            self._training[unit.name] = (unit, since, workers or unit.workers)
        elif workers not in (None, self._training[unit.name][2]):
            self.ended(unit.name, since)
            self._training[unit.name] = (unit, since, workers or unit.workers)

    def ended(self, name: str, now: float) -> None:
        """A unit holds nothing any more."""
        found = self._training.pop(name, None)
        if found is not None:
            for kind, amount in self._of(*found, now).items():
                self._spent[kind] += amount

    def _of(self, unit: Unit, since: float, workers: int, now: float) -> dict[str, float]:
        hours = (now - since) / 3600.0
        execution = unit.runs[0].execution
        rate = self._cost_per_hour.get(unit.runs[0].run_id, 0.0)
        return {
            "cpu_hours": hours * execution.cpus * workers,
            "gpu_hours": hours * execution.gpus * workers,
            "cost": hours * rate * workers / unit.workers,
        }

    def spent(self, now: float) -> dict[str, float]:
        """Hours held, money, and hours since the sweep began, what trains now included."""
        total = dict(self._spent)
        for held in self._training.values():
            for kind, amount in self._of(*held, now).items():
                total[kind] += amount
        return total | {"wall_hours": (time.time_ns() / 1e6 - self._began_ms) / 3.6e6}

    def over(self, now: float) -> str | None:
        """The limit that is reached, as a sentence; None while there is none."""
        if not self._limits.is_limited:
            return None
        spent = self.spent(now)
        for kind in (*KINDS, "wall_hours"):
            limit = getattr(self._limits, f"max_{kind}")
            if limit is not None and spent[kind] >= limit:
                return f"budget.max_{kind} = {limit:g} is spent ({spent[kind]:.4g})"
        return None

    def write(self, now: float) -> None:
        """Keep what is spent."""
        spent = self.spent(now)
        write_sealed(self._files.place, SPENT, {kind: spent[kind] for kind in KINDS} | {"began_ms": self._began_ms})


def _cost_per_hour(files: SweepFiles) -> dict[str, float]:
    """Money for an hour of a run, by run id, where the plan says it."""
    plan = files.plan()
    if plan is None:
        return {}
    priced = (one for one in plan["settings"] if one.get("cost") is not None and one["hours"])
    return {one["run_id"]: one["cost"] / one["hours"] for one in priced}
