"""MLflow holds what a sweep's files hold, once, as people compare it, whoever asks and how often."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tracked_sweeps import BASE_MS, Swept, begin_sweep, finish_run, finished_sweep, start_of, token_of, write_rows

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.records import RunFailure
from scaling_ray.results.sweep_files import SweepFiles, read_sealed, write_sealed
from scaling_ray.runs import runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.tracking.check import differences
from scaling_ray.tracking.database import check_database
from scaling_ray.tracking.follower import Follower
from scaling_ray.tracking.ledger import is_tracked, shown_uri, tracking_uri
from scaling_ray.tracking.mlflow import NOTE_TAG, PARENT_TAG
from scaling_ray.tracking.shown import names_of
from scaling_ray.tracking.story import LARGEST_NOTE, read_report
from scaling_ray.tracking.tracker import Tracker, replay

mlflow_client = pytest.importorskip("mlflow.tracking").MlflowClient


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: making them takes longer than most of these tests."""
    path = tmp_path_factory.mktemp("blank") / "mlruns.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def swept(tmp_path: Path, blank_database: Path) -> Swept:
    """Two runs finished, one failed, one cut off in its training, the others not begun."""
    shutil.copy(blank_database, tmp_path / "mlruns.db")
    swept = begin_sweep(tmp_path / "sweep")
    finish_run(swept, 0)
    finish_run(swept, 1)
    for index in (2, 3):
        run = swept.runs[index]
        swept.files.run(run.run_id).prepare(run)
        write_rows(swept.files, run, token_of(1, start_of(index)), start_of(index), range(1, 5))
    failure = RunFailure(
        run_id=swept.runs[2].run_id, failure="bug", message="m", attempts=1, ended_ms=start_of(2) + 4_321
    )
    swept.files.run(swept.runs[2].run_id).place.write("failure.json", failure.to_json().encode())
    return swept


def tracker_of(swept: Swept) -> Tracker:
    return Tracker(swept.files, swept.spec, swept.manifest)


def client_of(swept: Swept) -> Any:
    return mlflow_client(tracking_uri(swept.files))


def runs_there(swept: Swept) -> tuple[list, dict]:
    """Parents, and children by name."""
    client = client_of(swept)
    experiment = client.get_experiment_by_name("scaling_ray/tracked")
    found = client.search_runs([experiment.experiment_id])
    children = [run for run in found if PARENT_TAG in run.data.tags]
    assert len({run.info.run_name for run in children}) == len(children)
    return [run for run in found if PARENT_TAG not in run.data.tags], {run.info.run_name: run for run in children}


def test_names_numbers_and_times_are_those_that_people_compare(swept: Swept) -> None:
    tracker = tracker_of(swept)
    tracker.sync(swept.runs)
    tracker.close(failed=True)
    parents, children = runs_there(swept)
    assert [run.info.run_name for run in parents] == ["tracked"] and parents[0].info.status == "FAILED"
    assert set(children) == {"W4 200 s1", "W4 200 s2", "W4 5000 s1", "W4 5000 s2"}
    done = children["W4 200 s1"]
    run = swept.runs[0]
    assert done.data.params == {
        "params": str(run.params),
        "cells": "200",
        "genes": "64",
        "width": "4",
        "seed": "1",
        "lr": "0.01",
    }
    assert children["W4 5000 s1"].data.params["cells"] == "5000", "all cells are a number like any other"
    result = swept.files.run(run.run_id).result()
    assert result is not None and done.data.metrics["test_loss"] == result.test_loss
    assert done.data.metrics["gain_over_gene_mean"] > done.data.metrics["gain_over_gaussian"] > 0
    assert done.data.metrics["cells_per_second"] == 256 / 8
    assert done.data.tags["recipe"] == "corrected" and done.data.tags["node"] == "node-1"
    assert done.data.tags["setting"] == "W4 200" and children["W4 5000 s1"].data.tags["failure"] == "bug"
    assert {name: child.info.status for name, child in children.items()} == {
        "W4 200 s1": "FINISHED",
        "W4 200 s2": "FINISHED",
        "W4 5000 s1": "FAILED",
        "W4 5000 s2": "KILLED",
    }
    for index, name in enumerate(["W4 200 s1", "W4 200 s2", "W4 5000 s1", "W4 5000 s2"]):
        assert children[name].info.start_time == start_of(index)
        took = {0: 9_000, 1: 9_000, 2: 4_321, 3: 4_000}[index]
        assert children[name].info.end_time == start_of(index) + took
    assert parents[0].info.start_time == BASE_MS and parents[0].info.end_time == start_of(3) + 4_000


