"""Measure how fast runs train on this machine, on synthetic cells, and what share of its matrix rate they reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells, ResidentFeed, run_order
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.train.engine import PlainEngine, device_of
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.memory import is_out_of_memory
from scaling_ray.train.stack_loop import StackedLoop

MADE_CELLS = 4_096
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
WARM_UPDATES = 1
PROBE_SECONDS = 1.0


def made_cells(cells: int, genes: int, seed: int = 0) -> Cells:
    """Overdispersed counts at a density of about a fifth, of one data set and donor; every gene measured."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.1, 3.0, size=genes)
    counts = rng.poisson(rate * rng.gamma(4.0, 0.25, size=(cells, 1))).astype(np.uint16)
    zeros = np.zeros(cells, np.int32)
    return Cells(
        counts, counts.sum(1).astype(np.int64) * 4 + 1, np.arange(cells), zeros, zeros, np.ones((1, genes), bool)
    )


def made_updates(run: RunSpec, members: int, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """(make one update of the run, or of a stack of such runs; wait for all updates), on synthetic cells."""
    cells = made_cells(MADE_CELLS, run.genes)
    unbounded = run.train.model_copy(update={"max_cells_seen": 10**9})
    run = run.model_copy(update={"train": unbounded, "cells": None, "donors": None, "lr": 1e-4})
    if members == 1:
        loop = TrainingLoop(run, RunData(cells, cells, cells, "made"), PlainEngine(run, device))
        return loop.update, loop.settle
    runs = [run.model_copy(update={"seed": seed}) for seed in range(members)]
    feeds = [ResidentFeed(cells, run_order(one, MADE_CELLS)) for one in runs]
    stack = StackedLoop(runs, list(feeds), cells, cells, device)
    return stack.update, stack.settle


def rate_of(update: Callable[[], object], wait: Callable[[], object], cells_per_update: int, seconds: float) -> float:
    """Cells a second after a warm-up, over at least one update and at least ``seconds``."""
    for _ in range(WARM_UPDATES):
        update()
    wait()
    done, began = 0, time.perf_counter()
    while True:
        update()
        done += 1
        if time.perf_counter() - began >= seconds:
            wait()
            break
        if done % 16 == 0:
            wait()
    return done * cells_per_update / (time.perf_counter() - began)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Matrix FLOPs a second of square products, the best of two sizes: the most that this machine reaches."""
    best = 0.0
    for size in MATRIX_SIZES[device.type]:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def synchronise() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        one @ other
        synchronise()
        fastest, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            one @ other
            synchronise()
            fastest = min(fastest, time.perf_counter() - began)
        best = max(best, 2 * size**3 / fastest)
    return best


def bench_run(run: RunSpec, seconds: float, members: int = 1) -> dict[str, Any]:
    """Measure the throughput of a run here, or of a stack of ``members`` such runs (all their cells together)."""
    torch.set_num_threads(run.execution.cpus)
    device = device_of(run.execution)
    update, wait = made_updates(run, members, device)
    rate = rate_of(update, wait, run.train.cells_per_step * members, seconds)
    flops = training_flops_per_cell(run.shape, run.genes, run.masked_genes_per_cell)
    dtype = torch.bfloat16 if run.execution.precision == "bf16" else torch.float32
    peak = matmul_rate(device, dtype)
    return {
        "cells_per_second": rate,
        "size": run.size,
        "params": run.params,
        "genes": run.genes,
        "micro_batch": run.execution.micro_batch,
        "cells_per_step": run.train.cells_per_step,
        "dropout": run.train.dropout,
        "precision": run.execution.precision,
        "threads": run.execution.cpus,
        "stacked": members,
        "device": device.type,
        "gflops_per_second": rate * flops / 1e9,
        "matmul_gflops_per_second": peak / 1e9,
        "share_of_matmul": rate * flops / peak,
    }


def probe_micro_batch(run: RunSpec, seconds: float = PROBE_SECONDS) -> int:
    """The fastest micro-batch of 1, 2, 4, ... cells that fits into this machine's memory; each gets ``seconds``."""
    torch.set_num_threads(run.execution.cpus)
    device = device_of(run.execution)

    def cells_per_second(micro_batch: int) -> float:
        update, wait = made_updates(run.carried_out(micro_batch=micro_batch), 1, device)
        return rate_of(update, wait, run.train.cells_per_step, seconds)

    return fastest_micro_batch(run.train.cells_per_step, cells_per_second)


def fastest_micro_batch(cells_per_step: int, cells_per_second: Callable[[int], float]) -> int:
    """The fastest of the micro-batches 1, 2, 4, ... up to ``cells_per_step``; 1 where none fits into memory.

    ``cells_per_second`` measures one micro-batch. Measuring ends at the first that does not fit into memory.
    """
    rates: dict[int, float] = {}
    micro_batch = 1
    while micro_batch <= cells_per_step:
        try:
            rates[micro_batch] = cells_per_second(micro_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        micro_batch *= 2
    return max(rates, key=lambda size: rates[size]) if rates else 1
