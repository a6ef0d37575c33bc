"""The table of a sweep, assembled from the files of its runs: results.parquet and results.csv. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
from numpy.typing import NDArray

from scaling_ray.records import Branch, RunResult
from scaling_ray.results.columns import SCHEMA, Row
from scaling_ray.results.rates import at_edge, check_ratios
from scaling_ray.results.references import UNIT, per_gene_bits, read_closed_form, read_floor, reference_name
from scaling_ray.results.sweep_files import (
    ATTEMPTS,
    BUDGETS_CSV,
    FAILURE,
    MLFLOW,
    RESULT,
    RESULTS,
    RESULTS_CSV,
    TEST_CELLS,
    TEST_GENES,
    RunFiles,
    SweepFiles,
    read_table,
    write_table,
)
from scaling_ray.runs import RunSpec

_OF_RESULT = {each.name for each in fields(Row)} & set(RunResult.model_fields) - {"run_id", "attempt", "version"}


class ResultsTable:
    """The rows of a sweep's runs, kept in memory, so that only the files of a run that ended are read again.

    Args:
        sweep: its files.
        runs: all of them, in the table's order; rates may be chosen later (``replace_runs``).
        train_cells: cells of the training split.
    """

    def __init__(self, sweep: SweepFiles, runs: list[RunSpec], train_cells: int) -> None:
        self._sweep, self._train_cells = sweep, train_cells
        self._runs = {run.run_id: run for run in runs}
        self._order = {run.run_id: number for number, run in enumerate(runs)}
        self.rows: list[Row] = []
        self._references: dict[str, dict[str, Any] | None] = {}
        self._floors: dict[str, dict[str, NDArray[np.float64]] | None] = {}
        self._columns: dict[str, list[Any]] = {}
        self._branches: dict[str, list[Branch]] = {}
        self.refresh()

    def row(self, run_id: str) -> Row:
        """What is known of a run."""
        return self.rows[self._order[run_id]]

    def replace_runs(self, runs: Iterable[RunSpec]) -> None:
        """Replace the runs by the same ones with later decisions (rates, execution)."""
        for run in runs:
            self._runs[run.run_id] = run
            number = self._order[run.run_id]
            if self.rows[number].status != "done" and self.rows[number].lr != run.lr:
                self._put(number, replace(self.rows[number], lr=run.lr))

    def refresh(self, run_ids: Iterable[str] | None = None) -> None:
        """Read the files of some runs again, or of all."""
        if run_ids is None:
            self._references, self._floors = {}, {}
            there = self._sweep.place.names("runs/")
            by_run: dict[str, set[str]] = {run_id: set() for run_id in self._runs}
            for name in there:
                _, run_id, rest = name.split("/", 2)
                if run_id in by_run:
                    by_run[run_id].add(rest)
            self.rows = [self._row(run, by_run[run_id]) for run_id, run in self._runs.items()]
            self._columns = {name: [getattr(row, name) for row in self.rows] for name in SCHEMA.names}
        else:
            for run_id in run_ids:
                run = self._runs[run_id]
                self._put(self._order[run_id], self._row(run, set(self._sweep.run(run_id).place.names())))
        self._mark_rates()

    def _put(self, number: int, row: Row) -> None:
        self.rows[number] = row
        for name, column in self._columns.items():
            column[number] = getattr(row, name)

    def write(self) -> list[Row]:
        """Publish both tables as they are in memory; returns the rows."""
        arrays = [pa.array(self._columns[field.name], type=field.type) for field in SCHEMA]
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        write_table(self._sweep.place, RESULTS, table)
        text = pa.BufferOutputStream()
        pcsv.write_csv(table, text)
        self._sweep.place.write(RESULTS_CSV, text.getvalue().to_pybytes())
        budgets = self._budgets()
        if budgets.num_rows:
            text = pa.BufferOutputStream()
            pcsv.write_csv(budgets, text)
            self._sweep.place.write(BUDGETS_CSV, text.getvalue().to_pybytes())
        return self.rows

    def _budgets(self) -> pa.Table:
        """The loss of each run of the law at each budget that its trunk was decayed for, and at its end."""
        told = [name for name in ("run_id", "size", "params", "genes", "cells", "seed", "lr") if name in SCHEMA.names]
        rows = []
        for row in self.rows:
            if not self._branches.get(row.run_id):
                continue
            same = {name: getattr(row, name) for name in told}
            for branch in self._branches[row.run_id]:
                rows.append(same | branch.model_dump(include={"cells_seen", "val_loss", "test_loss"}))
            rows.append(same | {name: getattr(row, name) for name in ("cells_seen", "val_loss", "test_loss")})
        names = [*told, "cells_seen", "val_loss", "test_loss"]
        return pa.table({name: [row[name] for row in rows] for name in names})

    def _row(self, run: RunSpec, there: set[str]) -> Row:
        """One run as a row of the table; ``there`` are the names of its files."""
        files, closed = self._sweep.run(run.run_id), self._closed_form(run)
        row = _planned_row(run, self._train_cells)
        result = files.result() if RESULT in there else None
        if result is not None:
            row = replace(row, status="done", cells=result.cells_resolved, **_of_result(result))
            self._branches[run.run_id] = result.branches
        elif FAILURE in there and (failure := files.failure()) is not None:
            row = replace(row, status="failed", failure=failure.failure)
        elif any(name.startswith(f"{ATTEMPTS}/") for name in there):
            row = replace(row, status="running")
        if MLFLOW in there:
            row = replace(row, mlflow_run_id=files.mlflow_run_id())
        if run.train.loss_unit != UNIT:
            return replace(row, undertrained=_undertrained(files, result, None))
        if closed is not None:
            row = replace(
                row,
                baseline_loss=closed["test_gene_mean_loss"],
                gaussian_loss=closed["test_gaussian_loss"],
                baseline_per_gene_bits=closed["test_gene_mean_per_gene_bits"],
            )
        if TEST_GENES in there:
            genes = read_table(files.place, TEST_GENES)
            bits = per_gene_bits(genes["loss"].to_numpy(), genes["masked_genes"].to_numpy())
            row = replace(row, test_per_gene_bits=bits)
        gene_mean = closed["val_gene_mean_loss"] if closed is not None else None
        row = replace(row, undertrained=_undertrained(files, result, gene_mean))
        return self._with_floors(row, run, files, TEST_CELLS in there)

    def _closed_form(self, run: RunSpec) -> dict[str, Any] | None:
        name = reference_name(run, self._train_cells)
        if self._references.get(name) is None:
            self._references[name] = read_closed_form(self._sweep.references, name)
        return self._references[name]

    def _with_floors(self, row: Row, run: RunSpec, files: RunFiles, tested: bool) -> Row:
        key = f"{run.genes} {run.train.recipe} {run.train.mask_fraction} {run.train.umi_fraction}"
        if self._floors.get(key) is None:
            self._floors[key] = read_floor(self._sweep.references, run.genes, run.train)
        floor = self._floors[key]
        if floor is None:
            return row
        masked = floor["masked_genes"].sum()
        row = replace(
            row,
            bound_loss=float(floor["bound_loss"].sum() / masked),
            attainable_loss=float(floor["attainable_loss"].sum() / masked),
            bound_bits=float(floor["bound_entropy_bits"].sum() / masked),
            attainable_bits=float(floor["attainable_entropy_bits"].sum() / masked),
        )
        if not tested:
            return row
        table = read_table(files.place, TEST_CELLS)
        if not np.array_equal(table["cell"].to_numpy(), floor["cell"]):
            raise ValueError(f"{files.place}/{TEST_CELLS}: its cells are not those of the planted floor")
        return replace(row, bound_z=paired_z(table["loss"].to_numpy() - floor["bound_loss"]))

    def _mark_rates(self) -> None:
        """Say of law rows whether their rate is at an edge of those tried, and how well a transfer held."""
        by_name = {row.run_id: row for row in self.rows}
        ratios = check_ratios(self._runs.values(), by_name)
        for number, (row, run) in enumerate(zip(self.rows, self._runs.values(), strict=True)):
            if row.role != "law":
                continue
            tried = [rate for name in run.lr_candidates if (rate := by_name[name].lr) is not None]
            edge = at_edge(run, row.lr, tried) if tried and row.lr is not None else None
            ratio = ratios.get(run.genes)
            if (row.lr_at_edge, row.lr_check_ratio) != (edge, ratio):
                self._put(number, replace(row, lr_at_edge=edge, lr_check_ratio=ratio))


def _planned_row(run: RunSpec, train_cells: int) -> Row:
    named = ("run_id", "role", "size", "width", "layers", "heads", "feedforward", "genes", "donors", "seed", "lr")
    return Row(
        **{name: getattr(run, name) for name in named},
        status="waiting",
        params=run.params,
        params_without_embedding=run.params_without_embedding,
        cells=min(run.cells or train_cells, train_cells) if run.donors is None else run.cells,
        cells_requested="all" if run.cells is None else str(run.cells),
        recipe=run.train.recipe,
        umi_fraction=run.train.umi_fraction,
        held_out_in_training=run.train.held_out_in_training,
        objective=run.train.objective,
        loss_unit=run.train.loss_unit,
        schedule=run.train.schedule,
        max_cells_seen=run.train.total_steps * run.train.cells_per_step,
        workers=run.execution.workers,
        engine=run.execution.engine,
    )


def _of_result(result: RunResult) -> dict[str, Any]:
    found = {name: getattr(result, name) for name in _OF_RESULT}
    return found | {"worker_counts": " ".join(map(str, result.worker_counts)) or None}


HALF = 0.5
"""The branch that says whether a run was still learning: a decay from its trunk at half its budget."""
STILL_LEARNING = 0.02
"""Share of all that a run gained over the gene mean from which on the second half of its budget says that a third half
would bring something; calibrated on runs whose budget was doubled (reports/LOG.md)."""


def is_undertrained(half_loss: float, loss: float, gene_mean_loss: float) -> bool:
    """Whether a run is still learning at the end of its budget.

    It is where twice the budget brought more than a part of all it gained over the gene mean, both ends decayed.
    """
    return half_loss - loss > STILL_LEARNING * (gene_mean_loss - loss)


def may_be_undertrained(curve_loss: list[float], gene_mean_loss: float) -> bool:
    """The same from the validation curve alone, for schedules that have no trunk; a guess, since the rate falls.

    The second half of the curve brought more than a tenth of all it gained over the gene mean. (The end of a decaying
    rate is flat in any case, so the last few evaluations say nothing.)
    """
    half = len(curve_loss) // 2
    if half < 1:
        return True
    return curve_loss[half - 1] - curve_loss[-1] > 0.1 * (gene_mean_loss - min(curve_loss))


def _undertrained(files: RunFiles, result: RunResult | None, gene_mean_loss: float | None) -> bool | None:
    if result is None:
        return None
    if result.stop_reason == "early_stop":
        return False
    if gene_mean_loss is None:
        return None
    half = next((branch.val_loss for branch in result.branches if branch.share == HALF), None)
    if half is not None:
        return is_undertrained(half, result.val_loss, gene_mean_loss)
    curve = [row["val_loss"] for row in files.rows() if row["kind"] == "eval"]
    return may_be_undertrained(curve, gene_mean_loss) if curve else None


def paired_z(differences: NDArray[np.float64]) -> float | None:
    """Mean of per-cell differences over its standard error; None where they do not vary."""
    if len(differences) < 2:
        return None
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() / error) if error > 0 else None


def is_failure(row: Row) -> bool:
    """Whether a run is missing a required result; a learning rate that diverged is an answer, not a failure."""
    return row.status != "done" and (row.role, row.failure) != ("rate", "diverged")