def test_curves_stand_against_cells_seen_with_the_time_of_their_rows(swept: Swept) -> None:
    tracker_of(swept).sync(swept.runs)
    client = client_of(swept)
    run_id = runs_there(swept)[1]["W4 200 s1"].info.run_id
    curve = client.get_metric_history(run_id, "curve/val_loss")
    assert [(m.step, m.timestamp) for m in curve] == [(32 * n, BASE_MS + 1000 * n) for n in (2, 4, 6, 8)]
    updates = client.get_metric_history(run_id, "curve/optimizer_steps")
    assert [m.value for m in updates] == list(range(1, 9))
    dataset = client.get_run(run_id).inputs.dataset_inputs[0].dataset
    assert dataset.digest == "d" * 32 and "counts of 64 genes" in dataset.schema
    assert {entry.path for entry in client.list_artifacts(run_id)} == {"run.json"}


def test_rows_about_the_system_become_system_metrics(swept: Swept) -> None:
    run = swept.runs[3]
    row = {"kind": "system", "optimizer_steps": 4, "cells_seen": 128, "cpu_percent": 96.5, "memory_gib": 1.5}
    log = swept.files.run(run.run_id).place.below(f"attempts/{token_of(1, start_of(3))}").log("metrics.jsonl")
    log.write(json.dumps(row | {"timestamp_ms": start_of(3) + 4_000}) + "\n")
    for _ in range(2):
        tracker_of(swept).sync(swept.runs)
    there = runs_there(swept)[1]["W4 5000 s2"]
    assert there.data.metrics["system/cpu_percent"] == 96.5 and there.data.metrics["system/memory_gib"] == 1.5
    assert len(client_of(swept).get_metric_history(there.info.run_id, "system/cpu_percent")) == 1
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs) == []


def test_a_replay_adds_nothing_moves_no_time_and_new_rows_are_added_once(swept: Swept) -> None:
    for _ in range(3):
        replay(swept.files, swept.spec, swept.manifest, swept.runs)
    before = {name: dict(child.info) for name, child in runs_there(swept)[1].items()}
    run = swept.runs[3]
    write_rows(swept.files, run, token_of(1, start_of(3)), start_of(3), range(5, 7))
    replay(swept.files, swept.spec, swept.manifest, swept.runs)
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs) == []
    after = runs_there(swept)[1]
    client = client_of(swept)
    steps = [m.step for m in client.get_metric_history(after["W4 5000 s2"].info.run_id, "curve/train_loss")]
    assert steps == [32 * n for n in range(1, 7)]
    for name in ("W4 200 s1", "W4 200 s2", "W4 5000 s1"):
        found = dict(after[name].info)
        assert found == before[name]
    assert is_tracked(swept.files, [run.run_id for run in swept.runs[:2]])
    assert not is_tracked(swept.files, [run.run_id for run in swept.runs])


def test_what_a_failing_server_did_not_take_is_logged_by_the_next_sync(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_of(swept)
    whole, left = mlflow_client.log_batch, [3]

    def sometimes(self: object, *arguments: object, **named: object) -> object:
        done = whole(self, *arguments, **named)
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the answer was lost")
        return done

    monkeypatch.setattr(mlflow_client, "log_batch", sometimes)
    with pytest.raises(OSError, match="lost"):
        tracker.sync(swept.runs)
    tracker.sync(swept.runs)
    tracker.close(failed=True)
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs) == []


