"""The command line: verbs parse their arguments first and import what is heavy after.

Each verb names the extras it needs where it is declared; ``main`` checks them before its handler imports anything.

Exit codes: 0 ok, complete or agrees, 1 some runs failed or files damaged, 2 bad input, 3 drifted, 5 another driver
holds the directory, 6 cannot tell, 75 stopped on the way, call again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scaling_ray import __version__, verbs
from scaling_ray.errors import ScalingRayError
from scaling_ray.extras import require_extras

Handler = Callable[[argparse.Namespace], int]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def place(text: str) -> str | Path:
    """A directory, or an ``s3://`` URI as it stands."""
    return text if "://" in text else Path(text)


CELL_FILES = ".h5ad, .zarr, .h5mu, .loom, 10x .h5, or a 10x folder of matrix.mtx (.gz of each too)"


def reading_flags(parser: argparse.ArgumentParser, when: str = "") -> None:
    """The flags that say how files of cells are read; none of them is needed where a file says it itself."""
    parser.add_argument(
        "--layer", default=None, help=f"{when}where the counts are: X, raw.X or a layer's name (found if left out)"
    )
    parser.add_argument(
        "--donor",
        metavar="COLUMN",
        action="append",
        default=[],
        help=f"{when}obs column of donors (found if left out); repeatable, the first that a file has; @file: one each",
    )
    parser.add_argument(
        "--organism",
        choices=("homo_sapiens", "mus_musculus"),
        default=None,
        help=f"{when}keep the genes of this species only (told from the ids if left out)",
    )
    parser.add_argument(
        "--genes",
        choices=("union", "intersection"),
        default="union",
        help=f"{when}genes of several files: all that any has, or those that all have (libraries are then of those)",
    )
    parser.add_argument(
        "--gene-ids",
        choices=("mapped", "given"),
        default="mapped",
        help=f"{when}given: take ids as they stand, drop no version and map no name; needs --organism",
    )
    parser.add_argument(
        "--trust-counts", action="store_true", help=f"{when}take whole numbers as counts that look like none"
    )
    parser.add_argument(
        "--cut-counts", action="store_true", help=f"{when}take the counts of a panel as whole libraries"
    )
    parser.add_argument("--title", default=None, help=f"{when}what the cells are called in the Census and in reports")
    parser.add_argument("--source", default=None, help=f"{when}citation or address of the cells")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers; write them as 11,12") from error


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = argparse.ArgumentParser(prog="scaling-ray", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=__version__)
    top = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        parent: argparse._SubParsersAction, name: str, handler: Handler, about: str, needs: tuple[str, ...] = ()
    ) -> argparse.ArgumentParser:
        """A verb that runs ``handler`` and ``needs`` these extras beside a light installation."""
        made: argparse.ArgumentParser = parent.add_parser(
            name, help=about, description=about, formatter_class=HelpFormatter
        )
        made.set_defaults(handler=handler, needs=needs, asked=made.prog.removeprefix("scaling-ray "))
        return made

    def group(name: str, about: str) -> argparse._SubParsersAction:
        return top.add_parser(name, help=about, description=about).add_subparsers(
            dest=f"{name}_verb", required=True, metavar="VERB"
        )

    spec_help = "the sweep's spec: a TOML file, or the name of a shipped example (scaling-ray init --list)"
    sweep_help = "directory or s3:// URI of the sweep"
    cluster_help = "the file that `ray up` started the cluster from: what it can become decides which sizes have room"
    census_help = "directory, URI or version (such as 2025-11-08) of a Census"

    init = verb(top, "init", verbs.init, "write a spec with every key explained: a shipped example, or a new sweep")
    init.add_argument(
        "name", nargs="?", metavar="NAME", help="an example, or the name of a new sweep, which begins as `cells`"
    )
    init.add_argument("--out", type=Path, default=None, help="TOML file to write, a new one (printed if left out)")
    init.add_argument("--list", action="store_true", help="name the shipped examples")
    whole = verb(
        top,
        "run",
        verbs.run,
        "the whole path: Census, shards, sweep and report below OUT; the same command again goes on",
        needs=("train", "cluster", "census"),
    )
    whole.add_argument("spec", metavar="SPEC.toml", nargs="?", default=None, help=f"{spec_help}; with --cells: `cells`")
    whole.add_argument(
        "--cells",
        type=Path,
        nargs="+",
        default=None,
        metavar="FILE",
        help=f"your own raw counts, imported first: {CELL_FILES}",
    )
    whole.add_argument(
        "--split",
        choices=("donor_id", "dataset_id", "cell"),
        default=None,
        help="with --cells: what stays together in train, validation or test (the spec's if left out)",
    )
    reading_flags(whole, "with --cells: ")
    whole.add_argument(
        "--out", type=place, required=True, help="directory or s3:// URI for everything: census, shards, sweep, report"
    )
    whole.add_argument("--census", default=None, help=f"{census_help}; if left out, OUT/census, planted if not there")
    whole.add_argument("--shards", default=None, help="directory or s3:// URI of shards; no Census is read then")
    whole.add_argument("--cluster", type=Path, default=None, metavar="CLUSTER.yaml", help=cluster_help)

    census = group("census", "make a local Census")
    plant = verb(
        census,
        "plant",
        verbs.census_plant,
        "draw cells whose best possible loss is known, in the Census layout",
        needs=("census",),
    )
    plant.add_argument("--out", type=Path, required=True, help="directory of the Census")
    plant.add_argument(
        "--law", action="store_true", help="a truth whose loss falls as a power of model size and of training cells"
    )
    plant.add_argument("--cells", type=int, default=None, help="number of cells (8,000; with --law 40,000)")
    plant.add_argument("--genes", type=int, default=None, help="number of genes (2,000; with --law its markers and 8)")
    plant.add_argument("--seed", type=int, default=0, help="seed of model and cells")
    importing = verb(
        census,
        "import",
        verbs.census_import,
        "raw counts of one or more files into the Census layout",
        needs=("census",),
    )
    checking = verb(
        census,
        "check",
        verbs.census_check,
        "say what an import would believe of files, and why; import nothing",
        needs=("census",),
    )
    for reading in (importing, checking):
        reading.add_argument("files", type=Path, nargs="+", metavar="FILE", help=f"{CELL_FILES}; one data set each")
        reading_flags(reading)
    importing.add_argument("--out", type=Path, required=True, help="directory of the Census")

    shards = group("shards", "make and check shards")
    build = verb(
        shards,
        "build",
        verbs.shards_build,
        "convert the cells a spec asks for into Parquet shards",
        needs=("cluster", "census"),
    )
    build.add_argument("spec", metavar="SPEC.toml", help=f"{spec_help}; its [data] table is used")
    build.add_argument("--census", required=True, help=census_help)
    build.add_argument("--out", default=None, help="directory or s3:// URI of the shards; the same one again goes on")
    build.add_argument("--dry-run", action="store_true", help="say what it would read, write and take; build nothing")
    build.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    check = verb(shards, "verify", verbs.shards_verify, "name each missing, damaged or foreign file")
    check.add_argument("directory", metavar="DIR", help="directory or s3:// URI of the shards")

    plan = verb(top, "plan", verbs.plan, "what a sweep will do and cost: grid, parameters, TFLOP, MiB, hours")
    plan.add_argument("spec", metavar="SPEC.toml", help=spec_help)
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument(
        "--rates", type=Path, nargs="+", default=[], metavar="FILE", help="JSON of measured rates, a file per machine"
    )
    plan.add_argument(
        "--cluster", type=Path, default=None, metavar="FILE", help="cluster's file for `ray up`: what it can become"
    )
    for limit, about in {
        "gpu-hours": "whole GPUs times hours",
        "cpu-hours": "CPUs times hours",
        "cost": "in the currency of the spec's [prices]",
        "wall-hours": "from the first start",
    }.items():
        plan.add_argument(
            f"--max-{limit}", type=float, default=None, metavar="X", help=f"budget, {about}: what it leaves undone"
        )
    sweep = verb(
        top,
        "sweep",
        verbs.sweep,
        "train every run of the grid that has no result yet",
        needs=("train", "cluster"),
    )
    sweep.add_argument("spec", metavar="SPEC.toml", help=spec_help)
    sweep.add_argument("--shards", required=True, help="directory or s3:// URI of the shards")
    sweep.add_argument("--out", type=place, required=True, help=f"{sweep_help}; the same one again goes on")
    sweep.add_argument("--cluster", type=Path, default=None, metavar="CLUSTER.yaml", help=cluster_help)
    fit = verb(
        top, "fit", verbs.fit, "fit scaling laws to a sweep or to any table: verdict, intervals, declared choices"
    )
    fit.add_argument(
        "table",
        type=place,
        metavar="SWEEP_DIR|TABLE",
        help="directory or s3:// URI of a sweep, or a table (.csv, .tsv, .parquet) with columns params and loss",
    )
    fit.add_argument("--out", type=Path, required=True, help="JSON file to write")
    fit.add_argument(
        "--loss", metavar="COLUMN", default=None, help="the column of a table that is the loss, where several are"
    )
    fit.add_argument("--log-loss", action="store_true", help="fit the natural logarithm of the loss (of a perplexity)")
    fit.add_argument(
        "--same",
        metavar="COLUMN",
        action="append",
        default=[],
        help="ignore a column that differs between repeats; repeatable",
    )
    fit.add_argument(
        "--by", metavar="COLUMN", default=None, help="fit each value of a column apart; --out holds all of them"
    )
    fit.add_argument(
        "--last", metavar="COLUMN", default=None, help="of each run, keep the row that is last along a column"
    )
    fit.add_argument(
        "--best",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of each size and data, keep the value of a column with the lowest mean loss; repeatable",
    )
    audit = verb(top, "audit", verbs.audit, "re-read the published law: what was reported, what the same runs support")
    audit.add_argument("--out", type=Path, required=True, help="directory of audit.json and audit.html")
    audit.add_argument(
        "--published",
        type=Path,
        default=None,
        help="directory of the published run tables (the shipped ones if left out)",
    )
    report = verb(top, "report", verbs.report, "write a sweep's report: report.html, report.json, figures")
    report.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=sweep_help)
    report.add_argument("--out", type=place, required=True, help="directory or s3:// URI of the report")
    report.add_argument(
        "--beside", type=place, default=None, metavar="SWEEP_DIR", help="another sweep, of the other recipe, to compare"
    )
    keep = verb(top, "reference", verbs.reference, "keep what a sweep found as one small file, to repeat and compare")
    keep.add_argument(
        "sweep", type=place, metavar="SWEEP_DIR|TABLE", help=f"{sweep_help}, or a table that `scaling-ray fit` reads"
    )
    keep.add_argument("--out", type=Path, required=True, metavar="REF.json", help="JSON file to write")
    keep.add_argument("--name", default=None, help="of the reference (that of the sweep, or of the table's file)")
    keep.add_argument(
        "--loss",
        choices=("test_loss", "val_loss"),
        default="test_loss",
        help="the loss of a sweep that is compared (of a table: that its loss is compared with)",
    )
    keep.add_argument("--spec", default=None, help="of a table: the spec whose grid it holds, a file or an example")
    keep.add_argument("--manifest", type=Path, default=None, help="of a table: the shards' manifest kept beside it")
    keep.add_argument("--source", default=None, help="of a table: where its figures are from, in words")
    keep.add_argument(
        "--same",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of a table: ignore a column that differs between repeats; repeatable",
    )
    again = verb(
        top,
        "reproduce",
        verbs.reproduce,
        "repeat a sweep and say whether it agrees with a reference (exit 0), drifted (3) or cannot tell (6)",
        needs=("train", "cluster", "census"),
    )
    again.add_argument("spec", metavar="SPEC.toml", help=spec_help)
    again.add_argument(
        "--against", type=Path, required=True, metavar="REF.json", help="reference that `scaling-ray reference` made"
    )
    again.add_argument(
        "--out", type=place, required=True, help="directory or s3:// URI for shards, sweeps, verdicts and their history"
    )
    again.add_argument(
        "--census",
        default=None,
        help=f"{census_help}; if left out, OUT/census, planted if not there; "
        "latest or stable: say what the newest release would change, and do nothing",
    )
    again.add_argument("--shards", default=None, help="directory or s3:// URI of shards; no Census is read then")
    again.add_argument(
        "--seeds", type=_seeds, default=None, metavar="N,N,...", help="seeds in place of the spec's, such as 11,12"
    )
    again.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="smallest difference that matters, as a share of the drop from the gene mean to the best setting",
    )
    again.add_argument(
        "--tick",
        default=None,
        metavar="TIME",
        help="when it was due by its schedule (2026-11-28 or 2026-11-28T03:17Z): each tick has its own sweep",
    )
    again.add_argument(
        "--max-age", type=float, default=None, metavar="SECONDS", help="skip a tick that is older than this"
    )
    again.add_argument(
        "--every", type=float, default=None, metavar="SECONDS", help="time between ticks, to show those missed"
    )
    again.add_argument(
        "--webhook",
        default=None,
        metavar="URL",
        help="https:// address that is told the verdict, signed with SCALING_RAY_WEBHOOK_SECRET",
    )
    status = verb(
        top, "status", verbs.status, "how a sweep stands: sizes x cells, rate, time left, what waits, what failed"
    )
    status.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=sweep_help)
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        default=None,
        metavar="SECONDS",
        help="again every so many seconds (10 if left out), until nothing runs and nothing waits",
    )
    status.add_argument("--runs", action="store_true", help="a line per run instead")
    status.add_argument("--json", action="store_true", help="as JSON; with --watch a line each time")
    watch = verb(
        top,
        "node-watch",
        verbs.node_watch,
        "beside Ray on a worker node: at a cloud's notice that the machine is about to go, drain its node",
        needs=("cluster",),
    )
    watch.add_argument("--provider", choices=("auto", "aws", "gcp"), default="auto", help="whose metadata to ask")
    watch.add_argument(
        "--metadata-url", default=None, metavar="URL", help="http://HOST[:PORT] of the metadata (the cloud's own)"
    )
    watch.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="time between two questions")
    watch.add_argument("--once", action="store_true", help="look at the metadata and at Ray once: a check of both")
    watch.add_argument("--node-id", default=None, help="hexadecimal id of the Ray node (found if left out)")
    watch.add_argument(
        "--rebalance", action="store_true", help="drain at AWS's rebalance recommendations too; they name no deadline"
    )
    watch.add_argument(
        "--drain-now", action="store_true", help="drain this node and wait until it has left: for a preStop hook"
    )
    watch.add_argument(
        "--deadline", type=float, default=60.0, metavar="SECONDS", help="with --drain-now: when the machine goes"
    )
    track = group("track", "MLflow tracking of a sweep")
    replay = verb(
        track,
        "replay",
        verbs.track_replay,
        "log to MLflow what a sweep's files hold and MLflow does not",
        needs=("track",),
    )
    replay.add_argument(
        "--report",
        type=place,
        default=None,
        metavar="DIR",
        help="the sweep's report, for the parent run (if left out: the folder report beside the sweep, where one is)",
    )
    check = verb(
        track,
        "check",
        verbs.track_check,
        "compare MLflow with a sweep's files: a line for each difference, exit code 1 where there is one",
        needs=("track",),
    )
    models = verb(
        track,
        "models",
        verbs.track_models,
        "log to MLflow the model that validation chose for each setting: safetensors and a description, no pickle",
        needs=("track", "train"),
    )
    models.add_argument(
        "--run", action="append", default=[], metavar="RUN_ID", help="the model of this run instead; repeatable"
    )
    for tracking in (replay, check, models):
        tracking.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=sweep_help)
        tracking.add_argument(
            "--to",
            default=None,
            metavar="URI",
            help="the tracking server (if left out: MLFLOW_TRACKING_URI, else where the sweep is tracked already)",
        )
    export = verb(
        top,
        "export",
        verbs.export,
        "one trained model as a directory: model.safetensors and model.json",
        needs=("train",),
    )
    export.add_argument("sweep", type=place, metavar="SWEEP_DIR", help=sweep_help)
    export.add_argument("run_id", metavar="RUN_ID", help="a finished run, as `scaling-ray status` names it")
    export.add_argument("--out", required=True, help="directory of the model; it appears whole or not at all")
    export.add_argument(
        "--shards", default=None, help="directory or s3:// URI of the shards, for a sweep that kept no genes.parquet"
    )
    embed = verb(
        top,
        "embed",
        verbs.embed,
        "put new cells through a model: a copy of their file with an embedding each",
        needs=("train", "census"),
    )
    embed.add_argument("model", type=Path, metavar="MODEL", help="directory that `scaling-ray export` made")
    embed.add_argument("file", type=Path, metavar="FILE", help=f"cells with raw counts: {CELL_FILES}")
    embed.add_argument(
        "--out",
        required=True,
        metavar="FILE.h5ad",
        help="file to write, or replace: the cells with obsm['X_scaling_ray'], float32 of (cells, width)",
    )
    embed.add_argument("--batch", type=int, default=64, help="cells in the network at a time")
    embed.add_argument(
        "--layer", default=None, help="where the counts are: X, raw.X or a layer's name (found if left out)"
    )
    embed.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the network runs, in fp32")
    embed.add_argument(
        "--min-genes", type=float, default=0.5, metavar="FRACTION", help="share of the model's genes FILE must have"
    )
    embed.add_argument(
        "--cut-counts", action="store_true", help="take counts that are cut to a panel as whole libraries"
    )
    embed.add_argument("--trust-counts", action="store_true", help="take whole numbers as counts that look like none")
    bench = group("bench", "measure this machine")
    stream = verb(
        bench,
        "stream",
        verbs.bench_stream,
        "cells a second out of shards: streamed, from memory, and by bare pyarrow",
        needs=("cluster",),
    )
    stream.add_argument("shards", metavar="SHARDS", help="directory or s3:// URI of the shards")
    stream.add_argument("--genes", type=int, default=None, help="genes to read (all of the shards' if left out)")
    stream.add_argument("--batch", type=int, default=256, help="cells of a batch")
    stream.add_argument("--cells", type=int, default=1_000_000, help="cells to read, steady state, at the least")
    stream.add_argument("--cpus", type=int, default=2, help="CPUs of the private Ray")
    stream.add_argument("--json", action="store_true", help="as JSON")
    train = verb(
        bench,
        "train",
        verbs.bench_train,
        "cells a second that a size trains at on this machine, on made-up cells",
        needs=("train",),
    )
    train.add_argument("--size", default="TINY", help="a size of the ladder: XXS, TINY, XS, S, M, L, XL")
    train.add_argument("--genes", type=int, default=512, help="genes of the panel")
    train.add_argument("--micro-batch", type=int, default=None, help="cells of one pass (by size if left out)")
    train.add_argument("--cells-per-step", type=int, default=32, help="cells of an update")
    train.add_argument("--dropout", type=float, default=0.0, help="share of units dropped")
    train.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    train.add_argument("--threads", type=int, default=1, help="CPU threads")
    train.add_argument("--stack", type=int, default=1, help="models trained as one; cells of all count")
    train.add_argument("--seconds", type=float, default=5.0, help="how long to measure, once warm")
    train.add_argument("--json", action="store_true", help="as JSON")
    train.add_argument("--spec", default=None, help="measure every kind of run of this spec instead")
    train.add_argument("--out", type=Path, default=None, help="with --spec: JSON file for `plan --rates`")
    doctor = verb(top, "doctor", verbs.doctor, "what this machine has and lacks")
    doctor.add_argument("--write-to", type=Path, default=Path("."), help="a directory that must be writable")
    return parser


def _reaches_s3(options: argparse.Namespace) -> bool:
    """Whether an argument is an ``s3://`` URI. A Census there is read by TileDB, which brings its own client."""
    return any(
        isinstance(value, str) and value.startswith("s3://")
        for name, value in vars(options).items()
        if name != "census"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors of this package become one line and an exit code."""
    options = build_parser().parse_args(arguments)
    try:
        require_extras(options.asked, *options.needs, *(["s3"] if _reaches_s3(options) else []))
        return int(options.handler(options))
    except ScalingRayError as error:
        print(f"scaling-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("scaling-ray: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
