"""One trained model out of a sweep directory, with the genes it was trained on."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scaling_ray import __version__
from scaling_ray.errors import BadInput
from scaling_ray.model.exported import read_record, save_model
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.records import RunFailure, RunResult, ShardManifest
from scaling_ray.shards.format import read_manifest
from scaling_ray.spec import RunSpec
from scaling_ray.storage import Place, open_place, output_directory, partial_directory, publish_directory, write_atomic
from scaling_ray.train.checkpoint import read_result
from scaling_ray.train.engine import load_weights, model_tensors

GENES = "genes.parquet"


def keep_genes(sweep: Path, manifest: ShardManifest, shards: Place) -> None:
    """Copy the shards' table of genes beside the sweep's copy of their manifest: a model is no use without it."""
    if any(entry.path == GENES for entry in manifest.tables):
        write_atomic(sweep / GENES, _shards_genes(shards))


def export_model(sweep: Path, run_id: str, out: Path | str, shards: Path | str | None = None) -> Path:
    """Publish the chosen checkpoint of a finished run as a model directory, in one rename.

    Args:
        sweep: directory of the sweep.
        run_id: a run of it that has a result.
        out: directory to appear. A model of the same run that is there already is replaced.
        shards: of the sweep, where its directory holds no ``genes.parquet``.

    Raises:
        BadInput: no such run, no result, a checkpoint that is missing or damaged, genes unknown, or ``out`` holding
            something else.
    """
    target = Path(out)
    _check_target(target, run_id)
    if not (sweep / "shards_manifest.json").is_file():
        raise BadInput("sweep", str(sweep), "holds no shards_manifest.json; name the --out of a `scaling-ray sweep`")
    manifest = ShardManifest.read(sweep / "shards_manifest.json")
    directory = _run_directory(sweep, run_id)
    result = read_result(directory)
    if result is None:
        raise BadInput("run_id", run_id, _why_no_result(directory))
    run = _read_run(directory)
    for field, found, wanted in (
        ("run_id", result.run_id, run_id),
        ("data_hash", result.data_hash, manifest.data_hash),
    ):
        if found != wanted:
            raise BadInput(str(directory / "result.json"), found, f"is not the {field} of this sweep, {wanted}")
    genes = _genes(sweep, manifest, shards).slice(0, run.genes)
    weights = _chosen_weights(directory, run, result)
    facts: dict[str, Any] = run.model_dump(include={"run_id", "size", "width", "layers", "heads", "feedforward"})
    facts |= run.train.model_dump(include={"recipe", "mask_fraction", "umi_fraction"}) | {"precision": run.precision}
    facts |= result.model_dump(include={"lr", "val_mse", "test_mse", "data_hash"})
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
        raise BadInput("--out", str(target), f"cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _check_target(target: Path, run_id: str) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        there = read_record(target).run_id
    except BadInput as error:
        raise BadInput("--out", str(target), "is there already and is no model; name a new directory") from error
    if there != run_id:
        raise BadInput("--out", str(target), f"holds the model of {there}; name a new directory")


def _run_directory(sweep: Path, run_id: str) -> Path:
    """Where a run's files are; BadInput naming the nearest ids for one that the sweep does not know."""
    known = {path.name for path in (sweep / "runs").glob("*") if path.is_dir()}
    known |= _planned(sweep / "plan.json")
    if run_id not in known:
        near = difflib.get_close_matches(run_id, sorted(known), n=3, cutoff=0.3)
        near += [name for name in sorted(known) if run_id and run_id in name and name not in near][: 3 - len(near)]
        remedy = f"did you mean {' or '.join(near)}?" if near else f"`scaling-ray status {sweep}` lists its runs"
        raise BadInput("run_id", run_id, f"is no run of {sweep}; {remedy}")
    return sweep / "runs" / run_id


def _planned(path: Path) -> set[str]:
    """Run ids of a plan, for a better answer only: without one, or with a damaged one, there are none."""
    try:
        return {cell["run_id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _why_no_result(directory: Path) -> str:
    if (directory / "failure.json").is_file():
        failure = RunFailure.read(directory / "failure.json")
        return f"failed ({failure.failure}) and has no model; see {directory / 'failure.json'}"
    return "has no result yet; run the sweep to its end first"


def _read_run(directory: Path) -> RunSpec:
    path = directory / "spec.json"
    try:
        return RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(str(path), str(error).splitlines()[0], "is not a run's spec; run the sweep again") from error


def _chosen_weights(directory: Path, run: RunSpec, result: RunResult) -> dict[str, Tensor]:
    # A driver killed between a run's commit and its tidying leaves the checkpoint with the attempt that committed.
    places = (directory, directory / "attempts" / result.attempt)
    paths = [where / "checkpoints" / "best" / "state.safetensors" for where in places]
    path = next((path for path in paths if path.is_file()), None)
    remedy = "move this run's directory away and sweep again, then export"
    if path is None:
        raise BadInput("checkpoint", str(paths[0]), f"is missing; {remedy}")
    try:
        weights = model_tensors(load_file(path))
        load_weights(MaskedGeneTransformer(run.shape, run.genes), weights)
    except (OSError, SafetensorError, BadInput) as error:
        raise BadInput("checkpoint", str(path), f"is damaged ({error}); {remedy}") from error
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise BadInput("checkpoint", str(path), f"is damaged ({broken[0]} is not finite); {remedy}")
    return weights


def _genes(sweep: Path, manifest: ShardManifest, shards: Path | str | None) -> pa.Table:
    """feature_id and feature_name of all genes of the shards in rank order."""
    if shards is not None:
        source = open_place(shards, "--shards")
        manifest_there = read_manifest(source)
        if manifest_there.data_hash != manifest.data_hash:
            raise BadInput("--shards", str(shards), "are not the shards of this sweep")
        manifest, data = manifest_there, _shards_genes(source)
    elif (sweep / GENES).is_file():
        data = (sweep / GENES).read_bytes()
    else:
        raise BadInput("sweep", str(sweep), f"holds no {GENES}; name its shards with --shards")
    expected = {entry.path: entry.sha256 for entry in manifest.tables}.get(GENES)
    if hashlib.sha256(data).hexdigest() != expected:
        remedy = "is not the one the manifest names (sha256 differs); name whole shards with --shards"
        raise BadInput(GENES, str(shards or sweep), remedy)
    return pq.read_table(pa.BufferReader(data), columns=["feature_id", "feature_name"])


def _shards_genes(shards: Place) -> bytes:
    try:
        return shards.read(GENES)
    except FileNotFoundError as error:
        raise BadInput("--shards", str(shards), f"{GENES}: is missing; build the shards again") from error
