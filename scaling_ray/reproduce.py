"""A sweep repeated and held beside a reference: shards, runs, fit, a verdict, its history, and who is told.

Below OUT, a directory or ``s3://`` folder: shards/ (made once, verified ever after), sweep/ or, for each tick of a
schedule, sweep-<tick>/, reproduction.json or reproduction-<tick>.json, history.jsonl, history.html, skipped/. The same
call goes on where it stopped, and two at once leave one at work: the other is skipped.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scaling_ray.errors import BadInput, LeaseHeld, RunsFailed
from scaling_ray.extras import missing_modules
from scaling_ray.pipeline import make_shards
from scaling_ray.reproduction.compare import EXIT_CODES, Reproduction, compare, table_of
from scaling_ray.reproduction.history import (
    Entry,
    Skip,
    add_entry,
    entry_of,
    message_of,
    page,
    read_skips,
    record_skip,
)
from scaling_ray.reproduction.record import SweepRecord, commit_here, record_sweep
from scaling_ray.reproduction.ticks import milliseconds, stamp
from scaling_ray.reproduction.webhook import Webhook
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import runs_of
from scaling_ray.shards.format import MANIFEST, verify
from scaling_ray.spec import SweepSpec, load_spec, parse_spec
from scaling_ray.storage import Place, fenced, output_place
from scaling_ray.sweep.run import run_sweep
from scaling_ray.tracking.ledger import local_folder, tracking_uri

Progress = Callable[[str], None]
LEASE = ".reproduce.lease"
UNPINNED = ("stable", "latest")
"""Names of releases that mean another one tomorrow: they are looked up and reported, never read."""
_RELEASE = re.compile(r"\d{4}-\d{2}-\d{2}")
_SEEDS = re.compile(r"^seeds\s*=\s*\[[^\]]*\]", re.MULTILINE)


@dataclass(frozen=True)
class Tick:
    """When a reproduction was due by its schedule, how late it may begin, and how often one is due."""

    due: datetime
    max_age_seconds: float | None = None
    every_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a reproduction ended; ``made`` is None where it was skipped."""

    summary: str
    made: Reproduction | None

    @property
    def exit_code(self) -> int:
        """0 agrees or skipped, 3 drifted, 6 cannot tell."""
        return 0 if self.made is None else EXIT_CODES[self.made.verdict]


