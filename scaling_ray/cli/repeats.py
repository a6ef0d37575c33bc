"""``reference`` and ``reproduce``: what a sweep found, kept, repeated and compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling_ray.cli.complete import specs
from scaling_ray.cli.declare import (
    CENSUS_HELP,
    SPEC_HELP,
    SWEEP_HELP,
    Verbs,
    add_verb,
    completed,
    local,
    place,
    positive,
)
from scaling_ray.cli.given import flag, spec_of
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers; write them as 11,12") from error


def add_reference(top: Verbs) -> None:
    """``reference``."""
    verb = add_verb(
        top,
        "reference",
        reference,
        "keep what a sweep found as one small file, to repeat and compare",
        "reference out/demo/sweep --out reference.json",
    )
    verb.add_argument(
        "sweep", type=place, metavar="SWEEP_DIR|TABLE", help=f"{SWEEP_HELP}, or a table that `scaling-ray fit` reads"
    )
    verb.add_argument("--out", type=local, required=True, metavar="REF.json", help="JSON file to write")
    verb.add_argument(
        "--name", metavar="TEXT", default=None, help="of the reference (that of the sweep, or of the table's file)"
    )
    verb.add_argument(
        "--loss",
        choices=("test_loss", "val_loss"),
        default="test_loss",
        help="the loss of a sweep that is compared (of a table: that its loss is compared with)",
    )
    spec = verb.add_argument(
        "--spec", metavar="SPEC.toml", default=None, help="of a table: the spec whose grid it holds, or an example"
    )
    completed(spec, specs)
    verb.add_argument(
        "--manifest", type=local, metavar="FILE", default=None, help="of a table: the shards' manifest kept beside it"
    )
    verb.add_argument("--source", metavar="TEXT", default=None, help="of a table: where its figures are from, in words")
    verb.add_argument(
        "--same",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of a table: ignore a column that differs between repeats; repeatable",
    )


def reference(options: argparse.Namespace) -> int:
    """Keep what a sweep found as a reference."""
    from scaling_ray.reproduction.record import record_sweep, record_table
    from scaling_ray.storage import output_directory, write_atomic

    output_directory(options.out.parent)
    if str(options.sweep).startswith("s3://") or Path(options.sweep).is_dir():
        for name in ("spec", "manifest", "source", "same"):
            if getattr(options, name):
                raise BadInput("V021", flag(name), getattr(options, name), "is for tables; a sweep has its own")
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


def add_reproduce(top: Verbs) -> None:
    """``reproduce``."""
    verb = add_verb(
        top,
        "reproduce",
        reproduce,
        "repeat a sweep and say whether it agrees with a reference (exit 0), drifted (3) or cannot tell (6)",
        "reproduce demo --against reports/demo/reference.json --out out/again",
        "reproduce demo --against reference.json --out s3://BUCKET/nightly --tick 2026-11-28 --every 86400",
        needs=("train", "cluster", "census"),
    )
    completed(verb.add_argument("spec", metavar="SPEC.toml", help=SPEC_HELP), specs)
    verb.add_argument(
        "--against", type=local, required=True, metavar="REF.json", help="reference that `scaling-ray reference` made"
    )
    verb.add_argument(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help="directory or s3:// URI for shards, sweeps, verdicts and their history",
    )
    verb.add_argument(
        "--census",
        default=None,
        help=f"{CENSUS_HELP}; if left out, OUT/census, planted if not there; "
        "latest or stable: say what the newest release would change, and do nothing",
    )
    verb.add_argument(
        "--shards", metavar="DIR", default=None, help="directory or s3:// URI of shards; no Census is read then"
    )
    verb.add_argument(
        "--seeds", type=_seeds, default=None, metavar="N,N,...", help="seeds in place of the spec's, such as 11,12"
    )
    verb.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="smallest difference that matters, as a share of the drop from the gene mean to the best setting",
    )
    verb.add_argument(
        "--other-cells",
        action="store_true",
        help="compare losses and laws though the shards hold other cells than the reference's; else that is a drift",
    )
    verb.add_argument(
        "--tick",
        default=None,
        metavar="TIME",
        help="when it was due by its schedule (2026-11-28 or 2026-11-28T03:17Z): each tick has its own sweep",
    )
    verb.add_argument(
        "--max-age", type=positive, default=None, metavar="SECONDS", help="skip a tick that is older than this"
    )
    verb.add_argument(
        "--every", type=positive, default=None, metavar="SECONDS", help="time between ticks, to show those missed"
    )
    verb.add_argument(
        "--webhook",
        default=None,
        metavar="URL",
        help="https:// address that is told the verdict, signed with SCALING_RAY_WEBHOOK_SECRET",
    )


def reproduce(options: argparse.Namespace) -> int:
    """Repeat a sweep and compare it with a reference."""
    spec = spec_of(options)
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
                raise BadInput("V022", flag(name), getattr(options, name), "belongs to a --tick; name both")
    tick = None if options.tick is None else Tick(parse_tick(options.tick), options.max_age, options.every)
    outcome = reproduce(
        options.spec,
        options.against,
        options.out,
        census=options.census,
        shards=options.shards,
        seeds=options.seeds,
        tolerance=options.tolerance,
        other_cells=options.other_cells,
        tick=tick,
        webhook=options.webhook,
        progress=say,
    )
    print(outcome.summary)
    return outcome.exit_code
