"""Tracking to real servers: over HTTP on sqlite and PostgreSQL, through lost and late answers, kills and an outage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracked_sweeps import (
    Faults,
    Swept,
    begin_sweep,
    finish_run,
    finished_sweep,
    free_port,
    mlflow_server,
    postgres_server,
    proxy_to,
    start_of,
    token_of,
    why_no_postgres,
    write_rows,
)

from scaling_ray.cli import main
from scaling_ray.errors import ScalingRayError
from scaling_ray.model.exported import read_record, save_model
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.results.read import read_rows
from scaling_ray.tracking.check import differences
from scaling_ray.tracking.follower import Follower
from scaling_ray.tracking.models import chosen_runs, log_model
from scaling_ray.tracking.tracker import Tracker, replay

mlflow_client = pytest.importorskip("mlflow.tracking").MlflowClient
pytestmark = pytest.mark.slow

FOLLOWING = """
import sys, time
from scaling_ray.records import ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import runs_of
from scaling_ray.tracking.tracker import Tracker
sweep = SweepFiles.at(sys.argv[1])
spec, manifest = sweep.spec(), sweep.known_manifest()
tracker = None
while True:
    try:
        tracker = tracker or Tracker(sweep, spec, manifest, sys.argv[2])
        tracker.sync(runs_of(spec))
        print("synced", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
    time.sleep(0.2)
"""
"""A driver's tracking, in a process that a kill can end."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on sqlite that the tests of this module share; each has a sweep of its own."""
    with mlflow_server(tmp_path_factory.mktemp("server"), free_port()) as uri:
        yield uri


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def port_of(uri: str) -> int:
    return int(uri.rsplit(":", 1)[1])


def runs_on(uri: str, swept: Swept, key: str) -> list:
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name("scaling_ray/tracked")
    return list(client.search_runs([experiment.experiment_id], f"tags.`scaling_ray.sweep` = '{key}'", max_results=1000))


def assert_each_metric_is_there_once_per_step(uri: str, runs: list) -> None:
    client = mlflow_client(uri)
    for run in runs:
        for key in run.data.metrics:
            steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, key))
            assert set(steps.values()) == {1}, (run.info.run_name, key)


def test_a_sweep_on_a_server_on_sqlite(server: str, tmp_path: Path) -> None:
    swept = finished_sweep(tmp_path)
    assert main(["track", "replay", str(swept.place), "--to", server]) == 0
    assert main(["track", "check", str(swept.place), "--to", server]) == 0
    assert main(["track", "check", str(swept.place)]) == 0, "the sweep stays where it was moved to"


@pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))
def test_a_sweep_on_a_server_on_postgres(tmp_path: Path) -> None:
    import psycopg2

    swept = finished_sweep(tmp_path)
    where = str(Path(psycopg2.__file__).parents[1])
    path = os.pathsep.join([where, *filter(None, [os.environ.get("PYTHONPATH")])])
    with postgres_server() as backend, mlflow_server(tmp_path / "server", free_port(), backend, path) as uri:
        for _ in range(2):
            assert main(["track", "replay", str(swept.place), "--to", uri]) == 0
        assert main(["track", "check", str(swept.place)]) == 0
        runs = runs_on(uri, swept, Tracker(swept.files, swept.spec, swept.manifest).key)
        assert len(runs) == len(swept.runs) + 1
        assert_each_metric_is_there_once_per_step(uri, runs)


def test_ten_kills_and_a_tenth_of_the_answers_lost_leave_every_run_and_metric_once(server: str, tmp_path: Path) -> None:
    swept, faults = begin_sweep(tmp_path / "sweep"), Faults()
    faults.lost_share = 0.1
    done = 0
    with proxy_to(port_of(server), faults) as uri:
        for kill in range(10):
            if kill < 8:  # two more runs end while this driver tracks, and the next one is training
                finish_run(swept, done)
                finish_run(swept, done + 1)
                done += 2
            if done < len(swept.runs):
                write_rows(
                    swept.files, swept.runs[done], token_of(1, start_of(done)), start_of(done), range(1, 1 + kill)
                )
            command = [sys.executable, "-c", FOLLOWING, str(swept.place), uri]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
                assert driver.stdout is not None
                assert driver.stdout.readline()
                time.sleep(0.15 * kill)
                driver.send_signal(signal.SIGKILL)
            if done < len(swept.runs):
                swept.files.run(swept.runs[done].run_id).place.remove("attempts/")
        for _ in range(50):
            try:
                replay(swept.files, swept.spec, swept.manifest, swept.runs, uri)
                break
            except ScalingRayError:
                continue
    assert faults.lost > 10, "the proxy has lost too few answers to say anything"
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs, server) == []
    runs = runs_on(server, swept, Tracker(swept.files, swept.spec, swept.manifest, server).key)
    assert len(runs) == len(swept.runs) + 1
    assert_each_metric_is_there_once_per_step(server, [run for run in runs if run.info.run_name != "tracked"])
    for run in runs:
        if run.info.run_name != "tracked":
            index = [one.run_id for one in swept.runs].index(run.data.tags["run_id"])
            assert abs(run.info.start_time - start_of(index)) <= 1_000
            assert abs(run.info.end_time - start_of(index) - 9_000) <= 1_000


