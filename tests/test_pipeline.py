"""The whole path as one call: cells in, a report out; what is whole is skipped, what is odd is refused before work."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from conftest import TINY_SWEEP, S3Server

from scaling_ray.cli import main
from scaling_ray.errors import BadInput, RunsFailed
from scaling_ray.pipeline import run_pipeline

# A rate of 1e30 diverges at the first update: that run has no result, the others do.
ONE_DIVERGES = TINY_SWEEP.replace('rule = "choose"\nrates = [3e-3, 1e-2]', 'rule = "grid"\nrates = [1e-2, 1e30]')
ONE_DIVERGES = ONE_DIVERGES.replace('sizes = ["XXS", "W4"]', 'sizes = ["W4"]').replace('[100, "all"]', "[100]")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(ONE_DIVERGES)
    return path


def stamps(out: Path) -> dict[Path, int]:
    """When each file of the shards and each result was written."""
    files = [*out.glob("shards/*"), *out.glob("sweep/runs/*/result.json")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.ray
def test_from_a_census_to_a_report_and_nothing_twice(
    spec: Path, planted_census: Path, ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    page = out / "report" / "report.html"
    arguments = ["run", str(spec), "--census", str(planted_census), "--out", str(out)]
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("scaling-ray: 1 of 2 runs have no result; first law-W4")
    assert lines[-2].endswith(str(page)), "runs that finished are worth their report"
    assert page.is_file()
    assert {path.name for path in out.iterdir()} == {"shards", "sweep", "report", "mlruns.db", "mlartifacts"}
    with (out / "sweep" / "results.csv").open() as stream:
        ended = {(row["lr"], row["status"], row["failure"]) for row in csv.DictReader(stream)}
    assert ended == {("0.01", "done", ""), ("1e+30", "failed", "diverged")}
    before = stamps(out)
    assert len(before) > 4
    with pytest.raises(RunsFailed):
        run_pipeline(spec, out, shards=out / "shards")
    assert main(arguments) == 1
    assert stamps(out) == before


def test_shards_and_a_census_together_are_refused(spec: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--census: 'stable': is not read where --shards are given"):
        run_pipeline(spec, tmp_path / "out", census="stable", shards="shards")
    assert not (tmp_path / "out").exists()


def test_cells_are_planted_where_every_node_reads_them_or_not_at_all(
    spec: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(BadInput, match="--census: None: with --out s3://shards/whole on a cluster"):
        run_pipeline(spec, "s3://shards/whole")
    assert s3.objects("shards", "whole") == {}
