"""Measure the training step: against a plain loop, against the machine's matrix rate, stacked, and fed by the stream.

``make bench-train`` writes reports/benchmarks/training.json; on a machine with a GPU the same figures are of the GPU
(the reference loop too). Rates are compared within one run, side by side and in turns, on one thread; figures are
medians of repeats. Nothing here judges them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine, say
from reference_loop import reference_updates

from scaling_ray.execution import choose_stack, cpu_here
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.sizes import LADDER, training_flops_per_cell
from scaling_ray.spec import parse_spec
from scaling_ray.storage import write_json
from scaling_ray.train.bench import MADE_CELLS, made_cells, made_updates, matmul_rate, rate_of

GENES, CELLS_PER_STEP = 512, 32
MASKED = round(0.15 * GENES)
STACKED = 8
SHARDS = """
name = "bench"
[data]
genes = 512
[grid]
sizes = ["TINY"]
genes = [512]
cells = ["all"]
seeds = [1]
[lr]
rates = [1e-2]
[resources]
cpus = 2
"""

Rate = Callable[[], float]
"""Cells a second, measured once."""


class Plain(NamedTuple):
    """The plain loop's dropout, and the cells of its batches."""

    dropout: float
    batch: int


def run_of(size: str, train: str = "", cells_per_step: int = CELLS_PER_STEP, genes: int = GENES) -> RunSpec:
    """A run of a size as this machine carries it out; without lines of its own by the default recipe."""
    return runs_of(
        parse_spec(
            f'name = "bench"\n[data]\ngenes = {genes}\n[grid]\nsizes = ["{size}"]\ngenes = [{genes}]\ncells = ["all"]\n'
            f"seeds = [1]\n[lr]\nrates = [1e-4]\n[train]\ncells_per_step = {cells_per_step}\n{train}\n"
        ),
        "cuda" if torch.cuda.is_available() else cpu_here(),
    )[0]


def cells_per_update(size: str) -> int:
    """Updates of the large sizes are of fewer cells, on a CPU, so that one does not take minutes."""
    return CELLS_PER_STEP if torch.cuda.is_available() or LADDER[size].width < 500 else 8


def ours(run: RunSpec, seconds: float, device: torch.device, members: int = 1) -> Rate:
    """This project's step; of a stack all members' cells count."""
    update, wait = made_updates(run, members, device)
    return lambda: rate_of(update, wait, run.train.cells_per_step * members, seconds)


def reference(size: str, seconds: float, device: torch.device, dropout: float, batch: int, accumulation: int) -> Rate:
    """The plain loop's."""
    update = reference_updates(LADDER[size], made_cells(MADE_CELLS, GENES), dropout, batch, accumulation, device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return lambda: rate_of(update, wait, batch * accumulation, seconds)


def in_turns(rates: dict[str, Rate], repeats: int) -> dict[str, list[float]]:
    """Every rate ``repeats`` times, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(repeats):
        for name, measure in rates.items():
            found[name].append(measure())
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Median of the ratios of each turn, and what it is made of."""
    ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "cells_per_second": found}


def against_reference(
    name: str, options: argparse.Namespace, device: torch.device, sizes: tuple[str, ...], train: str, plain: Plain
) -> dict[str, Any]:
    """Sizes by lines of a spec against the plain loop, in turns."""
    out = {}
    for size in sizes:
        run = run_of(size, train, cells_per_update(size))
        accumulation = run.train.cells_per_step // plain.batch
        rates = {"ours": ours(run, options.seconds, device)}
        rates["reference"] = reference(size, options.seconds, device, plain.dropout, plain.batch, accumulation)
        found = ratio(in_turns(rates, options.repeats), "ours", "reference")
        out[size] = found | {"micro_batch": run.execution.micro_batch, "precision": run.execution.precision}
        say(f"{name}, {size}: {out[size]['ratio']:.2f}")
    return out


