"""How a sweep stands, for people (lines) and machines (JSON)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from scaling_ray.console import plain, table
from scaling_ray.pace import span
from scaling_ray.results.standing import Entry, RunStanding, Standing, by_number

MOST_LINES = 20
"""Units and failures that are listed one by one; the rest is a number."""


def standing_lines(standing: Standing) -> list[str]:
    """Matrix, counts, rate and time, what waits and for what, failures; as plain lines."""
    return plain(standing_view(standing))


def standing_view(standing: Standing) -> Group:
    """The same for a terminal: full entries are green, running ones cyan, failed ones red."""
    lines = ["", counts_line(standing), *_rate_lines(standing)]
    if standing.waiting_for:
        lines += ["", f"{len(standing.waiting_for)} units wait, {len(standing.in_flight)} are in flight:"]
        lines += _first(f"  {unit}: {reason}" if reason else f"  {unit}" for unit, reason in standing.waiting_for)
    if standing.failures:
        classes: dict[str, int] = {}
        for run in standing.failures:
            name = run.failure or "lost"
            classes[name] = classes.get(name, 0) + 1
        lines += ["", "failed: " + ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))]
        lines += _first(_failure_line(run) for run in standing.failures)
    return Group(*_matrix(standing), *(Text(line, style=_style_of(line)) for line in lines))


def _style_of(line: str) -> str:
    return "red" if line.startswith("failed: ") else ""


def counts_line(standing: Standing) -> str:
    """Such as "12 done, 2 running, 10 waiting, 0 failed"."""
    return ", ".join(f"{count} {status}" for status, count in standing.counts.items())


def short_line(standing: Standing) -> str:
    """One line for a log."""
    return "; ".join([counts_line(standing), *_rate_lines(standing)])


def run_lines(standing: Standing) -> list[str]:
    """A line per run, and the counts."""
    rows = []
    for run in standing.runs:
        end = "" if run.test_loss is None else f"test_loss {run.test_loss:.4f}"
        if run.status == "running" and run.share:
            end = f"{run.share:.0%}"
        rows.append((run.status, run.planned.run_id, f"{end}{run.failure or ''}"))
    return [*plain(table((), rows)), counts_line(standing)]


def as_json(standing: Standing) -> dict[str, Any]:
    """The standing as JSON: matrix, counts, rates, estimates, queue, every run."""
    found = asdict(standing)
    found["runs"] = [_run_fields(run) for run in standing.runs]
    found["failures"] = [_run_fields(run) for run in standing.failures]
    if standing.waiting_for is not None:
        found["waiting_for"] = [{"unit": unit, "for": reason} for unit, reason in standing.waiting_for]
    return found


def _run_fields(run: RunStanding) -> dict[str, Any]:
    fields = asdict(run)
    return fields.pop("planned") | fields


def _matrix(standing: Standing) -> list[RenderableType]:
    """Per panel of genes, a row per size and a column per number of cells; runs that choose rates stand first."""
    parts: list[RenderableType] = []
    both = [*standing.rate_entries, *standing.entries]
    for genes in sorted({entry.genes for entry in both}):
        here = [entry for entry in both if entry.genes == genes]
        labels = {entry.cells for entry in here} - {"rates"}
        columns = [*(["rates"] if any(e.cells == "rates" for e in here) else []), *sorted(labels, key=by_number)]
        sizes = list(dict.fromkeys((e.params, e.size) for e in sorted(here, key=lambda e: (e.params, e.size))))
        by_place = {(entry.size, entry.params, entry.cells): entry for entry in here}
        rows: list[list[str | Text]] = []
        for params, size in sizes:
            places = [(size, params, column) for column in columns]
            entries = [_entry_text(by_place[one]) if one in by_place else Text() for one in places]
            rows.append([f"{size} ({params:,})", *entries])
        parts += [Text()] if parts else []
        parts.append(table([f"{genes:,} genes", *(_column_name(column) for column in columns)], rows))
    return [*parts, Text("(done/total; r: running, f: failed)")]


def _column_name(column: str) -> str:
    if column == "rates":
        return "rates"
    name = f"{int(column):,}" if column.isdigit() else column
    return name if "donors" in name else f"{name} cells"


def _entry_text(entry: Entry) -> Text:
    running = f" {entry.running}r" if entry.running else ""
    failed = f" {entry.failed}f" if entry.failed else ""
    style = "red" if entry.failed else "cyan" if entry.running else "green" if entry.done == entry.total else ""
    return Text(f"{entry.done}/{entry.total}{running}{failed}", style=style)


def _rate_lines(standing: Standing) -> list[str]:
    """Rate, elapsed and remaining time, money: as far as they are known."""
    lines = []
    rate = "" if standing.cells_per_second is None else f"{standing.cells_per_second:,.0f} cells/s recently, "
    if standing.elapsed_seconds is not None:
        between = (
            "from the first run's start to the last one's end" if standing.has_ended else "since the first run began"
        )
        lines.append(f"{rate}{span(standing.elapsed_seconds)} {between}")
    if standing.counts["running"] and standing.silent_seconds is not None:
        lines.append(f"nothing was written for {span(standing.silent_seconds)}: is a driver running?")
    if standing.seconds_left is not None and standing.cpu_hours_left:
        source = "at the recent rate" if standing.estimate_from == "recent rate" else "by the plan, nothing is measured"
        hours = f"{_amount(standing.cpu_hours_left)} planned CPU-hours"
        lines.append(f"about {span(standing.seconds_left)} left ({source}; {hours})")
    if standing.cost_left is not None and standing.cost_spent is not None:
        lines.append(f"planned cost: {standing.cost_spent:,.2f} behind, {standing.cost_left:,.2f} left")
    return lines


def _failure_line(run: RunStanding) -> str:
    said = (run.message or "").strip().splitlines()
    reason = f": {said[0][:160]}" if said else ""
    return f"  {run.planned.run_id}: {run.failure or 'lost'}{reason}"


def _first(lines: Iterable[str]) -> list[str]:
    found = list(lines)
    more = [f"  and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []
    return [*found[:MOST_LINES], *more]


def _amount(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"
