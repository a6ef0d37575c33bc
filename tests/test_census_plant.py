"""A planted Census: the layout of the live one, the same cells again, and the realism it promises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma

from scaling_ray.census.layout import OBS_STRING_COLUMNS
from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.planted.plant import plant
from scaling_ray.planted.truth import PlantSpec, load_truth

CELLS, GENES = 2500, 400


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("plant") / "census", n_cells=CELLS, n_genes=GENES, seed=7)


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_the_public_package_reads_it_like_the_live_census(planted: Path) -> None:
    with cellxgene_census.open_soma(uri=str(planted)) as root, Census.open(planted) as census:
        assert set(root["census_info"]) == {"summary", "summary_cell_counts", "datasets", "organisms"}
        summary = root["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
        assert summary["census_schema_version"] == "2.4.0"
        assert summary["total_cell_count"] == str(CELLS)
        obs = cellxgene_census.get_obs(root, "Homo sapiens")
        assert list(obs["soma_joinid"]) == list(range(CELLS))
        assert set(OBS_STRING_COLUMNS) | {
            "is_primary_data",
            "observation_joinid",
            "raw_sum",
            "nnz",
            "raw_mean_nnz",
            "raw_variance_nnz",
            "n_measured_vars",
        } | {"soma_joinid"} == set(obs.columns)
        assert summary["unique_cell_count"] == str(obs["is_primary_data"].sum())

        adata = cellxgene_census.get_anndata(root, "Homo sapiens", obs_value_filter="cell_type == 'B cell'")
        assert 0 < adata.n_obs < CELLS and set(adata.obs["cell_type"]) == {"B cell"}
        rows = adata.obs["soma_joinid"].to_numpy()
        counts = census.counts(0, CELLS)
        assert (adata.X != counts[rows]).nnz == 0
        assert adata.X.dtype == np.float32

        # what the obs and var tables say about the counts is true of the counts
        whole = pd.DataFrame({"mean": 0.0, "variance": 0.0}, index=range(CELLS))
        for i in range(CELLS):
            values = counts[i].data
            whole.loc[i] = (
                values.mean() if len(values) else 0.0,
                values.var(ddof=1) if len(values) > 1 else 0.0,
            )
        np.testing.assert_array_equal(obs["raw_sum"], np.asarray(counts.sum(axis=1)).ravel())
        np.testing.assert_array_equal(obs["nnz"], np.diff(counts.indptr))
        np.testing.assert_allclose(obs["raw_mean_nnz"], whole["mean"], rtol=1e-12)
        np.testing.assert_allclose(obs["raw_variance_nnz"], whole["variance"], rtol=1e-9, atol=1e-12)
        var = cellxgene_census.get_var(root, "Homo sapiens")
        np.testing.assert_array_equal(var["nnz"], np.bincount(counts.indices, minlength=GENES))
        assert var["feature_id"].is_unique

        presence = cellxgene_census.get_presence_matrix(root, "Homo sapiens").toarray().astype(bool)
        ids, ours = census.presence()
        np.testing.assert_array_equal(ours.toarray(), presence)
        row = pd.Series(range(len(ids)), index=ids)[obs["dataset_id"].astype(str)].to_numpy()
        np.testing.assert_array_equal(obs["n_measured_vars"], presence.sum(axis=1)[row])
        assert not (counts.toarray() * ~presence[row]).any(), "counts of a gene its data set did not measure"
        assert (~presence).any()
        np.testing.assert_array_equal(var["n_measured_obs"], presence[row].sum(axis=0))

        tallies = root["census_info"]["summary_cell_counts"].read().concat().to_pandas()
        by_type = tallies[tallies["category"] == "cell_type"].set_index("label")["total_cell_count"]
        assert by_type.to_dict() == obs["cell_type"].astype(str).value_counts().to_dict()


def test_x_is_float32_with_the_row_tiles_of_the_live_census(planted: Path) -> None:
    root: Any
    with soma.open(str(planted)) as root:
        raw = root["census_data"]["homo_sapiens"].ms["RNA"].X["raw"]
        assert str(raw.schema.field("soma_data").type) == "float"
        assert json.loads(raw.schema_config_options().dims)["soma_dim_0"]["tile"] == "2048"


def test_the_same_parameters_find_it_done_and_others_are_refused(planted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in planted.rglob("*")}
    said: list[str] = []
    assert plant(planted, n_cells=CELLS, n_genes=GENES, seed=7, progress=said.append) == planted
    assert said == [f"{planted}: already there"]
    assert {p: p.stat().st_mtime_ns for p in planted.rglob("*")} == before
    with pytest.raises(BadInput, match="holds another Census"):
        plant(planted, n_cells=CELLS, n_genes=GENES, seed=8)
    assert not [p for p in planted.parent.iterdir() if p != planted], "something half-written was left"


def test_a_smaller_plant_is_the_beginning_of_a_larger_one(planted: Path, tmp_path: Path) -> None:
    smaller = plant(tmp_path / "small", n_cells=300, n_genes=GENES, seed=7)
    with Census.open(smaller) as few, Census.open(planted) as many:
        assert (few.counts(0, 300) != many.counts(0, 300)).nnz == 0
        pd.testing.assert_frame_equal(few.obs(), many.obs().iloc[:300])
        assert few.obs()["is_primary_data"].sum() < 300


def test_copies_repeat_an_earlier_primary_cell(planted: Path) -> None:
    with Census.open(planted) as census:
        obs, counts = census.obs(), census.counts(0, CELLS)
    cells = {counts[i].toarray().tobytes() for i in np.flatnonzero(obs["is_primary_data"])}
    copies = np.flatnonzero(~obs["is_primary_data"])
    assert len(copies) > 0.01 * CELLS
    assert all(counts[i].toarray().tobytes() in cells for i in copies)


def test_what_was_cut_short_is_never_taken_for_whole(planted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(planted, broken)
    with Census.open(broken) as whole:
        assert whole.n_cells == CELLS
    next(p for p in sorted(broken.rglob("*.tdb")) if "X" in str(p) and p.stat().st_size > 200).unlink()
    for attempt in (lambda: Census.open(broken), lambda: plant(broken, n_cells=CELLS, n_genes=GENES, seed=7)):
        with pytest.raises(BadInput, match="is incomplete"):
            attempt()
    (broken / "census.json").unlink()
    with pytest.raises(BadInput, match="no complete Census"):
        plant(broken, n_cells=CELLS, n_genes=GENES, seed=7)


def test_a_plant_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def dies(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant(tmp_path / "census", n_cells=50, n_genes=GENES, progress=dies)
    assert not list(tmp_path.iterdir())


def test_truth_comes_back_from_its_json_alone(planted: Path, tmp_path: Path) -> None:
    truth = load_truth(planted)
    assert truth.n_cells == CELLS and truth.spec == PlantSpec(n_genes=GENES, seed=7)
    assert (planted / "plant.json").stat().st_size < 4000
    with Census.open(planted) as census:
        obs, (ids, presence) = census.obs(["dataset_id", "donor_id", "disease"]), census.presence()
    assert ids == truth.dataset_ids
    np.testing.assert_array_equal(presence.toarray(), truth.measured)
    effect = truth.effect_of_donor(list(obs["donor_id"]))
    assert set(effect) == set(range(truth.spec.n_effects))
    # every data set has donors of every effect, so that holding donors out leaves each effect in training
    assert pd.crosstab(obs["dataset_id"], effect).to_numpy().min() > 0
    weights = truth.weights(1)
    np.testing.assert_allclose(weights.sum(axis=1), truth.concentration, rtol=1e-12)
    assert (weights[:, ~truth.measured[1]] == 0).all() and (weights[:, truth.measured[1]] > 0).all()

    altered = json.loads((planted / "plant.json").read_text())
    altered["spec"]["base_sd"] += 0.1
    (tmp_path / "plant.json").write_text(json.dumps(altered))
    with pytest.raises(BadInput) as refusal:
        load_truth(tmp_path)
    assert refusal.value.field == "table_sha256"
    for text in ("{", "[]", "{}", json.dumps(altered | {"truth_version": 99})):
        (tmp_path / "plant.json").write_text(text)
        with pytest.raises(BadInput):
            load_truth(tmp_path)
    with pytest.raises(BadInput, match="only a planted Census"):
        load_truth(tmp_path / "nowhere")


def test_counts_follow_the_truth() -> None:
    """Gene totals of deep and shallow cells against their expectation under the truth's weights."""
    from scaling_ray.planted.draw import draw_range
    from scaling_ray.planted.truth import PlantedTruth

    truth = PlantedTruth(PlantSpec(n_genes=300, seed=1, dataset_share=(0.5, 0.2, 0.1, 0.2)))
    found, expected, variance = (np.zeros((4, 300)) for _ in range(3))
    for index in range(2):
        cells = draw_range(truth, index)
        own = cells.copy_of < 0
        counts = cells.counts.toarray()
        totals = counts.sum(axis=1, keepdims=True)
        concentration = truth.concentration
        for t in range(4):
            rows = own & (cells.dataset == t)
            component = cells.state[rows] * truth.spec.n_effects + cells.effect[rows]
            share = truth.weights(t)[component] / concentration
            n = totals[rows]
            found[t] += counts[rows].sum(axis=0)
            expected[t] += (n * share).sum(axis=0)
            # of a Dirichlet-multinomial with this total
            variance[t] += (n * share * (1 - share) * (n + concentration) / (1 + concentration)).sum(axis=0)
    tested = variance > 20
    z = (found - expected)[tested] / np.sqrt(variance[tested])
    assert tested.sum() > 300
    assert abs(z.mean()) < 0.2 and 0.85 < z.std() < 1.15 and np.abs(z).max() < 5.5


