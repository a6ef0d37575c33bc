"""Other people's tables of runs, and older ones of this project, as columns under the names of this one."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.laws.points import is_finished
from scaling_ray.results.columns import COLUMNS, FOREIGN, LOSSES, Column

_ALL = {column.name: column for column in (*COLUMNS, *FOREIGN)}
# Where "loss" is no column of its own, the names of the others come before those that it goes by elsewhere.
_LOSSES = ("loss", *(name for own in LOSSES[1:] for name in (own, *_ALL[own].aliases)), *_ALL["loss"].aliases)
_ON_TEST = ("loss", "test_loss", *_ALL["test_loss"].aliases)


def read_table(path: Path | str) -> dict[str, Any]:
    """Columns of a CSV or Parquet table of runs, under the names of :class:`~scaling_ray.results.columns.Row`.

    Names are matched without regard to case, spaces and dashes ("Model Size" is ``model_size``), and by the aliases of
    :data:`COLUMNS` and :data:`FOREIGN` (N and D, tokens, test_mse); a table's own column of the exact name always comes
    first. The entry ``loss`` is the first of ``loss``, test, validation and final loss that every finished run has, and
    ``columns_used`` says which column of the table each entry came from.

    Raises:
        BadInput: no such file, not a table, or no column for parameters or loss.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput("table", str(path), "no such file")
    raw = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    raw, own_name = _plain_names(raw)
    rows = len(next(iter(raw.values()), []))
    if not rows:
        raise BadInput("table", str(path), "has no rows")
    losses = [name for name in _LOSSES if name in raw]
    if not losses:
        raise BadInput("loss", sorted(raw), f"the table needs one of the columns {', '.join(_LOSSES[:-1])}")
    unsaid = [None] * rows
    states = zip(raw.get("role", unsaid), raw.get("status", unsaid), strict=True)
    finished = [i for i, state in enumerate(states) if is_finished(*state)]
    whole = [name for name in losses if all(raw[name][i] is not None for i in finished)]
    used = {"loss": (whole or losses)[0]}
    for name, column in _ALL.items():
        # References were measured on test cells, and are comparable with a loss on test cells only.
        comparable = used["loss"] in _ON_TEST or (column.role, column.unit) != ("reference", "loss_unit")
        source = _source(column, raw)
        if name not in used and source is not None and comparable:
            used[name] = source
    if "params" not in used:
        raise BadInput(
            "params", sorted(raw), "the table needs a column params (or N): trainable parameters of each run"
        )
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


def _source(column: Column, raw: Mapping[str, list[Any]]) -> str | None:
    """The name that a column has in a table; None where it is not there, or without a single value."""
    for name in (column.name, *column.aliases):
        if name in raw and any(value is not None for value in raw[name]):
            return name
    return None


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
