"""MLflow holds what the files hold, once, whoever asks and how often."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_SWEEP

from scaling_ray.records import RunFailure, RunResult, ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.storage import open_place
from scaling_ray.tracking.ledger import is_tracked, tracking_uri
from scaling_ray.tracking.mlflow import PARENT_TAG, Tracker
from scaling_ray.train.attempt import MetricsLog

mlflow_client = pytest.importorskip("mlflow.tracking").MlflowClient


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[RunSpec]]:
    """Files of a sweep as its runs leave them: two finished, one failed, one not begun."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = [run.model_copy(update={"lr": run.lr or 0.01}) for run in runs_of(parse_spec(TINY_SWEEP))][:4]
    directory = tmp_path / "sweep"
    for index, run in enumerate(runs[:3]):
        place = directory / "runs" / run.run_id
        place.mkdir(parents=True)
        log = MetricsLog(open_place(place))
        for step in range(1, 4):
            log.write({"kind": "train", "optimizer_steps": step, "cells_seen": 32 * step, "train_loss": 3.0 / step})
            log.write(
                {
                    "kind": "eval",
                    "optimizer_steps": step,
                    "cells_seen": 32 * step,
                    "val_loss": 2.0 / step,
                    "val_loss_smoothed": 2.5 / step,
                }
            )
        log.write({"kind": "note", "optimizer_steps": 2, "note": "of a checkpoint; no metric"})
        if index < 2:
            (place / "result.json").write_text(result_of(run).to_json())
        else:
            failure = RunFailure(run_id=run.run_id, failure="bug", message="m", attempts=1)
            (place / "failure.json").write_text(failure.to_json())
    return directory, runs


def result_of(run: RunSpec) -> RunResult:
    return RunResult(
        run_id=run.run_id,
        attempt="a",
        attempts=1,
        data_hash="d" * 64,
        lr=0.01,
        cells_resolved=100,
        cells_seen=96,
        masked_genes_seen=960,
        optimizer_steps=3,
        flops=1e9,
        loss_unit="mse",
        val_loss=0.5,
        final_val_loss=0.6,
        best_curve_loss=0.5,
        best_cells_seen=96,
        test_loss=0.55,
        test_loss_sum=55.0,
        test_masked_genes=100,
        stop_reason="budget",
        wall_seconds=1.0,
        train_seconds=0.5,
        workers=1,
        engine="plain",
        micro_batch=32,
        precision="fp32",
        stacked=1,
        host="h",
        ended_ms=1_700_000_000_000,
    )


def manifest() -> ShardManifest:
    return ShardManifest(
        name="tiny",
        data_hash="d" * 64,
        genes=64,
        block_genes=256,
        row_group_cells=16_384,
        split_by="donor_id",
        data={},
        census={"uri": "planted"},
        planted=True,
        dropped={},
        splits={},
        tables=[],
        codes={},
        made_with={},
    )


def test_a_parent_and_a_child_per_run_with_curves_params_data_and_final_metrics(
    sweep: tuple[Path, list[RunSpec]],
) -> None:
    directory, runs = sweep
    tracker = Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest())
    tracker.sync(runs)
    tracker.close(failed=False)
    assert tracking_uri(SweepFiles.at(directory)) == f"sqlite:///{directory.parent / 'mlruns.db'}"
    client = mlflow_client(tracking_uri(SweepFiles.at(directory)))
    experiment = client.get_experiment_by_name("scaling_ray/tiny")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if PARENT_TAG not in run.data.tags]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    children = {run.info.run_name: run for run in found if run.data.tags.get(PARENT_TAG) == parents[0].info.run_id}
    assert set(children) == {run.run_id for run in runs[:3]}
    done = children[runs[0].run_id]
    assert done.info.status == "FINISHED" and children[runs[2].run_id].info.status == "FAILED"
    assert done.data.metrics["test_loss"] == 0.55 and done.data.tags["data_hash"] == "d" * 64
    assert done.data.params["width"] == str(runs[0].width) and done.data.params["recipe"] == "corrected"
    assert done.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    curve = client.get_metric_history(done.info.run_id, "val_loss_curve")
    assert [(m.step, m.value) for m in curve] == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    recorded = json.loads((directory / "runs" / runs[0].run_id / "mlflow.json").read_text())
    assert recorded["mlflow_run_id"] == done.info.run_id


def test_a_replay_adds_nothing_and_new_rows_are_added_once(sweep: tuple[Path, list[RunSpec]]) -> None:
    directory, runs = sweep
    for _ in range(3):
        Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest()).sync(runs)
    client = mlflow_client(tracking_uri(SweepFiles.at(directory)))
    experiment = client.get_experiment_by_name("scaling_ray/tiny")
    assert len(client.search_runs([experiment.experiment_id])) == 4
    place = directory / "runs" / runs[2].run_id
    MetricsLog(open_place(place)).write(
        {"kind": "eval", "optimizer_steps": 4, "cells_seen": 128, "val_loss": 0.4, "val_loss_smoothed": 0.4}
    )
    Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest()).sync(runs)
    run_id = json.loads((place / "mlflow.json").read_text())["mlflow_run_id"]
    assert [metric.step for metric in client.get_metric_history(run_id, "val_loss_curve")] == [1, 2, 3, 4]
    assert len(client.get_metric_history(run_id, "train_loss")) == 3
    assert is_tracked(SweepFiles.at(directory), [run.run_id for run in runs[:2]])
    assert not is_tracked(SweepFiles.at(directory), [run.run_id for run in runs])


def test_rows_that_a_failing_server_did_not_take_are_logged_by_the_next_sync(
    sweep: tuple[Path, list[RunSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, runs = sweep
    tracker = Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest())
    whole, left = mlflow_client.log_batch, [3]

    def sometimes(self: object, *arguments: object, **named: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("connection lost")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(mlflow_client, "log_batch", sometimes)
    with pytest.raises(OSError, match="connection lost"):
        tracker.sync(runs)
    tracker.sync(runs)
    client = mlflow_client(tracking_uri(SweepFiles.at(directory)))
    for run in runs[:3]:
        run_id = json.loads((directory / "runs" / run.run_id / "mlflow.json").read_text())["mlflow_run_id"]
        assert [metric.step for metric in client.get_metric_history(run_id, "val_loss_curve")] == [1, 2, 3]
        assert client.get_run(run_id).data.params["width"] == str(run.width)


def test_another_server_gets_runs_of_its_own(
    sweep: tuple[Path, list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, runs = sweep
    Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest()).sync(runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert not is_tracked(SweepFiles.at(directory), [run.run_id for run in runs[:2]])
    Tracker(SweepFiles.at(directory), parse_spec(TINY_SWEEP), manifest()).sync(runs)
    client = mlflow_client(tracking_uri(SweepFiles.at(directory)))
    experiment = client.get_experiment_by_name("scaling_ray/tiny")
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_two_sweeps_of_one_spec_in_folders_of_one_name_are_two_parents(
    sweep: tuple[Path, list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, runs = sweep
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    parents = set()
    for name in ("a", "it's b"):
        place = tmp_path / name / "sweep"
        shutil.copytree(directory, place)
        for _ in range(2):
            Tracker(SweepFiles.at(place), parse_spec(TINY_SWEEP), manifest()).sync(runs)
        parents.add(json.loads((place / "mlflow.json").read_text())["mlflow_run_id"])
    client = mlflow_client(tracking_uri(SweepFiles.at(directory)))
    experiment = client.get_experiment_by_name("scaling_ray/tiny")
    assert len(parents) == 2 and len(client.search_runs([experiment.experiment_id])) == 2 * 4
