"""What each verb of the command line does: parsed arguments in, exit code out. Heavy imports stand in the functions."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_ray.errors import BadInput, DamagedFiles

if TYPE_CHECKING:
    from scaling_ray.census.beliefs import Rules
    from scaling_ray.spec import SweepSpec


def say(line: str) -> None:
    """A line of progress on standard error, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _spec_of(options: argparse.Namespace) -> SweepSpec:
    """The spec of a verb that takes one; ``options.spec`` becomes the path of its file."""
    from scaling_ray.spec import load_spec
    from scaling_ray.specs import spec_path

    options.spec = spec_path(options.spec)
    return load_spec(options.spec)


def init(options: argparse.Namespace) -> int:
    """Write, print or list specs with every key explained."""
    from scaling_ray.specs import about_example, example_names

    if options.list:
        print("\n".join(f"{name:17} {about_example(name)}" for name in example_names()))
        return 0
    if options.name is None:
        remedy = f"name an example ({', '.join(example_names())}), or a new sweep"
        raise BadInput("NAME", None, remedy)
    from scaling_ray.specs.annotated import annotated_spec
    from scaling_ray.storage import create_if_absent, output_directory

    text = annotated_spec(options.name)
    if options.out is None:
        print(text, end="")
        return 0
    output_directory(options.out.parent)
    if not create_if_absent(options.out, text):
        raise BadInput("--out", str(options.out), "exists; name another file, or remove it")
    say(f"next: scaling-ray plan {options.out}, then scaling-ray run {options.out} --out DIR")
    print(options.out)
    return 0


def run(options: argparse.Namespace) -> int:
    """The whole path, from cells to a report."""
    if options.cells is not None:
        return _run_cells(options)
    for name, default in _READING.items():
        if getattr(options, name) != default:
            raise BadInput(f"--{name.replace('_', '-')}", getattr(options, name), "goes with --cells FILE")
    if options.split is not None:
        raise BadInput("--split", options.split, "goes with --cells FILE; a spec says it as data.split_by")
    if options.spec is None:
        raise BadInput("SPEC.toml", None, "name a spec, or your own files of cells with --cells FILE")
    _spec_of(options)
    from scaling_ray.pipeline import run_pipeline

    given = {"census": options.census, "shards": options.shards, "cluster": options.cluster}
    print(run_pipeline(options.spec, options.out, progress=say, **given))
    return 0


def _run_cells(options: argparse.Namespace) -> int:
    """The whole path from somebody's own files."""
    for name in ("census", "shards"):
        if getattr(options, name) is not None:
            raise BadInput(f"--{name}", getattr(options, name), "does not go with --cells; name one of them")
    misplaced = [str(file) for file in options.cells if file.suffix == ".toml"]
    if misplaced:
        raise BadInput("--cells", misplaced[0], "is a spec; name it before --cells")
    if options.spec is None:
        options.spec = "cells"
    _spec_of(options)
    from scaling_ray.pipeline import run_cells

    rules, split = _reading_rules(options), options.split
    print(run_cells(options.cells, options.spec, options.out, rules=rules, split_by=split, progress=say))
    return 0


_READING: dict[str, Any] = {
    "layer": None,
    "donor": [],
    "organism": None,
    "genes": "union",
    "gene_ids": "mapped",
    "trust_counts": False,
    "cut_counts": False,
    "title": None,
    "source": None,
}
"""The flags that say how files of cells are read, with the values of those that nobody gave."""


def _reading_rules(options: argparse.Namespace) -> Rules:
    from scaling_ray.census.beliefs import Rules

    given = {name: getattr(options, name) for name in _READING}
    return Rules(**given | {"donor": tuple(options.donor)})


def census_plant(options: argparse.Namespace) -> int:
    """Plant a Census."""
    from scaling_ray.planted.plant import plant, plant_law

    draw = plant_law if options.law else plant
    sizes = {"n_cells": options.cells, "n_genes": options.genes}
    given = {name: size for name, size in sizes.items() if size is not None}
    print(draw(options.out, seed=options.seed, progress=say, **given))
    return 0


