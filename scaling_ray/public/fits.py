"""Scaling laws of a table of runs, as values with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa

from scaling_ray.errors import BadInput
from scaling_ray.public.results import Results
from scaling_ray.results.cohorts import fit_cohorts, fit_document, fit_place
from scaling_ray.results.delimited import Fields, fields_in
from scaling_ray.results.foreign import read_table
from scaling_ray.results.table_fit import fit_read_table, said

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["supported", "approximate", "refused"]
Source: TypeAlias = "str | Path | Mapping[str, Sequence[Any]] | pd.DataFrame | pa.Table | Results"


@dataclass(frozen=True)
class Interval:
    """A value with the 95% interval that is shown of it; an end that the runs do not bound is None."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        low, high = ("open" if end is None else f"{end:.4g}" for end in (self.low, self.high))
        return f"{self.value:.4g} ({low} to {high}, 95%)"


@dataclass(frozen=True)
class Axis:
    """What the runs say of size, or of data: a verdict with its reasons, the exponent where there is one to tell.

    ``sentence`` says what more of it bought, or at most can buy, in the unit of the loss.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    exponent: Interval | None
    sentence: str | None


@dataclass(frozen=True)
class Prediction:
    """The mean loss of a setting that was not run: ``low`` to ``high`` with 95%. ``params``: parameters."""

    what: str
    verdict: Verdict
    params: float
    cells: float | None
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, repr=False)
class Fit:
    """A scaling law of loss against parameters P and, where they vary, training cells or tokens D.

    The verdict comes first. ``parameters`` (alpha, c, ...) is empty where the law is refused. ``document`` is all that
    ``scaling-ray fit`` writes to ``fit.json``. ``parts`` holds a fit for each part of a table that was taken apart, and
    for each number of genes of a sweep that has several; the fit itself is then that of the part with the most runs.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    settles: tuple[str, ...]
    formula: str
    parameters: Mapping[str, Interval]
    size: Axis
    data: Axis
    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...]
    parts: Mapping[str, Fit] = field(repr=False)
    document: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return "\n".join(said(self.document))


def fit_table(
    table: Source,
    *,
    loss: str | None = None,
    log_loss: bool = False,
    same: str | Sequence[str] = (),
    by: str | None = None,
    last: str | None = None,
    best: str | Sequence[str] = (),
) -> Fit:
    """Fit scaling laws to a table of runs: a verdict, intervals, what more size or data can buy.

    Args:
        table: of one row for each run, with columns for parameters and loss and, where they vary, training cells or
            tokens, seed and compute in FLOP. A .csv, .tsv or .parquet file, a dict of columns of equal length, a
            pandas or Arrow table; or a sweep: its directory, its ``s3://`` URI, or what ``read_results`` returned.
        loss: the column that is the loss, where several are.
        log_loss: fit the natural logarithm of the loss (of a perplexity).
        same: columns that differ between repeats of one setting and are ignored.
        by: a column whose values are fitted apart.
        last: of each run, keep the row that is last along this column.
        best: of each size and data, keep the value of these columns with the lowest mean loss.

    Raises:
        BadInput: no such table, no or several columns that could be parameters or loss, values that are no numbers, or
            a difference between repeats that nothing is said about.

    Example:
        >>> fit = scaling_ray.fit_table({"params": [1e3, 1e4, 1e5, 1e6], "loss": [2.0, 1.5, 1.26, 1.13]})
        >>> fit.verdict
        'refused'
    """
    asked: dict[str, Any] = {
        "same": [same] if isinstance(same, str) else same,
        "by": by,
        "last": last,
        "best": best,
        "loss": loss,
        "log_loss": log_loss,
    }
    is_sweep = isinstance(table, Results) or (
        isinstance(table, str | Path) and (str(table).startswith("s3://") or Path(table).is_dir())
    )
    if is_sweep:
        for name, value in asked.items():
            if value:
                raise BadInput("V006", name, value, "is for tables; of a sweep, fit its results.csv")
    if isinstance(table, Results):
        return _fit_of(fit_document(fit_cohorts(table.rows)), ())
    if isinstance(table, str | Path):
        if is_sweep:
            return _fit_of(fit_place(table), ())
        read = read_table(table, **asked)
    else:
        read = read_table(_fields(table), **asked)
    notes = {name: part.notes for name, part in read.parts.items()}
    return _fit_of(fit_read_table(read), read.notes, notes)


def _fields(table: Any) -> Fields:
    """The columns of a table that is in memory."""
    try:
        arrow = table if isinstance(table, pa.Table) else pa.table(dict(table) if isinstance(table, Mapping) else table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        remedy = "is no table; give columns of one type and of equal length"
        raise BadInput("V007", "table", type(table).__name__, f"{remedy} ({error})") from error
    return fields_in(arrow, type(table).__name__)


def _fit_of(
    document: Mapping[str, Any], notes: Sequence[str], part_notes: Mapping[str, Sequence[str]] | None = None
) -> Fit:
    head = document["headline"]
    given = {} if part_notes is None else part_notes
    parts = document["cohorts"] if "cohorts" in document else {}
    return Fit(
        verdict=head["verdict"],
        reasons=tuple(head["reasons"]),
        settles=tuple(head["settles"]),
        formula=head["formula"],
        parameters={name: _interval(each) for name, each in _parameters(head).items()},
        size=_axis(head["size"]),
        data=_axis(head["data"]),
        predictions=tuple(
            Prediction(
                what=one["what"],
                verdict=one["verdict"],
                params=one["params"],
                cells=one["cells"],
                value=one["value"],
                low=one["low"],
                high=one["high"],
            )
            for one in head["predictions"]["entries"]
        ),
        notes=tuple(notes),
        parts={name: _fit_of(part, given[name] if name in given else ()) for name, part in parts.items()},
        document=document,
    )


def _parameters(head: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = head["parameters"] if "parameters" in head else {}
    return found


def _axis(said_of: Mapping[str, Any]) -> Axis:
    exponent = said_of["parameter"]
    shown = None if exponent is None else _interval(exponent)
    return Axis(said_of["verdict"], tuple(said_of["reasons"]), shown, said_of["sentence"])


def _interval(parameter: Mapping[str, Any]) -> Interval:
    return Interval(parameter["value"], parameter["low"], parameter["high"])
