"""Measure what scheduling costs: idle CPUs on a cluster, seconds beside training, memory of the head per setting.

Writes reports/benchmarks/scheduling.json. Stages:

groups    6 groups of two workers and 12 single runs on 4 nodes of 2 CPUs (all on this machine): the most groups at the
          same time, and the share of the nodes' CPUs that no unit holds between the first and the last second of
          training. A unit holds its CPUs from the start of its attempt to its result, as its result says.
overhead  24 settings of about 10 s and 200 of about half a second on a private cluster of 2 CPUs: seconds of the whole
          command against half of the seconds inside the trials.
chaos     12 single runs and 12 groups on three nodes, 20 kills with -9 at random moments, four of each kind, each
          followed by the same command where it ended: whether its losses are those of an undisturbed sweep.
many      settings without work through the scheduler: seconds and memory of the driver and of Ray's control service per
          setting, in quarters of the sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from fake_cluster import KINDS, FakeCluster, write_spec
from machine import machine, say

from scaling_ray.storage import write_json

STAGES = ("groups", "overhead", "chaos", "many")
NODES, CPUS = 4, 2


def spec_text(sizes: dict[str, int], seeds: int, cells_seen: int, evaluations: int = 20) -> str:
    """A sweep of tiny sizes, by name with their workers, each with so many seeds."""
    text = 'name = "scheduling"\n[data]\ngenes = 64\n[grid]\ngenes = [64]\ncells = ["all"]\n'
    text += f"sizes = {list(sizes)}\nseeds = {list(range(1, seeds + 1))}\n"
    for name in sizes:
        text += f"[sizes.{name}]\nwidth = 8\nlayers = 1\nheads = 2\nfeedforward = 1\n"
    text += f"[train]\nmax_cells_seen = {cells_seen}\ncells_per_step = 8\nmicro_batch = 4\npatience_evaluations = 0\n"
    text += f'evaluations = {evaluations}\n[lr]\nrule = "fixed"\nrates = [0.01]\n[resources]\nstack = 1\n'
    workers = {name: count for name, count in sizes.items() if count > 1}
    return text + "workers = { " + ", ".join(f"{name} = {count}" for name, count in workers.items()) + " }\n"


def results(out: Path) -> list[dict[str, Any]]:
    """result.json of every run that has one."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/result.json"))]


def command(spec: Path, shards: Path, out: Path) -> list[str]:
    """The command of a sweep."""
    return [sys.executable, "-m", "scaling_ray.cli", "sweep", str(spec), "--shards", str(shards), "--out", str(out)]


