"""``shards``: cells as Parquet that training reads."""

from __future__ import annotations

import argparse
import json

from scaling_ray.cli.complete import specs
from scaling_ray.cli.declare import CENSUS_HELP, SPEC_HELP, Verbs, add_group, add_verb, completed
from scaling_ray.cli.given import spec_of
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput, DamagedFiles


def add_shards(top: Verbs) -> None:
    """``shards build`` and ``shards verify``."""
    shards = add_group(top, "shards", "make and check shards")
    building = add_verb(
        shards,
        "build",
        build,
        "convert the cells a spec asks for into Parquet shards",
        "shards build demo --census out/demo/census --out out/shards",
        "shards build corrected --census 2025-11-08 --dry-run",
        needs=("cluster", "census"),
    )
    spec = building.add_argument("spec", metavar="SPEC.toml", help=f"{SPEC_HELP}; its [data] table is used")
    completed(spec, specs)
    building.add_argument("--census", required=True, help=CENSUS_HELP)
    building.add_argument(
        "--out", metavar="DIR", default=None, help="directory or s3:// URI of the shards; the same one again goes on"
    )
    building.add_argument(
        "--dry-run", action="store_true", help="say what it would read, write and take; build nothing"
    )
    building.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    verifying = add_verb(
        shards, "verify", verify, "name each missing, damaged or foreign file", "shards verify out/demo/shards"
    )
    verifying.add_argument("directory", metavar="DIR", help="directory or s3:// URI of the shards")


def build(options: argparse.Namespace) -> int:
    """Build shards, or say what that would take."""
    spec = spec_of(options)
    if options.dry_run:
        from scaling_ray.shards.estimate import estimate, format_estimate

        found = estimate(spec, options.census)
        print(json.dumps(found, indent=1) if options.json else format_estimate(found))
        return 0
    if options.json:
        raise BadInput("V033", "--json", True, "goes with --dry-run")
    if options.out is None:
        raise BadInput("V017", "--out", None, "name a directory or an s3:// URI for the shards (or ask for --dry-run)")
    from scaling_ray.shards.convert import build_shards

    manifest = build_shards(spec, options.census, options.out, say)
    for name, split in manifest.splits.items():
        say(f"{name}: {split.cells:,} cells ({split.fraction:.1%})")
    print(options.out)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check every file of some shards."""
    from scaling_ray.shards.format import verify

    problems = verify(options.directory)
    if problems:
        raise DamagedFiles("V018", problems)
    print(f"{options.directory}: whole")
    return 0