def test_a_creation_whose_answer_was_lost_leaves_no_second_run(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlflow_client.create_run

    def twice(self: object, *arguments: object, **named: object) -> object:
        whole(self, *arguments, **named)
        return whole(self, *arguments, **named)

    monkeypatch.setattr(mlflow_client, "create_run", twice)
    tracker_of(swept).sync(swept.runs)
    parents, children = runs_there(swept)
    assert len(parents) == 1 and len(children) == 4


def test_a_run_that_came_late_is_deleted_at_the_end_and_a_deleted_one_is_made_anew(swept: Swept) -> None:
    tracker = tracker_of(swept)
    tracker.sync(swept.runs)
    parents, children = runs_there(swept)
    client, one = client_of(swept), children["W4 200 s1"]
    tags = {key: value for key, value in one.data.tags.items() if key != "mlflow.runName"}
    client.create_run(one.info.experiment_id, tags=tags, run_name="late")
    tracker.close(failed=True)
    assert "late" not in runs_there(swept)[1]
    client.delete_run(one.info.run_id)
    replay(swept.files, swept.spec, swept.manifest, swept.runs)
    anew = runs_there(swept)[1]["W4 200 s1"]
    assert anew.info.run_id != one.info.run_id and anew.info.start_time == BASE_MS
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs) == []