def bare() -> dict[str, str]:
    """This environment without variables of Ray's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def held(spans: Sequence[tuple[float, float, int]]) -> tuple[float, int]:
    """(share of the nodes' CPUs that nobody held, most groups at once) of units' (begin, end, CPUs)."""
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    used = sum((end - begin) * cpus for begin, end, cpus in spans)
    edges = sorted({edge for begin, end, _ in spans for edge in (begin, end)})
    at_once = max(sum(begin <= edge < end for begin, end, cpus in spans if cpus > 1) for edge in edges)
    return 1 - used / ((last - first) * NODES * CPUS), at_once


def groups(work: Path, shards: Path, cells_seen: int) -> dict[str, Any]:
    """Groups beside single runs on a cluster of several nodes."""
    spec, out = work / "groups.toml", work / "groups"
    spec.write_text(spec_text({"ONE": 1, "UNO": 1, "TWO": 2}, 6, cells_seen))
    with FakeCluster(NODES, CPUS) as cluster:
        began = time.monotonic()
        sweep = cluster.sweep(spec, shards, out, said=work / "groups.log")
        code = sweep.wait()
        seconds = time.monotonic() - began
    done = results(out)
    ends = [(one["ended_ms"] / 1e3 - one["wall_seconds"], one["ended_ms"] / 1e3, one["workers"]) for one in done]
    idle, at_once = held(ends)
    return {
        "exit": code,
        "runs": len(done),
        "cells_seen": cells_seen,
        "seconds": round(seconds, 1),
        "idle_share": round(idle, 3),
        "groups_at_once": at_once,
        "median_seconds": {
            workers: round(sorted(end - begin for begin, end, count in ends if count == workers)[len(ends) // 6], 1)
            for workers in (1, 2)
        },
    }


def overhead(work: Path, shards: Path, settings: int, cells_seen: int, factor: float) -> dict[str, Any]:
    """Seconds of a whole sweep against those inside its trials."""
    spec, out = work / f"overhead-{settings}.toml", work / f"overhead-{settings}"
    spec.write_text(spec_text({"ONE": 1}, settings, cells_seen, evaluations=4))
    began = time.monotonic()
    subprocess.run(command(spec, shards, out), env=bare(), stderr=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - began
    inside = sum(one["wall_seconds"] for one in results(out))
    return {
        "settings": settings,
        "seconds": round(seconds, 1),
        "inside_trials": round(inside, 1),
        "bar": round(20 + factor * inside / 2, 1),
        "beside": round(seconds - inside / 2, 1),
    }


def losses(out: Path) -> dict[str, tuple[float, float]]:
    """Validation and test loss of every run."""
    return {one["run_id"]: (one["val_loss"], one["test_loss"]) for one in results(out)}


def chaos(work: Path, shards: Path, of_each: int) -> dict[str, Any]:
    """One sweep disturbed by kills of every kind, against one left alone."""
    spec = write_spec(work / "chaos.toml", 12, 12, cells_seen=20_000)
    with FakeCluster(3) as cluster:
        if (code := cluster.sweep(spec, shards, work / "calm", said=work / "calm.log").wait()) != 0:
            raise SystemExit(f"the undisturbed sweep ended with {code}; see {work / 'calm.log'}")
    chance, out, said = random.Random(7), work / "chaos", work / "chaos.log"
    left, kills, calls, began = list(KINDS * of_each), list[str](), 1, time.monotonic()
    with FakeCluster(3) as cluster:
        sweep = cluster.sweep(spec, shards, out, said)
        while True:
            pause = time.monotonic() + chance.uniform(6, 18)
            while time.monotonic() < pause and sweep.poll() is None:
                time.sleep(0.3)
            if sweep.poll() == 0:
                break
            if sweep.poll() is not None:
                sweep, calls = cluster.sweep(spec, shards, out, said), calls + 1
            elif left and cluster.strike(left[0], sweep, chance):
                kills.append(left.pop(0))
                say(f"killed: {kills[-1]}, {len(results(out))} runs done")
            if time.monotonic() - began > 3_000:
                sweep.kill()
                raise SystemExit(f"the disturbed sweep did not end; {len(left)} kills were left")
    calm, disturbed = losses(work / "calm"), losses(out)
    events = [json.loads(line)["cause"] for line in (out / "events.jsonl").read_text().splitlines()]
    return {
        "settings": len(calm),
        "kills": {kind: kills.count(kind) for kind in KINDS},
        "calls": calls,
        "seconds": round(time.monotonic() - began),
        "same_losses": sum(disturbed.get(run) == loss for run, loss in calm.items()),
        "largest_difference": max(
            abs(a - b) for run, loss in calm.items() for a, b in zip(loss, disturbed[run], strict=True)
        ),
        "events": {cause: events.count(cause) for cause in sorted(set(events))},
        "tracebacks": said.read_text().count("Traceback"),
    }


class Memory(threading.Thread):
    """Samples the memory of a driver and of the control service below it, beside the number of finished runs."""

    def __init__(self, process: psutil.Process, out: Path) -> None:
        super().__init__(daemon=True)
        self._process, self._out, self.done = process, out, threading.Event()
        self.rows: list[tuple[float, int, float, float]] = []

    def run(self) -> None:
        """Until ``done``: (seconds, runs with a result, MiB of the driver, MiB of the control service)."""
        began = time.monotonic()
        while not self.done.wait(2.0):
            try:
                service = [one for one in self._process.children(recursive=True) if one.name() == "gcs_server"]
                memory = [self._process.memory_info().rss, sum(one.memory_info().rss for one in service)]
            except psutil.Error:
                continue
            finished = sum(1 for _ in self._out.glob("runs/*/result.json"))
            self.rows.append((time.monotonic() - began, finished, memory[0] / 2**20, memory[1] / 2**20))


def many(work: Path, shards: Path, settings: int) -> dict[str, Any]:
    """Settings of one update each."""
    spec, out = work / "many.toml", work / "many"
    spec.write_text(spec_text({"ONE": 1}, settings, 8, evaluations=1))
    with open(work / "many.log", "w") as log:
        process = subprocess.Popen(command(spec, shards, out), env=bare(), stderr=log)
        memory = Memory(psutil.Process(process.pid), out)
        memory.start()
        code = process.wait()
    memory.done.set()
    memory.join()
    marks = [settings * part // 4 for part in range(1, 5)]
    at = [next((row for row in memory.rows if row[1] >= mark), memory.rows[-1]) for mark in marks]
    return {
        "exit": code,
        "settings": settings,
        "rows": [
            dict(zip(("seconds", "runs", "driver_mib", "service_mib"), map(round, row), strict=True)) for row in at
        ],
    }


def main() -> int:
    """Run the stages asked for and write what they gave beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new directory for the sweeps")
    parser.add_argument("--shards", type=Path, required=True, help="directory of shards with 64 genes or more")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/scheduling.json"))
    parser.add_argument("--cells-seen", type=int, default=60_000, help="of a run of the stage groups")
    parser.add_argument("--settings", type=int, default=2_000, help="of the stage many")
    parser.add_argument("--cells-per-second", type=float, default=4_000, help="that one run trains at here")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    for stage in options.only:
        say(stage)
        if stage == "groups":
            found[stage] = groups(options.work, options.shards, options.cells_seen)
        elif stage == "overhead":
            long, short = (int(options.cells_per_second * seconds) // 8 * 8 for seconds in (10, 0.5))
            found[stage] = [
                overhead(options.work, options.shards, 24, long, 1.10),
                overhead(options.work, options.shards, 200, short, 1.15),
            ]
        elif stage == "chaos":
            found[stage] = chaos(options.work, options.shards, 4)
        else:
            found[stage] = many(options.work, options.shards, options.settings)
        say(json.dumps(found[stage]))
        found["machine"] = machine()
        write_json(options.results, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
