"""results.parquet of a sweep as typed rows. A missing column is an error, never a value that is None."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from scaling_ray.errors import BadInput
from scaling_ray.results.columns import COLUMNS, SCHEMA, Row
from scaling_ray.results.sweep_files import RESULTS, RESULTS_CSV
from scaling_ray.storage import Place

_AGAIN = "run the sweep again to write it anew"
_OF_EVERY_RUN = tuple(each.name for each in fields(Row) if each.default is MISSING)
_OF_FINISHED_RUNS = tuple(column.name for column in COLUMNS if column.required)


class Results(NamedTuple):
    """The rows of a results.parquet, and which file it was."""

    rows: list[Row]
    sha256: str


def read_rows(place: Place) -> list[Row]:
    """Every run of the sweep at ``place``, in the order of the table; BadInput as :func:`read_results`."""
    return read_results(place).rows


def read_results(place: Place) -> Results:
    """The results of the sweep at ``place``, read once.

    Raises:
        BadInput: there is no results.parquet, or it is none of this version (see :func:`parse_results`).
    """
    try:
        data = place.read(RESULTS)
    except FileNotFoundError as error:
        raise BadInput("T038", place.field, str(place), f"holds no {RESULTS}; run the sweep first") from error
    return Results(parse_results(data), hashlib.sha256(data).hexdigest())


def parse_results(data: bytes) -> list[Row]:
    """The rows of a results.parquet; a float that is NaN or infinite is None.

    Raises:
        BadInput: not Parquet, a column of :data:`SCHEMA` is missing or of another type, there are no rows, or a
            finished run of the grid has no value in a column that is required.
    """
    try:
        return _rows(pq.read_table(io.BytesIO(data)))
    except pa.ArrowException as error:
        raise BadInput("T039", RESULTS, str(error), f"not the table of a sweep of this version; {_AGAIN}") from error


def parse_csv(data: bytes) -> list[Row]:
    """The rows of a results.csv. A column that no run needs and that earlier versions did not write is None.

    Raises:
        BadInput: not such a table, or as :func:`parse_results`.
    """
    types = dict(zip(SCHEMA.names, SCHEMA.types, strict=True))
    try:
        options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False)
        table = csv.read_csv(io.BytesIO(data), convert_options=options)
    except pa.ArrowException as error:
        raise BadInput(
            "T040", RESULTS_CSV, str(error), "not the table of a sweep; name results.parquet, results.csv or a sweep"
        ) from error
    for column in COLUMNS:
        if column.name not in table.column_names and not column.required:
            table = table.append_column(column.name, pa.nulls(table.num_rows, column.type))
    return _rows(table)


def _rows(table: pa.Table) -> list[Row]:
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise BadInput("T041", RESULTS, ", ".join(missing), f"missing from its columns; {_AGAIN}")
    table = table.select(SCHEMA.names).cast(SCHEMA)
    if table.num_rows == 0:
        raise BadInput("T042", RESULTS, 0, "has no rows; run the sweep first")
    return [_row(values) for values in table.to_pylist()]


def _row(values: Mapping[str, Any]) -> Row:
    known: dict[str, Any] = {
        name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()
    }
    row = Row(**known)
    for name in _OF_FINISHED_RUNS if row.is_finished else _OF_EVERY_RUN:
        if known[name] is None:
            state = "is done and" if row.is_finished else "is in the table and"
            raise BadInput("T043", f"{RESULTS}: {name}", row.run_id, f"{state} has none; {_AGAIN}")
    return row
