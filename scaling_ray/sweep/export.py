"""Export one trained model from a sweep, with the genes that it was trained on."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from scaling_ray import __version__
from scaling_ray.errors import BadInput
from scaling_ray.model.exported import read_record, save_model
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.records import RunResult, ShardManifest
from scaling_ray.results.sweep_files import ATTEMPTS, CHECKPOINTS, GENES, TEST_SPLIT, RunFiles, SweepFiles, write_table
from scaling_ray.runs import RunSpec, differing
from scaling_ray.shards.format import read_manifest
from scaling_ray.shards.read import read_labels, read_raw_sums
from scaling_ray.storage import Place, open_place, output_directory, partial_directory, publish_directory
from scaling_ray.train.attempt import BEST
from scaling_ray.train.checkpoint import Checkpoint, Checkpoints, newest, read_checkpoint
from scaling_ray.train.engine import load_weights, model_tensors
from scaling_ray.train.sharded import UNREADABLE

LIBRARIES = "libraries.json"
"""In a sweep's directory: the sizes of its training cells, by which an embedding knows cells that were cut."""


def keep_genes(sweep: Place, manifest: ShardManifest, shards: Place) -> None:
    """Copy what a model needs of the shards: their table of genes, and the size of a training cell's library."""
    if any(entry.path == GENES for entry in manifest.tables):
        sweep.write(GENES, _shards_genes(shards))
        sweep.write(LIBRARIES, (json.dumps({"median": _library_median(shards, manifest)}) + "\n").encode())


def _library_median(shards: Place, manifest: ShardManifest) -> float:
    """Median counts of a training cell over all genes, from one shard file: cells are permuted, so a fair sample."""
    first = manifest.splits["train"].files[0].path
    return float(np.median(read_raw_sums(shards, first)))


def keep_test_labels(sweep: Place, manifest: ShardManifest, shards: Place) -> None:
    """Write donor and cell type of each test cell beside them: a report says where the loss sits, without shards."""
    write_table(sweep, TEST_SPLIT, read_labels(shards, manifest, "test"))