def reproduce(
    spec_path: str | Path,
    against: str | Path,
    out: str | Path,
    *,
    census: str | None = None,
    shards: str | None = None,
    seeds: Sequence[int] | None = None,
    tolerance: float,
    other_cells: bool = False,
    tick: Tick | None = None,
    webhook: str | None = None,
    progress: Progress = lambda line: None,
) -> Outcome:
    """Repeat a sweep and compare it with a reference.

    Args:
        spec_path: the sweep's TOML file.
        against: the reference's JSON file, as ``scaling-ray reference`` writes it.
        out: a directory or an ``s3://`` URI, for this reference alone.
        census: directory, URI or release of a Census, as for ``scaling-ray run``.
        shards: shards that another call made; no Census is read then.
        seeds: seeds to use in place of the spec's.
        tolerance: smallest difference that matters, as a share of the reference's drop.
        other_cells: compare what was found though the cells are others than the reference's.
        tick: of a schedule; each has a sweep of its own, and one that is too old is skipped.
        webhook: an address that is told the verdict.
        progress: called with one line of text now and then.

    Raises:
        BadInput: something given is wrong; nothing was trained.
        Preempted: stopped on the way; the same call goes on.
    """
    started_ms = milliseconds(datetime.now(UTC))
    commit_here()  # before anything else: a checkout may move on while the runs train
    reference = SweepRecord.read(Path(against))
    spec = load_spec(spec_path)
    text = Path(spec_path).read_text(encoding="utf-8")
    if seeds is not None:
        text = with_seeds(text, seeds)
        spec = parse_spec(text, str(spec_path))
    _check(reference, census, shards, tolerance)
    hook = Webhook(webhook) if webhook is not None else None
    place = output_place(out)
    suffix = "" if tick is None else f"-{stamp(tick.due)}"
    if tick is not None and (late := _too_late(tick)) is not None:
        record_skip(place, stamp(tick.due), Skip(due_ms=milliseconds(tick.due), reason="too old"))
        return Outcome(f"{reference.name}: skipped; the tick of {tick.due:%Y-%m-%d %H:%M} UTC is {late}", None)
    try:
        with place.lease(LEASE, progress) as lease:
            mine = fenced(place, lease)
            source = shards if shards is not None else _own_shards(mine, spec, census, progress)
            _train(text, source, mine.below(f"sweep{suffix}"), progress)
            found = record_sweep(mine.below(f"sweep{suffix}"), reference.origin.loss)
            notes = _notes(reference, census)
            made = compare(reference, found, tolerance, notes, other_cells=other_cells)
            mine.write(f"reproduction{suffix}.json", made.to_json().encode())
            due_ms = started_ms if tick is None else milliseconds(tick.due)
            every = None if tick is None else tick.every_seconds
            entry = entry_of(made, due_ms, started_ms, milliseconds(datetime.now(UTC)), every)
            _keep(mine, entry, made, tick, progress)
    except LeaseHeld as held:
        if tick is not None:
            record_skip(place, stamp(tick.due), Skip(due_ms=milliseconds(tick.due), reason="another driver"))
        return Outcome(f"{reference.name}: skipped; {held}", None)
    for line in table_of(made):
        progress(line)
    if hook is not None and (problem := hook.send(message_of(made, due_ms, str(place)))) is not None:
        progress(problem)
    return Outcome(made.summary, made)


def _check(reference: SweepRecord, census: str | None, shards: str | None, tolerance: float) -> None:
    """Refuse what can be known to be wrong before any work is done."""
    if not 0 <= tolerance < 1:
        raise BadInput("R003", "--tolerance", tolerance, "must be a share of the drop, at least 0 and below 1")
    if shards is not None and census is not None:
        raise BadInput("R004", "--census", census, "is not read where --shards are given; name one of them")
    if census in UNPINNED:
        raise BadInput("R005", "--census", census, "means another release tomorrow; name one, such as 2025-11-08")
    reference.drop()


def _too_late(tick: Tick) -> str | None:
    age = (datetime.now(UTC) - tick.due).total_seconds()
    if tick.max_age_seconds is None or age <= tick.max_age_seconds:
        return None
    return f"{age:,.0f} s old, and --max-age is {tick.max_age_seconds:,.0f} s"


def _own_shards(place: Place, spec: SweepSpec, census: str | None, progress: Progress) -> str:
    """Shards below OUT, converted where there are none and else verified; the sweep refuses those of other rules."""
    target = place.below("shards")
    there = target.exists(MANIFEST)
    make_shards(target.uri, place, spec, census, progress)
    if there and (problems := verify(target)):
        raise BadInput("R006", "shards", str(target), f"{problems[0]}; remove them, and the same call converts again")
    return target.uri


def _train(text: str, source: str, sweep: Place, progress: Progress) -> None:
    """Train what the sweep lacks; runs that failed are left to the comparison, which names them."""
    with tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
        path = Path(folder) / "spec.toml"
        path.write_text(text, encoding="utf-8")
        try:
            run_sweep(path, source, sweep.uri, progress)
        except RunsFailed as error:
            progress(str(error))


def _notes(reference: SweepRecord, census: str | None) -> list[str]:
    """What the directory of releases says of a named release: a newer one is reported, never taken."""
    if census is None or not _RELEASE.fullmatch(census) or Path(census).exists():
        return []
    from scaling_ray.census.releases import newest_release

    try:
        newest = newest_release()
    except BadInput as error:
        return [f"whether there is a newer Census release is not known: {error}"]
    return [] if newest.build <= census else [f"Census {newest.build} is newer than {census}, and was not taken"]