def test_answers_after_half_a_minute_cost_the_sweep_nothing(server: str, tmp_path: Path) -> None:
    swept, faults, said = begin_sweep(tmp_path / "sweep"), Faults(), list[str]()
    faults.delay_seconds = 30.0
    for index in range(3):
        finish_run(swept, index)
    with proxy_to(port_of(server), faults) as uri:
        follower = Follower(
            lambda: Tracker(swept.files, swept.spec, swept.manifest, uri), lambda: swept.runs, said.append, 0.1
        )
        follower.start()
        follower.finish(failed=False, timeout_seconds=1.0)
        assert len(said) == 1 and "tracking is behind" in said[0] and "track replay" in said[0]
        follower._thread.join(300)
    replay(swept.files, swept.spec, swept.manifest, swept.runs, server)
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs, server) == []


def test_a_server_that_was_away_for_a_while_holds_everything_in_the_end(tmp_path: Path) -> None:
    swept, port, said = begin_sweep(tmp_path / "sweep"), free_port(), list[str]()
    uri = f"http://127.0.0.1:{port}"
    follower = Follower(
        lambda: Tracker(swept.files, swept.spec, swept.manifest, uri), lambda: swept.runs, said.append, 0.2
    )
    third = len(swept.runs) // 3
    with mlflow_server(tmp_path / "server", port):
        follower.start()
        for index in range(third):
            finish_run(swept, index)
        wait_for(lambda: len(tracked(swept)) == third)
    for index in range(third, 2 * third):
        finish_run(swept, index)
    wait_for(lambda: follower._problem is not None)
    with mlflow_server(tmp_path / "server", port):
        for index in range(2 * third, len(swept.runs)):
            finish_run(swept, index)
        follower.finish(failed=False, timeout_seconds=300)
        assert len(said) == 1 and "in MLflow" in said[0]
        assert differences(swept.files, swept.spec, swept.manifest, swept.runs, uri) == []
        runs = runs_on(uri, swept, Tracker(swept.files, swept.spec, swept.manifest, uri).key)
        assert len(runs) == len(swept.runs) + 1
        assert_each_metric_is_there_once_per_step(uri, [run for run in runs if run.info.run_name != "tracked"])


def tracked(swept: Swept) -> list[str]:
    return [run.run_id for run in swept.runs if swept.files.run(run.run_id).mlflow_run_id() is not None]


def wait_for(happened: object, seconds: float = 300.0) -> None:
    assert callable(happened)
    for _ in range(int(seconds * 10)):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it never happened")


def test_a_server_that_is_away_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = begin_sweep(tmp_path / "sweep")
    finish_run(swept, 0)
    for verb in ("replay", "check"):
        assert main(["track", verb, str(swept.place), "--to", "http://127.0.0.1:9"]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "127.0.0.1:9" in said[0] and "Traceback" not in said[0]


def test_the_model_of_each_setting_is_logged_without_a_pickle(server: str, tmp_path: Path) -> None:
    swept = finished_sweep(tmp_path)
    replay(swept.files, swept.spec, swept.manifest, swept.runs, server)
    rows = read_rows(swept.files.place)
    chosen = chosen_runs(rows)
    assert len(chosen) == 8, "one of the two seeds of each setting"
    run = swept.runs[0]
    facts = run.model_dump(include={"run_id", "size", "width", "layers", "heads", "feedforward", "seed"})
    facts |= run.train.model_dump(include={"recipe", "mask_fraction", "umi_fraction", "objective"})
    facts |= {
        "precision": "fp32",
        "lr": 0.01,
        "loss_unit": "mse",
        "val_loss": 0.5,
        "test_loss": 0.5,
        "params": run.params,
    }
    facts |= {"feature_ids": [f"g{n}" for n in range(64)], "feature_names": [f"G{n}" for n in range(64)]}
    facts |= {"data_hash": "d" * 64, "census": {}, "scaling_ray_version": "0"}
    directory = tmp_path / "model"
    directory.mkdir()
    save_model(directory, MaskedGeneTransformer(run.shape, 64).state_dict(), facts)
    record = read_record(directory)
    assert log_model(swept.files, run.run_id, directory, record, server)
    assert not log_model(swept.files, run.run_id, directory, record, server), "the same weights again are not sent"
    run_id = swept.files.run(run.run_id).mlflow_run_id()
    there = {entry.path for entry in mlflow_client(server).list_artifacts(run_id, "model")}
    assert there == {"model/model.safetensors", "model/model.json", "model/README.md"}
