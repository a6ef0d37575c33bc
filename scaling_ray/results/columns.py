"""The columns of results.parquet, each declared once: the writer, the reader, ``fit`` and the report go by this.

A column is a field of ``Row``: its Python type gives its Arrow type, its metadata the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import pyarrow as pa

ColumnRole = Literal["identity", "axis", "protocol", "execution", "state", "count", "loss", "reference", "note"]
"""What a column is: an axis of the grid, a rule of training, how it was carried out, what was counted, a loss, ..."""


@dataclass(frozen=True)
class Column:
    """One column.

    ``required``: every finished run of the grid has a value. ``agrees``: runs that differ in it belong to no one law;
    "by_size" lets it follow the size. ``aliases`` are what other people's tables and older ones call it, the first one
    found counts; a table's own column of the exact name comes first.
    """

    name: str
    type: pa.DataType
    unit: str
    role: ColumnRole
    required: bool
    agrees: Literal["", "within_law", "by_size"]
    aliases: tuple[str, ...]


def _column(
    role: ColumnRole,
    unit: str = "",
    *aliases: str,
    required: bool = False,
    agrees: Literal["", "within_law", "by_size"] = "",
) -> Any:
    facts = {"role": role, "unit": unit, "aliases": aliases, "required": required, "agrees": agrees}
    return field(default=None, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep; what is not known yet, or does not exist for it, is None."""

    run_id: str = field(metadata={"role": "identity", "required": True})
    role: Literal["law", "rate"] = field(metadata={"role": "identity", "required": True})
    status: Literal["waiting", "running", "done", "failed"] = field(metadata={"role": "state", "required": True})
    failure: str | None = _column("state")
    size: str = field(metadata={"role": "axis", "required": True})
    width: int | None = _column("axis", "units")
    layers: int | None = _column("axis")
    heads: int | None = _column("axis")
    feedforward: int | None = _column("axis", "multiple of width")
    params: int = field(
        metadata={
            "role": "axis",
            "unit": "parameters",
            "required": True,
            "aliases": ("parameters", "n_params", "num_params", "model_size", "n"),
        }
    )
    params_without_embedding: int | None = _column("axis", "parameters", "non_embedding_params")
    genes: int = field(metadata={"role": "axis", "unit": "genes", "required": True, "agrees": "within_law"})
    cells: int | None = _column(
        "axis", "unique training cells", "tokens", "n_tokens", "num_tokens", "training_tokens", "d", required=True
    )
    cells_requested: str | None = _column("axis", "cells, or all")
    donors: int | None = _column("axis", "donors", agrees="within_law")
    seed: int = field(metadata={"role": "axis", "required": True, "aliases": ("replicate",)})
    lr: float | None = _column("protocol", "peak learning rate", agrees="by_size", required=True)
    lr_at_edge: bool | None = _column("note")
    recipe: str | None = _column("protocol", agrees="within_law", required=True)
    umi_fraction: float | None = _column("protocol", "share of molecules", agrees="within_law")
    objective: str | None = _column("protocol", agrees="within_law", required=True)
    schedule: str | None = _column("protocol", agrees="within_law", required=True)
    max_cells_seen: int | None = _column("protocol", "cells seen", agrees="by_size", required=True)
    cells_seen: int | None = _column("count", "cell presentations", "tokens_seen", required=True)
    masked_genes_seen: int | None = _column("count", "masked genes", required=True)
    optimizer_steps: int | None = _column("count", "updates", required=True)
    flops: float | None = _column(
        "count", "matrix FLOP", "training_flop", "training_flops", "flop", "compute", required=True
    )
    wall_seconds: float | None = _column("count", "s", required=True)
    loss_unit: str | None = _column("protocol", agrees="within_law", required=True)
    val_loss: float | None = _column("loss", "loss_unit", "val_mse", required=True)
    final_val_loss: float | None = _column("loss", "loss_unit", "final_val_mse", required=True)
    test_loss: float | None = _column("loss", "loss_unit", "test_mse", required=True)
    best_cells_seen: int | None = _column("count", "cell presentations")
    stop_reason: str | None = _column("state", required=True)
    undertrained: bool | None = _column("note")
    baseline_loss: float | None = _column("reference", "loss_unit", "baseline", "baseline_mse")
    gaussian_loss: float | None = _column("reference", "loss_unit", "gaussian", "gaussian_mse")
    attainable_loss: float | None = _column("reference", "loss_unit", "attainable", "attainable_mse")
    bound_loss: float | None = _column("reference", "loss_unit", "bound", "bound_mse")
    attainable_bits: float | None = _column("reference", "bits per masked gene")
    bound_bits: float | None = _column("reference", "bits per masked gene")
    bound_z: float | None = _column("reference", "standard errors")
    test_per_gene_bits: float | None = _column("loss", "bits per masked gene", "per_gene_bits")
    baseline_per_gene_bits: float | None = _column("reference", "bits per masked gene")
    precision: str | None = _column("execution")
    stacked: int | None = _column("execution", "models")
    attempts: int | None = _column("state", required=True)
    mlflow_run_id: str | None = _column("note")
    data_hash: str | None = _column("identity", agrees="within_law", required=True)
    workers: int | None = _column("execution", "processes")
    engine: str | None = _column("execution")


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _type_of(hint: Any) -> pa.DataType:
    """The Arrow type of ``int``, ``float | None``, ``Literal["a", "b"]``, ..."""
    for kind in (bool, int, float, str):
        if hint is kind or kind in getattr(hint, "__args__", ()):
            return _TYPES[kind]
    return pa.string()  # a Literal of strings


def _columns() -> tuple[Column, ...]:
    hints = get_type_hints(Row)
    found = []
    for each in fields(Row):
        facts = each.metadata
        found.append(
            Column(
                name=each.name,
                type=_type_of(hints[each.name]),
                unit=facts.get("unit", ""),
                role=facts["role"],
                required=facts.get("required", False),
                agrees=facts.get("agrees", ""),
                aliases=tuple(facts.get("aliases", ())),
            )
        )
    return tuple(found)


COLUMNS = _columns()
SCHEMA = pa.schema([(column.name, column.type) for column in COLUMNS])
