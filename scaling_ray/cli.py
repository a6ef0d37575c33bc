"""The command line: verbs parse their arguments first and import what is heavy after.

Exit codes: 0 ok or complete, 1 some runs failed or files damaged, 2 bad input, 5 another driver holds the directory,
75 stopped on the way, call again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_ray import __version__
from scaling_ray.errors import BadInput, DamagedFiles, ScalingRayError

if TYPE_CHECKING:
    from scaling_ray.spec import SweepSpec

Handler = Callable[[argparse.Namespace], int]


def say(line: str) -> None:
    """A line of progress on standard error, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _census_plant(options: argparse.Namespace) -> int:
    from scaling_ray.planted.plant import plant

    print(plant(options.out, n_cells=options.cells, n_genes=options.genes, seed=options.seed, progress=say))
    return 0


def _census_import(options: argparse.Namespace) -> int:
    from scaling_ray.census.importer import import_h5ad

    print(import_h5ad(options.files, options.out, layer=options.layer, progress=say))
    return 0


def _shards_build(options: argparse.Namespace) -> int:
    from scaling_ray.spec import load_spec

    spec = load_spec(options.spec)
    if options.dry_run:
        from scaling_ray.shards.estimate import estimate, format_estimate

        found = estimate(spec, options.census)
        print(json.dumps(found, indent=1) if options.json else format_estimate(found))
        return 0
    if options.out is None:
        raise BadInput("--out", None, "name a directory or an s3:// URI for the shards (or ask for --dry-run)")
    from scaling_ray.shards.convert import build_shards

    manifest = build_shards(spec, options.census, options.out, say)
    for name, split in manifest.splits.items():
        say(f"{name}: {split.cells:,} cells ({split.fraction:.1%})")
    print(options.out)
    return 0


def _shards_verify(options: argparse.Namespace) -> int:
    from scaling_ray.shards.format import verify

    problems = verify(options.directory)
    if problems:
        raise DamagedFiles(problems)
    print(f"{options.directory}: whole")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from scaling_ray.spec import load_spec
    from scaling_ray.sweep.plan import format_plan, make_plan, read_rates

    plan = make_plan(load_spec(options.spec), rates=read_rates(options.rates) if options.rates else None)
    print(json.dumps(plan, indent=1) if options.json else format_plan(plan))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from scaling_ray.spec import load_spec

    load_spec(options.spec)
    from scaling_ray.sweep.run import run_sweep

    run_sweep(options.spec, options.shards, options.out, say)
    print(options.out)
    return 0


def _fit(options: argparse.Namespace) -> int:
    from scaling_ray.results.cohorts import fit_place
    from scaling_ray.storage import output_directory, write_json

    output_directory(options.out.parent)
    found = fit_place(options.table)
    write_json(options.out, found)
    headline = found["headline"]
    used = {name: column for name, column in found["columns_used"].items() if column is not None}
    say("columns used: " + ", ".join(n if n == column else f"{n} = {column}" for n, column in used.items()))
    print(f"{headline['verdict']}: {'; '.join(headline['reasons']) or headline['form']}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from scaling_ray.report.audit_page import build_audit

    page, found = build_audit(options.out, options.published)
    reported, supported = found["published"], found["supported"]
    print(f"reported: alpha {reported['alpha']!r}, a {reported['a']!r}, c {reported['c']!r}, R2 {reported['r2_log']!r}")
    low, high = supported["alpha"]["low"], supported["alpha"]["high"]
    print(f"supported: {supported['verdict']}; alpha {low:.2f} to {high:.2f} over declared choices of the same runs")
    print(page)
    return 0


def _report(options: argparse.Namespace) -> int:
    from scaling_ray.report.build import build_report

    print(build_report(options.sweep, options.out, beside=options.beside))
    return 0


def _status(options: argparse.Namespace) -> int:
    from scaling_ray.results.read import read_rows
    from scaling_ray.storage import open_place

    rows = read_rows(open_place(options.sweep, "SWEEP_DIR"))
    for row in rows:
        loss = "" if row.test_loss is None else f"test_loss {row.test_loss:.4f}"
        print(f"{row.status:8} {row.run_id:56} {loss}{row.failure or ''}")
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "running", "waiting", "failed")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0


def _track_replay(options: argparse.Namespace) -> int:
    from scaling_ray.records import ShardManifest
    from scaling_ray.spec import load_spec
    from scaling_ray.storage import Lease
    from scaling_ray.tracking.mlflow import replay, tracking_uri

    spec = load_spec(options.sweep / "spec.toml")
    manifest = ShardManifest.read(options.sweep / "shards_manifest.json")
    with Lease(options.sweep):
        replay(options.sweep, spec, manifest, spec.runs())
    print(tracking_uri(options.sweep))
    return 0


def _export(options: argparse.Namespace) -> int:
    from scaling_ray.sweep.export import export_model

    print(export_model(options.sweep, options.run_id, options.out, options.shards))
    return 0


def _embed(options: argparse.Namespace) -> int:
    from scaling_ray.embed import embed_h5ad

    embed_h5ad(
        options.model,
        options.file,
        options.out,
        batch_cells=options.batch,
        layer=options.layer,
        device=options.device,
        min_genes=options.min_genes,
        progress=say,
    )
    print(options.out)
    return 0


