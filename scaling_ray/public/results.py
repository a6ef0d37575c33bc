"""The results of a sweep: a row for each run, typed, and as an Arrow table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from scaling_ray.console import plain, table
from scaling_ray.errors import BadInput
from scaling_ray.results.columns import SCHEMA, Row
from scaling_ray.results.read import parse_csv, parse_results, read_rows
from scaling_ray.results.sweep_files import SweepFiles


@dataclass(frozen=True, repr=False)
class Results:
    """Every run of a sweep, those that chose learning rates (``role`` "rate") included. It has R rows.

    ``rows`` are typed, one for each run, and ``table`` holds the same as R rows of an Arrow table. A value that is not
    known, or does not exist for a run, is None. Losses are in the unit that ``loss_unit`` names.
    """

    rows: tuple[Row, ...]

    @property
    def table(self) -> pa.Table:
        """(R, columns) as ``results.parquet`` has them; ``table.to_pandas()`` gives a data frame."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows], schema=SCHEMA)

    @property
    def finished(self) -> tuple[Row, ...]:
        """The runs of the grid that are done: those that a law is fitted to."""
        return tuple(row for row in self.rows if row.is_finished)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        lines = [f"{len(self.rows)} runs, {len(self.finished)} of the grid finished"]
        known = [row for row in self.finished if row.test_loss is not None and row.cells is not None]
        if not known:
            return lines[0]
        cells = sorted({row.cells for row in known if row.cells is not None})
        lines.append(f"mean test loss ({known[0].loss_unit}) by size and training cells")
        rows = []
        for params, size in sorted({(row.params, row.size) for row in known}):
            row_of_size = [size, f"{params:,}"]
            for count in cells:
                losses = [row.test_loss for row in known if (row.params, row.size, row.cells) == (params, size, count)]
                given = [loss for loss in losses if loss is not None]
                row_of_size.append(f"{sum(given) / len(given):.4g}" if given else "-")
            rows.append(row_of_size)
        head = ["size", "params", *(f"{count:,}" for count in cells)]
        lines += plain(table(head, rows, right=range(1, len(head))))
        return "\n".join(lines)


def read_results(sweep: str | Path) -> Results:
    """The results of a sweep.

    Args:
        sweep: directory or ``s3://`` URI of a sweep, its ``results.parquet``, or a ``results.csv`` that was kept.

    Returns:
        All runs, in the order of the sweep's table.

    Raises:
        BadInput: no such sweep or file, or a table that no sweep of this version wrote.

    Example:
        >>> results = scaling_ray.read_results("reports/planted/results.csv")
        >>> len(results.finished)
        84
        >>> frame = results.table.to_pandas()
    """
    path = Path(sweep)
    if "://" in str(sweep) or path.is_dir():
        return Results(tuple(read_rows(SweepFiles.at(sweep).place)))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(
            "V009", "sweep", str(sweep), f"cannot be read ({error.strerror}); name a sweep or its table"
        ) from error
    return Results(tuple(parse_csv(data) if path.suffix == ".csv" else parse_results(data)))
