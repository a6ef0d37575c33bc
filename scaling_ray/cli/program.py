"""The whole command line, and its one way out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scaling_ray import __version__
from scaling_ray.cli import about, cells, laws, machine, models, repeats, shards, specs, sweeps, tracking, whole
from scaling_ray.cli.complete import complete_here
from scaling_ray.cli.declare import PROGRAM, Parser
from scaling_ray.cli.lines import close_bar
from scaling_ray.errors import EXIT_CODES, ScalingRayError
from scaling_ray.extras import require_extras

DESCRIPTION = "Scaling laws for single-cell models: what does loss buy, and what will the next size cost?"


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments, in the order of ``--help``."""
    codes = "\n".join(f"  {code:>2}  {meaning}" for code, meaning in EXIT_CODES.items())
    epilog = f"`{PROGRAM} VERB --help` shows an example of each.\n\nexit codes:\n{codes}"
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=epilog)
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    top = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    specs.add_init(top)
    whole.add_run(top)
    cells.add_census(top)
    shards.add_shards(top)
    specs.add_plan(top)
    sweeps.add_sweep(top)
    laws.add_fit(top)
    laws.add_audit(top)
    laws.add_report(top)
    repeats.add_reference(top)
    repeats.add_reproduce(top)
    sweeps.add_status(top)
    sweeps.add_node_watch(top)
    tracking.add_track(top)
    models.add_export(top)
    models.add_embed(top)
    machine.add_bench(top)
    machine.add_doctor(top)
    about.add_explain(top)
    about.add_completion(top)
    return parser


def _needs(options: argparse.Namespace) -> list[str]:
    """The extras of a verb. Shards that are there already need no Census."""
    return [extra for extra in options.needs if extra != "census" or not getattr(options, "shards", None)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors of this package become one line and an exit code."""
    parser = build_parser()
    complete_here(parser)
    try:
        options = parser.parse_args(arguments)
        require_extras(options.asked, *_needs(options))
        code = int(options.handler(options))
        sys.stdout.flush()
        return code
    except ScalingRayError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read has gone. What is still held back is dropped, or Python says so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        close_bar()
