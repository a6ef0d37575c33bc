"""One study in two files: no person and no cell on two sides of a split, whatever each file calls them and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from test_census_door import Imported, cells, dense, write

from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.shards.convert import build_shards
from scaling_ray.shards.format import SPLITS
from scaling_ray.shards.prepare import choose
from scaling_ray.shards.read import read_split
from scaling_ray.shards.select import select_cells
from scaling_ray.spec import DataSpec, parse_spec

EVERYTHING: dict[str, Any] = {"value_filter": None}


def chosen(census: Path, **rules: Any) -> pd.DataFrame:
    """The chosen cells with their splits and all that obs says of them."""
    with Census.open(census) as opened:
        selection, *_ = choose(opened, DataSpec(**rules))
        obs = opened.obs().set_index("soma_joinid").loc[selection.joinid].reset_index()
    obs["split"] = [SPLITS[at] for at in selection.split]
    return obs


def sides(table: pd.DataFrame, column: str) -> int:
    """The most splits that one value of a column is on."""
    return int(table.groupby(column)["split"].nunique().max())


def again(adata: anndata.AnnData, genes: slice = slice(None), **renamed: str) -> anndata.AnnData:
    """The same cells as another atlas has them: in another order, with fewer genes, under other names of donors."""
    order = np.random.default_rng(4).permutation(len(adata))
    copy = adata[order][:, genes].copy()
    if renamed:
        copy.obs["donor_id"] = [renamed[donor] for donor in copy.obs["donor_id"]]
    return copy


def test_the_same_cells_with_fewer_genes_are_twins_and_one_copy_counts(tmp_path: Path) -> None:
    adata = cells(n=300)
    files = [write(adata, tmp_path / "good.h5ad"), write(again(adata, slice(60)), tmp_path / "fewer.h5ad")]
    found = Imported(files, tmp_path / "census")
    assert "300 cells are in both good.h5ad and fewer.h5ad (counts of 60 shared genes agree)" in found.said
    obs = found.obs
    assert obs["is_primary_data"].tolist() == [True] * 300 + [False] * 300, "the copy with most counts is kept"
    barcode = obs["observation_joinid"].to_numpy()
    assert found.twin_of is not None
    np.testing.assert_array_equal(barcode[found.twin_of], barcode)
    assert len(chosen(tmp_path / "census")) == 300
    for split_by in ("donor_id", "cell"):
        table = chosen(tmp_path / "census", split_by=split_by, **EVERYTHING)
        assert len(table) == 600 and set(table["split"]) == set(SPLITS)
        assert sides(table, "observation_joinid") == 1
    assert sides(chosen(tmp_path / "census", **EVERYTHING), "donor_id") == 1


def test_one_study_under_two_names_of_donors_ids_and_gene_sets_parts_nobody(tmp_path: Path) -> None:
    """The donors of the second file are the first's under other names; two more of its cells have none."""
    adata = cells(n=300, donors=6)
    other = again(adata, slice(10, 70), **{f"D{i}": f"patient {i + 20}" for i in range(6)})
    truth = dict(zip(adata.obs_names, adata.obs["donor_id"], strict=True))
    other.obs["donor_id"] = [*other.obs["donor_id"][:-2], "unknown", "unknown"]
    other.obs = other.obs.rename(columns={"donor_id": "SampleID"})
    other.var = pd.DataFrame({"ids": [f"{gene}.7" for gene in other.var_names]}, index=other.var["feature_name"])
    other.var = other.var.rename(columns={"ids": "gene_ids"})
    fresh = cells(seed=9, n=60, donors=3)
    fresh.obs["donor_id"] = [f"X{i % 3}" for i in range(60)]
    files = [write(a, tmp_path / f"{n}.h5ad") for n, a in (("first", adata), ("second", other), ("third", fresh))]
    found = Imported(files, tmp_path / "census", donor=("SampleID",))
    assert found.donors == sorted([f"D{i}" for i in range(6)] + ["X0", "X1", "X2"])
    assert "'patient 20' and 'D0' have cells in common: one person, 'D0'" in found.said
    assert "2 cells without a donor took the donor of their twin" in found.said
    barcode = found.obs["observation_joinid"]
    same_study = barcode.isin(list(truth))
    assert (found.obs["donor_id"][same_study] == barcode[same_study].map(truth)).all()
    for rules in ({}, EVERYTHING, EVERYTHING | {"split_by": "cell"}):
        table = chosen(tmp_path / "census", **rules)
        assert set(table["split"]) == set(SPLITS)
        assert sides(table, "observation_joinid") == 1
        if "split_by" not in rules:
            table["person"] = [truth[name] if name in truth else name for name in table["observation_joinid"]]
            assert sides(table, "donor_id") == sides(table, "person") == 1
    with pytest.raises(BadInput, match="gives 3 groups|gives 2 groups|empty|split by another column"):
        chosen(tmp_path / "census", split_by="dataset_id", **EVERYTHING)


