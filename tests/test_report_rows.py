"""results.parquet as typed rows: declared once, written, read and shown; what is missing has a name."""

from __future__ import annotations

import typing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import rows_of, write_rows, write_sweep

from scaling_ray import cli
from scaling_ray.errors import BadInput
from scaling_ray.report.page import NOT_SHOWN, render
from scaling_ray.report.pictures import draw_pictures
from scaling_ray.report.summary import summarise
from scaling_ray.report.sweep import read_sweep
from scaling_ray.results.cohorts import fit_cohorts, fit_columns, fit_place
from scaling_ray.results.columns import COLUMNS, FOREIGN, SCHEMA, Row, agreeing
from scaling_ray.results.foreign import read_table
from scaling_ray.results.read import parse_results
from scaling_ray.storage import sealed_json

NAMES = [column.name for column in COLUMNS]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "s", sizes=("XXS", "W8", "TINY", "XS"), cells=(500,))


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def other(value: Any, hint: Any) -> Any:
    """A value of the same type that a reader would take for another."""
    if isinstance(value, bool):
        return not value
    if value is None:
        kind = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        return {str: "other", int: 7, float: 0.7, bool: True}[kind]
    return value + "x" if isinstance(value, str) else 2 * value + 1


def page_of(sweep: Path, known: dict[int, dict[str, Any]] | None = None) -> str:
    """The page without the hash of the table; with ``known`` fits also without pictures."""
    read = read_sweep(sweep)
    fits = known or fit_cohorts(read.rows)
    report = summarise(read, fits) | {"beside": None}
    page = render(report, [] if known else draw_pictures(read, fits, report["unit"]), fits)
    return page.replace(str(read.sha256["results.parquet"]), "")


def test_rows_come_back_as_they_were_written() -> None:
    hints = typing.get_type_hints(Row)
    blank = {name: None for name in NAMES}
    full = {name: other(None, hints[name] | None) for name in NAMES if name not in ("role", "status")}
    rows = [Row(**blank | full | {"role": "law", "status": "done"})]
    rows.append(Row(run_id="r", role="rate", status="waiting", size="S", params=1, genes=2, seed=3))
    assert parse_results(parquet(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA))) == rows


@pytest.mark.parametrize("name", ["bound_z", "test_loss", "data_hash", "engine"])
def test_a_missing_column_is_named_and_never_none(sweep: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(sweep / "results.parquet").drop_columns([name])
    pq.write_table(table, sweep / "results.parquet")
    with pytest.raises(BadInput, match=f"'{name}': missing from its columns; run the sweep again"):
        rows_of(sweep)
    for verb in (["status", str(sweep)], ["report", str(sweep), "--out", str(sweep / "r")]):
        assert cli.main(verb) == 2
        line = capsys.readouterr().err.strip()
        assert name in line and len(line.splitlines()) == 1
    assert not (sweep / "r").exists()


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_finished_run_without_a_needed_value_is_named(sweep: Path, value: float | None) -> None:
    first, *others = rows_of(sweep)
    write_rows(sweep, [replace(first, test_loss=value), *others])
    with pytest.raises(BadInput, match=f"test_loss: '{first.run_id}'"):
        rows_of(sweep)
    write_rows(sweep, [replace(first, status="running", test_loss=value, flops=None), *others])
    assert rows_of(sweep)[0].test_loss is None


def test_a_value_that_is_no_number_is_none(sweep: Path) -> None:
    first, *others = rows_of(sweep)
    write_rows(sweep, [replace(first, bound_z=float("nan")), *others])
    assert rows_of(sweep)[0].bound_z is None and rows_of(sweep)[1].bound_z is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"size,loss\n", "not the table of a sweep"),
        (parquet(pa.Table.from_pylist([], SCHEMA)), "has no rows"),
        (parquet(pa.table({name: ["?"] for name in SCHEMA.names})), "not the table of a sweep"),
    ],
)
def test_a_file_that_is_no_table_of_a_sweep_is_bad_input(data: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=f"results.parquet: .*{message}"):
        parse_results(data)


