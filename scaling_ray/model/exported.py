"""A trained model as a directory: ``model.safetensors`` and ``model.json``. Needs torch, nothing of a sweep."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.records import ModelRecord
from scaling_ray.storage import file_sha256, unseal

RECORD, WEIGHTS = "model.json", "model.safetensors"


def save_model(directory: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> ModelRecord:
    """Write both files into an existing directory.

    Args:
        directory: not looked at by readers yet; the caller publishes it.
        weights: by the network's own names.
        facts: every field of ``ModelRecord`` but ``version`` and ``weights_sha256``.
    """
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
    record = ModelRecord(**facts, weights_sha256=file_sha256(directory / WEIGHTS))
    (directory / RECORD).write_text(record.to_json(), encoding="utf-8")
    # safetensors makes files for their owner alone; a model is read by whoever may read the directory
    (directory / WEIGHTS).chmod((directory / RECORD).stat().st_mode)
    return record


def read_record(directory: Path) -> ModelRecord:
    """What the model in ``directory`` is; BadInput where there is none, or one of another version."""
    path = directory / RECORD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"holds no readable {RECORD}; make a model with `scaling-ray export`"
        raise BadInput("M012", "model", str(directory), remedy) from error
    fields = unseal(text, str(path), "export the model again")
    version, known = fields.pop("version", None), ModelRecord.model_fields["version"].default
    if version != known:
        raise BadInput(
            "M013", f"{path}: version", version, f"is not known here, only {known} is; use the version that wrote it"
        )
    return ModelRecord.parse(text, str(path))


def load_model(directory: Path) -> tuple[MaskedGeneTransformer, ModelRecord]:
    """The network in evaluation mode, on the CPU in fp32, and its record.

    Raises:
        BadInput: no model, one of another version, or weights that are not those that were exported.
    """
    record = read_record(directory)
    path = directory / WEIGHTS
    remedy = "is missing, cut short or changed since it was written; export the model again"
    try:
        weights = path.read_bytes()
    except OSError as error:
        raise BadInput("M014", str(path), error.strerror, remedy) from error
    found = hashlib.sha256(weights).hexdigest()
    if found != record.weights_sha256:
        raise BadInput("M015", str(path), f"sha256 {found[:12]}, not {record.weights_sha256[:12]}", remedy)
    network = MaskedGeneTransformer(record.shape, len(record.feature_ids))
    try:
        network.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise BadInput("M016", str(path), str(error), f"does not fit {RECORD}; export the model again") from error
    return network.eval(), record