def census_import(options: argparse.Namespace) -> int:
    """Import files of cells into a Census."""
    from scaling_ray.census.importer import import_h5ad

    print(import_h5ad(options.files, options.out, rules=_reading_rules(options), progress=say))
    return 0


def census_check(options: argparse.Namespace) -> int:
    """Say what an import would believe of files."""
    from scaling_ray.census.importer import check_files

    check_files(options.files, _reading_rules(options), print)
    return 0


def shards_build(options: argparse.Namespace) -> int:
    """Build shards, or say what that would take."""
    spec = _spec_of(options)
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


def shards_verify(options: argparse.Namespace) -> int:
    """Check every file of some shards."""
    from scaling_ray.shards.format import verify

    problems = verify(options.directory)
    if problems:
        raise DamagedFiles(problems)
    print(f"{options.directory}: whole")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Say what a sweep will do and cost."""
    from scaling_ray.public.plans import plan_document
    from scaling_ray.spec import BudgetSpec
    from scaling_ray.sweep.plan_text import format_plan

    spec, limits = _spec_of(options), {name: getattr(options, name) for name in BudgetSpec.model_fields}
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')}", value, "must be more than 0")
    plan = plan_document(spec, options.rates, options.cluster, limits)
    print(json.dumps(plan, indent=1) if options.json else format_plan(plan))
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Train what a sweep lacks."""
    _spec_of(options)
    from scaling_ray.sweep.run import run_sweep

    run_sweep(options.spec, options.shards, options.out, say, options.cluster)
    print(options.out)
    return 0


def fit(options: argparse.Namespace) -> int:
    """Fit laws to a sweep or a table."""
    from scaling_ray.storage import output_directory, write_json

    output_directory(options.out.parent)
    if str(options.table).startswith("s3://") or Path(options.table).is_dir():
        found = _fit_sweep(options)
    else:
        found = _fit_table(options)
    write_json(options.out, found)
    from scaling_ray.results.table_fit import said

    print("\n".join(said(found)))
    return 0


def _fit_sweep(options: argparse.Namespace) -> dict[str, Any]:
    from scaling_ray.results.cohorts import fit_place

    for name in ("same", "by", "last", "best", "loss", "log_loss"):
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise BadInput(flag, getattr(options, name), "is for tables; of a sweep, fit its results.csv")
    found = fit_place(options.table)
    _say_columns(found)
    return found


def _fit_table(options: argparse.Namespace) -> dict[str, Any]:
    from scaling_ray.results.foreign import read_table
    from scaling_ray.results.table_fit import fit_read_table

    table = read_table(
        options.table,
        same=options.same,
        by=options.by,
        last=options.last,
        best=options.best,
        loss=options.loss,
        log_loss=options.log_loss,
    )
    found = fit_read_table(table)
    for name, part in table.parts.items() or [("", table)]:
        _say_columns(found["cohorts"][name] if name else found, name)
        for note in part.notes:
            say(f"{name}: {note}" if name else note)
    return found


def _say_columns(found: dict[str, Any], part: str = "") -> None:
    """Which column was read as what, and which rows were left out and why."""
    before = f"{part}: " if part else ""
    used = {name: column for name, column in found["columns_used"].items() if column is not None}
    say(before + "columns used: " + ", ".join(n if n == column else f"{n} = {column}" for n, column in used.items()))
    for left_out in found["excluded"]:
        say(f"{before}{left_out['runs']} runs left out: {left_out['reason']}")


def audit(options: argparse.Namespace) -> int:
    """Re-read the published law."""
    from scaling_ray.public.audits import summary
    from scaling_ray.report.audit_page import build_audit

    page, found = build_audit(options.out, options.published)
    print("\n".join(summary(found)))
    print(page)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write a sweep's report, and log it where the sweep is tracked."""
    from scaling_ray.report.build import build_report
    from scaling_ray.results.sweep_files import SweepFiles
    from scaling_ray.tracking.report import track_report

    page = build_report(options.sweep, options.out, beside=options.beside)
    where = track_report(SweepFiles.at(options.sweep), options.out, say)
    if where is not None:
        say(f"in MLflow: {where}")
    print(page)
    return 0


