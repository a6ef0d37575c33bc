"""Splits come first and are never empty; genes are ranked on training cells as Seurat v3 does."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import scipy.sparse as sp

from scaling_ray.errors import BadInput
from scaling_ray.shards import genes as gene_ranking
from scaling_ray.shards.format import CODE_COLUMNS, SPLITS
from scaling_ray.shards.genes import Batch, CountHistogram, GeneRanking, HistogramSum
from scaling_ray.shards.select import MANY_GROUPS, Coded, select_cells, split_groups
from scaling_ray.spec import DataSpec

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def histogram_of(counts: sp.csr_matrix) -> CountHistogram:
    entries = counts.tocoo()
    return CountHistogram.of(entries.col, entries.data, counts.shape[1])


def rank_genes(histogram: CountHistogram, n_cells: int, n_genes: int, data: DataSpec) -> GeneRanking:
    """Ranks from one batch."""
    return gene_ranking.rank_genes([Batch("all", histogram, n_cells)], n_genes, data)


@pytest.mark.parametrize("salt", range(40))
def test_few_groups_never_leave_a_split_empty_and_come_near_the_fractions(salt: int) -> None:
    rng = np.random.default_rng(salt)
    sizes = {f"donor{i}": int(rng.integers(50, 2500)) for i in range(18)}
    assigned = split_groups(sizes, FRACTIONS, salt)
    assert set(assigned) == set(sizes) and set(assigned.values()) == set(FRACTIONS)
    total = sum(sizes.values())
    for split, fraction in FRACTIONS.items():
        share = sum(sizes[group] for group, where in assigned.items() if where == split) / total
        assert abs(share - fraction) < 0.06


@pytest.mark.parametrize("groups", [3, 4])
def test_the_fewest_groups_still_fill_every_split(groups: int) -> None:
    for salt in range(20):
        sizes = {f"g{i}": 10 ** (i + 1) for i in range(groups)}
        assert set(split_groups(sizes, FRACTIONS, salt).values()) == set(FRACTIONS)


def test_fewer_groups_than_splits_is_refused_on_one_line() -> None:
    with pytest.raises(BadInput, match=r"data.split_by: .*2 groups for 3 splits; split by another column"):
        split_groups({"a": 5, "b": 7}, FRACTIONS, 0)


def test_many_groups_keep_their_split_when_others_come() -> None:
    sizes = {f"donor{i}": 5 for i in range(MANY_GROUPS + 1)}
    before = split_groups(sizes, FRACTIONS, 3)
    after = split_groups({**sizes, **{f"new{i}": 9 for i in range(200)}}, FRACTIONS, 3)
    assert all(after[group] == split for group, split in before.items())
    share = sum(split == "val" for split in before.values()) / len(before)
    assert 0.07 < share < 0.13


def obs_of(cells: int, donors: int) -> tuple[np.ndarray, dict[str, Coded]]:
    columns: dict[str, Coded] = {name: (np.zeros(cells, np.int32), ["x"]) for name in CODE_COLUMNS}
    columns["donor_id"] = ((np.arange(cells) % donors).astype(np.int32), [f"d{i}" for i in range(donors)])
    return np.arange(cells) * 3, columns


@pytest.mark.parametrize("split_by", ["donor_id", "cell"])
def test_each_split_is_permuted_once_and_groups_stay_together(split_by: Literal["donor_id", "cell"]) -> None:
    joinid, columns = obs_of(1000, 10)
    selection = select_cells(joinid, columns, DataSpec(split_by=split_by, genes=2), 1200)
    assert selection.dropped == {"value_filter": 200}
    for index in range(len(SPLITS)):
        positions = np.sort(selection.position[selection.split == index])
        assert len(positions) >= 50 and np.array_equal(positions, np.arange(len(positions)))
    train = selection.split == 0
    assert np.abs(np.corrcoef(selection.position[train], selection.joinid[train])[0, 1]) < 0.15
    if split_by == "donor_id":
        donor, names = columns["donor_id"]
        assert all(len(np.unique(selection.split[donor == d])) == 1 for d in np.unique(donor))
        assert sorted(sum(selection.groups.values(), [])) == sorted(names)


def test_a_filter_that_matches_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="data.value_filter: .*matches no cell"):
        select_cells(*obs_of(0, 1), DataSpec(genes=2), 10)


def test_seurat_v3_ranks_as_scanpy_does() -> None:
    anndata, scanpy = pytest.importorskip("anndata"), pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.4, 2.0, size=(1, 800)) * rng.lognormal(0, 1.0, size=(1500, 1))
    counts = sp.csr_matrix(rng.poisson(rate * rng.lognormal(0, rng.uniform(0, 1.2, 800), size=(1500, 800))))
    ranking = rank_genes(histogram_of(counts), 1500, 800, DataSpec(genes=200))
    data = anndata.AnnData(counts.astype(np.float32))
    scanpy.pp.highly_variable_genes(data, flavor="seurat_v3", n_top_genes=200)
    expected = data.var["highly_variable_rank"].dropna().sort_values().index.astype(int).to_numpy()
    assert np.array_equal(ranking.order, expected)
    normalised = data.var["variances_norm"].to_numpy()
    assert np.allclose(ranking.score, normalised, rtol=1e-9, atol=1e-12)


def test_histograms_of_parts_add_up_and_can_be_taken_away() -> None:
    values = lambda n: np.concatenate([np.arange(n - 40) % 5 + 1, 60 + np.arange(40)])  # noqa: E731  some above 63
    counts = sp.random(300, 50, density=0.2, random_state=1, data_rvs=values).tocsr().astype(np.int64)
    entries = counts.tocoo()
    keys, cells = np.unique(entries.col.astype(np.int64) * 1_000 + entries.data, return_counts=True)
    total = HistogramSum(50)
    for part in (counts[:100], counts[100:250], counts[250:], counts[40:90]):
        total.add(histogram_of(part))
    total.add(histogram_of(counts[40:90]), -1)
    for found in (histogram_of(counts), total.result()):
        assert np.array_equal(found.gene * 1_000 + found.count, keys)
        assert np.array_equal(found.cells, cells)


def test_other_rules_and_too_many_genes() -> None:
    counts = sp.csr_matrix(np.arange(60).reshape(20, 3) % 7)
    histogram = histogram_of(counts)
    assert rank_genes(histogram, 20, 3, DataSpec(genes=2, gene_rule="first_n")).order.tolist() == [0, 1]
    by_mean = rank_genes(histogram, 20, 3, DataSpec(genes=3, gene_rule="by_mean"))
    assert by_mean.order.tolist() == np.argsort(-np.asarray(counts.mean(0)).ravel(), kind="stable").tolist()
    with pytest.raises(BadInput, match="data.genes: 4: is more than the 3 genes"):
        rank_genes(histogram, 20, 3, DataSpec(genes=4))
