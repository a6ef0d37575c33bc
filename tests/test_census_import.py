"""From .h5ad files to a local Census: raw counts found, checked and never guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scaling_ray.census.importer import import_h5ad
from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput

REAL_CELLS = Path(
    os.environ.get("SCALING_RAY_REAL_CELLS")
    or Path(__file__).resolve().parents[1].parent / "shared" / "data" / "dev_aml_bonemarrow.h5ad"
)


def cells(
    n: int = 40, ids: Sequence[str] = ("ENSG01", "ENSG02", "ENSG03", "ENSG04", "ENSG05"), seed: int = 0, **obs: object
) -> anndata.AnnData:
    """n cells of sparse raw counts, none of them without a count."""
    counts = sp.random(n, len(ids), 0.4, format="csr", random_state=seed, dtype=np.float32)
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    counts = (counts + sp.eye_array(n, len(ids), dtype=np.float32) + _in_the_last(n, len(ids))).tocsr()
    counts = sp.csr_matrix(counts)
    table = pd.DataFrame(obs, index=[f"c{seed}-{i}" for i in range(n)])
    return anndata.AnnData(counts, obs=table, var=pd.DataFrame(index=list(ids)))


def _in_the_last(n: int, genes: int) -> sp.csr_array:
    """A count of the last gene in every cell that the diagonal leaves out."""
    rows = np.arange(min(genes, n), n)
    return sp.csr_array((np.ones(len(rows), np.float32), (rows, np.full(len(rows), genes - 1))), shape=(n, genes))


def write(adata: anndata.AnnData, path: Path) -> Path:
    adata.write_h5ad(path)
    return path


def imported(files: list[Path], out: Path, **options: Any) -> tuple[Any, ...]:
    """The whole content of an import, and what it said."""
    said: list[str] = []
    with Census.open(import_h5ad(files, out, progress=said.append, **options)) as census:
        content = census.counts(0, census.n_cells), census.obs(), census.var(), census.presence()
    return *content, "\n".join(said)


def log(adata: anndata.AnnData) -> sp.csr_matrix:
    """A normalised matrix beside the counts."""
    return sp.csr_matrix(adata.X).log1p()


def in_x(adata: anndata.AnnData) -> anndata.AnnData:
    return adata


def in_x_dense(adata: anndata.AnnData) -> anndata.AnnData:
    adata.X = adata.X.toarray()
    return adata


def in_x_by_columns(adata: anndata.AnnData) -> anndata.AnnData:
    adata.X = adata.X.tocsc()
    return adata


def in_raw(adata: anndata.AnnData) -> anndata.AnnData:
    adata.raw = adata.copy()
    adata.X = log(adata)
    return adata


def in_a_layer(adata: anndata.AnnData) -> anndata.AnnData:
    adata.layers["counts"] = adata.X.copy()
    adata.X = log(adata)
    return adata


def in_two_places_alike(adata: anndata.AnnData) -> anndata.AnnData:
    adata.layers["counts"] = adata.X.copy()
    return adata


@pytest.mark.parametrize(
    ("arrange", "place"),
    [
        (in_x, "X"),
        (in_x_dense, "X"),
        (in_x_by_columns, "X"),
        (in_raw, "raw.X"),
        (in_a_layer, "counts"),
        (in_two_places_alike, "X"),
    ],
)
def test_raw_counts_are_found_wherever_they_are(
    tmp_path: Path, arrange: Callable[[anndata.AnnData], anndata.AnnData], place: str
) -> None:
    adata = cells()
    want = adata.X.toarray().copy()
    file = write(arrange(adata), tmp_path / "some.h5ad")
    counts, obs, var, _, said = imported([file], tmp_path / "census")
    np.testing.assert_array_equal(counts.toarray(), want)
    np.testing.assert_array_equal(obs["raw_sum"], want.sum(axis=1))
    assert list(var["feature_id"]) == list(adata.var_names)
    assert f"raw counts from {place};" in said
    record = json.loads((tmp_path / "census" / "census.json").read_text())
    assert record["about"]["counts_from"] == {"some.h5ad": place}


@pytest.mark.parametrize(
    ("value", "reason"), [(-1.0, "negative"), (0.5, "fractional"), (float("nan"), "not finite"), (3e8, "beyond")]
)
def test_what_is_no_count_is_refused_with_the_reason_for_each_place(tmp_path: Path, value: float, reason: str) -> None:
    adata = cells()
    adata.layers["logged"] = log(adata)
    adata.X = adata.X.copy()
    adata.X.data[-1] = value  # the last value of the last cell: a look at the first rows would miss it
    file = write(adata, tmp_path / "bad.h5ad")
    with pytest.raises(BadInput) as refusal:
        import_h5ad([file], tmp_path / "census")
    assert f"X: holds {'values that are not finite' if reason == 'not finite' else ''}".strip() in str(refusal.value)
    assert reason in str(refusal.value) and "logged: holds fractional" in str(refusal.value)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.h5ad"}, "something half-written was left"


def test_differing_candidates_need_a_choice(tmp_path: Path) -> None:
    adata = cells()
    adata.layers["spliced"] = adata.X.copy()
    adata.layers["spliced"].data[0] += 1
    file = write(adata, tmp_path / "two.h5ad")
    with pytest.raises(BadInput, match=r"X.*spliced.*--layer"):
        import_h5ad([file], tmp_path / "census")
    counts, *_, said = imported([file], tmp_path / "census", layer="spliced")
    np.testing.assert_array_equal(counts.toarray(), adata.layers["spliced"].toarray())
    assert "raw counts from spliced" in said
    with pytest.raises(BadInput, match="is not in two.h5ad; it has X, spliced"):
        import_h5ad([file], tmp_path / "other", layer="nonesuch")


def test_files_are_joined_on_gene_ids_and_remember_what_they_measured(tmp_path: Path) -> None:
    first = cells(30, ids=("ENSG03", "ENSG01", "ENSG02"), seed=1, patient="p1")
    second = cells(20, ids=("ENSG02", "ENSG04"), seed=2, patient="p2")
    files = [write(first, tmp_path / "first.h5ad"), write(second, tmp_path / "second.h5ad")]
    counts, obs, var, (datasets, presence), _ = imported(files, tmp_path / "census")
    assert list(var["feature_id"]) == ["ENSG01", "ENSG02", "ENSG03", "ENSG04"]
    assert datasets == ["first", "second"]
    np.testing.assert_array_equal(presence.toarray(), [[1, 1, 1, 0], [0, 1, 0, 1]])
    wide = pd.DataFrame(counts.toarray(), columns=var["feature_id"])
    np.testing.assert_array_equal(wide.loc[:29, list(first.var_names)], first.X.toarray())
    np.testing.assert_array_equal(wide.loc[30:, list(second.var_names)], second.X.toarray())
    assert list(obs["dataset_id"]) == ["first"] * 30 + ["second"] * 20
    assert list(obs["donor_id"]) == ["p1"] * 30 + ["p2"] * 20
    np.testing.assert_array_equal(obs["n_measured_vars"], [3] * 30 + [2] * 20)


def test_columns_go_by_their_common_names_and_what_is_missing_is_said(tmp_path: Path) -> None:
    adata = cells(4, CellType=["a", "b", None, "a"], gender="female", is_primary_data=[True, False, True, True])
    adata.var = pd.DataFrame({"gene_ids": [f"ENSG{i}" for i in range(5)]}, index=list("vwxyz"))
    _, obs, var, _, said = imported([write(adata, tmp_path / "f.h5ad")], tmp_path / "census")
    assert list(obs["cell_type"]) == ["a", "b", "unknown", "a"]
    assert set(obs["sex"]) == {"female"} and set(obs["disease"]) == {"unknown"}
    assert list(obs["is_primary_data"]) == [True, False, True, True]
    assert list(var["feature_id"]) == [f"ENSG{i}" for i in range(5)] and list(var["feature_name"]) == list("vwxyz")
    assert "cell_type from CellType" in said and "no donor_id" in said
    assert "disease" in said.split("set to unknown: ")[1]
    with cellxgene_census.open_soma(uri=str(tmp_path / "census")) as root:
        assert len(cellxgene_census.get_obs(root, "homo_sapiens", value_filter="cell_type == 'a'")) == 2


def test_a_second_import_finds_it_done_and_another_is_refused(tmp_path: Path) -> None:
    file = write(cells(), tmp_path / "f.h5ad")
    imported([file], tmp_path / "census")
    *_, said = imported([file], tmp_path / "census")
    assert said.endswith("already there")
    other = write(cells(seed=9), tmp_path / "g.h5ad")
    with pytest.raises(BadInput, match="imported of other files"):
        import_h5ad([other], tmp_path / "census")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no")
    whole = write(cells(), tmp_path / "f.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    repeated = cells()
    repeated.var = pd.DataFrame({"gene_ids": ["ENSG01", "ENSG01", "ENSG02", "ENSG03", "ENSG04"]}, index=list("abcde"))
    write(repeated, tmp_path / "repeated.h5ad")
    for name in ("text.h5ad", "cut.h5ad", "missing.h5ad", "repeated.h5ad"):
        with pytest.raises(BadInput) as refusal:
            import_h5ad([tmp_path / name], tmp_path / "census")
        assert "\n" not in str(refusal.value) and not (tmp_path / "census").exists()
    with pytest.raises(BadInput):
        import_h5ad([], tmp_path / "census")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CELLS.is_file(), reason="the real cells are not on this machine")
def test_every_count_of_the_real_cells_arrives(tmp_path: Path) -> None:
    adata = anndata.read_h5ad(REAL_CELLS)
    counts, obs, var, _, said = imported([REAL_CELLS], tmp_path / "census")
    assert "raw counts from X;" in said
    assert counts.shape == adata.shape
    assert (counts != adata.X.astype(np.int32)).nnz == 0 and counts.sum() == adata.X.sum(dtype=np.float64)
    for column in ("donor_id", "cell_type", "disease", "tissue", "assay"):
        np.testing.assert_array_equal(obs[column], adata.obs[column].astype(str))
    np.testing.assert_array_equal(obs["raw_sum"], adata.obs["raw_sum"])
    np.testing.assert_array_equal(var["feature_name"], adata.var["feature_name"].astype(str))
