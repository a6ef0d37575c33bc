"""Seconds of a run: from rates measured on its kind of machine where there are any, else from the model of speeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling_ray.errors import BadInput
from scaling_ray.execution import Device
from scaling_ray.rules import LINEAR_START_CELLS
from scaling_ray.runs import RunSpec
from scaling_ray.sweep.speed import ASSUMED_GPU, CALIBRATED_GFLOPS, CPU, Terms, gpu_terms, seconds_of, work_of_update

FULL_MACHINE = 1.1
"""What processes on every core of a machine take longer than one alone: four kept sweeps on two cores took 1.09 to 1.15
times what the rows of planning.json, measured one by one, say of their runs."""

SCATTER = 1.43
"""The factor, each way, of a modelled size's interval: two standard deviations (0.18) of the logarithm of actual over
planned hours of the sizes of those sweeps. The rows themselves scatter by 0.093."""

UNKNOWN_CPU, UNKNOWN_GPU, MEASURED = 2.0, 3.0, 1.1
"""Further factors of an interval, each way: a CPU that was not measured may be twice as fast or slow; a GPU's terms are
from data sheets; a measured rate moves by a tenth between turns (reports/benchmarks/training.json)."""

EVALUATED_SHARE = 0.3
"""Seconds of evaluating a cell over those of training on it (median of planning.json: 0.27, batches made apart)."""

RUN_SECONDS = 0.5
"""A run's own start and end inside its trial: first weights from cells, checkpoints, tables of losses."""
LINEAR_START_SECONDS = 5e-8
"""Further seconds of a linear start per look at a cell, gene and unit of width: 1.7 s for W64 at V = 128, 3 to 4 s for
W48 at V = 512; in six turns at V = 256, 5 s for W16 and 12 s for W80, on one core. Members of a stack start in turn."""
TRIAL_SECONDS, GROUP_SECONDS = 3.0, 25.0
"""Start of a trial (a process that imports torch, shared by some) and of a worker group, outside a run's own clock."""

LINK_BYTES_PER_SECOND = {"cpu": 1e9, "cuda": 10e9}
LINK_SECONDS = {"cpu": 1e-3, "cuda": 2e-4}
"""Exchange of gradients between workers: bandwidth and latency (assumed: gloo and NCCL over a cloud's network)."""


@dataclass(frozen=True)
class Machine:
    """A kind of machine that rates were measured on: its CPU's name and cores, and its GPU's name or None."""

    cpu: str
    cores: int | None
    gpu: str | None = None


@dataclass(frozen=True)
class RatesFile:
    """Measured cells a second by ``rate_name``, and on which machine; None for a file that does not say."""

    machine: Machine | None
    cells_per_second: Mapping[str, float]

    def serves(self, device: Device, gpu: str | None) -> bool:
        """Whether a run on a device, of a kind of GPU, goes at these rates."""
        if self.machine is None:
            return True
        if device != "cuda":
            return self.machine.gpu is None
        return self.machine.gpu is not None and gpu is not None and gpu.lower() in self.machine.gpu.lower()


def read_rates(paths: Path | Sequence[Path]) -> list[RatesFile]:
    """Measured rates as ``scaling-ray bench train --spec`` writes them, a file per kind of machine.

    Raises:
        BadInput: a file that holds no rates.
    """
    return [_rates_file(path) for path in ([paths] if isinstance(paths, Path) else paths)]


def _rates_file(path: Path) -> RatesFile:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rates = {str(name): float(rate) for name, rate in found["cells_per_second"].items()}
        machine = Machine(**found["machine"]) if "machine" in found else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "holds no measured rates; write it with `scaling-ray bench train --spec SPEC.toml --out FILE`"
        raise BadInput("W019", "--rates", str(path), remedy) from error
    if not all(math.isfinite(rate) and rate > 0 for rate in rates.values()):
        raise BadInput("W020", "--rates", str(path), "holds a rate that is not above 0; measure it again")
    return RatesFile(machine, rates)


def rate_name(run: RunSpec, members: int = 1) -> str:
    """The key of a measured throughput of such runs, or of stacks of them: everything that it depends on."""
    train, execution = run.train, run.execution
    shape = f"{run.width}x{run.layers}x{run.heads}x{run.feedforward} v{run.genes}"
    rates = f"dropout{train.dropout:g} mask{train.mask_fraction:g}"
    how = f"b{train.cells_per_step}/{execution.micro_batch} {execution.precision} {rates} threads{execution.cpus}"
    return f"{shape} {how}" + (f" stack{members}" if members > 1 else "")


