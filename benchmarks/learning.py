"""How far models learn in a budget: starts, rates and sizes, several seeds each, on shards that are at hand.

``make bench-learning BENCH='--shards NAME=DIR:GENES'`` writes reports/benchmarks/learning.json: for each data set,
start, size and rate the test loss of each seed, its share of the way from the gene mean (0) to the shrunk Gaussian (1),
and CPU seconds. A run is *stuck* where its validation loss is above 0.9 of the gene mean's at half its budget. Sizes
have heads of width 4 and one layer, XS as on the ladder; losses are those of the last update. Nothing here judges them.

``--only starts`` compares the starts, ``--only rates`` tries rates at every size. ``--only reach`` asks in how few
cells seen a start that knows the cells, at the rate that its rule gives a width, reaches what the drawn start has after
all of them at the better of its rates: at parts of them, each a run that decays within it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import machine, say

from scaling_ray.errors import Diverged
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.shards.format import read_manifest, row_groups
from scaling_ray.shards.read import read_split, run_order
from scaling_ray.sizes import LADDER
from scaling_ray.spec import parse_spec
from scaling_ray.storage import open_place, write_json
from scaling_ray.sweep.references import closed_form_references
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.evaluation import evaluate
from scaling_ray.train.loop import RunData, TrainingLoop

SEEDS, CELLS_SEEN, STUCK = (1, 2, 3), 60_000, 0.9
WIDTHS = {"W4": 4, "W8": 8, "W16": 16, "W32": 32}
PARTS = (12, 6, 3)
STARTS: dict[str, dict[str, Any]] = {
    "drawn": {"start": "drawn", "adam_beta2": 0.99},
    "cells": {"start": "cells", "adam_beta2": 0.95},
    "linear": {"start": "linear", "adam_beta2": 0.95},
}
RATES = (0.005, 0.01, 0.02, 0.04)
RATE_OF_STARTS = {"drawn": (0.01, 0.03), "cells": (0.02,)}
RATE_OF_WIDTH_16, WIDTH_EXPONENT = {"cells": 0.014, "linear": 0.006}, -0.5
SPEC = """
name = "learning"
[data]
genes = {stored}
[grid]
sizes = ["{size}"]
genes = [{genes}]
cells = ["all"]
seeds = [{seed}]
{shape}
[train]
cells_per_step = 16
max_cells_seen = {seen}
start = "{start}"
adam_beta2 = {adam_beta2}
[lr]
rates = [{lr}]
"""


def run_of(task: dict[str, Any]) -> RunSpec:
    """The run of a task."""
    width = WIDTHS.get(task["size"])
    shape = "" if width is None else f"[sizes.{task['size']}]\nwidth = {width}\nlayers = 1\nfeedforward = 1\n"
    shape += "" if width is None else f"heads = {width // 4}\n"
    return runs_of(parse_spec(SPEC.format(shape=shape, **task)), "cpu")[0]


@cache
def data_of(shards: str, genes: int) -> RunData:
    """All three splits of some shards, read once by each process."""
    place = open_place(shards)
    manifest = read_manifest(place)
    train, val, test = (read_split(place, manifest, name, genes) for name in ("train", "val", "test"))
    return RunData(train, val, test, manifest.data_hash, row_groups(manifest, "train"))


def trained(task: dict[str, Any]) -> dict[str, Any]:
    """Train a task's run for its budget: test loss of its last weights, validation at half, CPU seconds."""
    torch.set_num_threads(1)
    run, data = run_of(task), data_of(task["shards"], task["genes"])
    loop = TrainingLoop(run, data, PlainEngine(run, torch.device("cpu")))
    began = time.process_time()
    loop.begin(fresh=True)
    half = loss = None
    try:
        while loop.steps < loop.total_steps:
            loop.update()
            if loop.steps % 64 == 0:
                loop.settle()
            if loop.steps == loop.total_steps // 2:
                half = loop.curve_loss()
        loop.settle()
        loss = evaluate(loop.engine, data.test, run).sums.mean
    except Diverged as error:
        say(str(error))
    found = {"params": run.params, "test_loss": loss, "half_val_loss": half}
    return task | found | {"cpu_seconds": time.process_time() - began}


def references(shards: str, genes: int) -> dict[str, float]:
    """Gene mean and shrunk Gaussian of all training cells."""
    data = data_of(shards, genes)
    run = run_of({"size": "W8", "genes": genes, "stored": genes, "seed": 1, "seen": 1600, "lr": 1e-2} | STARTS["cells"])
    assert data.edges is not None
    order = run_order(run, len(data.train), data.edges, data.train.donor)  # type: ignore[arg-type, union-attr]
    found = closed_form_references(run, order, data.train.rows, data.val, data.test)  # type: ignore[union-attr]
    return {
        "gene_mean": found["test_gene_mean_loss"],
        "gaussian": found["test_gaussian_loss"],
        "val_gene_mean": found["val_gene_mean_loss"],
    }


