"""``census``: cells into the layout that everything else reads."""

from __future__ import annotations

import argparse

from scaling_ray.cli.declare import Verbs, add_group, add_verb, local
from scaling_ray.cli.lines import say
from scaling_ray.cli.reading import CELL_FILES, add_reading_flags, reading_rules


def add_census(top: Verbs) -> None:
    """``census plant``, ``census import`` and ``census check``."""
    census = add_group(top, "census", "make a local Census")
    planting = add_verb(
        census,
        "plant",
        plant,
        "draw cells whose best possible loss is known, in the Census layout",
        "census plant --out planted",
        needs=("census",),
    )
    planting.add_argument("--out", type=local, required=True, metavar="DIR", help="directory of the Census")
    planting.add_argument(
        "--law", action="store_true", help="a truth whose loss falls as a power of model size and of training cells"
    )
    planting.add_argument(
        "--cells", type=int, metavar="CELLS", default=None, help="number of cells (8,000; with --law 40,000)"
    )
    planting.add_argument(
        "--genes",
        type=int,
        metavar="GENES",
        default=None,
        help="number of genes (2,000; with --law 168, 8 always on)",
    )
    planting.add_argument("--seed", type=int, metavar="SEED", default=0, help="seed of model and cells")
    importing = add_verb(
        census,
        "import",
        import_files,
        "raw counts of one or more files into the Census layout",
        "census import cells.h5ad --donor SampleID --out my-census",
        needs=("census",),
    )
    checking = add_verb(
        census,
        "check",
        check,
        "say what an import would believe of files, and why; import nothing",
        "census check cells.h5ad more.h5ad",
        needs=("census",),
    )
    for verb in (importing, checking):
        verb.add_argument("files", type=local, nargs="+", metavar="FILE", help=f"{CELL_FILES}; one data set each")
        add_reading_flags(verb)
    importing.add_argument("--out", type=local, required=True, metavar="DIR", help="directory of the Census")


def plant(options: argparse.Namespace) -> int:
    """Plant a Census."""
    from scaling_ray.planted.plant import plant, plant_law

    draw = plant_law if options.law else plant
    sizes = {"n_cells": options.cells, "n_genes": options.genes}
    given = {name: size for name, size in sizes.items() if size is not None}
    print(draw(options.out, seed=options.seed, progress=say, **given))
    return 0


def import_files(options: argparse.Namespace) -> int:
    """Import files of cells into a Census."""
    from scaling_ray.census.importer import import_h5ad

    print(import_h5ad(options.files, options.out, rules=reading_rules(options), progress=say))
    return 0


def check(options: argparse.Namespace) -> int:
    """Say what an import would believe of files."""
    from scaling_ray.census.importer import check_files

    check_files(options.files, reading_rules(options), print)
    return 0