def _keep(place: Place, entry: Entry, made: Reproduction, tick: Tick | None, progress: Progress) -> None:
    entries = add_entry(place, made.name, entry)
    uri = tracking_uri(SweepFiles(place.below("sweep")))
    if uri is None or missing_modules("track"):
        progress("not tracked; set MLFLOW_TRACKING_URI for a reproduction on S3, and install MLflow")
        return
    from scaling_ray.tracking.history import Figure, Logged, log_reproduction

    figures = []
    for q in made.quantities:
        if q.found is not None and q.kind in ("loss", "parameter", "prediction", "contrast"):
            half = None if q.found_error is None else 1.96 * q.found_error
            ends = (None, None) if half is None else (q.found - half, q.found + half)
            figures.append(Figure(f"{q.kind}/{_metric(q.name)}", q.found, *ends))
    words = {"verdict": made.verdict, "tick": stamp(tick.due) if tick is not None else f"{entry.started_ms}"}
    folder = local_folder(place)
    drifted = [q for q in made.quantities if q.verdict == "drifted"]
    counts = {"verdict": EXIT_CODES[made.verdict], "drifted": len(drifted), "identical": made.identical}
    logged = Logged(
        reference=made.name,
        identity=f"{place.uri}/{words['tick']}"[-200:].replace("'", ""),
        due_ms=entry.due_ms,
        started_ms=entry.started_ms,
        ended_ms=entry.ended_ms,
        summary=made.summary,
        counts={name: float(value) for name, value in counts.items()},
        params={"tolerance": repr(made.tolerance), "data_hash": made.found.data_hash or ""},
        tags=words | {"commit": made.found.commit or "", "changed": "; ".join(made.changed)},
        figures=figures,
        files=[("reproduction.json", made.to_json()), ("history.html", page(made.name, entries, read_skips(place)))],
    )
    artifacts = (
        (folder / "mlartifacts").resolve().as_uri() if folder is not None and uri.startswith("sqlite:") else None
    )
    try:
        log_reproduction(uri, logged, artifacts)
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the verdict stands
        progress(f"tracking is behind ({type(error).__name__}); the same call logs it")


def _metric(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "", name)


def with_seeds(text: str, seeds: Sequence[int]) -> str:
    """A spec's text with other seeds in its grid, and nothing else changed.

    Raises:
        BadInput: the text has no such line of its own, or these are no seeds of a grid.
    """
    made = "[" + ", ".join(str(seed) for seed in seeds) + "]"
    changed = _SEEDS.sub(f"seeds = {made}", text)
    before, after = parse_spec(text).model_dump(), parse_spec(changed).model_dump()
    before["grid"]["seeds"] = after["grid"]["seeds"] if list(after["grid"]["seeds"]) == list(seeds) else None
    if before != after:
        raise BadInput("R007", "--seeds", made, "cannot be put into this spec; give grid.seeds a line of its own")
    return changed


def what_a_release_changes(spec: SweepSpec, reference: SweepRecord) -> Iterator[str]:
    """What the newest Census release would change, in lines; nothing is converted or trained.

    Raises:
        BadInput: the directory of releases cannot be reached.
    """
    from scaling_ray.census.releases import newest_release
    from scaling_ray.shards.estimate import estimate, format_estimate

    newest = newest_release()
    known = reference.origin.census
    when = f", of {newest.date}" if newest.date else ""
    yield f"the reference was made from Census {known or 'of an unknown release'}; the newest is {newest.build}{when}"
    if newest.build == known:
        yield "nothing would change"
        return
    try:
        yield from format_estimate(estimate(spec, newest.build)).splitlines()
    except BadInput as error:
        yield f"its cells could not be counted: {error}"
    yield f"another data_hash, so {len(runs_of(spec))} new runs; take it by --census {newest.build} and a new reference"