def tasks_of(what: str, shards: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run of a comparison on one data set, ``DIR:GENES``."""
    shards, _, panel = shards.rpartition(":")
    stored, genes, seen = read_manifest(open_place(shards)).genes, int(panel), options.seen
    for start in options.starts:
        rules = STARTS[start]
        parts = PARTS if what == "reach" and start != "drawn" else (1,)
        for size in options.sizes:
            for lr in rates_of(what, start, size):
                for seed, part in itertools.product(SEEDS[: options.seeds], parts):
                    yield (
                        {"shards": shards, "genes": genes, "stored": stored, "seen": seen // part, "size": size}
                        | {"lr": lr, "seed": seed, "from": start}
                        | rules
                    )


def rates_of(what: str, start: str, size: str) -> tuple[float, ...]:
    """The rates at which a start is tried."""
    if what == "rates":
        return () if start == "drawn" else RATES
    if start in RATE_OF_STARTS and (what == "starts" or start == "drawn"):
        return RATE_OF_STARTS[start]
    width = WIDTHS.get(size) or LADDER[size].width
    return (float(f"{RATE_OF_WIDTH_16[start] * (width / 16) ** WIDTH_EXPONENT:.3g}"),)


def reached(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By size: the drawn start's loss at its better rate, and after how many cells seen each other start reaches it."""
    found = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        here = [row for row in rows if row["size"] == size and "test_loss" in row]
        drawn = min((r for r in here if r["start"] == "drawn"), key=lambda r: float(r["test_loss"]), default=None)
        if drawn is None:
            continue
        enough: dict[str, int] = {}
        for row in here:
            if row["start"] != "drawn" and row["test_loss"] <= drawn["test_loss"]:
                enough[row["start"]] = min(row["cells_seen"], enough.get(row["start"], row["cells_seen"]))
        found[size] = {
            "drawn_test_loss": drawn["test_loss"],
            "drawn_lr": drawn["lr"],
            "drawn_cells_seen": drawn["cells_seen"],
            "reached_after": {start: enough.get(start) for start in STARTS if start != "drawn"},
        }
    return found


def summary(runs: list[dict[str, Any]], known: dict[str, float]) -> list[dict[str, Any]]:
    """Runs of one start, size, rate and budget as one row."""
    rows = []
    keys = sorted({(run["from"], run["size"], run["lr"], run["seen"]) for run in runs}, key=str)
    for start, size, lr, seen in keys:
        here = [run for run in runs if (run["from"], run["size"], run["lr"], run["seen"]) == (start, size, lr, seen)]
        losses = [run["test_loss"] for run in here if run["test_loss"] is not None]
        span = known["gene_mean"] - known["gaussian"]
        shares = [(known["gene_mean"] - loss) / span for loss in losses]
        halves = [run["half_val_loss"] for run in here]
        row = {"start": start, "size": size, "lr": lr, "cells_seen": seen, "params": here[0]["params"]}
        row["test_losses"] = losses
        row |= {"diverged": len(here) - len(losses), "cpu_seconds": statistics.fmean(r["cpu_seconds"] for r in here)}
        row["stuck"] = sum(half is None or half > STUCK * known["val_gene_mean"] for half in halves)
        if losses:
            row |= {"test_loss": statistics.fmean(losses), "share": statistics.fmean(shares)}
            row["share_sd"] = statistics.stdev(shares) if len(shares) > 1 else None
        rows.append(row)
    return rows


def main() -> int:
    """Measure and put the results beside what stands in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/learning.json"))
    parser.add_argument("--shards", nargs="+", required=True, help="NAME=DIR:GENES, shards to train on")
    parser.add_argument("--only", nargs="*", default=["starts", "rates"], choices=["starts", "rates", "reach"])
    parser.add_argument("--sizes", nargs="*", default=[*WIDTHS, "XS"])
    parser.add_argument("--starts", nargs="*", default=[*STARTS], choices=[*STARTS])
    parser.add_argument("--seen", type=int, default=CELLS_SEEN, help="cells seen by each run")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    for what in options.only:
        for named in options.shards:
            name, _, where = named.partition("=")
            shards, _, genes = where.rpartition(":")
            known = references(shards, int(genes))
            tasks = list(tasks_of(what, where, options))
            say(f"{what} on {name}: {len(tasks)} runs")
            runs = []
            with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
                for run in pool.imap_unordered(trained, tasks):
                    runs.append(run)
                    loss = "diverged" if run["test_loss"] is None else f"{run['test_loss']:.4f}"
                    say(f"{run['from']} {run['size']} rate {run['lr']:g} seed {run['seed']}: {loss}")
            rows = summary(runs, known)
            entry = {"genes": int(genes), "cells_seen": options.seen, **known, "rows": rows}
            entry |= {"reached": reached(rows)} if what == "reach" else {}
            text = options.results.read_text() if options.results.is_file() else "{}"
            write_json(options.results, json.loads(text) | {f"{what}, {name}": entry | {"machine": machine()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
