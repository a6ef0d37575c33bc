"""Measure the data plane: exactness, conversion, scale and memory, stream, peers, trials on resident data, kills.

``make bench`` plants what it needs below out/bench and writes reports/benchmarks/data-plane.json. Rates are compared
within one run, interleaved, medians of repeats; nothing here judges them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bare_conversion
from exactness import compare
from machine import machine, say

from scaling_ray.census.importer import import_h5ad
from scaling_ray.cluster import ray_session
from scaling_ray.planted.plant import plant
from scaling_ray.shards.bench import bench_stream
from scaling_ray.shards.convert import build_shards
from scaling_ray.shards.format import read_manifest
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.storage import write_json

HERE = Path(__file__).resolve().parent
GENES = 512
SPEC = f"""
name = "bench"
[data]
genes = {GENES}
[grid]
sizes = ["TINY"]
genes = [{GENES}]
cells = ["all"]
seeds = [1]
[lr]
rates = [1e-2]
"""


def spec(cpus: int) -> SweepSpec:
    """The conversion that is measured, on so many CPUs."""
    return parse_spec(SPEC + f"[resources]\ncpus = {cpus}\n")


class Conversion:
    """One timed conversion under Ray, in a session whose workers are up."""

    def __init__(self, census: Path, out: Path, cpus: int) -> None:
        lines: list[tuple[float, str]] = []
        shutil.rmtree(out, ignore_errors=True)
        with ray_session(cpus):
            # Workers start and import with a first small conversion; it is not counted.
            warm = out.with_name("warm")
            shutil.rmtree(warm, ignore_errors=True)
            build_shards(spec(cpus), str(census.with_name("warm-census")), warm)
            began = time.perf_counter()
            manifest = build_shards(
                spec(cpus), str(census), out, lambda line: lines.append((time.perf_counter(), line))
            )
            self.seconds = time.perf_counter() - began
        self.cells = sum(split.cells for split in manifest.splits.values())
        peaks = [re.match(r"most memory of a (.*) task: ([\d,]+) MiB", line) for _, line in lines]
        self.peak_mib = {peak[1]: int(peak[2].replace(",", "")) for peak in peaks if peak}


def conversion(work: Path, repeats: int) -> dict[str, Any]:
    """Against the bare loop, on one CPU and on two, interleaved; a million cells."""
    census = work / "census-1000000"
    seconds: dict[str, list[float]] = {"bare": [], "one_cpu": [], "two_cpus": []}
    for repeat in range(repeats):
        shutil.rmtree(work / "bare", ignore_errors=True)
        cells, bare = bare_conversion.convert(census, work / "bare", GENES)
        seconds["bare"].append(bare / cells)
        for name, cpus in (("one_cpu", 1), ("two_cpus", 2)):
            ours = Conversion(census, work / "shards", cpus)
            seconds[name].append(ours.seconds / ours.cells)
        say(f"conversion {repeat + 1}/{repeats}: " + ", ".join(f"{n} {1 / s[-1]:,.0f}/s" for n, s in seconds.items()))
    rate = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    return {
        "cells": 1_000_000,
        "cells_per_second": rate,
        "repeats": {name: [1 / value for value in values] for name, values in seconds.items()},
        "one_cpu_over_bare": rate["one_cpu"] / rate["bare"],
        "two_cpus_over_bare": rate["two_cpus"] / rate["bare"],
    }


def scale(work: Path, repeats: int) -> dict[str, Any]:
    """Time per cell and memory of tasks, by number of cells, interleaved, two CPUs."""
    found: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        for cells in (100_000, 300_000, 1_000_000):
            done = Conversion(work / f"census-{cells}", work / "shards", 2)
            entry = found.setdefault(str(cells), {"microseconds_per_cell": [], "peak_mib": []})
            entry["microseconds_per_cell"].append(1e6 * done.seconds / done.cells)
            entry["peak_mib"].append(done.peak_mib)
            say(f"scale {repeat + 1}/{repeats}: {cells:,} cells {entry['microseconds_per_cell'][-1]:.1f} us/cell")
    median = {name: statistics.median(entry["microseconds_per_cell"]) for name, entry in found.items()}
    return found | {
        "million_over_hundred_thousand": median["1000000"] / median["100000"],
        "task_memory_mib": spec(2).resources.task_memory_gib * 1024,
    }


def stream(work: Path, repeats: int) -> dict[str, Any]:
    """Streaming and resident mode against bare pyarrow, 1,000,000 cells and more each."""
    shards = work / "shards-1000000"
    runs = []
    for repeat in range(repeats):
        runs.append(bench_stream(shards, GENES))
        say(f"stream {repeat + 1}/{repeats}: {runs[-1]['cells_per_second']:,.0f} cells/s")
    over = [run["cells_per_second"] / run["pyarrow_cells_per_second"] for run in runs]
    resident = [run["resident_cells_per_second"] / run["cells_per_second"] for run in runs]
    return {
        "repeats": runs,
        "stream_over_pyarrow": statistics.median(over),
        "resident_over_stream": statistics.median(resident),
    }


def exactness(work: Path, h5ad: Path | None) -> dict[str, Any]:
    """Every count of a million planted cells, and of the user's own where a file is given."""
    found = {"planted": compare(work / "census-1000000", work / "shards-1000000")}
    if h5ad is not None:
        import_h5ad([h5ad], work / "imported")
        build_shards(spec(2), str(work / "imported"), work / "shards-imported")
        found["imported"] = compare(work / "imported", work / "shards-imported")
    return found


