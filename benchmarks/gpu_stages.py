"""What ``gpu.py`` measures, stage by stage: each is a function of a ``Job`` that reports its figures one by one.

Timing is that of the other benchmarks (``training.py``, ``scaling_ray.train.bench``), in turns where two are compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_grid import MeasuredRates, gflops_per_cell
from torch import distributed
from training import CELLS_PER_STEP, GENES, Plain, Rate, against_reference, in_turns, ours, ratio, run_of

from scaling_ray.execution import cpu_here
from scaling_ray.planted.draw import draw_range
from scaling_ray.planted.truth import PlantedTruth, PlantSpec
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells, run_order
from scaling_ray.spec import load_spec
from scaling_ray.sweep.cost import RatesFile, rate_name
from scaling_ray.sweep.plan import make_plan
from scaling_ray.sweep.references import closed_form_references
from scaling_ray.train.bench import MADE_CELLS, bench_run, fastest_micro_batch, made_cells, matmul_rate, rate_of
from scaling_ray.train.driver import Signals, train
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.evaluation import evaluate
from scaling_ray.train.loop import RunData, TrainingLoop

REPOSITORY = Path(__file__).resolve().parents[1]
VAL_DONORS, TEST_DONORS = (0, 8), (4, 12)
"""Of the 16 planted donors, each of another data set; runs train on the others."""
HELD_OUT_CELLS = 2_048
"""Most cells of validation and of test: the Gaussian solves a system for each."""


@dataclass(frozen=True)
class Scale:
    """How much is measured; a setting is (size, genes, cells per update)."""

    seconds: float
    repeats: int
    settings: tuple[tuple[str, int, int], ...]
    stacks: tuple[tuple[str, int], ...]
    same_recipe: tuple[str, ...]
    own_recipe: tuple[str, ...]
    micro_batches: tuple[str, int]
    run_size: str
    run_lr: float
    run_seconds: float
    run_cells: int
    zero_size: str


LADDER_HERE = tuple((size, GENES, CELLS_PER_STEP) for size in ("XXS", "TINY", "XS", "S", "M", "L", "XL"))
FULL = Scale(
    seconds=0.7,
    repeats=3,
    settings=(*LADDER_HERE, ("TINY", 1024, 32), ("M", 1024, 32), ("L", 1024, 32), ("M", GENES, 256), ("L", GENES, 256)),
    stacks=tuple((size, members) for size in ("XXS", "TINY") for members in (4, 16, 64)),
    same_recipe=("TINY", "S"),
    own_recipe=("XXS", "S", "M"),
    micro_batches=("M", 128),
    run_size="M",
    run_lr=5e-4,
    run_seconds=120.0,
    run_cells=65_536,
    zero_size="L",
)
SMALL = Scale(
    seconds=0.2,
    repeats=2,
    settings=(*LADDER_HERE[:3], ("TINY", 1024, 32)),
    stacks=(("XXS", 4), ("XXS", 16), ("TINY", 4)),
    same_recipe=("TINY",),
    own_recipe=("XXS",),
    micro_batches=("TINY", 32),
    run_size="TINY",
    run_lr=1e-2,
    run_seconds=6.0,
    run_cells=4_096,
    zero_size="TINY",
)


@dataclass(frozen=True)
class Job:
    """What a stage is given: how much to measure, where, which specs, and what earlier stages found."""

    scale: Scale
    device: torch.device
    specs: list[Path]
    known: dict[str, Any]
    report: Callable[[str, Any], None]


def gpu_tests(job: Job) -> None:
    """The tests marked gpu, all skipped on a CPU; what other versions than the pinned warn of is no error here."""
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*line, "tests/test_gpu.py"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.strip().rpartition("\n")[2])
    job.report("counts", {what: int(number) for number, what in counts})
    if done.returncode:
        raise SystemExit(f"pytest: {done.stdout.strip().rpartition(chr(10))[2]}")


def matmul(job: Job) -> None:
    """Best square products."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        job.report(f"{name}_gflops_per_second", matmul_rate(job.device, dtype) / 1e9)


