"""Measure what tracking costs a sweep: training speed while the server is away, and how far a busy server lags behind.

Writes reports/benchmarks/tracking.json. Stages:

outage  one run of a real sweep on one CPU, logged to a real server over HTTP: cells a second with the server there all
        along, and with it stopped (SIGSTOP) for the middle third; pairs of both, one after the other.
lag     32 runs whose rows grow by one of training and half a one of validation a second, followed to one server: age of
        the newest row that the server holds of each run, asked once a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from machine import machine, say
from scheduling import command, results, spec_text

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from tracked_sweeps import begin_sweep, free_port, mlflow_server, token_of, write_rows  # noqa: E402

from scaling_ray.storage import write_json  # noqa: E402
from scaling_ray.tracking.follower import Follower  # noqa: E402
from scaling_ray.tracking.tracker import Tracker  # noqa: E402

STAGES = ("outage", "lag")


def belongs(process: psutil.Process, port: int) -> bool:
    """Whether a process is the server at a port, or one of its workers."""
    try:
        lines = [" ".join(one.cmdline()) for one in (process, *process.parents())]
    except psutil.Error:
        return False
    return any("mlflow server" in line and str(port) in line for line in lines)


def trained(work: Path, shards: Path, name: str, cells_seen: int, away: bool) -> dict[str, float]:
    """Cells a second of one run; where the server is ``away``, it is so for the middle third of the updates."""
    spec, out, port = work / f"{name}.toml", work / name, free_port()
    spec.write_text(spec_text({"ONE": 1}, 1, cells_seen, evaluations=40) + "cpus = 1\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"

    def progress() -> float:
        rows = [path.read_text().splitlines() for path in out.glob("runs/*/attempts/*/metrics.jsonl")]
        return max((json.loads(lines[-1])["cells_seen"] for lines in rows if lines), default=0) / cells_seen

    def until(share: float) -> None:
        while process.poll() is None and progress() < share:
            time.sleep(0.2)

    with mlflow_server(work / f"{name}-server", port):
        process = subprocess.Popen(command(spec, shards, out), env=environment, stderr=subprocess.DEVNULL)
        if away:
            until(1 / 3)
            # stopped and not killed: a start of the server on this machine would take CPU of the training's
            stopped = [one for one in psutil.process_iter() if belongs(one, port)]
            for one in stopped:
                one.suspend()
            until(2 / 3)
            for one in stopped:
                one.resume()
        process.wait()
    (done,) = results(out)
    return {"cells_per_second": round(done["cells_seen"] / done["train_seconds"], 1), "exit": process.returncode}


def outage(work: Path, shards: Path, cells_seen: int, pairs: int) -> dict[str, Any]:
    """Pairs of an undisturbed run and one whose server goes away; each other pair the other way round."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        for away in (False, True) if pair % 2 == 0 else (True, False):
            one = trained(work, shards, f"outage-{pair}-{away}", cells_seen, away)
            say(f"{'away' if away else 'there'}: {one}")
            found[away].append(one["cells_per_second"])
    ratios = [there / away for away, there in zip(found[False], found[True], strict=True)]
    return {
        "cells_seen": cells_seen,
        "there": found[False],
        "away": found[True],
        "away_over_there": [round(ratio, 4) for ratio in ratios],
        "median": round(statistics.median(ratios), 4),
    }


def lag(work: Path, seconds: int, runs: int) -> dict[str, Any]:
    """Age of the newest row on the server, over runs and time."""
    from mlflow.tracking import MlflowClient

    swept, port, said = begin_sweep(work / "lag", seeds=runs // 8), free_port(), list[str]()
    uri, ages = f"http://127.0.0.1:{port}", list[float]()
    began = time.time()
    start_ms = int(began * 1000)

    def grow() -> None:
        for step in range(1, seconds + 1):
            while time.time() < began + step:
                time.sleep(0.02)
            for number, run in enumerate(swept.runs):
                write_rows(swept.files, run, token_of(1, start_ms + number), start_ms, range(step, step + 1))

    for run in swept.runs:
        swept.files.run(run.run_id).prepare(run)
    with mlflow_server(work / "lag-server", port):
        began = time.time()
        start_ms = int(began * 1000)
        follower = Follower(
            lambda: Tracker(swept.files, swept.spec, swept.manifest, uri), lambda: swept.runs, said.append
        )
        writer = threading.Thread(target=grow)
        writer.start()
        follower.start()
        client, experiment = MlflowClient(uri), None
        while writer.is_alive():
            time.sleep(1.0)
            experiment = experiment or client.get_experiment_by_name("scaling_ray/tracked")
            if experiment is None:
                continue
            there = client.search_runs([experiment.experiment_id], max_results=1000)
            steps = [run.data.metrics.get("curve/optimizer_steps", 0.0) for run in there if run.data.params]
            if time.time() - began > 20:
                ages += [time.time() - began - step for step in steps]
        follower.finish(failed=False, timeout_seconds=300)
    ages.sort()
    return {
        "runs": len(swept.runs),
        "seconds": seconds,
        "rows_per_second": 1.5 * len(swept.runs),
        "median_lag_seconds": round(statistics.median(ages), 1),
        "95%_lag_seconds": round(ages[int(0.95 * len(ages))], 1),
        "said": said,
    }


def main() -> int:
    """Run the stages asked for and write what they gave beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new directory for the sweeps")
    parser.add_argument("--shards", type=Path, required=True, help="directory of shards with 64 genes or more")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/tracking.json"))
    parser.add_argument("--cells-seen", type=int, default=240_000, help="of a run of the stage outage")
    parser.add_argument("--pairs", type=int, default=4)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    for stage in options.only:
        say(stage)
        if stage == "outage":
            found[stage] = outage(options.work, options.shards, options.cells_seen, options.pairs)
        else:
            found[stage] = lag(options.work, 90, 32)
        say(json.dumps(found[stage]))
        found["machine"] = machine()
        write_json(options.results, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
