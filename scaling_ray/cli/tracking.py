"""``track``: MLflow beside the files of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling_ray.cli.declare import SWEEP_HELP, Verbs, add_group, add_verb, place
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput


def add_track(top: Verbs) -> None:
    """``track replay``, ``track check`` and ``track models``."""
    track = add_group(top, "track", "MLflow tracking of a sweep")
    replaying = add_verb(
        track,
        "replay",
        replay,
        "log to MLflow what a sweep's files hold and MLflow does not",
        "track replay out/demo/sweep",
        needs=("track",),
    )
    replaying.add_argument(
        "--report",
        type=place,
        default=None,
        metavar="DIR",
        help="the sweep's report, for the parent run (if left out: the folder report beside the sweep, where one is)",
    )
    checking = add_verb(
        track,
        "check",
        check,
        "compare MLflow with a sweep's files: a line for each difference, exit code 1 where there is one",
        "track check out/demo/sweep --to http://localhost:5000",
        needs=("track",),
    )
    logging = add_verb(
        track,
        "models",
        models,
        "log to MLflow the model that validation chose for each setting: safetensors and a description, no pickle",
        "track models out/demo/sweep",
        needs=("track", "train"),
    )
    logging.add_argument(
        "--run", action="append", default=[], metavar="RUN_ID", help="the model of this run instead; repeatable"
    )
    for verb in (replaying, checking, logging):
        verb.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=SWEEP_HELP)
        verb.add_argument(
            "--to",
            default=None,
            metavar="URI",
            help="the tracking server (if left out: MLFLOW_TRACKING_URI, else the http:// server that the sweep is on, "
            "else mlruns.db beside it)",
        )


def replay(options: argparse.Namespace) -> int:
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
        raise BadInput("V024", "--report", str(report), "holds no report; name the --out of a `scaling-ray report`")
    with sweep.place.lease(LEASE, say) as lease:
        where = replay(SweepFiles(fenced(sweep.place, lease)), spec, manifest, runs_of(spec), uri, told)
    if where is None:
        say("no run has begun: there is nothing to log yet")
        return 0
    if told is None:
        say(f"no report beside the sweep; `scaling-ray report {sweep} --out DIR` adds its verdict to the parent run")
    print(where)
    return 0


def check(options: argparse.Namespace) -> int:
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


def models(options: argparse.Namespace) -> int:
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