def cells(job: Job) -> None:
    """Cells a second, and exact FLOPs over the best product of the same precision measured beside."""
    for size, genes, per_step in job.scale.settings:
        name = f"{size} v{genes} b{per_step}"
        try:
            job.report(name, bench_run(run_of(size, cells_per_step=per_step, genes=genes), job.scale.seconds))
        except torch.OutOfMemoryError as error:
            job.report(name, {"out_of_memory": str(error)})


def stacks(job: Job) -> None:
    """Stacks against one run, in turns; a stack's cells are those of all members."""
    for size, members in job.scale.stacks:
        run = run_of(size)
        rates = {name: ours(run, job.scale.seconds, job.device, n) for name, n in (("stacked", members), ("alone", 1))}
        found = ratio(in_turns(rates, job.scale.repeats), "stacked", "alone")
        facts = {"stacked": members, "cells_per_step": CELLS_PER_STEP, "gflops_per_cell": gflops_per_cell(run)}
        job.report(f"{size} x{members}", found | facts)


def reference(job: Job) -> None:
    """The loop a user would write, in turns with this project's."""
    options = argparse.Namespace(seconds=job.scale.seconds, repeats=job.scale.repeats)
    recipes = {"same recipe": ('dropout = 0.1\nprecision = "fp32"', job.scale.same_recipe)}
    for recipe, (lines, sizes) in (recipes | {"own recipe": ("", job.scale.own_recipe)}).items():
        for size in sizes:
            found = against_reference(recipe, options, job.device, (size,), lines, Plain(0.1, 4))
            job.report(f"{recipe}, {size}", found[size])


def micro_batches(job: Job) -> None:
    """Cells a second by micro-batch, up to the whole update or the end of memory."""
    size, per_step = job.scale.micro_batches
    run = run_of(size, cells_per_step=per_step)

    def measure(micro_batch: int) -> float:
        rate = ours(run.carried_out(micro_batch=micro_batch), job.scale.seconds, job.device)()
        job.report(str(micro_batch), rate)
        return rate

    job.report("fastest", fastest_micro_batch(per_step, measure))
    job.report("planned", run.execution.micro_batch)


def one_run(job: Job) -> None:
    """A run whose budget fills its seconds, on planted cells: its curve, and losses on held-out donors."""
    scale = job.scale
    split = planted_splits(scale.run_cells)
    rate = ours(run_of(scale.run_size), scale.seconds, job.device)()
    lines = f"max_cells_seen = {int(0.95 * rate * scale.run_seconds)}\nevaluations = 24\npatience_evaluations = 0"
    run = run_of(scale.run_size, lines).model_copy(update={"lr": scale.run_lr})
    job.report("run", {"size": run.size, "params": run.params, "genes": run.genes, "lr": run.lr})
    job.report("max_cells_seen", run.train.max_cells_seen)
    job.report("cells", {name: len(part) for name, part in split.items()})
    order = run_order(run, len(split["train"]))
    known = closed_form_references(run, order, split["train"].rows, split["val"], split["test"])
    names = ("val_gene_mean_loss", "test_gene_mean_loss", "test_gaussian_loss")
    job.report("references", {name: known[name] for name in names})
    loop = TrainingLoop(
        run, RunData(split["train"], split["val"], split["test"], "planted"), PlainEngine(run, job.device)
    )
    loop.begin(fresh=True)
    curve: list[dict[str, float]] = []
    began = time.perf_counter()

    def evaluated(progress: Any) -> None:
        loss, seconds = progress.curve_loss[-1], time.perf_counter() - began
        curve.append({"cells_seen": progress.cells_seen, "seconds": seconds, "val_loss": loss})
        job.report("curve", curve)

    train(loop, Signals(report=evaluated))
    job.report("cells_per_second", loop.progress.cells_seen / (time.perf_counter() - began))
    job.report("test_loss", evaluate(loop.engine, split["test"], run).sums.mean)