def trials(work: Path) -> dict[str, Any]:
    """Seconds from the start of a Tune trial to its first batch out of the resident shards, trial by trial."""
    command = [sys.executable, str(HERE / "trial_start.py"), "--shards", str(work / "shards-1000000")]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def peers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Cells a second of other loaders on the same cells."""
    command = [sys.executable, str(HERE / "peers.py"), "--census", str(work / "census-100000"), "--json"]
    command += ["--shards", str(work / "shards-100000")]
    command += ["--peers-path", str(options.peers_path)] if options.peers_path else []
    command += ["--annbatch", str(options.annbatch)] if options.annbatch else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def kills(work: Path, number: int) -> dict[str, Any]:
    """Kills at random moments of a conversion."""
    path = work / "kills.toml"
    path.write_text(SPEC)
    command = [sys.executable, str(HERE / "kills.py"), "--census", str(work / "census-300000"), "--spec", str(path)]
    command += ["--work", str(work / "kills"), "--kills", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(work: Path) -> None:
    """Plant the Censuses and build the shards that the measurements read."""
    work.mkdir(parents=True, exist_ok=True)
    for cells in (100_000, 300_000, 1_000_000):
        plant(work / f"census-{cells}", n_cells=cells, n_genes=2_000)
    plant(work / "warm-census", n_cells=70_000, n_genes=2_000)
    for cells in (100_000, 1_000_000):
        build_shards(spec(2), str(work / f"census-{cells}"), work / f"shards-{cells}", say)
        read_manifest(work / f"shards-{cells}")


def main() -> int:
    """Measure what was asked for and put it into the results file, beside what stands there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="directory for Censuses and shards")
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/data-plane.json"))
    parser.add_argument(
        "--only", nargs="*", default=["exactness", "conversion", "scale", "stream", "trials", "peers", "kills"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--peers-path", type=Path, default=None, help="folder with tiledbsoma-ml")
    parser.add_argument("--h5ad", type=Path, default=None, help="raw counts to convert and compare too")
    parser.add_argument("--annbatch", type=Path, default=None, help="a Python 3.12 or newer with annbatch")
    options = parser.parse_args()
    work = options.work.resolve()
    prepare(work)
    measure = {
        "exactness": lambda: exactness(work, options.h5ad),
        "conversion": lambda: conversion(work, options.repeats),
        "scale": lambda: scale(work, options.repeats),
        "stream": lambda: stream(work, options.repeats),
        "trials": lambda: trials(work),
        "peers": lambda: peers(work, options),
        "kills": lambda: kills(work, options.kills),
    }
    for name in options.only:
        say(name)
        found = measure[name]()
        text = options.results.read_text() if options.results.is_file() else "{}"
        write_json(options.results, json.loads(text) | {name: found | {"machine": machine()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