@dataclass(frozen=True)
class Speeds:
    """What a plan knows of speed: measured rates, the matrix rate of a CPU, which CPU is the calibrated kind.

    ``gflops_per_cpu`` None takes the calibrated CPU's for a CPU with bf16 products, and half of it for others.
    """

    rates: tuple[RatesFile, ...] = ()
    gflops_per_cpu: float | None = None

    def cell_seconds(self, run: RunSpec, members: int, gpu: str | None) -> tuple[float, float, str]:
        """(seconds per cell presentation, factor of its interval, "measured" or "model").

        Of a stack, seconds of a cell of all its members together; of a group, while all workers share its updates.
        """
        name, device, workers = rate_name(run, members), run.execution.device, run.execution.workers
        found = [
            file.cells_per_second[name]
            for file in self.rates
            if file.serves(device, gpu) and name in file.cells_per_second
        ]
        exchange = _exchange_seconds(run) / run.train.cells_per_step
        if found:
            rate = math.exp(sum(map(math.log, found)) / len(found))
            factor = MEASURED * max(max(found) / rate, rate / min(found))
            return 1 / (rate * workers) + exchange, factor if workers == 1 else factor * SCATTER, "measured"
        work = _work(run, members)
        if device == "cuda":
            seconds, factor = seconds_of(work, gpu_terms(gpu or ASSUMED_GPU)), UNKNOWN_GPU
        else:
            of_device = CALIBRATED_GFLOPS if device == "cpu_bf16" else CALIBRATED_GFLOPS / 2
            gflops = self.gflops_per_cpu if self.gflops_per_cpu is not None else of_device
            slower = CALIBRATED_GFLOPS / gflops
            seconds = FULL_MACHINE * slower * seconds_of(work, CPU, run.execution.cpus)
            factor = SCATTER if device == "cpu_bf16" and self.gflops_per_cpu is None else SCATTER * UNKNOWN_CPU
        return seconds / (run.train.cells_per_step * members) + exchange, factor, "model"

    def busy(self, run: RunSpec, members: int, gpu: str) -> float:
        """Share of a run's time in which its GPU computes; the rest is the start of kernels by the CPU."""
        work = _work(run, members)
        starts = Terms(updates=work.updates, layer_passes=work.layer_passes)
        computed = seconds_of(work, gpu_terms(gpu)) - seconds_of(starts, gpu_terms(gpu))
        per_cell, _, _ = self.cell_seconds(run, members, gpu)
        return max(1e-3, min(1.0, computed / (per_cell * run.train.cells_per_step * members)))


def _work(run: RunSpec, members: int) -> Terms:
    """What one process of a run, or of a stack of them, does in an update."""
    train, execution = run.train, run.execution
    return work_of_update(
        run.shape,
        run.genes,
        run.masked_genes_per_cell,
        -(-train.cells_per_step // execution.workers),
        execution.micro_batch,
        members,
        train.dropout,
        execution.precision,
        execution.device == "cuda",
    )


def _exchange_seconds(run: RunSpec) -> float:
    """Seconds in which a group's workers bring their gradients together, per update."""
    workers, link = run.execution.workers, "cuda" if run.execution.device == "cuda" else "cpu"
    if workers == 1:
        return 0.0
    sent = 2 * 4 * run.params * (workers - 1) / workers
    return LINK_SECONDS[link] * math.ceil(math.log2(workers)) + sent / LINK_BYTES_PER_SECOND[link]


def evaluated_cells(run: RunSpec, val_cells: int, test_cells: int) -> float:
    """Cells that a run evaluates: its curve, the chosen weights on both splits, and both again for each branch."""
    train = run.train
    law = run.role == "law"
    if train.wsd is None:
        curve = train.evaluations
    else:
        curve = max(1, train.total_steps * train.cells_per_step // train.wsd.evaluation_cells)
    final = val_cells + (test_cells if law else 0)
    branches = len(train.wsd.branches) if train.wsd is not None else 0
    return curve * min(train.curve_cells, val_cells) + final * (1 + branches)


def run_seconds(
    run: RunSpec, members: int, speeds: Speeds, gpu: str | None, val_cells: int, test_cells: int
) -> tuple[float, float, float, str]:
    """(seconds of a run inside its trial, low, high, where they are from); a stack's member has its part of them."""
    per_cell, factor, source = speeds.cell_seconds(run, members, gpu)
    trained = run.train.total_steps * run.train.cells_per_step * (1 + run.train.branched_share)
    cells = trained + EVALUATED_SHARE * evaluated_cells(run, val_cells, test_cells)
    seconds = RUN_SECONDS / members + per_cell * cells
    if run.train.start == "linear":
        cells = min(run.cells or LINEAR_START_CELLS, LINEAR_START_CELLS)
        looks = cells * run.train.linear_start_turns(run.genes, cells)
        seconds += LINEAR_START_SECONDS * looks * run.genes * run.shape.width
    return seconds, seconds / factor, seconds * factor, source