def same_recipe(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Dropout 0.1 and float32 on both sides."""
    train = 'dropout = 0.1\nprecision = "fp32"'
    return against_reference("same recipe", options, device, ("TINY", "XS", "S"), train, Plain(0.1, 4))


def without_dropout(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Dropout 0 and float32 on both sides, batches of 32."""
    train = 'precision = "fp32"'
    return against_reference("without dropout", options, device, ("TINY", "XS"), train, Plain(0.0, CELLS_PER_STEP))


def own_recipe(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The default recipe (no dropout, precision by size) against the plain loop at dropout 0.1."""
    return against_reference("own recipe", options, device, ("XXS", "TINY", "XS", "S", "M"), "", Plain(0.1, 4))


def share_of_matmul(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Exact matrix FLOPs of the default recipe over the best square product of the same precision."""
    out = {}
    precisions = ("fp32", "bf16") if device.type == "cuda" else ("fp32",)
    for size in ("XS", "S", "M", *(("L", "XL") if device.type == "cuda" else ())):
        flops = training_flops_per_cell(LADDER[size], GENES, MASKED)
        for precision in precisions:
            run = run_of(size, f'precision = "{precision}"', cells_per_update(size))
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            rates: dict[str, Rate] = {"ours": ours(run, options.seconds, device)}
            rates["matmul"] = partial(_matmul_cells, device, dtype, flops)
            found = in_turns(rates, options.repeats)
            name = f"{size}-{precision}"
            out[name] = ratio(found, "ours", "matmul") | {"micro_batch": run.execution.micro_batch}
            out[name]["matmul_gflops_per_second"] = statistics.median(found["matmul"]) * flops / 1e9
            say(f"share of matmul, {name}: {out[name]['ratio']:.2f}")
    return out


def _matmul_cells(device: torch.device, dtype: torch.dtype, flops_per_cell: float) -> float:
    return matmul_rate(device, dtype) / flops_per_cell


def stacked(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Eight as one against one, at micro-batch 4; and what a plan chooses against one as a plan has it."""
    out: dict[str, Any] = {}
    for size in ("XXS", "TINY"):
        run = run_of(size, "micro_batch = 4")
        rates = {"stacked": ours(run, options.seconds, device, STACKED), "alone": ours(run, options.seconds, device)}
        out[f"{size}-micro-batch-4"] = ratio(in_turns(rates, options.repeats), "stacked", "alone")
        for cells in (16, 32):
            run = run_of(size, cells_per_step=cells)
            members = choose_stack(run.shape, run.execution.micro_batch, "cuda" if device.type == "cuda" else "cpu")
            how: dict[str, Any] = {"members": members, "micro_batch": run.execution.micro_batch}
            if members == 1:
                out[f"{size}-planned-{cells}"] = how | {"ratio": 1.0}
                continue
            rates = {"stacked": ours(run, options.seconds, device, members)}
            rates["alone"] = ours(run, options.seconds, device)
            out[f"{size}-planned-{cells}"] = how | ratio(in_turns(rates, options.repeats), "stacked", "alone")
    for name, found in out.items():
        say(f"stacked, {name}: {found['ratio']:.2f}")
    return out


def fed_by_stream(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same step fed by the stream of planted shards, and out of memory."""
    from scaling_ray.cluster import ray_session
    from scaling_ray.planted.plant import plant
    from scaling_ray.shards.convert import build_shards
    from scaling_ray.shards.format import read_manifest, row_groups
    from scaling_ray.shards.order import RunOrder, replicate_rows
    from scaling_ray.shards.read import Feed, ResidentFeed, read_split
    from scaling_ray.shards.stream import StreamFeed
    from scaling_ray.train.engine import PlainEngine
    from scaling_ray.train.loop import RunData, TrainingLoop

    census, shards = options.work / "census-100000", options.work / "shards-100000"
    plant(census, n_cells=100_000, n_genes=2_000)
    build_shards(parse_spec(SHARDS), str(census), shards)
    manifest = read_manifest(shards)
    n_train = manifest.splits["train"].cells
    order = RunOrder(replicate_rows(n_train, None, 1), row_groups(manifest, "train"), 1)
    val = read_split(shards, manifest, "val", GENES)
    train = read_split(shards, manifest, "train", GENES)
    out = {}
    with ray_session(2):
        for size in ("XS", "S"):
            run = run_of(size)
            run = run.model_copy(update={"train": run.train.model_copy(update={"max_cells_seen": 10**9})})
            stream = StreamFeed(shards, manifest, GENES, order)
            rates: dict[str, Rate] = {}
            feeds: dict[str, Feed] = {"stream": stream, "resident": ResidentFeed(train, order)}
            for name, feed in feeds.items():
                loop = TrainingLoop(run, RunData(feed, val, val, manifest.data_hash), PlainEngine(run, device))
                rates[name] = partial(rate_of, loop.update, loop.settle, CELLS_PER_STEP, options.seconds)
            out[size] = ratio(in_turns(rates, options.repeats), "stream", "resident")
            stream.close()
            say(f"fed by the stream, {size}: {out[size]['ratio']:.2f}")
    return out


def gpu_targets(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a GPU does: stacked TINY, compiled or not, XL at all, and hours of the ladder by the rates measured."""
    if device.type != "cuda":
        return {"left_out": "no GPU here"}
    out: dict[str, Any] = {}
    for members in (8, 64, 256):
        out[f"TINY-stacked-{members}"] = ours(run_of("TINY"), options.seconds, device, members)()
    hours = 0.0
    for size in LADDER:
        tries = {}
        for compiled in (False, True):
            run = run_of(size).carried_out(compile=compiled)
            try:
                tries["compiled" if compiled else "eager"] = ours(run, options.seconds, device)()
            except torch.OutOfMemoryError:
                tries["compiled" if compiled else "eager"] = 0.0
        out[size] = tries
        if size != "XL" and max(tries.values()) > 0:
            hours += 3 * 240_000 / max(tries.values()) / 3600
        say(f"gpu, {size}: {tries}")
    return out | {"hours_of_the_ladder_to_L_three_seeds_240k_cells": hours}


MEASURES = {
    "same_recipe": same_recipe,
    "without_dropout": without_dropout,
    "own_recipe": own_recipe,
    "share_of_matmul": share_of_matmul,
    "stacked": stacked,
    "fed_by_stream": fed_by_stream,
    "gpu": gpu_targets,
}


def main() -> int:
    """Measure what was asked for and put it into the results file, beside what stands there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/training.json"))
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument(
        "--work", type=Path, default=Path("out/bench"), help="directory for the stream's Census and shards"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.only:
        found = MEASURES[name](options, device)
        text = options.results.read_text() if options.results.is_file() else "{}"
        write_json(options.results, json.loads(text) | {name: found | {"machine": machine()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
