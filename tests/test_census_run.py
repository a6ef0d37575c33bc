"""``run --cells``: from somebody's file to a report, with the spec that was run beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_census_door import as_mtx, cells, with_donors, write

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.pipeline import with_data
from scaling_ray.spec import parse_spec
from scaling_ray.specs import example_path

SPEC = """
name = "own"

[data]
split_by = "donor_id"  # people
genes = 32

[grid]
sizes = ["XXS", "TINY"]
genes = [32]
cells = [60, "all"]
seeds = [1, 2]

[train]
cells_per_step = 8
max_cells_seen = 320
evaluations = 2
curve_cells = 32

[lr]
rates = [1e-2]
"""


def test_a_spec_takes_title_source_and_split_and_keeps_the_rest() -> None:
    values = {"title": 'Marrow "A" = 1', "source": "doi:10.1/ä", "split_by": "cell"}
    changed = parse_spec(with_data(SPEC, values, "spec"), "spec")
    plain = parse_spec(SPEC, "spec")
    assert {name: getattr(changed.data, name) for name in values} == values
    assert changed.model_copy(update={"data": plain.data}) == plain
    assert changed.data.genes == 32
    bare = parse_spec(
        with_data(
            SPEC.replace("[data]", "[resources]").replace('split_by = "donor_id"  # people\ngenes = 32', "cpus = 2"),
            {"title": "T", "source": None},
            "spec",
        ),
        "spec",
    )
    assert bare.data.title == "T" and bare.data.source is None
    for name in ("cells", "demo", "grid"):
        text = example_path(name).read_text()
        assert parse_spec(with_data(text, {"title": "T"}, name), name).data.title == "T"


@pytest.mark.parametrize(
    ("before", "after"),
    [("[data]", "[data]  # mine"), ("[data]", "[ data ]"), ("genes = 32", 'title = "Mine"\ngenes = 32')],
)
def test_a_table_of_data_may_be_written_in_other_ways(before: str, after: str) -> None:
    found = parse_spec(with_data(SPEC.replace(before, after, 1), {"title": "T", "split_by": "cell"}, "spec"), "spec")
    assert found.data.title == "T" and found.data.split_by == "cell" and found.data.genes == 32


def test_donors_whom_nobody_knows_may_train() -> None:
    from scaling_ray.census.donors import serves_a_split

    assert serves_a_split(["A", "B", "unknown"]) and serves_a_split(["A", "B", "C"])
    assert not serves_a_split(["A", "B"]) and not serves_a_split(["A", "unknown", "pooled"])
    assert not serves_a_split([])


def test_a_folder_that_is_called_like_a_spec_is_no_folder_of_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert main(["run", "demo", "--out", "x", "--census", "nowhere", "--shards", "nowhere"]) == 2
    assert "put --cells before it" not in capsys.readouterr().err
    as_mtx(cells(), tmp_path)
    assert main(["run", "filtered_feature_bc_matrix", "--out", "x"]) == 2
    assert "put --cells before it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cells_that_no_donor_split_can_serve_name_both_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text(SPEC)
    file = write(with_donors(["a", "b"], "SampleID"), tmp_path / "cells.h5ad")
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "own.toml"), "--cells", str(file), "--out", str(out)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--donor COLUMN" in last and "--split cell" in last
    assert not (out / "shards").exists() and not (out / "sweep").exists()
    with pytest.raises(BadInput, match="is no local directory"):
        from scaling_ray.census.beliefs import Rules
        from scaling_ray.pipeline import run_cells

        run_cells([file], tmp_path / "own.toml", "s3://bucket/out", rules=Rules())


@pytest.mark.ray
@pytest.mark.slow
def test_a_matrix_folder_becomes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.toml").write_text(SPEC)
    folder, out = as_mtx(cells(n=200), tmp_path), tmp_path / "out"
    flags = ["--split", "cell", "--title", "Somebody's marrow", "--source", "doi:10.1/x", "--out", str(out)]
    assert main(["run", str(tmp_path / "own.toml"), "--cells", str(folder), *flags]) == 0
    told = capsys.readouterr()
    assert told.out.strip().splitlines()[-1] == str(out / "report" / "report.html")
    assert "200 cells: 160 to train on, 20 to choose by, 20 to test on, split by cell" in told.err
    assert "8 runs: 2 sizes" in told.err and "minutes on 2 CPUs" in told.err
    assert "raw counts from X" in told.err
    assert "Somebody's marrow" in (out / "report" / "report.html").read_text().replace("&#39;", "'")
    assert json.loads((out / "shards" / "manifest.json").read_text())["split_by"] == "cell"
    assert main(["run", str(tmp_path / "own.toml"), "--cells", str(folder), *flags]) == 0
    assert "0 to go" in (again := capsys.readouterr().err) or "already there" in again
