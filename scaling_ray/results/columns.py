"""The columns of results.parquet, each declared once: the writer, the reader, ``fit`` and the report go by this.

A column is a field of ``Row``: its Python type gives its Arrow type, its metadata the rest. Columns that only other
people's tables have stand below it, in ``FOREIGN``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import pyarrow as pa

ColumnRole = Literal["identity", "axis", "protocol", "execution", "state", "count", "loss", "reference", "note"]
"""Kinds of columns: an axis of the grid, a rule of training, a detail of execution, a count, a loss, ..."""
Agrees = Literal["", "within_law", "by_size"]
"""How far runs of one law must agree: not at all; all of them; all of one size and number of cells."""


@dataclass(frozen=True)
class Column:
    """One column.

    ``unit`` is in words, "loss_unit" where the column of that name says it. ``required``: every finished run of the
    grid has a value. ``agrees``: runs that differ in it belong to no one law. ``aliases`` are what other people's
    tables and older ones call it; a table's own column of the exact name comes first, then the first alias found.
    """

    name: str
    type: pa.DataType
    unit: str
    role: ColumnRole
    required: bool
    agrees: Agrees
    aliases: tuple[str, ...]


def _facts(
    role: ColumnRole, unit: str = "", *aliases: str, required: bool = False, agrees: Agrees = ""
) -> dict[str, Any]:
    return {"role": role, "unit": unit, "aliases": aliases, "required": required, "agrees": agrees}


def _always(role: ColumnRole, unit: str = "", *aliases: str, agrees: Agrees = "") -> Any:
    """A column that every run has a value in, finished or not."""
    return field(metadata=_facts(role, unit, *aliases, required=True, agrees=agrees))


def _column(role: ColumnRole, unit: str = "", *aliases: str, required: bool = False, agrees: Agrees = "") -> Any:
    return field(default=None, metadata=_facts(role, unit, *aliases, required=required, agrees=agrees))


def _names_of_params(*things: str) -> tuple[str, ...]:
    """What a number of parameters is called elsewhere; the words alone first, as far as they are no declared name."""
    forms = ("{0}", "n_{0}", "num_{0}", "total_{0}", "{0}_total", "model_{0}", "number_of_{0}", "trainable_{0}")
    names = [form.format(thing) for form in forms for thing in things]
    return (*(name for name in names if name != "params"), "parameter_count", "param_count", "params_count", "nparams")


_TOKENS = (
    *("tokens", "n_tokens", "num_tokens", "training_tokens", "total_tokens", "train_tokens", "tokens_trained"),
    *("n_train_tokens", "num_train_tokens", "dataset_tokens", "unique_tokens", "n_cells", "num_cells", "d"),
)
_HELD_OUT = (
    *("valid_loss", "dev_loss", "heldout_loss", "held_out_loss", "val_nll", "eval_nll", "validation_nll", "loss_val"),
    *("val_bpb", "eval_bpb", "validation_bpb", "val_cross_entropy", "eval_cross_entropy"),
)
_BITS = ("bpb", "bits_per_byte", "bits_per_token", "bpc", "bits_per_character")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep; what is not known yet, or does not exist for it, is None."""

    run_id: str = _always("identity", "", "run_uuid", "wandb_id")
    role: Literal["law", "rate"] = _always("identity")
    status: Literal["waiting", "running", "done", "failed"] = _always("state", "", "state", "run_status", "run_state")
    failure: str | None = _column("state")
    size: str = _always("axis")
    width: int | None = _column("axis", "units")
    layers: int | None = _column("axis")
    heads: int | None = _column("axis")
    feedforward: int | None = _column("axis", "multiple of width")
    params: int = _always("axis", "parameters", *_names_of_params("params", "parameters"), "model_size", "n")
    params_without_embedding: int | None = _column(
        "axis",
        "parameters",
        "non_embedding_params",
        "params_non_embedding",
        "non_embedding_parameters",
        "n_params_non_embedding",
        "num_non_embedding_params",
        "n_non_embedding_params",
    )
    genes: int = _always("axis", "genes", agrees="within_law")
    cells: int | None = _column("axis", "unique training cells", *_TOKENS, required=True)
    cells_requested: str | None = _column("axis", "cells, or all")
    donors: int | None = _column("axis", "donors", agrees="within_law")
    seed: int = _always("axis", "", "replicate", "random_seed", "rng_seed", "init_seed", "model_seed", "repeat", "rep")
    lr: float | None = _column(
        "protocol",
        "peak learning rate",
        "learning_rate",
        "max_lr",
        "peak_lr",
        "max_learning_rate",
        "peak_learning_rate",
        agrees="by_size",
        required=True,
    )
    lr_at_edge: bool | None = _column("note")
    lr_check_ratio: float | None = _column("note", "best rate of the checking size over the one taken over")
    recipe: str | None = _column("protocol", agrees="within_law", required=True)
    umi_fraction: float | None = _column("protocol", "share of molecules", agrees="within_law")
    held_out_in_training: bool | None = _column("protocol", agrees="within_law")
    objective: str | None = _column("protocol", agrees="within_law", required=True)
    schedule: str | None = _column("protocol", agrees="within_law", required=True)
    max_cells_seen: int | None = _column("protocol", "cell presentations", agrees="by_size", required=True)
    cells_seen: int | None = _column("count", "cell presentations", "tokens_seen", required=True)
    masked_genes_seen: int | None = _column("count", "masked genes", required=True)
    optimizer_steps: int | None = _column("count", "updates", required=True)
    flops: float | None = _column(
        "count",
        "matrix FLOP",
        "training_flop",
        "training_flops",
        "flop",
        "compute",
        "total_flops",
        "train_flops",
        "total_flop",
        "training_compute",
        "train_compute",
        "c",
        required=True,
    )
    wall_seconds: float | None = _column("count", "s", required=True)
    loss_unit: str | None = _column("protocol", agrees="within_law", required=True)
    val_loss: float | None = _column(
        "loss", "loss_unit", "val_mse", "best_val_mse", "validation_loss", "eval_loss", *_HELD_OUT, required=True
    )
    final_val_loss: float | None = _column("loss", "loss_unit", "final_loss", "final_val_mse", required=True)
    test_loss: float | None = _column(
        "loss", "loss_unit", "test_nll", "test_bpb", "loss_test", "test_mse", required=True
    )
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
    worker_counts: str | None = _column("execution", "processes")

    @property
    def is_finished(self) -> bool:
        """Whether it is a run of the grid, not one that chose a rate, and done."""
        return self.role == "law" and self.status == "done"


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _type_of(hint: Any) -> pa.DataType:
    """The Arrow type of ``int``, ``float | None``, ``Literal["a", "b"]``, ..."""
    for kind in (bool, int, float, str):
        if hint is kind or kind in getattr(hint, "__args__", ()):
            return _TYPES[kind]
    return pa.string()  # a Literal of strings


