"""Tables of runs, one's own or other people's, into the columns that a fit reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput

# What the fit calls a column -> the names it goes by in tables, first found first served.
_NAMES = {
    "params": ("params", "parameters", "n_params", "num_params", "model_size", "n"),
    "params_without_embedding": ("params_without_embedding", "non_embedding_params"),
    "cells": ("cells", "tokens", "n_tokens", "num_tokens", "training_tokens", "d"),
    "cells_seen": ("cells_seen", "tokens_seen"),
    "seed": ("seed", "replicate"),
    "flops": ("flops", "training_flop", "training_flops", "flop", "compute"),
    "size": ("size",),
    "width": ("width",),
    "genes": ("genes",),
    "recipe": ("recipe",),
    "donors": ("donors",),
    "umi_fraction": ("umi_fraction",),
    "objective": ("objective",),
    "schedule": ("schedule",),
    "data_hash": ("data_hash",),
    "max_cells_seen": ("max_cells_seen",),
    "micro_batch": ("micro_batch",),
    "accumulation": ("accumulation",),
    "micro_steps": ("micro_steps",),
    "lr": ("lr",),
    "lr_at_edge": ("lr_at_edge",),
    "undertrained": ("undertrained",),
    "bound_z": ("bound_z",),
    "status": ("status",),
    "failure": ("failure",),
    "role": ("role",),
    "run_id": ("run_id",),
    "per_gene_bits": ("per_gene_bits", "test_per_gene_bits"),
    "count_bits": ("count_bits",),
    "nb_bits": ("nb_bits",),
    "multinomial_bits": ("multinomial_bits",),
    "beta_binomial_bits": ("beta_binomial_bits",),
}
_LOSSES: tuple[str, ...] = ("loss", "test_mse", "test_loss", "val_mse", "best_val_mse", "val_loss")
_LOSSES += ("validation_loss", "eval_loss", "final_loss", "mse", "l")
_VALIDATION = ("val_mse", "best_val_mse", "val_loss", "validation_loss", "eval_loss")
_FINAL = ("final_loss", "final_val_mse")
# Baselines were measured on test cells, and are comparable with a loss on test cells only.
_ON_TEST = {"baseline": ("baseline", "baseline_mse"), "gaussian": ("gaussian", "gaussian_mse")}
_ON_TEST |= {"attainable": ("attainable", "attainable_mse"), "bound": ("bound", "bound_mse")}


def read_table(path: Path | str) -> dict[str, Any]:
    """Columns of a CSV or Parquet table, or of a sweep's directory, under the names that a fit reads.

    Names are matched without regard to case, spaces and dashes ("Model Size" is ``model_size``), and by the synonyms of
    other people's tables (N and D, tokens, val_loss); a table's own column of the exact name always comes first.
    The loss is ``loss``, else ``test_mse``, else ``val_mse``: the first that every finished run has. The entry
    ``columns_used`` says which column of the table each came from.

    Raises:
        BadInput: no such file, not a table, or no column for parameters or loss.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("results.parquet", "results.csv") if (path / name).exists()]
        if not found:
            raise BadInput("table", str(path), "no results.parquet or results.csv in it; run the sweep first")
        path = found[0]
    if not path.exists():
        raise BadInput("table", str(path), "no such file")
    raw = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    raw, own_name = _plain_names(raw)
    rows = len(next(iter(raw.values()), []))
    if not rows:
        raise BadInput("table", str(path), "has no rows")
    point = [_is_point(raw, i) for i in range(rows)]
    losses = [name for name in _LOSSES if name in raw]
    if not losses:
        raise BadInput("loss", sorted(raw), f"the table needs one of the columns {', '.join(_LOSSES[:-1])}")
    whole = [n for n in losses if all(raw[n][i] is not None for i in range(rows) if point[i])]
    used = {"loss": (whole or losses)[0]}
    for name, aliases in _NAMES.items():
        _use(used, name, aliases, raw)
    if "params" not in used:
        raise BadInput(
            "params", sorted(raw), "the table needs a column params (or N): trainable parameters of each run"
        )
    if used["loss"] in ("loss", "test_mse", "test_loss"):
        for name, aliases in _ON_TEST.items():
            _use(used, name, aliases, raw)
    _use(used, "validation_loss", _VALIDATION, raw)
    _use(used, "final_loss", _FINAL, raw)
    columns: dict[str, Any] = {name: raw[source] for name, source in used.items()}
    columns["columns_used"] = {name: own_name.get(source, source) for name, source in used.items()}
    return columns


def _plain_names(raw: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The columns with plain names beside their own: lower case, one underscore for anything that is no letter.

    Returns:
        the columns under both names, and the name that each plain one has in the table.

    Raises:
        BadInput: two columns with the same plain name, neither of which has it as its own.
    """
    found = dict(raw)
    twice: dict[str, list[str]] = {}
    for name in raw:
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        if plain and plain not in raw:
            twice.setdefault(plain, []).append(name)
    for plain, names in twice.items():
        if len(names) > 1:
            raise BadInput(plain, ", ".join(names), "two columns of one name; rename or remove one")
        found[plain] = raw[names[0]]
    return found, {plain: names[0] for plain, names in twice.items()}


def _use(used: dict[str, str], name: str, aliases: tuple[str, ...], raw: Mapping[str, list[Any]]) -> None:
    for alias in aliases:
        if alias in raw and any(value is not None for value in raw[alias]):
            used[name] = alias
            return


def _is_point(raw: Mapping[str, list[Any]], row: int) -> bool:
    done = "status" not in raw or raw["status"][row] in (None, "done")
    return done and ("role" not in raw or raw["role"][row] in (None, "law"))


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            records = list(reader)
            names = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput("table", str(path), f"is not a CSV table ({error})") from error
    for number, record in enumerate(records, start=2):
        if None in record or any(value is None for value in record.values()):
            raise BadInput(
                "table", f"{path.name} line {number}", f"does not have the {len(names)} fields of its header"
            )
    # An empty field is a value that is not known; spelled-out nan stays, for the fit to name.
    return {name.strip(): [record[name].strip() or None for record in records] for name in names}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput("table", str(path), f"is not a Parquet file ({error})") from error
