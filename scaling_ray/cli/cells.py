"""``census``: cells into the layout that everything else reads."""

from __future__ import annotations

import argparse

from scaling_ray.cli.declare import Verbs, add_group, add_verb, local
from scaling_ray.cli.lines import say
from scaling_ray.cli.reading import CELL_FILES, add_reading_flags, reading_rules


def add_census(top: Verbs) -> None:
    """``census plant``, ``census limits``, ``census import`` and ``census check``."""
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
        help="number of genes (2,000; with --law 264, 8 always on)",
    )
    planting.add_argument("--seed", type=int, metavar="SEED", default=0, help="seed of model and cells")
    limiting = add_verb(
        census,
        "limits",
        limits,
        "how the loss of planted cells falls with what a predictor may tell apart",
        "census limits planted --out limits.json",
        needs=("census",),
    )
    limiting.add_argument("census", type=local, metavar="DIR", help="a planted Census")
    limiting.add_argument("--cells", type=int, metavar="CELLS", default=600, help="number of cells looked at")
    limiting.add_argument(
        "--genes", type=int, metavar="GENES", default=None, help="the first so many genes (all that programs move)"
    )
    limiting.add_argument(
        "--mask-fraction", type=float, metavar="SHARE", default=0.15, help="share of the genes that is hidden (0.15)"
    )
    limiting.add_argument("--out", type=local, metavar="FILE", default=None, help="keep the figures as JSON")
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


def limits(options: argparse.Namespace) -> int:
    """References of limited predictors on a planted Census."""
    from scaling_ray.console import plain, table
    from scaling_ray.planted.limits import limits_of
    from scaling_ray.planted.truth import load_truth
    from scaling_ray.storage import output_directory, write_json

    if options.out is not None:
        output_directory(options.out.parent)
    found = limits_of(
        load_truth(options.census), cells=options.cells, n_genes=options.genes, mask_fraction=options.mask_fraction
    )
    print(f"attainable floor {found['attainable_floor']:.4f} mse, gene mean {found['drop']:.4f} above it")
    for part in (found["told"], found["rank"]):
        rows = [(str(n), f"{share:.4f}") for n, share in zip(part["n"], part["share_of_drop"], strict=True)]
        print("\n".join(plain(table((part["what"], "share of it left"), rows, right=(0, 1)))))
        if part["exponent"] is not None:
            low, high = part["exponent_n"][0], part["exponent_n"][-1]
            print(f"falls as n^-{part['exponent']:.2f} from {low} to {high}")
    if options.out is not None:
        write_json(options.out, found)
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
