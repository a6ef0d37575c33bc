"""How a sweep stands, from its directory alone: the matrix, rates and estimates, what waits, what failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_SWEEP, S3Server
from test_report import rows_of, write_rows, write_sweep

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult
from scaling_ray.results.standing import Standing, StandingReader
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.spec import parse_spec
from scaling_ray.storage import Place, open_place
from scaling_ray.sweep.plan import make_plan

REPOSITORY = Path(__file__).resolve().parents[1]


class Sweep:
    """A sweep's directory, as the driver writes it while it goes on."""

    def __init__(self, where: Path | str | Place, text: str = TINY_SWEEP) -> None:
        self.files = SweepFiles.at(where)
        self.plan, self.runs = make_plan(parse_spec(text))
        self.files.place.write("spec.toml", text.encode())
        self.files.write_plan(self.plan)

    def of(self, role: str) -> list[RunSpec]:
        return [run for run in self.runs if run.role == role]

    def cpu_hours(self, run: RunSpec) -> float:
        (setting,) = [setting for setting in self.plan["settings"] if setting["run_id"] == run.run_id]
        return float(setting["hours"]) * run.execution.cpus * run.execution.workers

    def budget(self, run: RunSpec) -> int:
        return run.train.total_steps * run.train.cells_per_step

    def finish(self, run: RunSpec, ended_seconds_ago: float, wall_seconds: float) -> None:
        result = RunResult(
            run_id=run.run_id,
            attempt="000001-00000000000000000001-00000000",
            attempts=1,
            data_hash="3f" * 32,
            lr=1e-3,
            cells_resolved=100,
            cells_seen=self.budget(run),
            masked_genes_seen=1,
            optimizer_steps=20,
            flops=1.0,
            loss_unit="mse",
            val_loss=0.5,
            final_val_loss=0.5,
            best_curve_loss=0.5,
            best_cells_seen=1,
            test_loss=0.5,
            test_loss_sum=0.5,
            test_masked_genes=1,
            stop_reason="budget",
            wall_seconds=wall_seconds,
            train_seconds=wall_seconds,
            workers=1,
            engine="plain",
            micro_batch=32,
            precision="fp32",
            stacked=1,
            host="here",
            ended_ms=int(1000 * (time.time() - ended_seconds_ago)),
        )
        place = self.files.run(run.run_id).place
        assert place.commit("result.json", place.claim("result.json", result.attempt), result.to_json().encode())

    def train(self, run: RunSpec, rows: list[tuple[float, int]]) -> None:
        """Rows of an attempt: (seconds ago, cells seen)."""
        token = "000001-00000000000000000001-00000000"
        lines = [
            json.dumps({"kind": "train", "cells_seen": seen, "timestamp_ms": 1000 * (time.time() - ago)})
            for ago, seen in rows
        ]
        text = "".join(line + "\n" for line in lines) + '{"kind": "tr'
        self.files.run(run.run_id).place.write(f"attempts/{token}/metrics.jsonl", text.encode())

    def standing(self) -> Standing:
        return StandingReader(self.files).read()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def row_of(text: str, size: str) -> list[str]:
    """The entries of a size's row of the matrix."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{size} (")]
    return line.split(")")[1].split()


def test_the_matrix_counts_the_seeds_of_each_size_and_number_of_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "TINY", "XS"), unfinished=3)
    rows = rows_of(sweep)
    blank: dict[str, Any] = {"val_loss": None, "test_loss": None, "final_val_loss": None}
    last = max(i for i, row in enumerate(rows) if row.role == "law")
    rows[last] = replace(rows[last], status="failed", failure="bug", **blank)
    write_rows(sweep, rows)
    text = shown(capsys, str(sweep))
    assert "512 genes" in text and "500 cells" in text and "2,000 cells" in text and "8,000 cells" in text
    assert row_of(text, "XXS") == ["3/3", "0/2", "1/2", "2/2"], "rates, then cells"
    assert row_of(text, "TINY") == ["3/3", "2/2", "2/2", "2/2"]
    assert row_of(text, "XS") == ["3/3", "2/2", "2/2", "1/2", "1f"]
    assert "23 done, 0 running, 3 waiting, 1 failed" in text
    assert f"{rows[last].run_id}: bug" in text
    runs = shown(capsys, str(sweep), "--runs").splitlines()
    assert len(runs) == len(rows) + 1 and runs[-1] == "23 done, 0 running, 3 waiting, 1 failed"
    assert runs[last].split() == ["failed", rows[last].run_id, "bug"]
    assert runs[3].endswith(f"test_loss {rows[3].test_loss:.4f}")


def test_a_planned_sweep_has_a_matrix_before_its_first_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    text = shown(capsys, str(tmp_path))
    assert row_of(text, "XXS") == ["0/2", "0/1", "0/1"] and "all cells" in text
    assert f"0 done, 0 running, {len(sweep.runs)} waiting, 0 failed" in text
    assert "by the plan, nothing is measured" in text
    hours = sum(sweep.cpu_hours(run) for run in sweep.runs)
    standing = sweep.standing()
    assert standing.cpu_hours_left == pytest.approx(hours)
    assert standing.seconds_left == pytest.approx(3600 * sweep.plan["totals"]["hours"])


def test_files_of_runs_are_newer_than_the_table(where: Place) -> None:
    sweep = Sweep(where)
    done, running, failed, *others = sweep.runs
    sweep.finish(done, 5, 10)
    sweep.train(running, [(20, 100), (10, 200)])
    sweep.files.run(failed.run_id).record_failure(failed, "out_of_memory", "MemoryError: 3 GiB\n  at line 7\n")
    standing = sweep.standing()
    status = {run.planned.run_id: run.status for run in standing.runs}
    assert status[done.run_id] == "done" and status[running.run_id] == "running" and status[failed.run_id] == "failed"
    assert {status[run.run_id] for run in others} == {"waiting"}
    (failure,) = standing.failures
    assert failure.failure == "out_of_memory" and failure.message is not None and "3 GiB" in failure.message


def test_rate_and_time_left_are_those_of_the_last_ten_minutes(tmp_path: Path) -> None:
    """Two processes: one has trained one run for the whole span; the other one run after another."""
    sweep = Sweep(tmp_path)
    first, second, third, *_ = sweep.runs
    budget = sweep.budget(first)
    sweep.train(first, [(1200 - 60 * i, budget // 40 * i) for i in range(21)])  # half of its budget in 20 minutes
    sweep.finish(second, ended_seconds_ago=300, wall_seconds=600)
    sweep.train(third, [(300 - 60 * i, budget // 20 * i) for i in range(6)])
    standing = sweep.standing()
    expected = budget / 40 / 60 + sweep.budget(second) / 600 / 2 + budget / 20 / 60 / 2
    assert standing.cells_per_second == pytest.approx(expected, rel=0.02)
    assert standing.elapsed_seconds == pytest.approx(1200, abs=5) and standing.silent_seconds is None
    left = sum(sweep.cpu_hours(run) for run in sweep.runs if run is not second)
    left -= sweep.cpu_hours(first) * 0.5 + sweep.cpu_hours(third) * 0.25
    assert standing.cpu_hours_left == pytest.approx(left, rel=0.01)
    per_second = sweep.cpu_hours(first) / 2400 + sweep.cpu_hours(second) / 600 / 2 + sweep.cpu_hours(third) / 1200 / 2
    assert standing.estimate_from == "recent rate"
    assert standing.seconds_left == pytest.approx(left / per_second, rel=0.02)


def test_a_young_sweep_is_measured_over_its_own_age(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    first, second, *_ = sweep.runs
    sweep.finish(first, ended_seconds_ago=240, wall_seconds=240)
    sweep.train(second, [(240, 0), (160, 800), (80, 1600), (0, 2400)])
    found = sweep.standing().cells_per_second
    assert found == pytest.approx(sweep.budget(first) / 480 + 10 / 2, rel=0.05)


def test_an_attempt_of_a_driver_that_is_gone_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    sweep.train(sweep.runs[0], [(7300, 0), (7200, 100)])
    standing = sweep.standing()
    assert standing.cells_per_second is None and standing.silent_seconds == pytest.approx(7200, abs=5)
    assert standing.estimate_from == "plan"
    assert "nothing was written for 2 h 00 min: is a driver running?" in shown(capsys, str(tmp_path))


def test_costs_are_the_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.standing().cost_left is None and "cost" not in shown(capsys, str(tmp_path))
    for number, setting in enumerate(sweep.plan["settings"]):
        setting["cost"] = 1.0 + number
    sweep.files.write_plan(sweep.plan)
    first, second, *others = sweep.runs
    sweep.finish(first, 5, 10)
    sweep.train(second, [(20, 0), (0, sweep.budget(second) // 4)])
    assert sweep.standing().cost_left == pytest.approx(2.0 * 0.75 + sum(range(3, 3 + len(others))))
    assert sweep.standing().cost_spent == pytest.approx(1.0 + 2.0 * 0.25)
    assert f"planned cost: 1.50 behind, {1.5 + sum(range(3, 3 + len(others))):.2f} left" in shown(capsys, str(tmp_path))


def test_a_plan_without_hours_gives_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    for setting in sweep.plan["settings"]:
        del setting["hours"]
    sweep.files.write_plan(sweep.plan)
    sweep.train(sweep.runs[0], [(20, 0), (0, 100)])
    standing = sweep.standing()
    assert standing.cells_per_second == pytest.approx(5, rel=0.05)
    assert standing.seconds_left is None and standing.cpu_hours_left is None
    assert " left " not in shown(capsys, str(tmp_path))


def test_what_waits_and_for_what_is_the_drivers_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.standing().waiting_for is None
    waiting = [{"unit": f"unit-{i}", "for": "4 CPUs"} for i in range(25)]
    sweep.files.place.write("queue.json", json.dumps({"waiting": waiting, "in_flight": ["a", {"unit": "b"}]}).encode())
    standing = sweep.standing()
    assert standing.waiting_for == tuple((f"unit-{i}", "4 CPUs") for i in range(25))
    assert standing.in_flight == ("a", "b")
    text = shown(capsys, str(tmp_path))
    assert "25 units wait, 2 are in flight:" in text and "  unit-0: 4 CPUs" in text and "  and 5 more" in text
    for damaged in (b"", b"{", b"[]", b'{"waiting": 3}', b'{"waiting": [1, {"for": "x"}], "in_flight": null}'):
        sweep.files.place.write("queue.json", damaged)
        assert not sweep.standing().waiting_for and not sweep.standing().in_flight


def test_a_rate_that_diverged_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    rate, law = sweep.of("rate")[0], sweep.of("law")[0]
    for run in (rate, law):
        sweep.files.run(run.run_id).record_failure(run, "diverged", "Diverged: loss is NaN")
    standing = sweep.standing()
    (entry,) = [entry for entry in standing.rate_entries if entry.size == rate.size]
    assert (entry.done, entry.failed, entry.total) == (1, 0, 2)
    assert sum(entry.failed for entry in standing.entries) == 1
    assert "failed: 2 diverged" in shown(capsys, str(tmp_path))


def test_json_holds_what_the_lines_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)
    sweep.finish(sweep.runs[0], 5, 10)
    found = json.loads(shown(capsys, str(tmp_path), "--json"))
    assert found["name"] == "tiny" and found["counts"]["done"] == 1
    assert [run["run_id"] for run in found["runs"]] == [run.run_id for run in sweep.runs]
    assert found["runs"][0]["status"] == "done" and found["runs"][0]["test_loss"] == 0.5
    assert sum(entry["total"] for entry in found["entries"] + found["rate_entries"]) == len(sweep.runs)


def test_it_watches_until_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path)

    def go_on() -> None:
        for run in sweep.runs:
            time.sleep(0.3)
            sweep.finish(run, 0, 0.1)

    driver = threading.Thread(target=go_on)
    driver.start()
    text = shown(capsys, str(tmp_path), "--watch", "0.1")
    driver.join()
    lines = text.splitlines()
    total = len(sweep.runs)
    done = [int(line.split(" done")[0].split()[-1]) for line in lines if " waiting" in line]
    assert done == sorted(done) and done[-1] == total and len(set(done)) > 2
    assert "\x1b" not in text and row_of(text, "W4") == ["2/2", "1/1", "1/1"], "the whole table at the end"


def test_a_sweep_that_is_being_written_is_read_at_every_moment(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    stop, all_done, reader = threading.Event(), threading.Event(), StandingReader(sweep.files)

    def write() -> None:
        number = 0
        while not stop.is_set():
            run = sweep.runs[number % len(sweep.runs)]
            place = sweep.files.run(run.run_id).place
            sweep.train(run, [(10, 10), (0, 20)])
            sweep.files.write_plan(sweep.plan)
            sweep.files.place.write("queue.json", b'{"waiting": [], "in_flight": []}')
            if number < len(sweep.runs):
                sweep.finish(run, 0, 1)
            place.remove("attempts/")
            number += 1
            if number == len(sweep.runs):
                all_done.set()

    driver = threading.Thread(target=write)
    driver.start()
    try:
        done = looks = 0
        while looks < 150 or not all_done.is_set():
            looks += 1
            assert driver.is_alive()
            counts = reader.read().counts
            assert counts["done"] >= done and sum(counts.values()) == len(sweep.runs)
            done = counts["done"]
    finally:
        stop.set()
        driver.join()
    assert reader.read().counts["done"] == len(sweep.runs)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match=r"SWEEP_DIR: .*holds no plan.json and no results.parquet"):
        StandingReader(SweepFiles(open_place(tmp_path, "SWEEP_DIR"))).read()
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch" in capsys.readouterr().err
    sweep = Sweep(tmp_path)
    sweep.files.place.write("plan.json", sweep.files.place.read("plan.json")[:-20])
    assert main(["status", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "plan.json" in line


def test_it_reads_from_s3(s3: S3Server, on_s3: Place, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(on_s3)
    sweep.finish(sweep.runs[0], 5, 10)
    before = len(s3.requests())
    text = shown(capsys, str(on_s3))
    assert f"1 done, 0 running, {len(sweep.runs) - 1} waiting, 0 failed" in text
    assert {request[0] for request in s3.requests()[before:]} <= {"GET", "HEAD"}, "status writes nothing, no lease"


def test_a_reservation_on_s3_is_no_result(on_s3: Place) -> None:
    sweep = Sweep(on_s3)
    sweep.train(sweep.runs[0], [(10, 10), (0, 20)])
    sweep.files.run(sweep.runs[0].run_id).place.claim("result.json", "somebody")
    assert sweep.standing().counts["running"] == 1


def test_it_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    Sweep(tmp_path)
    code = (
        "import sys; from scaling_ray.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'ray', 'torch', 'mlflow', 'pandas', 'tiledbsoma'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "status", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "waiting" in done.stdout
