"""What a sweep decides of its units: which go next, what becomes of attempts that were cut off, its end. No Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import synthetic_cells, write_cells_as_shards

from scaling_ray.errors import BadInput, BudgetSpent, StorageFailed
from scaling_ray.pace import span
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import runs_of
from scaling_ray.shards.format import SPLITS, read_manifest
from scaling_ray.spec import parse_spec
from scaling_ray.storage import open_place
from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.desk import PATIENCE_SECONDS, PAUSE_SECONDS, Attempt, Cause, Desk
from scaling_ray.sweep.plan import make_plan
from scaling_ray.sweep.state import SweepState

SPEC = """
name = "desk"
[data]
genes = 32
[grid]
sizes = ["A", "B"]
genes = [32]
cells = ["all"]
seeds = [1, 2]
[sizes.A]
width = 4
layers = 1
heads = 1
feedforward = 1
[sizes.B]
width = 8
layers = 1
heads = 2
feedforward = 1
[train]
max_cells_seen = 640
[lr]
rule = "fixed"
rates = [0.01]
[resources]
stack = 1
max_failures = 2
"""


class Call:
    """One call's desk over a sweep, with a clock that is set by hand."""

    def __init__(self, directory: Path, more: str = "", cpus: int = 2) -> None:
        spec = parse_spec(SPEC + more)
        if not (directory / "shards").exists():
            cells = {name: synthetic_cells(40, genes=32, first_id=1_000 * i) for i, name in enumerate(SPLITS)}
            write_cells_as_shards(directory / "shards", cells)
        shards = open_place(directory / "shards")
        self.said: list[str] = []
        self.files, self.now = SweepFiles.at(directory / "sweep"), 0.0
        plan, runs = make_plan(spec, "cpu")
        self.files.write_plan(plan)
        self.state = SweepState(spec, read_manifest(shards), shards, self.files, runs, self.said.append)
        self.desk = Desk(self.state, self.state.units(), Capacity.local(cpus), {}, clock=lambda: self.now)

    def start(self) -> str:
        unit = self.desk.next()
        assert unit is not None
        self.desk.began(unit.name)
        return unit.name

    def cut_off(self, name: str, cause: Cause, reason: str = "it went away") -> None:
        unit = next(unit for unit in self.state.units() if unit.name == name)
        self.desk.cut_off(Attempt(unit, cause, reason, "last words"))


def test_what_fits_starts_and_the_larger_size_first(tmp_path: Path) -> None:
    call = Call(tmp_path)
    assert [call.start()[:5], call.start()[:5]] == ["law-B", "law-B"]
    assert call.desk.next() is None and not call.desk.is_over
    assert call.files.run(next(iter(call.desk.queue.in_flight))).spec() is not None


@pytest.mark.parametrize(("cause", "tries"), [("process lost", 3), ("stuck", 3), ("host memory", 6)])
def test_an_attempt_is_made_again_as_often_as_its_cause_allows(tmp_path: Path, cause: Cause, tries: int) -> None:
    call = Call(tmp_path, cpus=1)
    name = call.start()
    for _ in range(tries - 1):
        call.cut_off(name, cause)
        assert call.files.run(name).failure() is None
        assert call.start() == name
    call.cut_off(name, cause)
    failure = call.files.run(name).failure()
    assert failure is not None
    assert failure.failure == {"process lost": "lost", "stuck": "stuck", "host memory": "out_of_memory"}[cause]
    assert "it went away" in failure.message and "last words" in failure.message
    assert call.start() != name
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "events.jsonl").read_text().splitlines()]
    assert [(row["unit"], row["cause"], row["log"]) for row in rows] == [(name, cause, "last words")] * tries


def test_a_lost_node_costs_nothing_however_often(tmp_path: Path) -> None:
    call = Call(tmp_path, cpus=1)
    name = call.start()
    for _ in range(20):
        call.cut_off(name, "node lost")
        assert call.start() == name
    assert call.files.run(name).failure() is None
    assert len(call.said) == 20 and all("node lost" in line and "\n" not in line for line in call.said)