def test_cells_counted_again_with_some_genes_off_are_found_by_bands(tmp_path: Path) -> None:
    adata = cells(n=200, genes=600)
    other = again(adata)
    counts = dense(other)
    moved = np.random.default_rng(5).random(counts.shape) < 0.02
    other.X = sp.csr_matrix(counts + moved)
    files = [write(adata, tmp_path / "a.h5ad"), write(other, tmp_path / "b.h5ad")]
    found = Imported(files, tmp_path / "census")
    assert found.twin_of is not None
    copies = found.twin_of != np.arange(400)
    assert copies.sum() > 150
    barcode = found.obs["observation_joinid"].to_numpy()
    np.testing.assert_array_equal(barcode[found.twin_of], barcode)
    assert "of them differ in some genes" in found.said


def test_different_cells_are_no_twins(tmp_path: Path) -> None:
    files = [write(cells(seed, n=300), tmp_path / f"{seed}.h5ad") for seed in (1, 2, 3)]
    found = Imported(files, tmp_path / "census")
    assert found.twin_of is None and "twins" not in found.said and found.obs["is_primary_data"].all()


def test_the_same_barcodes_with_other_counts_are_warned_of(tmp_path: Path) -> None:
    """Spliced counts of cells whose whole counts are there too: no twins by counts, and a warning with numbers."""
    adata = cells(n=200)
    random = np.random.default_rng(6)
    letters = np.array(list("ACGT"))
    barcodes = ["".join(letters[random.integers(0, 4, 16)]) for _ in range(200)]
    other = adata.copy()
    other.X = sp.csr_matrix(random.binomial(dense(adata).astype(int), 0.5).astype(np.float32))
    adata.obs_names = [f"{code}-1" for code in barcodes]
    other.obs_names = [f"run2_{code}" for code in barcodes]
    found = Imported([write(adata, tmp_path / "a.h5ad"), write(other, tmp_path / "b.h5ad")], tmp_path / "census")
    assert "a.h5ad and b.h5ad share 200 barcodes and 0 cells by their counts" in found.said


# The split itself, of any Census.


def selection_of(donors: list[str], **rules: Any) -> dict[str, set[str]]:
    """Donor -> the splits that its cells are on, ten cells each."""
    labels = sorted(set(donors))
    codes = np.repeat([labels.index(donor) for donor in donors], 10).astype(np.int32)
    one = (np.zeros(len(codes), np.int32), ["x"])
    names = ("dataset_id", "cell_type", "disease", "tissue", "assay", "tissue_general", "sex")
    columns = dict.fromkeys(names, one) | {"donor_id": (codes, labels)}
    data = DataSpec(**rules)
    found = select_cells(np.arange(len(codes)), columns, data, len(codes))
    sides: dict[str, set[str]] = {}
    for code, split in zip(found.codes["donor_id"], found.split, strict=True):
        sides.setdefault(found.labels["donor_id"][code], set()).add(SPLITS[split])
    return sides


