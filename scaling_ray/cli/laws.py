"""``fit``, ``audit`` and ``report``: what runs say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scaling_ray.cli.declare import SWEEP_HELP, Verbs, add_verb, local, place
from scaling_ray.cli.given import flag
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput


def add_fit(top: Verbs) -> None:
    """``fit``."""
    verb = add_verb(
        top,
        "fit",
        fit,
        "fit scaling laws to a sweep or to any table: verdict, intervals, declared choices",
        "fit out/demo/sweep --out fit.json",
        "fit runs.csv --loss eval_loss --same hostname --out fit.json",
    )
    verb.add_argument(
        "table",
        type=place,
        metavar="SWEEP_DIR|TABLE",
        help="directory or s3:// URI of a sweep, or a table (.csv, .tsv, .parquet) with columns params and loss",
    )
    verb.add_argument("--out", type=local, required=True, metavar="FILE.json", help="JSON file to write")
    verb.add_argument(
        "--loss", metavar="COLUMN", default=None, help="the column of a table that is the loss, where several are"
    )
    verb.add_argument("--log-loss", action="store_true", help="fit the natural logarithm of the loss (of a perplexity)")
    verb.add_argument(
        "--same",
        metavar="COLUMN",
        action="append",
        default=[],
        help="ignore a column that differs between repeats; repeatable",
    )
    verb.add_argument(
        "--by", metavar="COLUMN", default=None, help="fit each value of a column apart; --out holds all of them"
    )
    verb.add_argument(
        "--last", metavar="COLUMN", default=None, help="of each run, keep the row that is last along a column"
    )
    verb.add_argument(
        "--best",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of each size and data, keep the value of a column with the lowest mean loss; repeatable",
    )


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
            remedy = "is for tables; of a sweep, fit its results.csv"
            raise BadInput("V020", flag(name), getattr(options, name), remedy)
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


def add_audit(top: Verbs) -> None:
    """``audit``."""
    verb = add_verb(
        top,
        "audit",
        audit,
        "re-read the published law: what was reported, what the same runs support",
        "audit --out out/audit",
    )
    verb.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="directory or s3:// URI of audit.json and audit.html"
    )
    verb.add_argument(
        "--published",
        type=local,
        metavar="DIR",
        default=None,
        help="directory of the published run tables (the shipped ones if left out)",
    )


def audit(options: argparse.Namespace) -> int:
    """Re-read the published law."""
    from scaling_ray.public.audits import summary
    from scaling_ray.report.audit_page import build_audit

    page, found = build_audit(options.out, options.published)
    print("\n".join(summary(found)))
    print(page)
    return 0


def add_report(top: Verbs) -> None:
    """``report``."""
    verb = add_verb(
        top,
        "report",
        report,
        "write a sweep's report: report.html, report.json, figures",
        "report out/demo/sweep --out out/demo/report",
    )
    verb.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=SWEEP_HELP)
    verb.add_argument("--out", type=place, required=True, metavar="DIR", help="directory or s3:// URI of the report")
    verb.add_argument(
        "--beside", type=place, default=None, metavar="SWEEP_DIR", help="another sweep, of the other recipe, to compare"
    )


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