def forbid_writing(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def full(name: str, data: bytes) -> None:
        raise BadInput("P001", "--out", name, "cannot be used") from OSError(
            28, os.strerror(28), name
        )  # as a LocalPlace does

    monkeypatch.setattr(call.files.place, "write", full)


def test_a_full_disk_pauses_the_sweep_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(tmp_path)
    name = call.start()
    with monkeypatch.context() as patch:
        forbid_writing(patch, call)
        call.cut_off(name, "storage", "No space left on device")
        call.now += PAUSE_SECONDS + 1
        assert call.desk.next() is None and not call.desk.is_over
    call.now += PAUSE_SECONDS + 1
    assert call.start() == name
    assert [line for line in call.said if "pauses" in line and "No space left" in line] == call.said[:1]
    assert "goes on" in call.said[1] and len(call.said) == 2


def test_a_disk_that_stays_full_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(tmp_path)
    call.cut_off(call.start(), "storage", "No space left on device")
    forbid_writing(monkeypatch, call)
    while call.now <= PATIENCE_SECONDS + 2 * PAUSE_SECONDS:
        assert call.desk.next() is None
        call.now += PAUSE_SECONDS
    assert call.desk.is_over and isinstance(call.desk.problem, StorageFailed)
    assert call.desk.problem.exit_code == 75 and "call again" in str(call.desk.problem)


def test_a_budget_ends_the_sweep_and_a_later_call_counts_on(tmp_path: Path) -> None:
    call = Call(tmp_path, "[budget]\nmax_cpu_hours = 1.0\n")
    call.start(), call.start()
    call.now += 1700.0
    call.desk.tick({})
    assert not call.desk.is_over
    call.now += 200.0
    call.desk.tick({})
    assert call.desk.is_over and isinstance(call.desk.problem, BudgetSpent)
    assert call.files.stop_requested() and call.desk.problem.exit_code == 4
    call.desk.write()
    call.files.clear_stop()
    later = Call(tmp_path, "[budget]\nmax_cpu_hours = 1.0\n")
    later.desk.tick({})
    assert isinstance(later.desk.problem, BudgetSpent)
    later.files.clear_stop()
    more = Call(tmp_path, "[budget]\nmax_cpu_hours = 2.0\n")
    more.desk.tick({})
    assert more.desk.problem is None and more.start()


def test_units_too_short_to_be_seen_count(tmp_path: Path) -> None:
    call = Call(tmp_path)
    unit = call.desk.next()
    assert unit is not None
    call.now += 3.0
    call.desk.ended(unit.name, 3.0)
    assert call.desk.budget.spent(call.now)["cpu_hours"] == pytest.approx(3 / 3600)


def test_who_waits_for_nodes_is_said_once_a_minute(tmp_path: Path) -> None:
    call = Call(tmp_path)
    assert call.desk.next() is not None
    for _ in range(130):
        call.now += 1.0
        call.desk.tick({"CPU": 0.0})
    waits = [line for line in call.said if "for room or nodes" in line]
    assert len(waits) == 2 and "1 CPUs (the nodes that are up have 0)" in waits[0]
    told = json.loads((tmp_path / "sweep" / "queue.json").read_text())
    assert [one["trains"] for one in told["in_flight"]] == [False] and told["waiting_units"] == 3


def test_what_no_node_can_hold_fails_and_the_others_go_on(tmp_path: Path) -> None:
    call = Call(tmp_path)
    call.files.write_plan(make_plan(parse_spec(SPEC + "workers = { B = 4 }\n"), "cpu", capacity=Capacity.local(8))[0])
    runs = runs_of(parse_spec(SPEC + "workers = { B = 4 }\n"))
    state = SweepState(call.state.spec, call.state.manifest, call.state.shards, call.files, runs, call.said.append)
    call.state, call.desk = state, Desk(state, state.units(), Capacity.local(2), {}, clock=lambda: call.now)
    assert [call.start()[:5], call.start()[:5]] == ["law-A", "law-A"]
    assert call.desk.next() is None
    failures = [call.files.run(run.run_id).failure() for run in runs if run.size == "B"]
    assert [failure.failure for failure in failures if failure is not None] == ["bad_input", "bad_input"]
    assert all(failure and "needs 4 CPUs, the cluster can have 2" in failure.message for failure in failures)


def test_a_run_that_ended_is_told_with_the_time_that_the_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(tmp_path)
    now = [1_000.0]
    monkeypatch.setattr("scaling_ray.sweep.state.time.monotonic", lambda: now[0])
    state = SweepState(
        call.state.spec, call.state.manifest, call.state.shards, call.files, call.state.runs, call.said.append
    )
    hours = {run["run_id"]: run["hours"] for run in make_plan(call.state.spec, "cpu")[0]["settings"]}
    ended = call.state.runs[0]
    now[0] += 60.0
    call.files.run(ended.run_id).record_failure(ended, "bug", "it broke")
    state.announce(ended, 60.0)
    ahead = 60.0 * (sum(hours.values()) - hours[ended.run_id]) / hours[ended.run_id]
    assert call.said[-1].endswith(f"failed (bug)  60 s, about {span(ahead)} left")
    for run in call.state.runs[1:]:
        call.files.run(run.run_id).record_failure(run, "bug", "it broke")
        state.announce(run, 1.0)
    assert call.said[-1].endswith("failed (bug)  1 s"), "the last one leaves nothing"
