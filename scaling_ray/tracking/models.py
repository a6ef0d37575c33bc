"""Trained models beside their runs on a tracking server: safetensors, model.json and a description. No pickle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from scaling_ray.errors import BadInput
from scaling_ray.records import ModelRecord
from scaling_ray.results.columns import Row
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.tracking.ledger import known_uri, read_tracked
from scaling_ray.tracking.mlflow import Server, said_of

MODEL_TAG = "scaling_ray.model"
"""The sha256 of the weights that a run holds."""
FOLDER = "model"


def chosen_runs(rows: Iterable[Row]) -> list[str]:
    """Of each setting, the run that validation chose among its seeds and rates."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        setting = (row.params, row.size, row.genes, row.cells, row.cells_requested, row.donors)
        if row.is_finished and row.val_loss is not None:
            there = best.get(setting)
            if there is None or there.val_loss is None or row.val_loss < there.val_loss:
                best[setting] = row
    return [row.run_id for row in best.values()]


def log_model(sweep: SweepFiles, run_id: str, directory: Path, record: ModelRecord, uri: str | None = None) -> bool:
    """Put an exported model below its run on the server; False where the run holds these weights already.

    Raises:
        BadInput: the run is not on the server.
        ScalingRayError: the server refuses or does not answer.
    """
    uri = uri or known_uri(sweep)
    tracked = read_tracked(sweep.run(run_id).place)
    if tracked is None or tracked.uri != uri:
        raise BadInput(
            "K008", "SWEEP_DIR", str(sweep), "is not on this server; `scaling-ray track replay` logs it first"
        )
    try:
        server = Server(uri)
        seen = server.run(tracked.mlflow_run_id)
        if seen.tags.get(MODEL_TAG) == record.weights_sha256:
            return False
        files = {f"{FOLDER}/{path.name}": path.read_bytes() for path in sorted(directory.iterdir())}
        files[f"{FOLDER}/README.md"] = description_of(record).encode()
        server.write_artifacts(seen.run_id, files)
        server.log(seen.run_id, tags={MODEL_TAG: record.weights_sha256})
        return True
    except Exception as error:
        raise said_of(uri, error) from error


def description_of(record: ModelRecord) -> str:
    """What a model is and how it is used, as Markdown."""
    test = f", test loss {record.test_loss:.4g}" if record.test_loss is not None else ""
    return "\n".join(
        [
            f"# {record.size}: {record.params:,} parameters, {len(record.feature_ids):,} genes",
            "",
            f"The chosen checkpoint of run `{record.run_id}`: validation loss {record.val_loss:.4g}{test} "
            f"({record.loss_unit} per masked gene), recipe {record.recipe}, rate {record.lr:g}, seed {record.seed}.",
            "",
            "- `model.safetensors`: the weights, by the names of the network; no code is run to read them",
            "- `model.json`: shape, genes in the order of the model's inputs, normalisation, origin of the cells",
            "",
            "Embed new cells, with both files in DIR: `scaling-ray embed DIR FILE.h5ad --out EMBEDDED.h5ad`",
            "",
        ]
    )