def test_another_server_gets_runs_of_its_own_with_the_same_times(
    swept: Swept, tmp_path: Path, blank_database: Path
) -> None:
    replay(swept.files, swept.spec, swept.manifest, swept.runs)
    here = {name: (run.info.start_time, run.info.end_time) for name, run in runs_there(swept)[1].items()}
    shutil.copy(blank_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert main(["track", "check", str(swept.place), "--to", other]) == 1
    assert main(["track", "replay", str(swept.place), "--to", other]) == 0
    assert main(["track", "check", str(swept.place), "--to", other]) == 0
    client = mlflow_client(other)
    experiment = client.get_experiment_by_name("scaling_ray/tracked")
    found = client.search_runs([experiment.experiment_id])
    there = {run.info.run_name: (run.info.start_time, run.info.end_time) for run in found}
    assert there == here | {"tracked": there["tracked"]} and len(found) == 5


def test_a_sweep_that_moved_to_a_server_stays_there(swept: Swept) -> None:
    place = swept.files.place
    tracked = {"mlflow_run_id": "a", "uri": "http://127.0.0.1:9", "sweep": "k", "experiment": "1", "started_ms": 1}
    write_sealed(place, "mlflow.json", tracked)
    assert tracking_uri(swept.files) == "http://127.0.0.1:9"


def test_two_sweeps_of_one_spec_in_folders_of_one_name_are_two_parents(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns.db'}")
    parents = set()
    for name in ("a", "it's b"):
        shutil.copytree(swept.place, tmp_path / name / "sweep")
        files = SweepFiles.at(tmp_path / name / "sweep")
        for _ in range(2):
            Tracker(files, swept.spec, swept.manifest).sync(swept.runs)
        parents.add((read_sealed(files.place, "mlflow.json") or {})["mlflow_run_id"])
    client = client_of(swept)
    experiment = client.get_experiment_by_name("scaling_ray/tracked")
    assert len(parents) == 2 and len(client.search_runs([experiment.experiment_id])) == 2 * 5


def test_a_run_that_is_tried_again_after_a_failure_runs_and_finishes(swept: Swept) -> None:
    tracker = tracker_of(swept)
    tracker.sync(swept.runs)
    run = swept.runs[2]
    write_rows(swept.files, run, token_of(2, start_of(2) + 60_000), start_of(2) + 60_000, range(1, 2))
    tracker.sync(swept.runs)
    assert runs_there(swept)[1]["W4 5000 s1"].info.status == "RUNNING"
    finish_run(swept, 2)
    tracker.sync(swept.runs)
    there = runs_there(swept)[1]["W4 5000 s1"]
    assert there.info.status == "FINISHED" and there.data.tags["failure"] == "none"
    assert there.info.end_time == start_of(2) + 9_000


def test_the_parent_tells_verdict_law_best_loss_and_cost(tmp_path: Path, blank_database: Path) -> None:
    swept = finished_sweep(tmp_path)
    shutil.copy(blank_database, tmp_path / "mlruns.db")
    for _ in range(2):
        assert main(["track", "replay", str(swept.place)]) == 0
    (parent,), children = runs_there(swept)
    assert len(children) == len(swept.runs) == 16
    fit = json.loads((tmp_path / "report" / "fit.json").read_text())["headline"]
    tags, metrics = parent.data.tags, parent.data.metrics
    verdicts = {"size": "size", "data": "data", "prediction": "predictions"}
    assert tags["verdict"] == fit["verdict"]
    assert {about: tags[f"verdict_{about}"] for about in verdicts} == {
        a: fit[p]["verdict"] for a, p in verdicts.items()
    }
    for name, parameter in fit.get("parameters", {}).items():
        assert metrics[name] == pytest.approx(parameter["value"], rel=1e-5)
    best = min((run for run in children.values()), key=lambda run: run.data.metrics["val_loss"])
    assert metrics["test_loss"] == best.data.metrics["test_loss"] and tags["size"] == best.data.tags["size"]
    assert metrics["actual_hours"] == pytest.approx(16 * 9 / 3600) and metrics["planned_hours"] > 0
    note = tags[NOTE_TAG]
    assert all(sentence in note for sentence in fit["sentences"]) and len(note) <= LARGEST_NOTE
    assert "/#/experiments/" in note
    client = client_of(swept)
    top = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "fit.json", "plan.json", "figures"} <= top
    page = client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))
    assert Path(page).read_bytes() == (tmp_path / "report" / "report.html").read_bytes()
    assert {len(client.get_metric_history(parent.info.run_id, name)) for name in metrics} == {1}
    view = client.get_experiment(parent.info.experiment_id).tags
    (prepared,) = [json.loads(value) for key, value in view.items() if key.startswith("mlflow.sharedViewState.")]
    assert "metrics.`test_loss`" in prepared["selectedColumns"]
    assert prepared["compareRunCharts"][0]["xaxis"]["key"] == "params"


def test_a_report_of_another_sweep_is_refused(tmp_path: Path) -> None:
    swept = finished_sweep(tmp_path)
    (swept.place / "spec.toml").write_text("# changed since\n" + (swept.place / "spec.toml").read_text())
    with pytest.raises(BadInput, match="another sweep"):
        read_report(swept.files.place.below("../report"), swept.files)
    assert main(["track", "replay", str(swept.place), "--report", str(tmp_path / "report")]) == 2
    assert not (tmp_path / "mlruns.db").exists(), "nothing is logged before the question is settled"


