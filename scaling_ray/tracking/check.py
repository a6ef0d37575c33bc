"""Compare a tracking server with a sweep's files: one line for each difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from scaling_ray.records import ShardManifest
from scaling_ray.results.sweep_files import RUN_SPEC, SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec
from scaling_ray.tracking import shown
from scaling_ray.tracking.ledger import known_uri, sweep_key
from scaling_ray.tracking.mlflow import PARENT_TAG, SWEEP_TAG, Seen, Server, said_of
from scaling_ray.tracking.shown import KILLED, RUNNING, Point
from scaling_ray.tracking.told import RunTold


def differences(
    sweep: SweepFiles, spec: SweepSpec, manifest: ShardManifest, runs: list[RunSpec], uri: str | None = None
) -> list[str]:
    """What a server and a sweep's files disagree about; nothing is written.

    Compared are which runs there are, their names, parents, parameters, first metrics, status and times, and every
    point of every curve.

    Raises:
        ScalingRayError: the server refuses or does not answer.
    """
    uri = uri or known_uri(sweep)
    try:
        return list(_differences(sweep, spec, manifest, runs, Server(uri)))
    except Exception as error:
        raise said_of(uri, error) from error


def _differences(
    sweep: SweepFiles, spec: SweepSpec, manifest: ShardManifest, runs: list[RunSpec], server: Server
) -> Iterator[str]:
    cells, key = shown.train_cells(manifest), sweep_key(sweep)
    experiment = server.known_experiment(f"scaling_ray/{spec.name}")
    there: dict[str, list[Seen]] = {}
    for seen in server.runs(experiment, SWEEP_TAG, key) if experiment is not None else []:
        there.setdefault(seen.identity, []).append(seen)
    begun = {name.split("/")[1] for name in sweep.place.names("runs/") if not name.endswith(RUN_SPEC)}
    names = shown.names_of(runs, cells)
    parents = there.pop(key, [])
    if begun and len(parents) != 1:
        yield f"{spec.name}: {_count(len(parents), 'parent run')} on the server, 1 sweep in the files"
    for run in runs:
        found = there.pop(f"{key}/{run.run_id}", [])
        expected = int(run.run_id in begun)
        if len(found) != expected:
            yield f"{names[run.run_id]}: {_count(len(found), 'run')} on the server, {expected} in the files"
        if found and expected:
            told = RunTold(sweep, run, cells)
            if told.started is None:
                continue
            for line in _of_run(server, told, found[0], names[run.run_id], cells, parents):
                yield f"{names[run.run_id]}: {line}"
    for identity, found in there.items():
        yield f"{identity}: {_count(len(found), 'run')} on the server, no such run in the files"


def _of_run(server: Server, told: RunTold, seen: Seen, name: str, cells: int, parents: list[Seen]) -> Iterator[str]:
    status, end_ms = told.end
    if seen.name != name:
        yield f"is called {seen.name!r}"
    if parents and seen.tags.get(PARENT_TAG) != parents[0].run_id:
        yield "is not below the sweep's parent run"
    if seen.status != status and (seen.status, status) != (KILLED, RUNNING):
        yield f"status {seen.status} on the server, {status} in the files"
    if told.started is not None and abs(seen.start_ms - told.started) > 1000:
        yield f"start {seen.start_ms} on the server, {told.started} in the files (milliseconds since 1970)"
    if status != RUNNING and seen.end_ms != end_ms:
        yield f"end {seen.end_ms} on the server, {end_ms} in the files (milliseconds since 1970)"
    for key, value in shown.params_of(told.spec, cells, told.result).items():
        if seen.params.get(key) != value:
            yield f"parameter {key} {seen.params.get(key)} on the server, {value} in the files"
    yield from _of_metrics(server, told, seen)


def _of_metrics(server: Server, told: RunTold, seen: Seen) -> Iterator[str]:
    final = shown.final_points(told.result, told.closed) if told.result is not None else []
    expected: dict[str, list[Point]] = {}
    for point in [*final, *(point for row in shown.row_points(told.rows) for point in row)]:
        expected.setdefault(point.key, []).append(point)
    for key in sorted(seen.metrics.keys() | expected.keys()):
        wanted, found = (
            expected[key] if key in expected else [],
            server.history(seen.run_id, key) if key in seen.metrics else [],
        )
        steps, known = Counter(point.step for point in found), {point.step: point.value for point in found}
        twice = sum(count - 1 for count in steps.values())
        if twice:
            yield f"metric {key}: {_count(twice, 'point')} too many on the server"
        missing = [point for point in wanted if point.step not in known]
        if missing:
            yield f"metric {key}: {_count(len(missing), 'point')} missing, the first at {missing[0].step} cells seen"
        other = [point for point in wanted if point.step in known and known[point.step] != point.value]
        if other:
            there, here = known[other[0].step], other[0].value
            many = _count(len(other), "point")
            yield f"metric {key}: {many} differ, the first {there!r} on the server, {here!r} in the files"
        extra = len(known.keys() - {point.step for point in wanted})
        if extra:
            yield f"metric {key}: {_count(extra, 'point')} that the files do not have"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
