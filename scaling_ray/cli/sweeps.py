"""``sweep``, ``status`` and ``node-watch``: training, how it stands, and machines that are about to go."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from scaling_ray.cli.complete import specs
from scaling_ray.cli.declare import (
    CLUSTER_HELP,
    SPEC_HELP,
    SWEEP_HELP,
    Verbs,
    add_verb,
    completed,
    local,
    place,
    positive,
)
from scaling_ray.cli.given import spec_of
from scaling_ray.cli.lines import say

if TYPE_CHECKING:
    from scaling_ray.results.standing import Standing, StandingReader


def add_sweep(top: Verbs) -> None:
    """``sweep``."""
    verb = add_verb(
        top,
        "sweep",
        sweep,
        "train every run of the grid that has no result yet",
        "sweep demo --shards out/demo/shards --out out/demo/sweep",
        needs=("train", "cluster"),
    )
    completed(verb.add_argument("spec", metavar="SPEC.toml", help=SPEC_HELP), specs)
    verb.add_argument("--shards", required=True, metavar="DIR", help="directory or s3:// URI of the shards")
    verb.add_argument(
        "--out", type=place, required=True, metavar="SWEEP_DIR", help=f"{SWEEP_HELP}; the same one again goes on"
    )
    verb.add_argument("--cluster", type=local, default=None, metavar="CLUSTER.yaml", help=CLUSTER_HELP)


def sweep(options: argparse.Namespace) -> int:
    """Train what a sweep lacks."""
    spec_of(options)
    from scaling_ray.sweep.run import run_sweep

    run_sweep(options.spec, options.shards, options.out, say, options.cluster)
    print(options.out)
    return 0


def add_status(top: Verbs) -> None:
    """``status``."""
    verb = add_verb(
        top,
        "status",
        status,
        "how a sweep stands: sizes x cells, rate, time left, what waits, what failed",
        "status out/demo/sweep",
        "status out/demo/sweep --watch 30",
    )
    verb.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=SWEEP_HELP)
    verb.add_argument(
        "--watch",
        type=positive,
        nargs="?",
        const=10.0,
        default=None,
        metavar="SECONDS",
        help="again every so many seconds (10 if left out), until nothing runs and nothing waits",
    )
    verb.add_argument("--runs", action="store_true", help="a line per run instead")
    verb.add_argument("--json", action="store_true", help="as JSON; with --watch a line each time")


def status(options: argparse.Namespace) -> int:
    """Say how a sweep stands, once or until it has ended."""
    from scaling_ray.results.standing import StandingReader
    from scaling_ray.results.sweep_files import SweepFiles

    reader = StandingReader(SweepFiles.at(options.sweep, "SWEEP_DIR"))
    if options.watch is not None and sys.stdout.isatty() and not options.json:
        _watch_on_terminal(reader, options)
        return 0
    while True:
        standing = reader.read()
        watched = options.watch is not None and not standing.has_ended
        _print_standing(standing, options, brief=watched)
        if not watched:
            return 0
        time.sleep(options.watch)


def _print_standing(standing: Standing, options: argparse.Namespace, brief: bool) -> None:
    from rich.console import Console

    from scaling_ray.results.standing_text import as_json, run_lines, short_line, standing_lines, standing_view

    if options.json:
        print(json.dumps(as_json(standing), indent=None if options.watch else 1), flush=True)
    elif brief:
        print(f"{time.strftime('%H:%M:%S')} {short_line(standing)}", flush=True)
    elif options.runs:
        print("\n".join(run_lines(standing)), flush=True)
    elif sys.stdout.isatty():
        Console().print(standing_view(standing))
    else:
        print("\n".join(standing_lines(standing)), flush=True)


def _watch_on_terminal(reader: StandingReader, options: argparse.Namespace) -> None:
    """One picture that changes in its place; the last one stays."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from scaling_ray.results.standing_text import run_lines, standing_view

    with Live(auto_refresh=False) as live:
        while True:
            standing = reader.read()
            live.update(
                Group(*map(Text, run_lines(standing))) if options.runs else standing_view(standing), refresh=True
            )
            if standing.has_ended:
                return
            time.sleep(options.watch)


def add_node_watch(top: Verbs) -> None:
    """``node-watch``."""
    verb = add_verb(
        top,
        "node-watch",
        node_watch,
        "beside Ray on a worker node: at a cloud's notice that the machine is about to go, drain its node",
        "node-watch --once",
        "node-watch --drain-now --deadline 90",
        needs=("cluster",),
    )
    verb.add_argument("--provider", choices=("auto", "aws", "gcp"), default="auto", help="whose metadata to ask")
    verb.add_argument(
        "--metadata-url", default=None, metavar="URL", help="http://HOST[:PORT] of the metadata (the cloud's own)"
    )
    verb.add_argument("--every", type=positive, default=5.0, metavar="SECONDS", help="time between two questions")
    verb.add_argument("--once", action="store_true", help="look at the metadata and at Ray once: a check of both")
    verb.add_argument(
        "--node-id", metavar="ID", default=None, help="hexadecimal id of the Ray node (found if left out)"
    )
    verb.add_argument(
        "--rebalance", action="store_true", help="drain at AWS's rebalance recommendations too; they name no deadline"
    )
    verb.add_argument(
        "--drain-now", action="store_true", help="drain this node and wait until it has left: for a preStop hook"
    )
    verb.add_argument(
        "--deadline", type=positive, default=60.0, metavar="SECONDS", help="with --drain-now: when the machine goes"
    )


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