def test_the_check_names_each_difference(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    replay(swept.files, swept.spec, swept.manifest, swept.runs)
    assert main(["track", "check", str(swept.place)]) == 0
    client, children = client_of(swept), runs_there(swept)[1]
    client.log_metric(children["W4 200 s1"].info.run_id, "curve/val_loss", 9.0, timestamp=1, step=64)
    client.set_terminated(children["W4 200 s2"].info.run_id, "FAILED", end_time=1)
    client.delete_run(children["W4 5000 s1"].info.run_id)
    write_rows(swept.files, swept.runs[3], token_of(1, start_of(3)), start_of(3), range(5, 6))
    capsys.readouterr()
    assert main(["track", "check", str(swept.place)]) == 1
    lines = capsys.readouterr().out.splitlines()
    wanted = (
        "W4 200 s1: metric curve/val_loss: 1 point too many",
        "W4 200 s2: status FAILED on the server, FINISHED in the files",
        "W4 5000 s1: 0 runs on the server, 1 in the files",
        "W4 5000 s2: metric curve/train_loss: 1 point missing, the first at 160 cells seen",
    )
    for line in wanted:
        assert any(found.startswith(line) for found in lines), (line, lines)


def test_names_say_what_else_tells_runs_apart() -> None:
    text = """
    name = "names"
    [grid]
    sizes = ["TINY"]
    genes = [64, 128]
    cells = [200]
    seeds = [1]
    [lr]
    rule = "grid"
    rates = [1e-3, 1e-2]
    """
    assert sorted(names_of(runs_of(parse_spec(text)), 1_000).values()) == [
        "TINY 200 v128 s1 lr 0.001",
        "TINY 200 v128 s1 lr 0.01",
        "TINY 200 v64 s1 lr 0.001",
        "TINY 200 v64 s1 lr 0.01",
    ]
    chosen = text.replace('rule = "grid"', 'rule = "choose"').replace("[64, 128]", "[64]")
    assert sorted(names_of(runs_of(parse_spec(chosen)), 1_000).values()) == [
        "TINY 200 s1",
        "TINY rate 0.001",
        "TINY rate 0.01",
    ]


def test_a_locked_a_half_migrated_and_a_broken_database_are_said_in_one_line(
    swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlruns.db"
    uri = f"sqlite:///{path}"
    check_database(uri)
    with sqlite3.connect(path) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BadInput, match="is locked by another program"):
            check_database(uri, wait_seconds=0.1)
        holder.rollback()
    holder.close()
    half = sqlite3.connect(path)
    half.execute("CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)")
    half.commit()
    half.close()
    assert main(["track", "replay", str(swept.place)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "half-migrated" in said[0] and "track replay" in said[0]
    path.write_bytes(b"no database at all, but bytes that somebody put here instead" * 20)
    with pytest.raises(BadInput, match="is no whole database"):
        check_database(uri)
    path.unlink()
    assert main(["track", "replay", str(swept.place)]) == 0


def test_a_database_of_another_version_is_said_with_the_command_that_mends_it(
    swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = sqlite3.connect(tmp_path / "mlruns.db")
    older.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    older.commit()
    older.close()
    assert main(["track", "replay", str(swept.place)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "mlflow db upgrade" in said[-1]


def test_a_sweep_goes_on_without_its_server_and_names_the_command(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    follower = Follower(lambda: tracker_of(swept), lambda: swept.runs, said.append, seconds=0.1)
    follower.start()
    follower.finish(failed=False)
    assert len(said) == 1 and "tracking is behind" in said[0] and "scaling-ray track replay" in said[0]


def test_no_line_per_run_is_printed_and_the_end_says_where_to_look(
    swept: Swept, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    follower = Follower(lambda: tracker_of(swept), lambda: swept.runs, said.append, seconds=0.1)
    follower.start()
    follower.finish(failed=True)
    assert len(said) == 1 and "viewStateShareKey=" in said[0]
    assert "View run" not in capfd.readouterr().out


def test_a_password_in_a_tracking_uri_is_shown_to_nobody() -> None:
    assert shown_uri("https://user:secret@mlflow.example/base") == "https://mlflow.example/base"
    assert shown_uri("sqlite:////tmp/mlruns.db") == "sqlite:////tmp/mlruns.db"


def test_runs_that_ended_before_an_error_stay_on_the_server(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracker_of(swept)
    tracker.sync(swept.runs)
    finish_run(swept, 4)
    with monkeypatch.context() as broken:
        broken.setattr(mlflow_client, "log_batch", lambda *_, **__: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):
            tracker.sync(swept.runs)
    tracker.sync(swept.runs)
    tracker.close(failed=True)
    assert differences(swept.files, swept.spec, swept.manifest, swept.runs) == []
