"""``run``: the whole path, from cells to a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling_ray.cli.complete import specs
from scaling_ray.cli.declare import CENSUS_HELP, CLUSTER_HELP, SPEC_HELP, Verbs, add_verb, completed, local, place
from scaling_ray.cli.given import flag, spec_of
from scaling_ray.cli.lines import say
from scaling_ray.cli.reading import CELL_FILES, ENDINGS, READING, add_reading_flags, reading_rules
from scaling_ray.errors import BadInput


def add_run(top: Verbs) -> None:
    """``run``."""
    verb = add_verb(
        top,
        "run",
        run,
        "the whole path: Census, shards, sweep and report below OUT; the same command again goes on",
        "run demo --out out/demo",
        "run --cells cells.h5ad --donor SampleID --out out/mine",
        needs=("train", "cluster", "census"),
    )
    spec = verb.add_argument(
        "spec", metavar="SPEC.toml", nargs="?", default=None, help=f"{SPEC_HELP}; with --cells: `cells`"
    )
    completed(spec, specs)
    verb.add_argument(
        "--cells",
        type=local,
        nargs="+",
        default=None,
        metavar="FILE",
        help=f"your own raw counts, imported first: {CELL_FILES}",
    )
    verb.add_argument(
        "--split",
        choices=("donor_id", "dataset_id", "cell"),
        default=None,
        help="with --cells: what stays together in train, validation or test (the spec's if left out)",
    )
    add_reading_flags(verb, "with --cells: ")
    verb.add_argument(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help="directory or s3:// URI for everything: census, shards, sweep, report",
    )
    verb.add_argument("--census", default=None, help=f"{CENSUS_HELP}; if left out, OUT/census, planted if not there")
    verb.add_argument(
        "--shards", metavar="DIR", default=None, help="directory or s3:// URI of shards; no Census is read then"
    )
    verb.add_argument("--cluster", type=local, default=None, metavar="CLUSTER.yaml", help=CLUSTER_HELP)


def run(options: argparse.Namespace) -> int:
    """The whole path, from cells to a report."""
    if options.cells is not None:
        return _run_cells(options)
    for name, default in READING.items():
        if getattr(options, name) != default:
            raise BadInput("V012", flag(name), getattr(options, name), "goes with --cells FILE")
    if options.split is not None:
        raise BadInput("V013", "--split", options.split, "goes with --cells FILE; a spec says it as data.split_by")
    if options.spec is None:
        raise BadInput("V014", "SPEC.toml", None, "name a spec, or your own files of cells with --cells FILE")
    named = Path(options.spec)
    if named.name.lower().removesuffix(".gz").endswith(ENDINGS) or any(named.glob("*matrix.mtx*")):
        raise BadInput("V036", "SPEC.toml", str(named), "holds cells; put --cells before it")
    spec_of(options)
    from scaling_ray.pipeline import run_pipeline

    given = {"census": options.census, "shards": options.shards, "cluster": options.cluster}
    print(run_pipeline(options.spec, options.out, progress=say, **given))
    return 0


def _run_cells(options: argparse.Namespace) -> int:
    """The whole path from somebody's own files."""
    for name in ("census", "shards"):
        if getattr(options, name) is not None:
            raise BadInput("V015", flag(name), getattr(options, name), "does not go with --cells; name one of them")
    misplaced = [str(file) for file in options.cells if file.suffix == ".toml"]
    if misplaced:
        raise BadInput("V016", "--cells", misplaced[0], "is a spec; name it before --cells")
    if options.spec is None:
        options.spec = "cells"
    spec_of(options)
    from scaling_ray.pipeline import run_cells

    rules, split = reading_rules(options), options.split
    given = {"rules": rules, "split_by": split, "cluster": options.cluster}
    print(run_cells(options.cells, options.spec, options.out, progress=say, **given))
    return 0
