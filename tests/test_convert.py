"""From a Census to shards: every count exact, published whole or not at all, the same again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from conftest import TINY_SWEEP

from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.shards.convert import build_shards
from scaling_ray.shards.format import SPLITS, read_manifest, verify
from scaling_ray.shards.read import read_split
from scaling_ray.shards.stream import read_resident
from scaling_ray.spec import parse_spec

pytestmark = pytest.mark.ray


def test_every_count_of_every_cell_is_that_of_the_census(tiny_shards: Path, planted_census: Path) -> None:
    manifest = read_manifest(tiny_shards)
    genes = pq.read_table(tiny_shards / "genes.parquet")["soma_joinid"].to_numpy()
    seen = []
    with Census.open(str(planted_census)) as census:
        everything: sp.csr_matrix = census.counts(0, census.n_cells)
        obs = census.obs(["soma_joinid", "donor_id", "dataset_id", "is_primary_data"]).set_index("soma_joinid")
        datasets, presence = census.presence()
    for split in SPLITS:
        cells = read_split(tiny_shards, manifest, split, manifest.genes)
        assert np.array_equal(cells.counts, everything[cells.cell][:, genes].toarray())
        assert np.array_equal(cells.raw_sum, np.asarray(everything[cells.cell].sum(1)).ravel())
        donors = [manifest.codes["donor_id"][code] for code in cells.donor]
        assert donors == obs.loc[cells.cell, "donor_id"].tolist()
        assert set(donors) == set(manifest.splits[split].groups)
        rows = [datasets.index(manifest.codes["dataset_id"][code]) for code in cells.dataset]
        assert np.array_equal(cells.measured[cells.dataset], presence[rows][:, genes].toarray().astype(bool))
        seen.append(cells.cell)
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together)
    primary = obs.index[obs["is_primary_data"]].to_numpy()
    rows = [everything[cell].toarray().tobytes() for cell in primary]
    first = {row: cell for cell, row in zip(primary[::-1], rows[::-1], strict=True)}
    kept = [cell for cell, row in zip(primary, rows, strict=True) if first[row] == cell or not everything[cell].nnz]
    assert np.array_equal(np.sort(together), kept)
    assert manifest.dropped == {
        "value_filter": int((~obs["is_primary_data"]).sum()),
        "drop_duplicates": len(primary) - len(kept),
    }


def test_ray_data_reads_the_same_cells_in_the_same_order(tiny_shards: Path) -> None:
    manifest = read_manifest(tiny_shards)
    for genes in (64, 10):
        plain, resident = (read(tiny_shards, manifest, "train", genes) for read in (read_split, read_resident))
        assert np.array_equal(plain.cell, resident.cell) and np.array_equal(plain.counts, resident.counts)
        assert np.array_equal(plain.measured, resident.measured)


def test_the_same_rules_give_the_same_data_and_others_are_refused(
    tiny_shards: Path, planted_census: Path, tmp_path: Path
) -> None:
    spec = parse_spec(TINY_SWEEP)
    before = {path.name: path.stat().st_mtime_ns for path in tiny_shards.iterdir()}
    first = build_shards(spec, str(planted_census), tiny_shards)
    assert before == {path.name: path.stat().st_mtime_ns for path in tiny_shards.iterdir()}
    again = build_shards(spec, str(planted_census), tmp_path / "again")
    assert again.data_hash == first.data_hash
    assert [e.sha256 for e in again.splits["train"].files] == [e.sha256 for e in first.splits["train"].files]
    with pytest.raises(BadInput, match=r"made by other rules \(genes\)"):
        build_shards(parse_spec(TINY_SWEEP.replace("genes = 64", "genes = 65", 1)), str(planted_census), tiny_shards)


def test_too_many_genes_leave_nothing_behind(planted_census: Path, tmp_path: Path) -> None:
    spec = parse_spec(TINY_SWEEP.replace("genes = 64", "genes = 201", 1))
    with pytest.raises(BadInput, match="data.genes: 201: is more than the 200 genes"):
        build_shards(spec, str(planted_census), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["/no/such/place", "not-a-version", "s3://"])
def test_what_is_no_census_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        build_shards(parse_spec(TINY_SWEEP), uri, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_left_alone(planted_census: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="manifest.json"):
        build_shards(parse_spec(TINY_SWEEP), str(planted_census), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_shards_cut_short_are_named(tiny_shards: Path, planted_census: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    assert verify(copy) == []
    file = copy / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    problems = verify(copy)
    assert len(problems) == 1 and problems[0].startswith("train-00000.parquet: has ")
    with pytest.raises(BadInput, match="train-00000.parquet"):
        build_shards(parse_spec(TINY_SWEEP), str(planted_census), copy)
