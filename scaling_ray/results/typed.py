"""Columns of a table as their declared types: numbers in ones, states and flags in the words of this project."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaling_ray.results.delimited import Fields
from scaling_ray.results.doubts import refuse_doubtful
from scaling_ray.results.fields import Sign, decimal_sign, is_unknown, numbers, parse
from scaling_ray.results.naming import ALL, Named, Source

_STATES = {
    "done": ("done", "finished", "finish", "completed", "complete", "success", "succeeded", "successful", "ok"),
    "failed": ("failed", "diverged", "crashed", "crash", "killed", "error", "errored", "cancelled", "canceled"),
    "running": ("running", "scheduled", "pending", "preempted", "preempting"),
    "waiting": ("waiting", "queued"),
}
_STATE_OF = {word: state for state, words in _STATES.items() for word in words}
_YES, _NO = frozenset(("true", "t", "yes", "y", "1", "1.0")), frozenset(("false", "f", "no", "n", "0", "0.0"))
_SEVERAL_BUDGETS = 1.5  # compute of one size that differs by more is not early stopping of seeds


@dataclass(frozen=True)
class Typed:
    """A table whose columns are read: declared name -> values (R,), None where not known.

    ``named`` says where each came from, ``sign`` is the table's decimal sign, and ``notes`` say what was read as what.
    """

    named: Named
    values: Mapping[str, list[Any]]
    sign: Sign
    notes: tuple[str, ...]


def type_columns(fields: Fields, named: Named, log_asked: bool) -> Typed:
    """Read the columns of a table that have a declared name.

    Args:
        fields: the table.
        named: its names.
        log_asked: whether the user asked for the logarithm of the loss, which then is said.

    Raises:
        BadInput: numbers are written in two ways, or may mean two things.
    """
    notes = [*fields.notes, *named.notes]
    read = [fields.columns[source.header] for name, source in named.sources.items() if _is_number(name)]
    sign = decimal_sign((value for column in read for value in column), fields.separator)
    if sign == ",":
        notes.append("numbers are read with a decimal comma")
    values = {
        name: _values(name, source, fields.columns[source.header], sign, notes)
        for name, source in named.sources.items()
    }
    if "status" in named.sources and "failure" not in named.sources:
        states = fields.columns[named.sources["status"].header]
        values["failure"] = ["diverged" if str(state).lower() == "diverged" else None for state in states]
        named = replace(named, sources={**named.sources, "failure": named.sources["status"]})
    named = _with_data(named, values, notes)
    if named.log_loss:
        if log_asked:
            notes.append(f"the loss is the natural logarithm of {named.sources['loss'].header}, as asked")
        values["loss"] = [math.log(v) if isinstance(v, int | float) and v > 0 else v for v in values["loss"]]
    return Typed(named, values, sign, tuple(notes))


def _values(name: str, source: Source, fields: Sequence[Any], sign: Sign, notes: list[str]) -> list[Any]:
    """One column as its declared type."""
    if name == "status":
        return [state_of(value) for value in fields]
    if str(ALL[name].type) == "bool":
        return [_flag(value) for value in fields]
    if not _is_number(name):
        return [_plain(value, name) for value in fields]
    if name == "loss" or (name in ("params", "cells") and source.scale == 1.0):
        refuse_doubtful(source.header, fields, sign, whole=name != "loss")
    values, marks = numbers(source.header, fields, sign, source.scale)
    if source.scale != 1.0 and not marks:
        notes.append(f"{source.header} is read times {source.scale:,.0f}")
    if marks:
        notes.append(f"{source.header} is read with {', '.join(sorted(marks))} as written in its fields")
    whole = str(ALL[name].type) == "int64"
    return [int(v) if whole and isinstance(v, float) and v.is_integer() else v for v in values]


def _with_data(named: Named, values: dict[str, list[Any]], notes: list[str]) -> Named:
    """Data by a second way, where no column has its name: tokens seen, or compute over six parameters."""
    if "cells" in named.sources:
        return named
    params = values["params"]
    seen = named.sources.get("cells_seen")
    if seen is not None and "token" in seen.header.lower() and several_budgets(params, values["cells_seen"]):
        notes.append(f"{seen.header} is read as the data, each token once")
        values["cells"] = values["cells_seen"]
        return replace(named, sources={**named.sources, "cells": seen})
    if "flops" in named.sources and several_budgets(params, values["flops"]):
        header = named.sources["flops"].header
        notes.append(f"the table has no tokens, and compute differs within a size: tokens = {header} / (6 params)")
        values["cells"] = [
            f / (6.0 * p) if isinstance(f, int | float) and isinstance(p, int | float) and p else None
            for f, p in zip(values["flops"], params, strict=True)
        ]
        return replace(named, sources={**named.sources, "cells": Source(f"{header} / (6 params)")})
    return named


def state_of(value: Any) -> Any:
    """A state under the word of this project; one that is not known stays as it is."""
    return None if is_unknown(value) else _STATE_OF.get(str(value).strip().lower(), value)


def _flag(value: Any) -> Any:
    """A yes or no; what is neither stays as it is."""
    if is_unknown(value) or isinstance(value, bool):
        return None if is_unknown(value) else value
    word = str(value).strip().lower()
    return True if word in _YES else False if word in _NO else value


def _plain(value: Any, name: str) -> Any:
    """A field that is no number: None where it is not known, and a seed of 1.0 as 1."""
    if is_unknown(value):
        return None
    if name == "seed" and (number := parse(value)) is not None and number.value.is_integer():
        return int(number.value)
    return value


def _is_number(name: str) -> bool:
    return name != "seed" and str(ALL[name].type) in ("int64", "double")


def several_budgets(params: Sequence[Any], spent: Sequence[Any]) -> bool:
    """Whether runs of one size differ in what was spent on them by more than early stopping does."""
    within: dict[Any, list[float]] = {}
    for size, value in zip(params, spent, strict=True):
        if isinstance(value, int | float) and value > 0:
            within.setdefault(size, []).append(value)
    return any(max(values) > _SEVERAL_BUDGETS * min(values) for values in within.values())