def test_older_tables_are_read_as_other_peoples_and_not_as_a_sweeps(sweep: Path, tmp_path: Path) -> None:
    old = {column.name: column.aliases[-1] for column in COLUMNS if "mse" in (column.aliases or ("",))[-1]}
    assert set(old.values()) >= {"test_mse", "final_val_mse", "baseline_mse", "bound_mse"}
    table = pq.read_table(sweep / "results.parquet")
    now = fit_place(sweep)
    renamed = table.rename_columns([old.get(name, name) for name in table.column_names])
    pq.write_table(renamed, sweep / "results.parquet")
    with pytest.raises(BadInput, match="missing from its columns"):
        fit_place(sweep)
    found = fit_place(sweep / "results.parquet")
    assert found["columns_used"]["loss"] == "test_mse"
    assert {key: value for key, value in found.items() if key != "columns_used"} == {
        key: value for key, value in now.items() if key != "columns_used"
    }


def test_every_declared_name_is_read_from_other_peoples_tables(tmp_path: Path) -> None:
    for column in (*COLUMNS, *FOREIGN):
        for name in (column.name, *column.aliases):
            table = {needed: "1" for needed in ("params", "loss") if needed != column.name} | {name: "1"}
            (tmp_path / "t.csv").write_text(f"{','.join(table)}\n{','.join(table.values())}\n")
            assert read_table(tmp_path / "t.csv")["columns_used"][column.name] == name


@pytest.mark.parametrize("name", [*agreeing("within_law"), *agreeing("by_size")])
def test_runs_that_differ_in_what_must_agree_are_no_one_law(name: str) -> None:
    params = np.repeat(np.geomspace(1e4, 1e7, 5), 2)
    loss = 1.0 + (params / 1e4) ** -0.4 + np.tile([0.001, -0.001], 5)
    table = {"params": params, "loss": loss}
    by_size = {"lr": 1.0, "max_cells_seen": 1.0, "micro_steps": 1.0}
    for values, apart in ((np.repeat([1, 2, 3, 4, 5], 2), name not in by_size), (np.tile([1, 2], 5), True)):
        reasons = fit_columns(table | {name: values})["headline"]["reasons"]
        assert any(f"differ in {name}" in line or f"{name} differs" in line for line in reasons) == apart, reasons


def test_every_column_is_shown_or_listed_as_not_shown(sweep: Path) -> None:
    """A page follows the value that a column has in all runs, or the column stands among those it leaves out."""
    plan = [
        {"run_id": row.run_id, "hours": 1.0, "hours_from": "assumed", "flops": 1.0, "execution": {"workers": 1}}
        for row in rows_of(sweep)
    ]
    (sweep / "plan.json").write_text(sealed_json({"version": 3, "settings": plan}))
    hints, rows, fits = typing.get_type_hints(Row), rows_of(sweep), fit_cohorts(rows_of(sweep))
    words, whole = page_of(sweep, fits), page_of(sweep)
    given, unseen = {"role": "rate", "status": "running"}, []
    for name in NAMES:
        changed = [replace(row, **{name: given.get(name, other(getattr(row, name), hints[name]))}) for row in rows]
        write_rows(sweep, changed)
        # Many a column is on the page as it stands; the others, and the runs' names, may come to it through a law.
        if (name == "run_id" or page_of(sweep, fits) == words) and page_of(sweep) == whole:
            unseen.append(name)
    assert set(unseen) == set(NOT_SHOWN)


def test_every_column_stands_in_report_json(sweep: Path) -> None:
    read = read_sweep(sweep)
    for shown, row in zip(summarise(read, fit_cohorts(read.rows))["runs"], read.rows, strict=True):
        assert {name: shown[name] for name in NAMES} == asdict(row)