def _bench_stream(options: argparse.Namespace) -> int:
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


def _bench_train(options: argparse.Namespace) -> int:
    from scaling_ray.spec import load_spec, parse_spec

    for field, value in (("--seconds", options.seconds), ("--stack", options.stack)):
        if value <= 0:
            raise BadInput(field, value, "must be more than 0")
    if options.spec is not None:
        return _bench_spec(load_spec(options.spec), options)
    precision = f'precision = "{options.precision}"'
    micro_batch = f"micro_batch = {options.micro_batch}" if options.micro_batch else ""
    lines = f"dropout = {options.dropout}\nthreads = {options.threads}\n{precision}\n{micro_batch}"
    run = parse_spec(
        f'name = "bench"\n[data]\ngenes = {options.genes}\n[grid]\nsizes = ["{options.size}"]\n'
        f"genes = [{options.genes}]\ncells = ['all']\nseeds = [1]\n[lr]\nrates = [1e-3]\n"
        f"[resources]\ncpus = {options.threads}\n[train]\ncells_per_step = {options.cells_per_step}\n{lines}\n",
        "bench train",
    ).runs()[0]
    from scaling_ray.train.bench import bench_run

    found = bench_run(run, options.seconds, options.stack)
    print(json.dumps(found) if options.json else _bench_line(found))
    return 0


def _bench_spec(spec: SweepSpec, options: argparse.Namespace) -> int:
    """Measure every kind of run of a spec, as it would be carried out, for ``plan --rates``."""
    from scaling_ray.storage import output_directory, write_json
    from scaling_ray.sweep.plan import as_planned, make_plan, rate_name
    from scaling_ray.train.bench import bench_run

    if options.out is None:
        raise BadInput("--out", None, "name the JSON file for the measured rates")
    output_directory(options.out.parent)
    plan = make_plan(spec)
    members = {name: len(stack) for stack in plan["stacks"] for name in stack}
    rates: dict[str, float] = {}
    for run in as_planned(spec.runs(), plan):
        name = rate_name(run, members.get(run.run_id, 1))
        if name not in rates:
            found = bench_run(run, options.seconds, members.get(run.run_id, 1))
            rates[name] = found["cells_per_second"]
            say(_bench_line(found))
            write_json(options.out, {"version": 1, "cells_per_second": rates})
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


