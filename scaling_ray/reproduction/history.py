"""The history of reproductions: a line each in history.jsonl, and history.html drawn from it.

The lines are written by the holder of the lease of OUT. A tick that was skipped leaves a small file of its own below
skipped/, since whoever skips holds no lease.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from scaling_ray.errors import BadInput
from scaling_ray.laws.drift import DRIFTED
from scaling_ray.report import svg
from scaling_ray.reproduction.compare import Kind, Quantity, Reproduction
from scaling_ray.reproduction.ticks import missed
from scaling_ray.storage import Place

HISTORY, PAGE, SKIPPED = "history.jsonl", "history.html", "skipped/"
WIDTH, HEIGHT = 540, 210
_LEFT, _RIGHT, _TOP, _BASE = 62.0, 16.0, 26.0, 40.0
_KINDS: tuple[tuple[Kind, str], ...] = (
    ("loss", "Losses of settings"),
    ("parameter", "Parameters of the law"),
    ("prediction", "Predictions"),
    ("contrast", "What each step bought"),
)


class Entry(BaseModel):
    """One reproduction: when it was due and made, its verdict, and the figures that are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    due_ms: int
    started_ms: int
    ended_ms: int
    every_seconds: float | None
    verdict: str
    summary: str
    changed: list[str]
    data_hash: str | None
    commit: str | None
    quantities: list[Quantity]