def reference(options: argparse.Namespace) -> int:
    """Keep what a sweep found as a reference."""
    from scaling_ray.reproduction.record import record_sweep, record_table
    from scaling_ray.storage import output_directory, write_atomic

    output_directory(options.out.parent)
    if str(options.sweep).startswith("s3://") or Path(options.sweep).is_dir():
        for name in ("spec", "manifest", "source", "same"):
            if getattr(options, name):
                raise BadInput(f"--{name}", getattr(options, name), "is for tables; a sweep has its own")
        record = record_sweep(options.sweep, options.loss, options.name)
    else:
        from scaling_ray.specs import spec_path

        record = record_table(
            options.sweep,
            name=options.name or Path(options.sweep).stem,
            spec=None if options.spec is None else spec_path(options.spec),
            manifest=options.manifest,
            loss=options.loss,
            same=options.same,
            source=options.source,
        )
    write_atomic(options.out, record.to_json())
    runs = sum(len(setting.losses) for setting in record.settings)
    say(f"{record.name}: {runs} runs in {len(record.settings)} settings, a drop of {record.drop():.4g}")
    print(options.out)
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """Repeat a sweep and compare it with a reference."""
    spec = _spec_of(options)
    from scaling_ray.reproduce import UNPINNED, Tick, reproduce, what_a_release_changes
    from scaling_ray.reproduction.record import SweepRecord
    from scaling_ray.reproduction.ticks import parse_tick

    if options.census in UNPINNED:
        for line in what_a_release_changes(spec, SweepRecord.read(options.against)):
            print(line)
        return 0
    if options.tick is None:
        for name in ("max_age", "every"):
            if getattr(options, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')}", getattr(options, name), "belongs to a --tick; name both")
    tick = None if options.tick is None else Tick(parse_tick(options.tick), options.max_age, options.every)
    outcome = reproduce(
        options.spec,
        options.against,
        options.out,
        census=options.census,
        shards=options.shards,
        seeds=options.seeds,
        tolerance=options.tolerance,
        tick=tick,
        webhook=options.webhook,
        progress=say,
    )
    print(outcome.summary)
    return outcome.exit_code


def status(options: argparse.Namespace) -> int:
    """Say how a sweep stands, once or until it has ended."""
    from scaling_ray.results.standing import StandingReader
    from scaling_ray.results.standing_text import as_json, run_lines, short_line, standing_lines
    from scaling_ray.results.sweep_files import SweepFiles

    if options.watch is not None and options.watch <= 0:
        raise BadInput("--watch", options.watch, "must be more than 0 seconds")
    reader, on_terminal = StandingReader(SweepFiles.at(options.sweep, "SWEEP_DIR")), sys.stdout.isatty()
    while True:
        standing = reader.read()
        watched = options.watch is not None and not standing.has_ended
        if options.json:
            print(json.dumps(as_json(standing), indent=None if options.watch else 1), flush=True)
        elif options.watch is not None and watched and not on_terminal:
            print(f"{time.strftime('%H:%M:%S')} {short_line(standing)}", flush=True)
        else:
            clear = "\x1b[H\x1b[2J" if options.watch is not None and on_terminal else ""
            lines = run_lines(standing) if options.runs else standing_lines(standing)
            print(clear + "\n".join(lines), flush=True)
        if not watched:
            return 0
        time.sleep(options.watch)


def node_watch(options: argparse.Namespace) -> int:
    """Watch this machine for a notice of its end, or drain it now."""
    from scaling_ray.sweep.notices import drain_now, watch_node

    if options.drain_now:
        drain_now(options.deadline, options.node_id, say)
        return 0
    watch_node(
        options.provider,
        options.metadata_url,
        options.every,
        options.once,
        options.node_id,
        options.rebalance,
        say,
    )
    return 0


def track_replay(options: argparse.Namespace) -> int:
    """Log to MLflow what it lacks."""
    from scaling_ray.results.sweep_files import LEASE, SweepFiles
    from scaling_ray.runs import runs_of
    from scaling_ray.storage import fenced, open_place
    from scaling_ray.tracking.ledger import known_uri
    from scaling_ray.tracking.report import report_beside
    from scaling_ray.tracking.story import read_report
    from scaling_ray.tracking.tracker import replay

    sweep = SweepFiles.at(options.sweep)
    spec, manifest, uri = sweep.spec(), sweep.known_manifest(), options.to or known_uri(sweep)
    report = options.report or report_beside(sweep)
    told = None if report is None else read_report(open_place(report, "--report"), sweep)
    if told is None and options.report is not None:
        raise BadInput("--report", str(report), "holds no report; name the --out of a `scaling-ray report`")
    with sweep.place.lease(LEASE, say) as lease:
        where = replay(SweepFiles(fenced(sweep.place, lease)), spec, manifest, runs_of(spec), uri, told)
    if where is None:
        say("no run has begun: there is nothing to log yet")
        return 0
    if told is None:
        say(f"no report beside the sweep; `scaling-ray report {sweep} --out DIR` adds its verdict to the parent run")
    print(where)
    return 0


def track_check(options: argparse.Namespace) -> int:
    """Compare MLflow with a sweep's files."""
    from scaling_ray.results.sweep_files import SweepFiles
    from scaling_ray.runs import runs_of
    from scaling_ray.tracking.check import differences

    sweep = SweepFiles.at(options.sweep)
    spec = sweep.spec()
    found = differences(sweep, spec, sweep.known_manifest(), runs_of(spec), options.to)
    for line in found:
        print(line)
    if not found:
        print(f"{sweep}: MLflow holds what the files hold")
    return int(bool(found))


def track_models(options: argparse.Namespace) -> int:
    """Log trained models to MLflow."""
    import tempfile

    from scaling_ray.model.exported import read_record
    from scaling_ray.results.read import read_rows
    from scaling_ray.results.sweep_files import LEASE, SweepFiles
    from scaling_ray.sweep.export import export_model
    from scaling_ray.tracking.models import chosen_runs, log_model

    sweep = SweepFiles.at(options.sweep)
    wanted = options.run or chosen_runs(read_rows(sweep.place))
    with sweep.place.lease(LEASE, say), tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
        for run_id in wanted:
            directory = export_model(options.sweep, run_id, Path(folder) / run_id)
            logged = log_model(sweep, run_id, directory, read_record(directory), options.to)
            say(f"{run_id}: {'logged' if logged else 'is there already'}")
    print(f"{len(wanted)} models")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write one trained model."""
    from scaling_ray.sweep.export import export_model

    print(export_model(options.sweep, options.run_id, options.out, options.shards))
    return 0


def embed(options: argparse.Namespace) -> int:
    """Embed new cells."""
    from scaling_ray.embedding import embed_h5ad

    embed_h5ad(
        options.model,
        options.file,
        options.out,
        batch_cells=options.batch,
        layer=options.layer,
        device=options.device,
        min_genes=options.min_genes,
        cut_counts=options.cut_counts,
        trust_counts=options.trust_counts,
        progress=say,
    )
    print(options.out)
    return 0


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

    for field, value in (("--seconds", options.seconds), ("--stack", options.stack)):
        if value <= 0:
            raise BadInput(field, value, "must be more than 0")
    if options.spec is not None:
        return _bench_spec(_spec_of(options), options)
    precision = f'precision = "{options.precision}"'
    micro_batch = f"micro_batch = {options.micro_batch}" if options.micro_batch else ""
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
        raise BadInput("--out", None, "name the JSON file for the measured rates")
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