def export_model(sweep: Path | str, run_id: str, out: Path | str, shards: Path | str | None = None) -> Path:
    """Publish the chosen checkpoint of a finished run as a model directory, in one rename.

    Args:
        sweep: directory or ``s3://`` URI of the sweep.
        run_id: a run of it that has a result.
        out: directory to create. A model of the same run that is there already is replaced.
        shards: of the sweep, where its directory holds no ``genes.parquet``.

    Raises:
        BadInput: no such run, no result, a checkpoint that is missing or damaged, genes unknown, or ``out`` holding
            something else.
    """
    target = Path(out)
    _check_target(target, run_id)
    files = SweepFiles.at(sweep)
    manifest = files.known_manifest()
    own = _run_files(files, run_id)
    result = own.result()
    if result is None:
        raise BadInput("M019", "run_id", run_id, _why_no_result(own))
    run = own.spec()
    if run is None:
        raise BadInput("M020", f"{own.place}/spec.json", None, "is missing; run the sweep again")
    for field, found, wanted in (
        ("run_id", result.run_id, run_id),
        ("data_hash", result.data_hash, manifest.data_hash),
    ):
        if found != wanted:
            raise BadInput(
                "M021",
                f"{own.place}/result.json",
                found,
                f"is not the {field} of this sweep, {wanted}; sweep into a new directory",
            )
    genes = _genes(files, manifest, shards).slice(0, run.genes)
    weights = _chosen_weights(own, run, result)
    facts: dict[str, Any] = run.model_dump(include={"run_id", "size", "width", "layers", "heads", "feedforward"})
    facts |= run.train.model_dump(include={"recipe", "mask_fraction", "umi_fraction", "objective"})
    facts["precision"] = run.execution.precision
    facts["library_median"] = _kept_library(files, manifest, shards)
    facts |= result.model_dump(include={"lr", "loss_unit", "val_loss", "test_loss", "data_hash"})
    facts |= {
        "seed": run.seed,
        "params": run.params,
        "feature_ids": genes["feature_id"].to_pylist(),
        "feature_names": genes["feature_name"].to_pylist(),
        "census": manifest.census,
        "scaling_ray_version": __version__,
    }
    output_directory(out if "://" in str(out) else target.parent)
    building = partial_directory(target)
    try:
        save_model(building, weights, facts)
        publish_directory(building, target)
    except OSError as error:
        raise BadInput(
            "M022", "--out", str(target), f"cannot be written ({error.strerror}); name another place"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _check_target(target: Path, run_id: str) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        there = read_record(target).run_id
    except BadInput as error:
        raise BadInput(
            "M023", "--out", str(target), "is there already and is no model; name a new directory"
        ) from error
    if there != run_id:
        raise BadInput("M024", "--out", str(target), f"holds the model of {there}; name a new directory")


def _run_files(sweep: SweepFiles, run_id: str) -> RunFiles:
    """The files of a run; BadInput naming the nearest ids for one that the sweep does not know."""
    known = sweep.run_ids() | _planned(sweep)
    if run_id not in known:
        near = difflib.get_close_matches(run_id, sorted(known), n=3, cutoff=0.3)
        near += [name for name in sorted(known) if run_id and run_id in name and name not in near][: 3 - len(near)]
        remedy = f"did you mean {' or '.join(near)}?" if near else f"`scaling-ray status {sweep}` lists its runs"
        raise BadInput("M025", "run_id", run_id, f"is no run of {sweep}; {remedy}")
    return sweep.run(run_id)


def _planned(sweep: SweepFiles) -> set[str]:
    """Run ids of a plan, for a better answer only: without one, or with a damaged one, there are none."""
    try:
        plan = sweep.plan()
        return {setting["run_id"] for setting in plan["settings"]} if plan else set()
    except (BadInput, KeyError, TypeError):
        return set()


def _why_no_result(files: RunFiles) -> str:
    failure = files.failure()
    if failure is not None:
        return f"failed ({failure.failure}) and has no model; see {files.place}/failure.json"
    return "has no result yet; run the sweep to its end first"


def _chosen_weights(files: RunFiles, run: RunSpec, result: RunResult) -> dict[str, Tensor]:
    remedy = "move this run's directory away and sweep again, then export"
    where = f"{files.place}/{CHECKPOINTS}/{BEST}"
    try:
        chosen = _chosen_checkpoint(files, result)
        if other := differing(chosen.facts["identity"], run.identity):
            raise BadInput("M026", f"checkpoint.{other[0]}", where, f"is of another run; {remedy}")
        weights = model_tensors(chosen.tensors())
        load_weights(MaskedGeneTransformer(run.shape, run.genes, outputs_per_gene=run.outputs_per_gene), weights)
    except FileNotFoundError as error:
        raise BadInput("M027", "checkpoint", where, f"is missing; {remedy}") from error
    except UNREADABLE as error:
        if isinstance(error, BadInput) and error.field.startswith("checkpoint."):
            raise
        raise BadInput("M028", "checkpoint", where, f"is damaged ({error}); {remedy}") from error
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise BadInput("M029", "checkpoint", where, f"is damaged ({broken[0]} is not finite); {remedy}")
    return weights


def _chosen_checkpoint(files: RunFiles, result: RunResult) -> Checkpoint:
    """The chosen weights of a finished run.

    A driver killed between a run's commit and its tidying leaves them with the attempt that committed.
    """
    published = files.place.below(f"{CHECKPOINTS}/{BEST}")
    attempt = files.place.below(f"{ATTEMPTS}/{result.attempt}/{CHECKPOINTS}")
    if not published.names() and (found := newest(Checkpoints(attempt), BEST, [])) is not None:
        return found
    return read_checkpoint(published)


def _genes(sweep: SweepFiles, manifest: ShardManifest, shards: Path | str | None) -> pa.Table:
    """feature_id and feature_name of all genes of the shards in rank order."""
    if shards is not None:
        source = open_place(shards, "--shards")
        manifest_there = read_manifest(source)
        if manifest_there.data_hash != manifest.data_hash:
            raise BadInput(
                "M030", "--shards", str(shards), "are not the shards of this sweep; name those it was trained on"
            )
        manifest, data = manifest_there, _shards_genes(source)
    elif (kept := sweep.place.read_if_there(GENES)) is not None:
        data = kept
    else:
        raise BadInput("M031", "sweep", str(sweep), f"holds no {GENES}; name its shards with --shards")
    expected = {entry.path: entry.sha256 for entry in manifest.tables}.get(GENES)
    if hashlib.sha256(data).hexdigest() != expected:
        remedy = "is not the one the manifest names (sha256 differs); name whole shards with --shards"
        raise BadInput("M032", GENES, str(shards or sweep), remedy)
    return pq.read_table(pa.BufferReader(data), columns=["feature_id", "feature_name"])


def _kept_library(sweep: SweepFiles, manifest: ShardManifest, shards: Path | str | None) -> float | None:
    kept = sweep.place.read_if_there(LIBRARIES)
    if kept is not None:
        return float(json.loads(kept)["median"])
    return None if shards is None else _library_median(open_place(shards, "--shards"), manifest)


def _shards_genes(shards: Place) -> bytes:
    try:
        return shards.read(GENES)
    except FileNotFoundError as error:
        raise BadInput("M033", "--shards", str(shards), f"{GENES}: is missing; build the shards again") from error
