"""``export`` and ``embed``: trained models, and new cells through them."""

from __future__ import annotations

import argparse

from scaling_ray.cli.complete import runs
from scaling_ray.cli.declare import SWEEP_HELP, Verbs, add_verb, completed, local, place
from scaling_ray.cli.lines import say
from scaling_ray.cli.reading import CELL_FILES


def add_export(top: Verbs) -> None:
    """``export``."""
    verb = add_verb(
        top,
        "export",
        export,
        "one trained model as a directory: model.safetensors and model.json",
        "export out/demo/sweep law-W8-v256-dall-s1-lr0.02-df305fdc --out model",
        needs=("train",),
    )
    verb.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=SWEEP_HELP)
    run = verb.add_argument("run_id", metavar="RUN_ID", help="a finished run, as `scaling-ray status --runs` names it")
    completed(run, runs)
    verb.add_argument(
        "--out",
        type=local,
        required=True,
        metavar="DIR",
        help="directory of the model; it appears whole or not at all",
    )
    verb.add_argument(
        "--shards",
        metavar="DIR",
        default=None,
        help="directory or s3:// URI of the shards, for a sweep that kept no genes.parquet",
    )


def export(options: argparse.Namespace) -> int:
    """Write one trained model."""
    from scaling_ray.sweep.export import export_model

    print(export_model(options.sweep, options.run_id, options.out, options.shards))
    return 0


def add_embed(top: Verbs) -> None:
    """``embed``."""
    verb = add_verb(
        top,
        "embed",
        embed,
        "put new cells through a model: a copy of their file with an embedding each",
        "embed model cells.h5ad --out embedded.h5ad",
        needs=("train", "census"),
    )
    verb.add_argument("model", type=local, metavar="MODEL", help="directory that `scaling-ray export` made")
    verb.add_argument("file", type=local, metavar="FILE", help=f"cells with raw counts: {CELL_FILES}")
    verb.add_argument(
        "--out",
        type=local,
        required=True,
        metavar="FILE.h5ad",
        help="file to write, or replace: the cells with obsm['X_scaling_ray'], float32 of (cells, width)",
    )
    verb.add_argument("--batch", type=int, metavar="CELLS", default=64, help="cells in the network at a time")
    verb.add_argument(
        "--layer",
        metavar="NAME",
        default=None,
        help="where the counts are: X, raw.X or a layer's name (found if left out)",
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the network runs, in fp32")
    verb.add_argument(
        "--min-genes", type=float, default=0.5, metavar="SHARE", help="share of the model's genes FILE must have"
    )
    verb.add_argument(
        "--cut-counts", action="store_true", help="take counts that are cut to a panel as whole libraries"
    )
    verb.add_argument("--trust-counts", action="store_true", help="take whole numbers as counts that look like none")


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
