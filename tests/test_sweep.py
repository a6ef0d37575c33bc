"""A sweep on a real Ray: the whole grid, skipped when done, one bad cell alone, gone on with after a kill -9."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import TINY_SWEEP

from scaling_ray.errors import BadInput, LeaseHeld, RunsFailed
from scaling_ray.model.exported import load_model
from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import read_manifest
from scaling_ray.storage import open_place
from scaling_ray.sweep.export import export_model
from scaling_ray.sweep.run import run_sweep

pytestmark = pytest.mark.ray

CONTRACT = (
    "run_id size params genes cells seed lr objective status cells_seen masked_genes_seen optimizer_steps flops"
    " val_loss test_loss baseline_loss gaussian_loss loss_unit wall_seconds attempts mlflow_run_id"
).split()


@pytest.fixture(scope="module")
def swept(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("swept")
    (place / "spec.toml").write_text(TINY_SWEEP)
    run_sweep(place / "spec.toml", tiny_shards, place / "sweep")
    return place / "sweep"


def test_every_cell_of_the_grid_has_a_row_with_its_references(swept: Path) -> None:
    rows = pq.read_table(swept / "results.parquet").to_pylist()
    assert len(rows) == 2 * 2 + 2 * 2 and {row["status"] for row in rows} == {"done"}
    with open(swept / "results.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert set(CONTRACT) <= set(table[0]) and [row["run_id"] for row in table] == [row["run_id"] for row in rows]
    for row in rows:
        assert row["cells_seen"] == 640 and row["optimizer_steps"] == 20
        assert row["attainable_loss"] >= row["bound_loss"] * 0.98 and row["baseline_loss"] > row["attainable_loss"]
        if row["role"] == "law":
            assert row["bound_z"] > -4 and row["test_loss"] > row["bound_loss"]
        else:
            assert row["test_loss"] is None, "a run that chooses a rate must not see a test cell"
    assert {row["cells"] for row in rows if row["cells_requested"] == "100"} == {100}
    plan = json.loads((swept / "plan.json").read_text())
    assert [setting["run_id"] for setting in plan["settings"]] == [row["run_id"] for row in rows]


def test_the_rate_is_the_one_of_lowest_validation_error(swept: Path) -> None:
    rows = pq.read_table(swept / "results.parquet").to_pylist()
    for size in ("XXS", "W4"):
        rates = {row["lr"]: row["val_loss"] for row in rows if row["role"] == "rate" and row["size"] == size}
        assert len(rates) == 2
        chosen = {row["lr"] for row in rows if row["role"] == "law" and row["size"] == size}
        assert chosen == {min(rates, key=lambda rate: rates[rate])}
        assert all(row["lr_at_edge"] for row in rows if row["role"] == "law"), "of two rates each is an edge"


def test_each_run_leaves_its_files_and_no_attempts(swept: Path) -> None:
    for directory in (swept / "runs").iterdir():
        there = {path.name for path in directory.iterdir()}
        assert {"spec.json", "metrics.jsonl", "result.json", "checkpoints", "mlflow.json"} <= there
        assert "attempts" not in there and not (directory / "checkpoints" / "last").exists()
        assert (directory / "checkpoints" / "best" / "state.safetensors").is_file()
    assert not list(swept.glob(".partial-*"))


def test_a_run_is_exported_with_the_genes_of_its_shards(swept: Path, tiny_shards: Path, tmp_path: Path) -> None:
    row = next(row for row in pq.read_table(swept / "results.parquet").to_pylist() if row["role"] == "law")
    network, record = load_model(export_model(swept, row["run_id"], tmp_path / "model"))
    assert record.feature_ids == pq.read_table(tiny_shards / "genes.parquet")["feature_id"].to_pylist()[:64]
    assert (record.val_loss, record.test_loss, record.params) == (row["val_loss"], row["test_loss"], row["params"])
    assert sum(parameter.numel() for parameter in network.parameters()) == row["params"]


def test_the_report_of_a_sweep_shows_what_its_runs_left(swept: Path, tmp_path: Path) -> None:
    from scaling_ray.report.build import build_report

    page = Path(build_report(swept, tmp_path / "report")).read_text()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    fit = json.loads((tmp_path / "report" / "fit.json").read_text())
    rows = {row["run_id"]: row for row in pq.read_table(swept / "results.parquet").to_pylist()}
    law = {run_id: row for run_id, row in rows.items() if row["role"] == "law"}
    told = {run["run_id"]: run for run in report["runs"] if run["run_id"] in law}
    assert told.keys() == law.keys()
    for run_id, row in law.items():
        for name in ("test_loss", "baseline_loss", "gaussian_loss", "bound_z", "mlflow_run_id"):
            assert told[run_id][name] == row[name]
    assert fit["headline"]["verdict"] == "refused", "one size is no law"
    assert f"{max(row['test_loss'] for row in law.values()):.4f}" in page
    lowest = min(row["bound_z"] for row in law.values())
    assert report["leak_test"]["lowest_z"] == lowest


def test_the_report_says_in_which_donors_and_genes_the_loss_sits(
    swept: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    from scaling_ray.report.build import build_report

    page = Path(build_report(swept, tmp_path / "report")).read_text()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found, run = report["whereabouts"], swept / "runs" / report["best"]["run_id"]
    cells, genes = pq.read_table(run / "test_cells.parquet"), pq.read_table(run / "test_genes.parquet")
    manifest = read_manifest(tiny_shards)
    shard = pq.read_table(tiny_shards / manifest.splits["test"].files[0].path, columns=["cell", "donor_id"])
    donor_of = dict(zip(shard["cell"].to_pylist(), shard["donor_id"].to_pylist(), strict=True))
    sums: dict[str, list[float]] = {}
    for cell, loss, masked in zip(*(cells[name].to_pylist() for name in ("cell", "loss", "masked_genes")), strict=True):
        total = sums.setdefault(manifest.codes["donor_id"][donor_of[cell]], [0.0, 0.0, 0.0])
        total[0], total[1], total[2] = total[0] + loss, total[1] + masked, total[2] + 1
    assert len(sums) > 1, "the case under test"
    donors = next(table["rows"] for table in found["tables"] if table["by"] == "donor")
    assert {row["name"] for row in donors} == set(sums)
    for row in donors:
        loss, masked, count = sums[row["name"]]
        assert row["loss"] == pytest.approx(loss / masked) and row["cells"] == count
    assert sum(row["share"] for row in donors) == pytest.approx(1.0)
    # The whole, put together from cells and from genes, is the run's own test loss.
    whole = sum(cells["loss"].to_pylist()) / sum(cells["masked_genes"].to_pylist())
    assert whole == pytest.approx(report["best"]["test_loss"])
    worst = max(zip(genes["loss"].to_pylist(), genes["gene"].to_pylist(), strict=True))
    names = pq.read_table(tiny_shards / "genes.parquet")["feature_name"].to_pylist()
    assert found["genes"][0]["gene"] == names[worst[1]] and names[worst[1]] in page
    assert "Where the loss sits" in page


def test_a_second_call_finds_everything_done(swept: Path, tiny_shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("result.json")}
    lines: list[str] = []
    rows = run_sweep(swept / "spec.toml", tiny_shards, swept, lines.append)
    assert lines == [] and len(rows) == 8
    assert before == {path: path.stat().st_mtime_ns for path in swept.rglob("result.json")}


def test_another_driver_is_kept_out(swept: Path, tiny_shards: Path) -> None:
    with open_place(swept).lease(".lease"), pytest.raises(LeaseHeld, match="another driver"):
        run_sweep(swept / "spec.toml", tiny_shards, swept)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("cells = [100", "cells = [100000"), r"grid.cells: 100000: is more than the \d+ training cells"),
        (("genes = 64\n[grid]", "genes = 63\n[grid]"), r"grid.genes: 64: is more than data.genes = 63"),
        (("genes = 64\n[grid]", "genes = 65\n[grid]"), r"data.genes: 65: the shards were made with 64"),
    ],
)
def test_what_the_shards_cannot_serve_is_refused(
    change: tuple[str, str], line: str, tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(TINY_SWEEP.replace(*change, 1))
    with pytest.raises(BadInput, match=line):
        run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_results_of_other_shards_are_refused(swept: Path, tiny_shards: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "shards"
    shutil.copytree(tiny_shards, other)
    manifest = ShardManifest.read(other / "manifest.json")
    (other / "manifest.json").write_text(manifest.model_copy(update={"data_hash": "0" * 64}).to_json())
    with pytest.raises(BadInput, match="differ from those of this sweep"):
        run_sweep(swept / "spec.toml", other, swept)


def test_one_failing_cell_does_not_stop_the_others(tiny_shards: Path, tmp_path: Path) -> None:
    spec = TINY_SWEEP.replace("[3e-3, 1e-2]", "[1e-2]").replace('"choose"', '"fixed"')
    spec += "[lr.per_size]\nW4 = [1e30]\n"
    (tmp_path / "spec.toml").write_text(spec)
    with pytest.raises(RunsFailed, match="2 of 4 runs have no result; first law-W4.*diverged"):
        run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "sweep")
    rows = pq.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()
    assert {(row["size"], row["status"], row["failure"]) for row in rows} == {
        ("XXS", "done", None),
        ("W4", "failed", "diverged"),
    }


def executions(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [setting["execution"] for setting in plan["settings"]]


STACKED = TINY_SWEEP.replace("seeds = [1]", "seeds = [1, 2, 3]").replace('"choose"', '"fixed"')
STACKED = STACKED.replace("rates = [3e-3, 1e-2]", "rates = [3e-3]").replace("= 640", "= 6400\ncheckpoint_seconds = 0.2")


def test_tiny_runs_train_as_one_and_a_later_call_keeps_to_the_plan(tiny_shards: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(STACKED.replace("= 6400", "= 640"))
    lines: list[str] = []
    rows = run_sweep(spec, tiny_shards, tmp_path / "sweep", lines.append)
    numbers = [int(line[1:4]) for line in lines if line.startswith("[")]
    assert numbers == list(range(1, 13)), "each run that ends counts once, also where four end together"
    plan = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    # six runs of each size and two processes
    assert [len(stack) for stack in plan["stacks"]] == [3, 3, 3, 3]
    assert sorted(name for stack in plan["stacks"] for name in stack) == sorted(row.run_id for row in rows)
    assert {row.status for row in rows} == {"done"}
    assert len({row.test_loss for row in rows if row.size == "W4"}) == 6
    for row in rows:
        result = json.loads((tmp_path / "sweep" / "runs" / row.run_id / "result.json").read_text())
        assert result["stacked"] == 3 and result["micro_batch"] == plan["settings"][0]["execution"]["micro_batch"]
        assert row.mlflow_run_id and row.cells_seen == 640
    spec.write_text(spec.read_text() + "[resources]\nstack = 1\ndevice = 'cuda'\n")
    run_sweep(spec, tiny_shards, tmp_path / "sweep")
    again = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    assert again["stacks"] == plan["stacks"]
    assert executions(again) == executions(plan)


def start_sweep(spec: Path, shards: Path, out: Path, own_group: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scaling_ray.cli", "sweep", str(spec), "--shards", str(shards), "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_worker_niceness": "0"}
    group = 0 if own_group else None
    # what ran in the background of a script hands on that it ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=group
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_of_stacks_stopped_on_the_way_ends_with_the_same_bits(
    tiny_shards: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    spec, out = tmp_path / "spec.toml", tmp_path / "sweep"
    # long enough that the workers of a killed driver, which go on for two seconds, do not come to their end
    spec.write_text(STACKED.replace("= 6400", "= 32000"))
    driver = start_sweep(spec, tiny_shards, out)
    deadline = time.monotonic() + 120
    while not list(out.glob("stacks/*/attempts/*/last-*/progress.json")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(sent)
    _, said = driver.communicate(timeout=60)
    if sent == signal.SIGTERM:
        assert driver.returncode == 75 and "the same command goes on" in said.splitlines()[-1]
    assert len(list(out.glob("runs/*/result.json"))) < 12
    rows = run_sweep(spec, tiny_shards, out)
    whole = run_sweep(spec, tiny_shards, tmp_path / "undisturbed")
    assert {row.status for row in rows} == {"done"} and any((row.attempts or 0) > 1 for row in rows)
    for one, other in zip(rows, whole, strict=True):
        for field in ("run_id", "val_loss", "test_loss", "final_val_loss", "cells_seen", "masked_genes_seen"):
            assert getattr(one, field) == getattr(other, field)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "to_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_stop_saves_every_run(
    tiny_shards: Path, tmp_path: Path, sent: signal.Signals, to_group: bool
) -> None:
    spec, out = tmp_path / "spec.toml", tmp_path / "sweep"
    text = TINY_SWEEP.replace("max_cells_seen = 640", "max_cells_seen = 64000\ncheckpoint_seconds = 3600")
    spec.write_text(text.replace('"choose"', '"fixed"').replace("rates = [3e-3, 1e-2]", "rates = [3e-3]"))
    driver = start_sweep(spec, tiny_shards, out, own_group=True)
    deadline = time.monotonic() + 120
    while len([p for p in out.glob("runs/*/attempts/*/metrics.jsonl") if p.stat().st_size]) < 2:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    if to_group:  # as a terminal, timeout and batch schedulers do
        os.killpg(driver.pid, sent)
    else:
        driver.send_signal(sent)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == (130 if sent == signal.SIGINT else 75)
    assert "runs to go, all saved" in said.splitlines()[-1]
    saved = list(out.glob("runs/*/attempts/*/checkpoints/last-*/progress.json"))
    assert len(saved) == 2, "checkpoints were an hour away: only the wish to stop makes them"
    assert not list(out.glob("runs/*/failure.json"))


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    spec = TINY_SWEEP.replace("max_cells_seen = 640", "max_cells_seen = 6400\ncheckpoint_seconds = 0.05")
    (tmp_path / "spec.toml").write_text(spec)
    command = [sys.executable, "-m", "scaling_ray.cli", "sweep", str(tmp_path / "spec.toml")]
    command += ["--shards", str(tiny_shards), "--out", str(tmp_path / "sweep")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "sweep").glob("runs/*/result.json")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    committed = {path: path.read_bytes() for path in (tmp_path / "sweep").glob("runs/*/result.json")}
    run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "sweep")
    rows = pq.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    assert all(path.read_bytes() == content for path, content in committed.items())

    run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "undisturbed")
    again = pq.read_table(tmp_path / "undisturbed" / "results.parquet").to_pylist()
    exact = ("run_id", "val_loss", "test_loss", "final_val_loss", "cells_seen", "flops", "best_cells_seen")
    assert [[row[k] for k in exact] for row in rows] == [[row[k] for k in exact] for row in again]


def test_without_a_trunk_a_curve_says_whether_a_run_may_be_undertrained() -> None:
    from scaling_ray.results.write import may_be_undertrained

    assert may_be_undertrained([3.0, 2.5, 2.0, 1.8], gene_mean_loss=2.6)
    assert not may_be_undertrained([3.0, 1.01, 1.0, 1.0], gene_mean_loss=2.6)
    assert not may_be_undertrained([3.0, 2.0, 1.95, 1.9], gene_mean_loss=4.0)
    assert may_be_undertrained([3.0, 2.9, 2.8, 2.7], gene_mean_loss=2.6), "worse than the gene mean and falling"
    assert may_be_undertrained([2.0], gene_mean_loss=2.6), "one evaluation says nothing"