@pytest.mark.slow
def test_the_default_plant_is_realistic(tmp_path: Path) -> None:
    with Census.open(plant(tmp_path / "census")) as census:
        obs, counts = census.obs(), census.counts(0, census.n_cells)
    assert counts.shape == (8000, 2000)
    assert 0.08 <= counts.nnz / np.prod(counts.shape) <= 0.10
    shallow = (obs["assay"] != "Smart-seq2").to_numpy()
    assert 300 < np.median(obs["raw_sum"][shallow]) < 900
    assert np.median(obs["raw_sum"][~shallow]) > 30_000
    assert counts.max() < 65_536
    assert 0 < (obs["raw_sum"] == 0).sum() < 80
    assert obs["cell_type"].nunique() == 16 and obs["tissue"].nunique() >= 4
    assert obs["disease"].str.contains(" || ", regex=False).any() and (obs["disease"] == "normal").any()
    assert 0.01 < 1 - obs["is_primary_data"].mean() < 0.05
    means = np.asarray(counts[shallow].mean(axis=0)).ravel()
    assert np.quantile(means, 0.99) > 30 * np.median(means), "genes are not long-tailed"


@pytest.mark.parametrize(
    ("field", "change"), [("cells", {"n_cells": 0}), ("genes", {"n_genes": 1}), ("seed", {"seed": -1})]
)
def test_sizes_out_of_range_are_refused(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refusal:
        plant(tmp_path / "census", **change)
    assert refusal.value.field == field and not list(tmp_path.iterdir())
