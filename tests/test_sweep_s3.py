"""A sweep whose files lie on S3: the digits of one on a disk, after kills, an outage, and a driver that overslept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import PROXY, TINY_SWEEP, S3Server, free_port, serving

from scaling_ray.results.columns import Row
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.results.write import ResultsTable
from scaling_ray.runs import runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.sweep.rates import with_rates
from scaling_ray.sweep.run import run_sweep

pytestmark = pytest.mark.ray

EXACT: tuple[str, ...] = ("run_id", "val_loss", "test_loss", "final_val_loss", "cells_seen", "flops", "best_cells_seen")
EXACT += ("baseline_loss",)
EXACT += ("gaussian_loss", "bound_z", "lr", "undertrained")
LONG = TINY_SWEEP.replace("max_cells_seen = 640", "max_cells_seen = 12800\ncheckpoint_seconds = 0.2")
STACKED = LONG.replace("seeds = [1]", "seeds = [1, 2]").replace('"choose"', '"fixed"').replace("[3e-3, 1e-2]", "[3e-3]")


def exact(rows: list[Row]) -> list[list[object]]:
    return [[getattr(row, name) for name in EXACT] for row in rows]


def rows_there(uri: str, text: str) -> list[Row]:
    """The table of a sweep, from its files alone."""
    sweep = SweepFiles.at(uri)
    manifest = sweep.known_manifest()
    runs = with_rates(runs_of(parse_spec(text)), sweep.chosen_rates())
    return ResultsTable(sweep, runs, manifest.splits["train"].cells).rows


def started(spec: Path, shards: Path, out: str, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """``scaling-ray sweep`` under way, with a Ray of its own."""
    own = {name: value for name, value in os.environ.items() if name[:4] not in ("RAY_", "AWS_")}
    own |= {"RAY_worker_niceness": "0"} | environment
    command = [sys.executable, "-m", "scaling_ray.cli", "sweep", str(spec), "--shards", str(shards), "--out", out]
    with open(log, "wb") as stream:
        return subprocess.Popen(command, env=own, stdout=stream, stderr=stream)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def swept(spec: Path, shards: Path, uri: str, tmp_path: Path, s3: S3Server, **environment: str) -> str:
    """A sweep to its end in processes of its own, as those of the test's Ray know no S3; what it said."""
    log = tmp_path / "log-of-a-sweep"
    driver = started(spec, shards, uri, log, s3.environment() | environment)
    try:
        assert driver.wait(240) == 0, log.read_text()
    finally:
        driver.kill()
    return log.read_text()


def names(s3: S3Server, below: str) -> set[str]:
    """Names of the objects below a folder of the bucket, without reading them: they come and go."""
    pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket="shards", Prefix=below)
    return {entry["Key"].removeprefix(below) for page in pages for entry in page.get("Contents", [])}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(LONG)
    return path


