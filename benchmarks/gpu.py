"""The evidence that needs a GPU, within eight minutes: each stage in a process of its own, results kept as they come.

``benchmarks/gpu.sh OUT`` runs it; ``--cpu`` measures small sizes on a CPU instead and says so in OUT/gpu.json. A stage
may use its part of the time that is left; one that fails, or that its time limit ends, is named with its last line and
what it had measured, and the next one begins. Everything printed goes to OUT/gpu.log. Nothing here judges a figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import machine, say

from scaling_ray.storage import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
GPU_SECONDS, CPU_SECONDS = 450.0, 105.0
GPU_START_SECONDS, CPU_START_SECONDS = 8.0, 7.0
"""What a stage's process needs before it measures anything: never taken from it by an earlier one."""
PARTS = {
    "tests": 35,
    "matmul": 12,
    "cells": 65,
    "stacks": 45,
    "reference": 45,
    "micro_batches": 30,
    "run": 200,
    "zero": 50,
    "grid": 20,
}
"""The stages in their order, each with its part of the time; what an early one leaves falls to the later ones."""
CPU_PARTS = PARTS | {"cells": 100, "run": 60}


def measure(name: str, options: argparse.Namespace) -> None:
    """The body of a stage's process: results go to OUT/part.json one by one."""
    import torch
    from gpu_stages import FULL, SMALL, STAGES, Job

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    found: dict[str, Any] = {}

    def report(what: str, value: Any) -> None:
        found[what] = value
        write_json(options.out / "part.json", found)
        say(f"{name}, {what}: {json.dumps(value)[:200]}")

    known = json.loads((options.out / "gpu.json").read_text())["stages"]
    STAGES[name](Job(SMALL if options.cpu else FULL, device, options.spec, known, report))


def carry_out(name: str, options: argparse.Namespace, limit_seconds: float) -> dict[str, Any]:
    """Run a stage in a process group of its own: how it ended, seconds, last line where it failed, what it found."""
    part, log = options.out / "part.json", options.out / "gpu.log"
    part.unlink(missing_ok=True)
    line = [sys.executable, __file__, str(options.out), "--stage", name, "--spec", *map(str, options.spec)]
    began, start = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            line + ["--cpu"] * options.cpu, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
        try:
            status = "failed" if process.wait(limit_seconds) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    entry = {"status": "absent" if "absent" in found else status, "seconds": time.monotonic() - began, "found": found}
    if status != "done":
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        entry |= {"limit_seconds": limit_seconds, "last_line": lines[-1] if lines else ""}
    return entry


def main() -> int:
    """Run the stages, each result written as it ends; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--spec", type=Path, nargs="*", default=sorted(REPOSITORY.glob("jobs/*.toml")))
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="in the order given")
    parser.add_argument("--budget", type=float, help="seconds in all")
    parser.add_argument("--commit", help="of these sources, where git cannot tell")
    parser.add_argument("--stage", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.stage:
        measure(options.stage, options)
        return 0
    about: dict[str, Any] = {"device": "cpu"}
    if not options.cpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU here; --cpu measures small sizes on the CPU")
        about = {"device": "cuda", "cuda": torch.version.cuda}
    options.out.mkdir(parents=True, exist_ok=True)
    sources = [path for folder in ("scaling_ray", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
    about |= machine(options.commit) | {"sources_sha256": digest}
    about |= {name: version(name) for name in ("torch", "numpy", "scipy", "pyarrow")}
    stages: dict[str, Any] = {}
    gpu, cpu = (GPU_SECONDS, GPU_START_SECONDS, PARTS), (CPU_SECONDS, CPU_START_SECONDS, CPU_PARTS)
    seconds, start_seconds, part_of = cpu if options.cpu else gpu
    ends = time.monotonic() + (options.budget or seconds)
    for number, name in enumerate(options.only):
        write_json(options.out / "gpu.json", {"version": 1, "machine": about, "stages": stages})
        parts = [part_of[later] for later in options.only[number:]]
        left = ends - time.monotonic() - start_seconds * len(parts)
        stages[name] = carry_out(name, options, max(0.0, start_seconds + left * parts[0] / sum(parts)))
        say(f"{name}: {stages[name]['status']} in {stages[name]['seconds']:.0f} s")
    write_json(options.out / "gpu.json", {"version": 1, "machine": about, "stages": stages})
    return int(any(stage["status"] not in ("done", "absent") for stage in stages.values()))


if __name__ == "__main__":
    sys.exit(main())
