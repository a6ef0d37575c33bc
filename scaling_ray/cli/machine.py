"""``bench`` and ``doctor``: what this machine does and has."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_ray.cli.complete import specs
from scaling_ray.cli.declare import Verbs, add_group, add_verb, completed, local, positive
from scaling_ray.cli.given import flag, spec_of
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput

if TYPE_CHECKING:
    from scaling_ray.spec import SweepSpec

MADE_UP = {
    "size": "TINY",
    "genes": 512,
    "micro_batch": None,
    "cells_per_step": 32,
    "dropout": 0.0,
    "precision": "auto",
    "threads": 1,
    "stack": 1,
    "json": False,
}
"""What ``bench train`` measures where nothing is said; with --spec the spec says it."""


def add_bench(top: Verbs) -> None:
    """``bench stream`` and ``bench train``."""
    bench = add_group(top, "bench", "measure this machine")
    stream = add_verb(
        bench,
        "stream",
        bench_stream,
        "cells a second out of shards: streamed, from memory, and by bare pyarrow",
        "bench stream out/demo/shards --cells 100000",
        needs=("cluster",),
    )
    stream.add_argument("shards", metavar="SHARDS", help="directory or s3:// URI of the shards")
    stream.add_argument(
        "--genes", type=int, metavar="GENES", default=None, help="genes to read (all of the shards' if left out)"
    )
    stream.add_argument("--batch", type=int, metavar="CELLS", default=256, help="cells of a batch")
    stream.add_argument(
        "--cells", type=int, metavar="CELLS", default=1_000_000, help="cells to read, steady state, at the least"
    )
    stream.add_argument("--cpus", type=int, metavar="CPUS", default=2, help="CPUs of the private Ray")
    stream.add_argument("--json", action="store_true", help="as JSON")
    train = add_verb(
        bench,
        "train",
        bench_train,
        "cells a second that a size trains at on this machine, on made-up cells",
        "bench train --size S --genes 1024 --threads 2",
        "bench train --spec demo --out rates.json",
        needs=("train",),
    )
    train.add_argument("--size", metavar="SIZE", help="of the ladder: XXS, TINY, XS, S, M, L, XL")
    train.add_argument("--genes", type=int, metavar="GENES", help="genes of the panel")
    train.add_argument("--micro-batch", type=int, metavar="CELLS", help="cells of one pass (by size if left out)")
    train.add_argument("--cells-per-step", type=int, metavar="CELLS", help="cells of an update")
    train.add_argument("--dropout", type=float, metavar="SHARE", help="share of units dropped")
    train.add_argument("--precision", choices=["auto", "fp32", "bf16"], help="of matrix products")
    train.add_argument("--threads", type=int, metavar="THREADS", help="CPU threads")
    train.add_argument("--stack", type=int, metavar="MODELS", help="models trained as one; cells of all count")
    train.add_argument(
        "--seconds", type=positive, metavar="SECONDS", default=5.0, help="how long to measure, once warm"
    )
    train.add_argument("--json", action="store_true", help="as JSON")
    spec = train.add_argument(
        "--spec", metavar="SPEC.toml", default=None, help="measure every kind of run of this spec instead"
    )
    completed(spec, specs)
    train.set_defaults(**MADE_UP)
    train.add_argument(
        "--out", type=local, metavar="FILE.json", default=None, help="with --spec: file for `plan --rates`"
    )


def add_doctor(top: Verbs) -> None:
    """``doctor``."""
    verb = add_verb(top, "doctor", doctor, "what this machine has and lacks", "doctor --write-to out")
    verb.add_argument(
        "--write-to", type=local, metavar="DIR", default=Path("."), help="a directory that must be writable"
    )


def bench_stream(options: argparse.Namespace) -> int:
    """Measure reading."""
    from scaling_ray.shards.bench import bench_stream

    found = bench_stream(options.shards, options.genes, options.batch, options.cells, options.cpus)
    if options.json:
        print(json.dumps(found))
    else:
        for name in ("pyarrow", "", "resident"):
            rate = found[f"{name}_cells_per_second" if name else "cells_per_second"]
            shown = f"{rate:,.0f} cells/s" if rate else "not measured: too much for this machine's memory"
            print(f"{name or 'stream':9} {shown} of {found['genes']} genes")
    return 0


def bench_train(options: argparse.Namespace) -> int:
    """Measure training."""
    from scaling_ray.spec import parse_spec

    if options.stack <= 0:
        raise BadInput("V025", "--stack", options.stack, "must be more than 0")
    if options.spec is not None:
        for name, default in MADE_UP.items():
            if getattr(options, name) != default:
                raise BadInput(
                    "V034", flag(name), getattr(options, name), "is what the spec says; leave one of them out"
                )
        return _bench_spec(spec_of(options), options)
    if options.out is not None:
        raise BadInput("V031", "--out", str(options.out), "holds the rates of a spec; name one with --spec")
    precision = f'precision = "{options.precision}"'
    micro_batch = f"micro_batch = {options.micro_batch}" if options.micro_batch is not None else ""
    lines = f"dropout = {options.dropout}\nthreads = {options.threads}\n{precision}\n{micro_batch}"
    spec = parse_spec(
        f'name = "bench"\n[data]\ngenes = {options.genes}\n[grid]\nsizes = ["{options.size}"]\n'
        f"genes = [{options.genes}]\ncells = ['all']\nseeds = [1]\n[lr]\nrates = [1e-3]\n"
        f"[resources]\ncpus = {options.threads}\n[train]\ncells_per_step = {options.cells_per_step}\n{lines}\n",
        "bench train",
    )
    from scaling_ray.execution import device_here
    from scaling_ray.runs import runs_of
    from scaling_ray.train.bench import bench_run

    run = runs_of(spec, device_here())[0]
    found = bench_run(run, options.seconds, options.stack)
    print(json.dumps(found) if options.json else _bench_line(found))
    return 0


def _bench_spec(spec: SweepSpec, options: argparse.Namespace) -> int:
    """Measure every kind of run of a spec, as it would be carried out, for ``plan --rates``."""
    from scaling_ray.execution import cpu_named_here, device_here, gpu_here
    from scaling_ray.storage import output_directory, write_json
    from scaling_ray.sweep.cost import rate_name
    from scaling_ray.sweep.plan import make_plan
    from scaling_ray.train.bench import bench_run

    if options.out is None:
        raise BadInput("V026", "--out", None, "name the JSON file for the measured rates")
    output_directory(options.out.parent)
    _, runs = make_plan(spec, device_here() if spec.resources.device == "auto" else None)
    on_gpu = runs[0].execution.device == "cuda"
    machine = {"cpu": cpu_named_here(), "cores": os.cpu_count(), "gpu": gpu_here() if on_gpu else None}
    rates: dict[str, float] = {}
    for run in runs:
        name = rate_name(run, run.execution.stack)
        if name not in rates:
            found = bench_run(run, options.seconds, run.execution.stack)
            rates[name] = found["cells_per_second"]
            say(_bench_line(found))
            write_json(options.out, {"version": 2, "machine": machine, "cells_per_second": rates})
    print(options.out)
    return 0


def _bench_line(found: dict[str, Any]) -> str:
    stacked = f"{found['stacked']} as one, " if found["stacked"] > 1 else ""
    return (
        f"{found['size']:6} {found['cells_per_second']:>12,.1f} cells/s  {stacked}{found['genes']} genes, micro-batch "
        f"{found['micro_batch']} of {found['cells_per_step']}, {found['precision']}, dropout {found['dropout']:g}, "
        f"{found['threads']} thread(s): {found['gflops_per_second']:,.1f} GFLOP/s, {found['share_of_matmul']:.0%} of "
        f"the best matrix product here"
    )


def doctor(options: argparse.Namespace) -> int:
    """Look at this machine."""
    from scaling_ray.doctor import check_machine, format_findings, lacks_required

    findings = check_machine(options.write_to)
    print(format_findings(findings))
    return int(lacks_required(findings))