def test_a_sweep_on_s3_has_the_digits_of_one_on_a_disk_and_every_verb_reads_it(
    tiny_shards: Path,
    tmp_path: Path,
    s3: S3Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scaling_ray.cli import main

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    spec = tmp_path / "spec.toml"
    spec.write_text(TINY_SWEEP)
    uri = "s3://shards/sweeps/whole"
    said = swept(spec, tiny_shards, uri, tmp_path, s3)
    there, here = rows_there(uri, TINY_SWEEP), run_sweep(spec, tiny_shards, tmp_path / "sweep")
    assert exact(there) == exact(here) and {row.status for row in there} == {"done"}
    assert "set MLFLOW_TRACKING_URI" in said
    assert not any("attempts/" in name or "tune/" in name for name in names(s3, "sweeps/whole/"))
    again: list[str] = []
    assert exact(run_sweep(spec, tiny_shards, uri, again.append)) == exact(there)
    assert again == []

    run_id = next(row.run_id for row in there if row.role == "law" and row.size == "W4")
    capsys.readouterr()
    assert main(["status", uri, "--runs"]) == 0
    assert capsys.readouterr().out.count("done") == len(there) + 1
    assert main(["fit", uri, "--out", str(tmp_path / "fit.json")]) == 0
    assert main(["report", uri, "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert main(["report", uri, "--out", "s3://shards/sweeps/report"]) == 0
    copied = names(s3, "sweeps/report/")
    assert {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")} == copied
    assert main(["export", uri, run_id, "--out", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()

    assert {row.mlflow_run_id for row in there} == {None}
    assert main(["track", "replay", uri]) == 2, "no server is named"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns.db'}")
    assert main(["track", "replay", uri]) == 0
    assert all(row.mlflow_run_id for row in rows_there(uri, TINY_SWEEP))


@pytest.mark.slow
@pytest.mark.parametrize("text", [LONG, STACKED], ids=["runs", "stacks"])
def test_killed_and_called_again_it_ends_with_the_digits_of_an_undisturbed_one(
    tiny_shards: Path, tmp_path: Path, s3: S3Server, text: str
) -> None:
    spec, log = tmp_path / "spec.toml", tmp_path / "log"
    spec.write_text(text)
    name = "killed-runs" if text is LONG else "killed-stacks"
    uri = f"s3://shards/sweeps/{name}"
    for kill in range(3):
        driver = started(spec, tiny_shards, uri, log, s3.environment())
        part = "stacks/" if text is STACKED else "runs/"

        def saved(part: str = part) -> set[str]:
            found = names(s3, f"sweeps/{name}/{part}")
            return {one for one in found if "last-" in one and one.endswith("progress.json")}

        before = saved()
        wait_for(lambda: bool(saved() - before), driver, log)  # noqa: B023
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert kill == 2 or len(names(s3, f"sweeps/{name}/runs/")) > 0
    again = started(spec, tiny_shards, uri, log, s3.environment())
    assert again.wait(300) == 0, log.read_text()
    whole = run_sweep(spec, tiny_shards, tmp_path / "undisturbed")
    found = rows_there(uri, text)
    assert exact(found) == exact(whole)
    assert any((row.attempts or 0) > 1 for row in found)


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_minute_costs_a_minute(
    tiny_shards: Path, tmp_path: Path, s3_server: S3Server, s3: S3Server, spec: Path
) -> None:
    port, log, uri = free_port(), tmp_path / "log", "s3://shards/sweeps/outage"
    with ExitStack() as stack:
        proxy = stack.enter_context(serving(port, PROXY, str(port), str(s3_server.port)))
        driver = started(spec, tiny_shards, uri, log, s3_server.environment(f"http://127.0.0.1:{port}"))
        stack.callback(driver.kill)

        def results() -> int:
            return sum(name.endswith("test_cells.parquet") for name in names(s3, "sweeps/outage/runs/"))

        wait_for(lambda: results() > 0, driver, log)
        os.kill(proxy.pid, signal.SIGKILL)
        proxy.wait()
        done = results()
        assert done < 4, "all was done before the store went away: the test shows nothing"
        gone = time.monotonic()
        while time.monotonic() - gone < 60:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.5)
        assert results() == done
        stack.enter_context(serving(port, PROXY, str(port), str(s3_server.port)))
        assert driver.wait(240) == 0, log.read_text()
    whole = run_sweep(spec, tiny_shards, tmp_path / "undisturbed")
    assert exact(rows_there(uri, LONG)) == exact(whole)
    assert {row.attempts for row in rows_there(uri, LONG)} == {1}, "patience, and not another try"


@pytest.mark.slow
def test_a_second_driver_is_told_so_and_exits_5(tiny_shards: Path, tmp_path: Path, s3: S3Server, spec: Path) -> None:
    log, uri = tmp_path / "log", "s3://shards/sweeps/two"
    driver = started(spec, tiny_shards, uri, log, s3.environment())
    try:
        wait_for(lambda: bool(names(s3, "sweeps/two/runs/")), driver, log)
        second = started(spec, tiny_shards, uri, tmp_path / "second", s3.environment())
        assert second.wait(60) == 5, (tmp_path / "second").read_text()
        assert driver.wait(240) == 0, log.read_text()
    finally:
        driver.kill()


@pytest.mark.slow
def test_a_driver_that_slept_past_its_lease_commits_nothing_more(
    tiny_shards: Path, tmp_path: Path, s3: S3Server
) -> None:
    """All processes of a driver are stopped, as a suspended machine's are; another goes on; then they wake."""
    import psutil

    spec, log, uri = tmp_path / "spec.toml", tmp_path / "log", "s3://shards/sweeps/slept"
    spec.write_text(LONG.replace("= 12800", "= 32000"))
    driver = started(spec, tiny_shards, uri, log, s3.environment())
    family: list[psutil.Process] = []
    try:
        wait_for(lambda: any("last-" in n for n in names(s3, "sweeps/slept/runs/")), driver, log)
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in family:
            process.suspend()
        # its lease names a process of this machine that lives: only its time can end it
        swept(spec, tiny_shards, uri, tmp_path, s3)
        rows = rows_there(uri, spec.read_text())
        assert {row.status for row in rows} == {"done"}
        before = s3.objects("shards", "sweeps/slept/")
        for process in family:
            process.resume()
        assert driver.wait(240) == 5, log.read_text()
        assert "another driver" in log.read_text().splitlines()[-1]
        after = s3.objects("shards", "sweeps/slept/")
        assert {n: v for n, v in after.items() if n.startswith("runs/")} == {
            n: v for n, v in before.items() if n.startswith("runs/")
        }
        assert after["results.parquet"] == before["results.parquet"]
    finally:
        for process in family:
            if process.is_running():
                process.kill()
    whole = run_sweep(spec, tiny_shards, tmp_path / "undisturbed")
    assert exact(rows) == exact(whole)


@pytest.mark.slow
def test_worker_groups_train_on_s3_as_one_process_does_on_a_disk(
    tiny_shards: Path, tmp_path: Path, s3: S3Server
) -> None:
    spec, uri = tmp_path / "spec.toml", "s3://shards/sweeps/groups"
    text = TINY_SWEEP.replace('"choose"', '"fixed"').replace("[3e-3, 1e-2]", "[3e-3]")
    spec.write_text(text + '[resources]\nworkers = { W4 = 2 }\nengine = "deepspeed"\nzero_stage = 1\n')
    swept(spec, tiny_shards, uri, tmp_path, s3)
    there = rows_there(uri, spec.read_text())
    assert {(row.size, row.workers, row.engine) for row in there} == {("XXS", 1, "plain"), ("W4", 2, "deepspeed")}
    assert not any("workers/" in name for name in names(s3, "sweeps/groups/")), "Ray's own files stay"
    spec.write_text(text)
    for one, other in zip(there, run_sweep(spec, tiny_shards, tmp_path / "alone"), strict=True):
        assert (one.run_id, one.cells_seen) == (other.run_id, other.cells_seen)
        assert one.test_loss == pytest.approx(other.test_loss, rel=1e-5)