def _doctor(options: argparse.Namespace) -> int:
    from scaling_ray.doctor import check_machine, format_findings

    findings = check_machine(options.write_to)
    print(format_findings(findings))
    return int(any(finding.required and not finding.ok for finding in findings))


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = argparse.ArgumentParser(prog="scaling-ray", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(parent: argparse._SubParsersAction, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = parent.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        made.set_defaults(handler=handler)
        return made

    def group(name: str, about: str) -> argparse._SubParsersAction:
        return verbs.add_parser(name, help=about, description=about).add_subparsers(
            dest=f"{name}_verb", required=True, metavar="VERB"
        )

    census = group("census", "make a local Census")
    plant = verb(census, "plant", _census_plant, "draw cells whose best possible loss is known, in the Census layout")
    plant.add_argument("--out", type=Path, required=True, help="directory of the Census")
    plant.add_argument("--cells", type=int, default=8_000, help="number of cells")
    plant.add_argument("--genes", type=int, default=2_000, help="number of genes")
    plant.add_argument("--seed", type=int, default=0, help="seed of model and cells")
    importing = verb(census, "import", _census_import, "raw counts from .h5ad files into the Census layout")
    importing.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.h5ad", help="files with raw counts, one data set each"
    )
    importing.add_argument("--out", type=Path, required=True, help="directory of the Census")
    importing.add_argument(
        "--layer", default=None, help="where the counts are: X, raw.X or a layer's name (found if left out)"
    )

    shards = group("shards", "make and check shards")
    build = verb(shards, "build", _shards_build, "convert the cells a spec asks for into Parquet shards")
    build.add_argument("spec", type=Path, metavar="SPEC.toml", help="the sweep's spec; its [data] table is used")
    build.add_argument("--census", required=True, help="directory, URI or version (such as 2025-11-08) of a Census")
    build.add_argument("--out", default=None, help="directory or s3:// URI of the shards; the same one again goes on")
    build.add_argument("--dry-run", action="store_true", help="say what it would read, write and take; build nothing")
    build.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    check = verb(shards, "verify", _shards_verify, "name each missing, damaged or foreign file")
    check.add_argument("directory", metavar="DIR", help="directory or s3:// URI of the shards")

    plan = verb(verbs, "plan", _plan, "what a sweep will do and cost: grid, parameters, TFLOP, MiB, hours")
    plan.add_argument("spec", type=Path, metavar="SPEC.toml", help="the sweep's spec")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument("--rates", type=Path, default=None, help="JSON of measured rates: hours follow from them")
    sweep = verb(verbs, "sweep", _sweep, "run every cell of the grid that has no result yet")
    sweep.add_argument("spec", type=Path, metavar="SPEC.toml", help="the sweep's spec")
    sweep.add_argument("--shards", required=True, help="directory or s3:// URI of the shards")
    sweep.add_argument("--out", type=Path, required=True, help="directory of the sweep; the same one again goes on")
    fit = verb(verbs, "fit", _fit, "fit scaling laws to a sweep or to any table: verdict, intervals, declared choices")
    fit.add_argument(
        "table", type=Path, metavar="SWEEP_DIR|TABLE", help="a sweep, or .csv/.parquet with columns params and loss"
    )
    fit.add_argument("--out", type=Path, required=True, help="JSON file to write")
    audit = verb(verbs, "audit", _audit, "re-read the published law: what was reported, what the same runs support")
    audit.add_argument("--out", type=Path, required=True, help="directory of audit.json and audit.html")
    audit.add_argument(
        "--published",
        type=Path,
        default=None,
        help="directory of the published run tables (the shipped ones if left out)",
    )
    report = verb(verbs, "report", _report, "write a sweep's report: report.html, report.json, figures")
    report.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="directory of the sweep")
    report.add_argument("--out", type=Path, required=True, help="directory of the report")
    report.add_argument(
        "--beside", type=Path, default=None, metavar="SWEEP_DIR", help="another sweep, of the other recipe, to compare"
    )
    status = verb(verbs, "status", _status, "a line per run of a sweep")
    status.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="directory of the sweep")
    track = group("track", "MLflow tracking of a sweep")
    replay = verb(track, "replay", _track_replay, "log to MLflow what a sweep's files hold and MLflow does not")
    replay.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="directory of the sweep")
    export = verb(verbs, "export", _export, "one trained model as a directory: model.safetensors and model.json")
    export.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="directory of the sweep")
    export.add_argument("run_id", metavar="RUN_ID", help="a finished run, as `scaling-ray status` names it")
    export.add_argument("--out", required=True, help="directory of the model; it appears whole or not at all")
    export.add_argument(
        "--shards", default=None, help="directory or s3:// URI of the shards, for a sweep that kept no genes.parquet"
    )
    embed = verb(verbs, "embed", _embed, "put new cells through a model: a copy of their file with an embedding each")
    embed.add_argument("model", type=Path, metavar="MODEL", help="directory that `scaling-ray export` made")
    embed.add_argument("file", type=Path, metavar="FILE.h5ad", help="cells with raw counts")
    embed.add_argument(
        "--out",
        required=True,
        metavar="FILE.h5ad",
        help="file to write, or replace: the cells with obsm['X_scaling_ray'], float32 of (cells, width)",
    )
    embed.add_argument("--batch", type=int, default=64, help="cells in the network at a time")
    embed.add_argument(
        "--layer", default=None, help="where the counts are: X, raw.X or a layer's name (found if left out)"
    )
    embed.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the network runs, in fp32")
    embed.add_argument(
        "--min-genes", type=float, default=0.5, metavar="FRACTION", help="share of the model's genes FILE must have"
    )
    bench = group("bench", "measure this machine")
    stream = verb(
        bench, "stream", _bench_stream, "cells a second out of shards: streamed, resident, and by bare pyarrow"
    )
    stream.add_argument("shards", metavar="SHARDS", help="directory or s3:// URI of the shards")
    stream.add_argument("--genes", type=int, default=None, help="genes to read (all of the shards' if left out)")
    stream.add_argument("--batch", type=int, default=256, help="cells of a batch")
    stream.add_argument("--cells", type=int, default=1_000_000, help="cells to read, steady state, at the least")
    stream.add_argument("--cpus", type=int, default=2, help="CPUs of the private Ray")
    stream.add_argument("--json", action="store_true", help="as JSON")
    train = verb(bench, "train", _bench_train, "cells a second that a size trains at on this machine, on made-up cells")
    train.add_argument("--size", default="TINY", help="a size of the ladder: XXS, TINY, XS, S, M, L, XL")
    train.add_argument("--genes", type=int, default=512, help="genes of the panel")
    train.add_argument("--micro-batch", type=int, default=None, help="cells of one pass (by size if left out)")
    train.add_argument("--cells-per-step", type=int, default=32, help="cells of an update")
    train.add_argument("--dropout", type=float, default=0.0, help="share of units dropped")
    train.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    train.add_argument("--threads", type=int, default=1, help="CPU threads")
    train.add_argument("--stack", type=int, default=1, help="models trained as one; cells of all count")
    train.add_argument("--seconds", type=float, default=5.0, help="how long to measure, once warm")
    train.add_argument("--json", action="store_true", help="as JSON")
    train.add_argument("--spec", type=Path, default=None, help="measure every kind of run of this spec instead")
    train.add_argument("--out", type=Path, default=None, help="with --spec: JSON file for `plan --rates`")
    doctor = verb(verbs, "doctor", _doctor, "what this machine has and lacks")
    doctor.add_argument("--write-to", type=Path, default=Path("."), help="a directory that must be writable")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors of this package become one line and an exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.handler(options))
    except ScalingRayError as error:
        print(f"scaling-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("scaling-ray: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
