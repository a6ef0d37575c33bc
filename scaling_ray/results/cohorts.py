"""Cohorts: runs of a sweep, or of any table, that may share one law, fitted by what the declared columns say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.laws import Agreement, fit_table, nothing_to_fit
from scaling_ray.results.columns import COLUMNS, Row, agreeing
from scaling_ray.results.foreign import read_table
from scaling_ray.results.read import read_rows
from scaling_ray.storage import open_place

AGREEMENT = Agreement(within_law=agreeing("within_law"), by_size=agreeing("by_size"))
Progress = Callable[[str], None]


def fit_columns(
    columns: Mapping[str, Any], *, anchors: Sequence[str] = ("XXS",), progress: Progress | None = None
) -> dict[str, Any]:
    """:func:`~scaling_ray.laws.fit_table` on columns under declared names, with what these say must agree.

    Raises:
        BadInput: a needed column is missing, columns differ in length, or a number is none.
    """
    return fit_table(columns, agreement=AGREEMENT, anchors=anchors, progress=progress)


def fit_place(where: Path | str, progress: Progress | None = None) -> dict[str, Any]:
    """The content of ``fit.json`` for a sweep (a directory or an ``s3://`` prefix) or a table (.csv, .parquet).

    Raises:
        BadInput: neither, or nothing in it that a law could be fitted to.
    """
    if str(where).startswith("s3://") or Path(where).is_dir():
        return fit_document(fit_cohorts(read_rows(open_place(where, "table")), progress))
    return fit_columns(read_table(where), progress=progress)


def fit_cohorts(rows: Sequence[Row], progress: Progress | None = None) -> dict[int, dict[str, Any]]:
    """One fit per number of genes, that with the most finished runs first: a loss over other genes is another loss.

    A cohort without anything to fit is refused, with the reason.
    """
    finished: dict[int, int] = {}
    for row in rows:
        finished[row.genes] = finished.get(row.genes, 0) + row.is_finished
    fits = {}
    for genes in sorted(finished, key=lambda genes: (-finished[genes], genes)):
        columns = columns_of([row for row in rows if row.genes == genes])
        try:
            fits[genes] = fit_columns(columns, progress=progress)
        except BadInput as error:
            fits[genes] = nothing_to_fit(error.said, columns, AGREEMENT)
    return fits


def fit_document(fits: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """``fit.json``: the first cohort's fit, and where there are others all of them under ``cohorts``."""
    first = next(iter(fits.values()))
    return first if len(fits) == 1 else first | {"cohorts": {f"genes={genes}": fit for genes, fit in fits.items()}}


def columns_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as columns of a fit of test loss; a column without a single value is left out."""
    columns = {column.name: [getattr(row, column.name) for row in rows] for column in COLUMNS}
    known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return {
        "loss": columns["test_loss"],
        "columns_used": {name: name for name in known} | {"loss": "test_loss"},
    } | known
