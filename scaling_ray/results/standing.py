"""How a sweep stands, from its files alone: what has ended, what trains, how fast, what is left. No torch, no Ray.

Files are read while a driver writes them: each is whole or absent, and a run may move on between two of them, which the
next look shows. No lease is taken.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult
from scaling_ray.results.columns import Row
from scaling_ray.results.read import parse_results
from scaling_ray.results.sweep_files import ATTEMPTS, FAILURE, PLAN, RESULT, RESULTS, SweepFiles

Status = Literal["waiting", "running", "done", "failed"]

QUEUE = "queue.json"
"""Written by the driver: ``{"waiting": [{"unit": name, "for": text}], "in_flight": [name, ...]}``."""
WINDOW_SECONDS = 600.0
"""What is recent: the span that rates are measured over."""
SILENT_INTERVALS = 3.0
"""A run whose next row is overdue by this many of its intervals no longer counts as training."""
READERS = 16
"""Files read at the same time: on S3 each is a request."""


@dataclass(frozen=True)
class Planned:
    """What is known of a run before it starts.

    ``cells`` is a label: a number of cells, or all, and of donors where the grid has several. ``cpu_hours`` and
    ``cost`` are None where the plan says none; ``cost`` is in the plan's own currency.
    """

    run_id: str
    role: Literal["law", "rate"]
    size: str
    params: int
    genes: int
    cells: str
    max_cells_seen: int | None
    cpu_hours: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class RunStanding:
    """One run: how it stands, the share of its budget that is behind it, and when it trained (seconds since 1970)."""

    planned: Planned
    status: Status = "waiting"
    failure: str | None = None
    message: str | None = None
    test_loss: float | None = None
    share: float = 0.0
    began_seconds: float | None = None
    last_seconds: float | None = None
    cells_per_second: float = 0.0
    """What it trained within the recent span, over all of that span."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to train: a rate that diverged would diverge again."""
        return self.status == "done" or self.failure == "diverged"

    @property
    def is_failure(self) -> bool:
        """Whether a required result is missing; of a learning rate, having diverged is an answer."""
        return self.status == "failed" and (self.planned.role, self.failure) != ("rate", "diverged")


@dataclass(frozen=True)
class Entry:
    """One entry of the matrix of sizes and numbers of cells: how many of its runs stand how."""

    genes: int
    size: str
    params: int
    cells: str
    total: int
    done: int
    running: int
    failed: int