class Skip(BaseModel):
    """A tick that was not carried out, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    due_ms: int
    reason: Literal["too old", "another driver"]


def entry_of(made: Reproduction, due_ms: int, started_ms: int, ended_ms: int, every_seconds: float | None) -> Entry:
    """The line of one reproduction; baselines stay in its own file."""
    return Entry(
        due_ms=due_ms,
        started_ms=started_ms,
        ended_ms=ended_ms,
        every_seconds=every_seconds,
        verdict=made.verdict,
        summary=made.summary,
        changed=made.changed,
        data_hash=made.found.data_hash,
        commit=made.found.commit,
        quantities=[each for each in made.quantities if each.kind != "baseline"],
    )


def read_history(place: Place) -> list[Entry]:
    """All entries, the last of each tick, in the order of ticks; a last line cut short is left out."""
    text = (place.read_if_there(HISTORY) or b"").decode()
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    try:
        entries = [Entry.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise BadInput(
            "R010", f"{place}/{HISTORY}", str(error).splitlines()[0], "is no history; move it away"
        ) from error
    return sorted({each.due_ms: each for each in entries}.values(), key=lambda each: each.due_ms)


def read_skips(place: Place) -> list[Skip]:
    """Ticks that were skipped, in their order."""
    found = [Skip.model_validate_json(place.read(name)) for name in place.names(SKIPPED)]
    return sorted(found, key=lambda each: each.due_ms)


def record_skip(place: Place, name: str, skip: Skip) -> None:
    """Leave a mark of a skipped tick; it needs no lease, and a second one of a tick changes nothing."""
    place.create(f"{SKIPPED}{name}.json", (skip.model_dump_json() + "\n").encode())


def add_entry(place: Place, name: str, entry: Entry) -> list[Entry]:
    """Append a line (whole or not at all) and draw the page anew; returns all entries."""
    before = place.read_if_there(HISTORY) or b""
    whole = before[: before.rfind(b"\n") + 1]
    place.write(HISTORY, whole + entry.model_dump_json().encode() + b"\n")
    entries = read_history(place)
    place.write(PAGE, page(name, entries, read_skips(place)).encode())
    return entries


def page(name: str, entries: Sequence[Entry], skips: Sequence[Skip]) -> str:
    """history.html: one file without outside requests."""
    done = {entry.due_ms for entry in entries}
    skips = [skip for skip in skips if skip.due_ms not in done]
    gone = _missed(entries, skips)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(name)}: reproductions</title><style>{_STYLE}{svg.STYLE}</style>",
        f"<h1>{escape(name)}: reproductions over time</h1>",
    ]
    if entries:
        parts.append(f"<p><b>Last</b> ({_day(entries[-1].due_ms)}): {escape(entries[-1].summary)}.</p>")
    parts.append(f"<p>{len(entries)} made, {len(skips)} skipped, {len(gone)} missed.</p>")
    times = [entry.due_ms for entry in entries] + [skip.due_ms for skip in skips]
    for kind, title in _KINDS:
        names = list(dict.fromkeys(q.name for entry in entries for q in entry.quantities if q.kind == kind))
        charts = [_chart(kind, each, entries, skips, gone, times) for each in names]
        shown = [chart for chart in charts if chart]
        if shown:
            parts.append(f"<h2>{title}</h2><div class=charts>{''.join(shown)}</div>")
    parts.append(f"<p class=note>{_LEGEND}</p>{_table(entries, skips, gone)}")
    return "\n".join(parts) + "\n"


_STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:#1b2330;"
    "background:#fff}h1{font-size:1.4rem}h2{font-size:1.1rem}table{border-collapse:collapse;font-size:.85rem}"
    "td,th{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #e3e7ec}"
    ".charts{display:flex;flex-wrap:wrap;gap:8px}.note{color:#5b6675;font-size:.85rem}svg{max-width:100%;height:auto}"
    "@media (prefers-color-scheme:dark){body{color:#e8ecf2;background:#12171f}td,th{border-color:#2c3542}}"
)
_LEGEND = (
    "Points are reproductions with the 95% interval of their figure; filled diamonds drifted. Dashed: the reference; "
    "grey band: differences too small to matter. Below the axis: x a missed tick, o a skipped one."
)


def _missed(entries: Sequence[Entry], skips: Sequence[Skip]) -> list[int]:
    """Ticks that left nothing, where the schedule says how often they come."""
    every = next((entry.every_seconds for entry in reversed(entries) if entry.every_seconds), None)
    heard = [entry.due_ms for entry in entries] + [skip.due_ms for skip in skips]
    return [] if every is None else missed(heard, int(every * 1000))


def _chart(
    kind: Kind,
    name: str,
    entries: Sequence[Entry],
    skips: Sequence[Skip],
    gone: Sequence[int],
    times: Sequence[int],
) -> str:
    """One quantity over time, as SVG; empty where no reproduction found it."""
    found = [(entry.due_ms, q) for entry in entries for q in entry.quantities if (q.kind, q.name) == (kind, name)]
    points = [(due, q, q.found, 1.96 * (q.found_error or 0.0)) for due, q in found if q.found is not None]
    if not points:
        return ""
    level = next((q.reference for _, q in reversed(found) if q.reference is not None), None)
    matters = next((q.tolerance for _, q in reversed(found) if q.tolerance is not None), 0.0) or 0.0
    heights = [v for _, _, value, half in points for v in (value - half, value + half)]
    heights += [] if level is None else [level - matters, level + matters]
    marks = svg.ticks(min(heights), max(heights), 4)
    start, end = min(times), max(times)
    span = max(end - start, 1)

    def across(due: int) -> float:
        room = WIDTH - _LEFT - _RIGHT - 20
        return _LEFT + 10 + (room / 2 if end == start else room * (due - start) / span)

    def up(value: float) -> float:
        room = HEIGHT - _TOP - _BASE
        return HEIGHT - _BASE - room * (value - marks[0]) / (marks[-1] - marks[0])

    drawn = [
        svg.open_svg(f"{name}: {len(points)} reproductions", WIDTH, HEIGHT),
        svg.text(8, 16, name, "name", "start"),
    ]
    for mark in marks:
        drawn.append(_line(_LEFT, up(mark), WIDTH - _RIGHT, up(mark), "grid"))
        drawn.append(svg.text(_LEFT - 6, up(mark) + 4, svg.plain(mark, marks), "soft", "end"))
    if level is not None:
        top, height = up(level + matters), up(level - matters) - up(level + matters)
        drawn.append(
            f'<rect x="{_LEFT}" y="{top:.1f}" width="{WIDTH - _LEFT - _RIGHT}" height="{height:.1f}" class="band"/>'
        )
        drawn.append(_line(_LEFT, up(level), WIDTH - _RIGHT, up(level), "level"))
    path = " ".join(f"{across(due):.1f},{up(value):.1f}" for due, _, value, _ in points)
    drawn.append(f'<polyline points="{path}" class="le"/>')
    for due, q, value, half in points:
        drawn.append(_line(across(due), up(value - half), across(due), up(value + half), "le"))
        drawn.append(_mark(across(due), up(value), q.verdict == DRIFTED, f"{_day(due)}: {value:.5g}, {q.verdict}"))
    base = HEIGHT - _BASE + 14
    drawn += [svg.text(across(due), base, "x", "soft", "middle") for due in gone]
    drawn += [svg.text(across(skip.due_ms), base, "o", "soft", "middle") for skip in skips]
    drawn.append(svg.text(_LEFT, HEIGHT - 8, _day(start), "soft", "start"))
    if end > start:
        drawn.append(svg.text(WIDTH - _RIGHT, HEIGHT - 8, _day(end), "soft", "end"))
    return "".join(drawn) + "</svg>"


def _line(x: float, y: float, x_end: float, y_end: float, css: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x_end:.1f}" y2="{y_end:.1f}" class="{css}"/>'


def _mark(x: float, y: float, drifted: bool, words: str) -> str:
    title = f"<title>{escape(words)}</title>"
    if drifted:
        corners = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
        return f'<polygon points="{corners}" class="ps4">{title}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="pe">{title}</circle>'


def _table(entries: Sequence[Entry], skips: Sequence[Skip], gone: Sequence[int]) -> str:
    rows = [(e.due_ms, e.verdict, e.summary + "".join(f"; {change}" for change in e.changed)) for e in entries]
    rows += [(skip.due_ms, "skipped", skip.reason) for skip in skips]
    rows += [(due, "missed", "") for due in gone]
    body = "".join(
        f"<tr><td>{_day(due)}<td>{escape(verdict)}<td>{escape(words)}" for due, verdict, words in sorted(rows)[::-1]
    )
    return f"<table><tr><th>Tick (UTC)<th>Verdict<th>What was found, and what changed{body}</table>"


def _day(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M}"


def message_of(made: Reproduction, due_ms: int, where: str) -> dict[str, object]:
    """What a webhook is told: the verdict and its reasons, no figure of a run that agrees."""
    told = [each for each in made.quantities if each.verdict == DRIFTED]
    return {
        "name": made.name,
        "verdict": made.verdict,
        "summary": made.summary,
        "due": _day(due_ms),
        "where": where,
        "drifted": [json.loads(each.model_dump_json()) for each in told],
        "missing": made.missing,
        "changed": made.changed,
        "hint": made.hint,
    }