def _columns() -> tuple[Column, ...]:
    hints = get_type_hints(Row)
    return tuple(Column(name=each.name, type=_type_of(hints[each.name]), **each.metadata) for each in fields(Row))


COLUMNS = _columns()
SCHEMA = pa.schema([(column.name, column.type) for column in COLUMNS])


def _foreign(name: str, kind: type, *facts: Any, agrees: Agrees = "") -> Column:
    return Column(name=name, type=_TYPES[kind], **_facts(*facts, agrees=agrees))


FOREIGN = (
    _foreign("loss", float, "loss", "loss_unit", "mse", "nll", "cross_entropy", "ce_loss", "lm_loss", *_BITS, "l"),
    _foreign("micro_batch", int, "execution", "cells or tokens", agrees="within_law"),
    _foreign("accumulation", int, "execution", "micro-batches", agrees="within_law"),
    _foreign("micro_steps", int, "protocol", "micro-batches", agrees="by_size"),
    _foreign("best_micro_step", int, "count", "micro-batches"),
    _foreign("count_bits", float, "loss", "bits per masked gene"),
    _foreign("nb_bits", float, "loss", "bits per masked gene"),
    _foreign("multinomial_bits", float, "loss", "bits per masked gene"),
    _foreign("beta_binomial_bits", float, "loss", "bits per masked gene"),
)
"""Columns that a fit reads where another's table has them, and that no sweep writes."""

LOSSES = ("loss", "test_loss", "val_loss", "final_val_loss")
"""Columns that can be the loss of a law, in order of preference: the first that every finished run has."""


def agreeing(agrees: Agrees) -> tuple[str, ...]:
    """Names of all columns that must agree so."""
    return tuple(column.name for column in (*COLUMNS, *FOREIGN) if column.agrees == agrees)