@dataclass(frozen=True)
class Standing:
    """How a sweep stands at one moment.

    ``entries`` count the law's runs, ``rate_entries`` those that choose a learning rate (all cells of a size as one).
    ``seconds_left`` is None where nothing says it; ``estimate_from`` says what does: the recent rate, or the plan.
    ``waiting_for`` are units that the driver's queue holds back and why, None where the driver left no queue.
    """

    name: str
    runs: tuple[RunStanding, ...]
    entries: tuple[Entry, ...]
    rate_entries: tuple[Entry, ...]
    counts: dict[Status, int]
    elapsed_seconds: float | None
    silent_seconds: float | None
    cells_per_second: float | None
    cpu_hours_left: float | None
    seconds_left: float | None
    estimate_from: Literal["recent rate", "plan"] | None
    cost_spent: float | None
    cost_left: float | None
    waiting_for: tuple[tuple[str, str], ...] | None
    in_flight: tuple[str, ...]
    failures: tuple[RunStanding, ...]

    @property
    def has_ended(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.counts["running"] and not self.counts["waiting"]


class StandingReader:
    """Reads how a sweep stands, again and again; what is committed is read once."""

    def __init__(self, sweep: SweepFiles) -> None:
        self._sweep = sweep
        self._results: dict[str, RunResult] = {}

    def read(self) -> Standing:
        """The standing now.

        Raises:
            BadInput: the place holds neither plan.json nor results.parquet, or one of them is damaged.
        """
        data = self._sweep.place.read_if_there(RESULTS)
        rows = {row.run_id: row for row in parse_results(data)} if data is not None else {}
        plan = self._sweep.plan()
        if plan is None and not rows:
            place = self._sweep.place
            raise BadInput("T050", place.field, str(place), f"holds no {PLAN} and no {RESULTS}; run the sweep first")
        planned = [_planned(setting) for setting in plan["settings"]] if plan is not None else []
        known = {one.run_id for one in planned}
        planned += [_planned_of(row) for row in rows.values() if row.run_id not in known]
        now, there = time.time(), self._files_of_runs()

        def look(one: Planned) -> RunStanding:
            return self._run(one, rows.get(one.run_id), there.get(one.run_id, set()), now)

        with ThreadPoolExecutor(READERS) as readers:
            runs = list(readers.map(look, planned))
        return _standing(str(plan["name"]) if plan and "name" in plan else "", runs, plan, self._queue(), now)

    def _files_of_runs(self) -> dict[str, set[str]]:
        """Names of files and folders at the top of each run's folder."""
        found: dict[str, set[str]] = {}
        for name in self._sweep.place.names("runs/"):
            parts = name.split("/")
            if len(parts) > 2:
                found.setdefault(parts[1], set()).add(parts[2])
        return found

    def _run(self, planned: Planned, row: Row | None, there: set[str], now: float) -> RunStanding:
        """One run: its own files are newer than the table."""
        files, run = self._sweep.run(planned.run_id), RunStanding(planned)
        if RESULT in there and planned.run_id not in self._results and (result := files.result()) is not None:
            self._results[planned.run_id] = result
        if planned.run_id in self._results:
            return _done(run, self._results[planned.run_id], now)
        if row is not None and row.status == "done":
            return replace(run, status="done", share=1.0, test_loss=row.test_loss)
        if FAILURE in there and (failure := files.failure()) is not None:
            return replace(run, status="failed", failure=failure.failure, message=failure.message)
        if ATTEMPTS in there:
            return _running(run, files.rows(), now)
        if row is not None and row.status == "failed":
            return replace(run, status="failed", failure=row.failure)
        return run

    def _queue(self) -> dict[str, Any] | None:
        data = self._sweep.place.read_if_there(QUEUE)
        try:
            found = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


def _planned(setting: dict[str, Any]) -> Planned:
    """A run of plan.json; newer and older plans may say less of its cost."""
    hours = setting["hours"] if "hours" in setting else None
    execution = setting["execution"] if "execution" in setting else {}
    processes = setting["workers"] if "workers" in setting else 1
    threads = execution["cpus"] if "cpus" in execution else 1
    return Planned(
        run_id=setting["run_id"],
        role=setting["role"] if "role" in setting else "law",
        size=setting["size"],
        params=setting["params"],
        genes=setting["genes"],
        cells=_label(setting["cells"], setting["donors"] if "donors" in setting else "all"),
        max_cells_seen=setting["max_cells_seen"] if "max_cells_seen" in setting else None,
        cpu_hours=None if hours is None else float(hours) * processes * threads,
        cost=setting["cost"] if "cost" in setting else None,
    )


def _planned_of(row: Row) -> Planned:
    """A run that only the table knows."""
    cells = row.cells_requested or ("all" if row.cells is None else str(row.cells))
    donors = "all" if row.donors is None else row.donors
    return Planned(row.run_id, row.role, row.size, row.params, row.genes, _label(cells, donors), row.max_cells_seen)


def _label(cells: int | str, donors: int | str) -> str:
    if donors == "all":
        return str(cells)
    return f"{donors} donors" if cells == "all" else f"{cells} of {donors} donors"


def _done(run: RunStanding, result: RunResult, now: float) -> RunStanding:
    ended = result.ended_ms / 1000
    began = ended - result.wall_seconds
    recent = max(0.0, min(ended, now) - max(began, now - WINDOW_SECONDS))
    per_second = result.cells_seen / max(result.wall_seconds, 1e-3)
    return replace(
        run,
        status="done",
        share=1.0,
        test_loss=result.test_loss,
        began_seconds=began,
        last_seconds=ended,
        cells_per_second=per_second * recent / WINDOW_SECONDS,
    )


def _running(run: RunStanding, rows: list[dict[str, Any]], now: float) -> RunStanding:
    """A run with an attempt: its rate is that of its recent rows, as long as the next one is not long overdue."""
    points = [
        (row["timestamp_ms"] / 1000, row["cells_seen"]) for row in rows if "timestamp_ms" in row and "cells_seen" in row
    ]
    if not points:
        return replace(run, status="running")
    last, seen = points[-1]
    budget = run.planned.max_cells_seen
    run = replace(
        run,
        status="running",
        share=min(1.0, seen / budget) if budget else 0.0,
        began_seconds=points[0][0],
        last_seconds=last,
    )
    earlier = [point for point in points if point[0] < last]
    if not earlier:
        return run
    if now - last > max(WINDOW_SECONDS, SILENT_INTERVALS * (last - earlier[-1][0])):
        return run
    recent = [point for point in earlier if point[0] >= now - WINDOW_SECONDS]
    since, seen_then = recent[0] if recent else earlier[-1]
    per_second = max(0, seen - seen_then) / (last - since)
    recently = min(WINDOW_SECONDS, now - points[0][0])
    return replace(run, cells_per_second=per_second * recently / WINDOW_SECONDS)


def _standing(
    name: str, runs: list[RunStanding], plan: dict[str, Any] | None, queue: dict[str, Any] | None, now: float
) -> Standing:
    counts: dict[Status, int] = {"done": 0, "running": 0, "waiting": 0, "failed": 0}
    for run in runs:
        counts[run.status] += 1
    began = min((run.began_seconds for run in runs if run.began_seconds is not None), default=None)
    last = max((run.last_seconds for run in runs if run.last_seconds is not None), default=None)
    trains = [run for run in runs if run.status == "running" and run.cells_per_second]
    silent = None if last is None or trains else max(0.0, now - last)
    elapsed = None if began is None or last is None else max(0.0, (now if trains else last) - began)
    # a sweep that began within the window has trained for a part of it only
    span = 1.0 if began is None else min(1.0, max(now - began, 1.0) / WINDOW_SECONDS)
    rates = {run.planned.run_id: run.cells_per_second / span for run in runs}
    left = _left(runs, [run.planned.cpu_hours for run in runs])
    seconds_left, source = _seconds_left(runs, rates, left, plan) if trains or counts["waiting"] else (None, None)
    costs = [run.planned.cost for run in runs]
    cost_left = _left(runs, costs)
    return Standing(
        name=name,
        runs=tuple(runs),
        entries=_entries([run for run in runs if run.planned.role == "law"]),
        rate_entries=_entries([_any_cells(run) for run in runs if run.planned.role == "rate"]),
        counts=counts,
        elapsed_seconds=elapsed,
        silent_seconds=silent,
        cells_per_second=sum(rates.values()) or None,
        cpu_hours_left=left,
        seconds_left=seconds_left,
        estimate_from=source,
        cost_spent=None if cost_left is None else sum(cost for cost in costs if cost is not None) - cost_left,
        cost_left=cost_left,
        waiting_for=None if queue is None else _waiting_for(queue),
        in_flight=() if queue is None else _in_flight(queue),
        failures=tuple(run for run in runs if run.status == "failed"),
    )


def _left(runs: list[RunStanding], amounts: list[float | None]) -> float | None:
    """What is left of the planned amounts; None where the plan does not say all of them."""
    if not amounts or any(amount is None for amount in amounts):
        return None
    pairs = zip(runs, amounts, strict=True)
    return sum((1.0 - run.share) * (amount or 0.0) for run, amount in pairs if not run.has_ended)


def _seconds_left(
    runs: list[RunStanding], rates: dict[str, float], left: float | None, plan: dict[str, Any] | None
) -> tuple[float | None, Literal["recent rate", "plan"] | None]:
    """Time for what is left, if it goes on as recently: planned hours per second of the clock; else by the plan."""
    if left is None:
        return None, None
    per_second = sum(
        rates[run.planned.run_id] * run.planned.cpu_hours / run.planned.max_cells_seen
        for run in runs
        if run.planned.cpu_hours is not None and run.planned.max_cells_seen
    )
    if per_second > 0:
        return left / per_second, "recent rate"
    # totals of a plan hold starts of processes too: what is left is a share of what all runs hold
    totals = plan["totals"] if plan is not None and "totals" in plan else {}
    whole = sum(run.planned.cpu_hours or 0.0 for run in runs)
    if "hours" in totals and whole:
        return 3600 * totals["hours"] * left / whole, "plan"
    return None, None


def _any_cells(run: RunStanding) -> RunStanding:
    return replace(run, planned=replace(run.planned, cells="rates"))


def _entries(runs: Iterable[RunStanding]) -> tuple[Entry, ...]:
    """Counts by genes, size and cells: smallest first, all cells last."""
    groups: dict[tuple[int, int, str, str], list[RunStanding]] = {}
    for run in runs:
        one = run.planned
        groups.setdefault((one.genes, one.params, one.size, one.cells), []).append(run)
    found = [
        Entry(
            genes=genes,
            size=size,
            params=params,
            cells=cells,
            total=len(group),
            done=sum(run.has_ended and not run.is_failure for run in group),
            running=sum(run.status == "running" for run in group),
            failed=sum(run.is_failure for run in group),
        )
        for (genes, params, size, cells), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda entry: (entry.genes, entry.params, entry.size, by_number(entry.cells))))


def by_number(cells: str) -> tuple[float, str]:
    """The order of labels of cells: by their first number, those without one last."""
    first = cells.split()[0]
    return (float(first) if first.isdigit() else float("inf"), cells)


def _waiting_for(queue: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    waiting = queue["waiting"] if "waiting" in queue and isinstance(queue["waiting"], list) else []
    return tuple(
        (str(one["unit"]), str(one["for"]) if "for" in one else "")
        for one in waiting
        if isinstance(one, dict) and "unit" in one
    )


def _in_flight(queue: dict[str, Any]) -> tuple[str, ...]:
    units = queue["in_flight"] if "in_flight" in queue and isinstance(queue["in_flight"], list) else []
    return tuple(str(one["unit"]) if isinstance(one, dict) and "unit" in one else str(one) for one in units)