@pytest.mark.parametrize("salt", ["a", "b", "c", "d", "e", "f"])
def test_spellings_of_a_donor_in_a_census_stay_together_and_nobody_trains(salt: str) -> None:
    found = selection_of(["1", "1.0", "P2", "p2 ", "P-3", "P3", "4", "5", "unknown", "pooled"], salt=salt)
    assert all(len(splits) == 1 for splits in found.values())
    for pair in (("1", "1.0"), ("P2", "p2 "), ("P-3", "P3")):
        assert found[pair[0]] == found[pair[1]]
    assert found["unknown"] == found["pooled"] == {"train"}
    assert set().union(*found.values()) == set(SPLITS)


def test_cells_without_donors_cannot_be_split_by_donor() -> None:
    with pytest.raises(BadInput, match=r"20 cells have no donor \(pooled, unknown\).*split_by = 'cell'"):
        selection_of(["unknown", "pooled", "D1"])


def test_a_value_of_keep_that_no_cell_has_is_an_error_beside_one_that_matches() -> None:
    assert set(selection_of(["D1", "D2", "D3", "D4"], keep={"donor_id": ["D1", "D2", "D3"]})) == {"D1", "D2", "D3"}
    with pytest.raises(BadInput, match=r"data.keep.donor_id: \['D8'\]: is no value.*did you mean D"):
        selection_of(["D1", "D2", "D3", "D4"], keep={"donor_id": ["D1", "D2", "D3", "D8"]})


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:.*zarr:UserWarning")
def test_shards_of_mouse_cells_from_two_containers_hold_the_counts_of_anndata(tmp_path: Path) -> None:
    """From .zarr and .h5ad to shards: mouse genes, copies of cells, and every count as anndata reads it."""
    adata, other = cells(n=200, genes=60, donors=6), cells(seed=3, n=100, genes=60, donors=6)
    for each in (adata, other):
        each.var_names = [name.replace("ENSG", "ENSMUSG") for name in each.var_names]
    adata.obs["donor_id"] = [f"mouse {donor[1:]}" for donor in adata.obs["donor_id"]]
    other.obs["donor_id"] = [f"Mouse-0{donor[1:]}" for donor in other.obs["donor_id"]]
    both = anndata.concat([again(adata, slice(40))[:50].copy(), other[:, :40].copy()])
    adata.write_zarr(tmp_path / "first.zarr")
    found = Imported([tmp_path / "first.zarr", write(both, tmp_path / "second.h5ad")], tmp_path / "census")
    assert found.organism == "mus_musculus" and found.twin_of is not None
    spec = parse_spec(
        'name = "mice"\n[data]\nvalue_filter = "soma_joinid >= 0"\ndrop_duplicates = false\ngenes = 60\n'
        'gene_rule = "by_mean"\n[grid]\nsizes = ["XXS"]\ngenes = [60]\ncells = ["all"]\nseeds = [1]\n'
        "[lr]\nrates = [1e-2]\n",
        "mice",
    )
    manifest = build_shards(spec, str(tmp_path / "census"), tmp_path / "shards")
    genes = pq.read_table(tmp_path / "shards" / "genes.parquet")["feature_id"].to_pylist()
    tables = [anndata.io.read_zarr(tmp_path / "first.zarr"), anndata.read_h5ad(tmp_path / "second.h5ad")]
    want = np.concatenate([table.to_df().reindex(columns=genes, fill_value=0).to_numpy() for table in tables])
    barcodes = np.concatenate([table.obs_names for table in tables])
    side: dict[str, set[str]] = {}
    seen = 0
    for split in SPLITS:
        read = read_split(tmp_path / "shards", manifest, split, 60)
        np.testing.assert_array_equal(read.counts, want[read.cell])
        np.testing.assert_array_equal(read.raw_sum, want[read.cell].sum(1))
        for cell in read.cell:
            side.setdefault(barcodes[cell], set()).add(split)
        seen += len(read.cell)
    assert seen == len(want) == 350 and all(len(splits) == 1 for splits in side.values())
    groups = [set(manifest.splits[split].groups) for split in SPLITS]
    assert sum(map(len, groups)) == 6 == len(set.union(*groups))
