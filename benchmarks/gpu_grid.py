"""Cells a second of runs that were not measured, from the seconds of an update of those that were, by its FLOPs."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from scaling_ray.errors import BadInput
from scaling_ray.runs import RunSpec
from scaling_ray.sizes import training_flops_per_cell


def gflops_per_cell(run: RunSpec) -> float:
    """Exact matrix GFLOPs of one training presentation."""
    return training_flops_per_cell(run.shape, run.genes, run.masked_genes_per_cell) / 1e9


class MeasuredRates:
    """What the stages ``cells`` (runs alone) and ``stacks`` of gpu.json measured on this machine.

    Args:
        stages: of gpu.json. BadInput where ``cells`` left no rate.
    """

    def __init__(self, stages: dict[str, Any]) -> None:
        self._updates: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for one in stages.get("cells", {}).get("found", {}).values():
            if rate := one.get("cells_per_second"):
                gflops = one["gflops_per_second"] / rate * one["cells_per_step"]
                self._updates[False].append((gflops, one["cells_per_step"] / rate))
        if not self._updates[False]:
            raise BadInput(
                "V028", "--only", "grid", "extrapolates the rates of the stage cells, which left none; run both"
            )
        for one in stages.get("stacks", {}).get("found", {}).values():
            cells = one["stacked"] * one["cells_per_step"]
            rate = statistics.median(one["cells_per_second"]["stacked"])
            self._updates[True].append((cells * one["gflops_per_cell"], cells / rate))

    def of(self, run: RunSpec) -> float:
        """Cells a second of a run, or of the whole stack that a plan has it in."""
        cells = run.execution.stack * run.train.cells_per_step
        measured = self._updates[run.execution.stack > 1] or self._updates[False]
        return cells / update_seconds(measured, cells * gflops_per_cell(run))


def update_seconds(measured: list[tuple[float, float]], gflops: float) -> float:
    """Seconds of an update of ``gflops``, from (GFLOPs, seconds) of measured ones: a line between two, in logarithms.

    Below the smallest an update takes as long as that one (starting operations is all that counts there), above the
    largest it goes on at that one's FLOPs a second.
    """
    known, seconds = np.log(np.array(sorted(measured))).T
    asked = math.log(gflops)
    return math.exp(float(np.interp(asked, known, seconds)) + max(0.0, asked - float(known[-1])))