def planted_splits(n_cells: int) -> dict[str, Cells]:
    """About so many planted cells of GENES genes, split by donor; copies and empty cells are left out."""
    truth = PlantedTruth(PlantSpec(n_genes=GENES))
    ranges = [draw_range(truth, index) for index in range(-(-n_cells // truth.spec.range_cells))]
    counts = np.concatenate([drawn.counts.toarray() for drawn in ranges]).astype(np.uint16)
    dataset, donor, copy_of = (
        np.concatenate([getattr(drawn, name) for drawn in ranges]).astype(np.int32)
        for name in ("dataset", "donor", "copy_of")
    )
    raw_sum = counts.sum(1, dtype=np.int64)
    whole = Cells(counts, raw_sum, np.arange(len(counts)), dataset, donor, truth.measured)
    held_out = np.isin(donor, (*VAL_DONORS, *TEST_DONORS))
    wanted = {"val": np.isin(donor, VAL_DONORS), "test": np.isin(donor, TEST_DONORS), "train": ~held_out}
    kept = (copy_of < 0) & (raw_sum > 0)
    rows = {name: np.flatnonzero(mask & kept) for name, mask in wanted.items()}
    return {name: whole.rows(own if name == "train" else own[:HELD_OUT_CELLS]) for name, own in rows.items()}


def zero(job: Job) -> None:
    """DeepSpeed in one process against the plain engine, in turns."""
    if job.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        importlib.import_module("deepspeed")
    except ImportError as error:
        job.report("absent", str(error))
        return
    from scaling_ray.train.zero import DeepSpeedEngine

    lo = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | lo)
    backend = "nccl" if job.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, f"file://{folder}/meeting", rank=0, world_size=1)
        zero_rates(job, DeepSpeedEngine)
        distributed.destroy_process_group()


def zero_rates(job: Job, build: Callable[..., Any]) -> None:
    """Each stage of ZeRO with the optimizer offloaded, and stage 2 without; ``build`` makes its engine.

    Bytes of a GPU are what is allocated there after the updates, beyond what was before the engine came.
    """
    run, made = run_of(job.scale.zero_size, "max_cells_seen = 1_000_000_000"), made_cells(MADE_CELLS, GENES)

    def rate(run: RunSpec, engine: Any) -> Rate:
        loop = TrainingLoop(run, RunData(made, made, made, "made"), engine)
        return partial(rate_of, loop.update, loop.settle, run.train.cells_per_step, job.scale.seconds)

    def allocated() -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if job.device.type == "cuda" else 0

    before = allocated()
    plain = rate(run, PlainEngine(run, job.device))
    plain()
    job.report("plain", {"size": run.size, "gpu_bytes": allocated() - before})
    for stage, offload in ((1, True), (2, True), (3, True), (2, False)):
        own = run.carried_out(engine="deepspeed", zero_stage=stage, offload_optimizer=offload)
        before = allocated()
        engine = build(own, job.device, 0, 1)
        found = ratio(in_turns({"zero": rate(own, engine), "plain": plain}, job.scale.repeats), "zero", "plain")
        held = {"gpu_bytes": allocated() - before, "resident_bytes": engine.resident_bytes()}
        job.report(f"stage {stage}{', offloaded' * offload}", found | held)
        del engine


def grid(job: Job) -> None:
    """Hours of each spec's whole budgets, one process after the other; its largest setting is measured as a check."""
    rates = MeasuredRates(job.known)
    here = "cuda" if job.device.type == "cuda" else cpu_here()
    for path in job.specs:
        spec = load_spec(path)
        device = here if spec.resources.device == "auto" else None
        runs = make_plan(spec, device)[1]
        expected = {rate_name(run, run.execution.stack): rates.of(run) for run in runs}
        settings = make_plan(spec, device, rates=[RatesFile(None, expected)])[0]["settings"]
        found: dict[str, Any] = {"runs": len(runs), "device": runs[0].execution.device}
        found |= {name: sum(setting[name] for setting in settings) for name in ("hours", "flops")}
        job.report(path.stem, found)
        largest = max(runs, key=gflops_per_cell)
        measured = ours(largest, job.scale.seconds, job.device, largest.execution.stack)()
        found |= {"largest": largest.size, "expected_over_measured": rates.of(largest) / measured}
        job.report(path.stem, found)


STAGES: dict[str, Callable[[Job], None]] = {
    "tests": gpu_tests,
    "matmul": matmul,
    "cells": cells,
    "stacks": stacks,
    "reference": reference,
    "micro_batches": micro_batches,
    "run": one_run,
    "zero": zero,
    "grid": grid,
}
