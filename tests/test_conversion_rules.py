"""Every rule of a conversion, against a calculation of its own straight from the SOMA counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import tiledbsoma as soma
from conftest import small_run

from scaling_ray.census.layout import CENSUS_SCHEMA_VERSION, OBS_STRING_COLUMNS, CensusWriter, Dataset
from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.records import ShardManifest
from scaling_ray.shards.convert import build_shards
from scaling_ray.shards.format import CODE_COLUMNS, SPLITS, decode_block, read_manifest, verify
from scaling_ray.shards.parts import DEFAULT_LAYOUT, Layout
from scaling_ray.shards.read import read_split, shards_order
from scaling_ray.shards.stream import StreamFeed
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.storage import open_place

pytestmark = pytest.mark.ray

GENES = 120


def write_census(
    out: Path,
    counts: np.ndarray | sp.spmatrix,
    about: str = "cells",
    primary: np.ndarray | None = None,
    unmeasured: int = 0,
    schema_version: str = CENSUS_SCHEMA_VERSION,
    **columns: np.ndarray,
) -> Path:
    """A Census of these counts (N, G); obs columns that are not given are "unknown"; one data set unless told.

    The last data set did not measure the last ``unmeasured`` genes.
    """
    counts = sp.csr_matrix(counts).astype(np.float32)
    n_cells, n_genes = counts.shape
    obs = pd.DataFrame({name: ["unknown"] * n_cells for name in OBS_STRING_COLUMNS})
    for name, values in {"dataset_id": np.full(n_cells, "d0"), **columns}.items():
        obs[name] = np.asarray(values, object)
    obs["is_primary_data"] = np.ones(n_cells, bool) if primary is None else primary
    obs["observation_joinid"] = [str(i) for i in range(n_cells)]
    names = sorted(obs["dataset_id"].unique())
    presence = np.ones((len(names), n_genes), bool)
    presence[-1, n_genes - unmeasured :] = False
    ids = [gene_id(gene) for gene in range(n_genes)]
    with CensusWriter(
        out,
        var=pd.DataFrame({"feature_id": ids, "feature_name": [f"N{i}" for i in ids], "feature_length": 1}),
        datasets=[Dataset(name, name, name, name) for name in names],
        presence=presence,
        n_cells=n_cells,
        categories={name: sorted(obs[name].unique()) for name in OBS_STRING_COLUMNS},
        build_tag=about,
        schema_version=schema_version,
    ) as writer:
        writer.append(obs, counts)
        return writer.publish(about={"what": about})


def gene_id(gene: int) -> str:
    return f"ENSG{gene:05d}"


def overdispersed(n_cells: int, n_genes: int = GENES, seed: int = 0) -> np.ndarray:
    """(N, G) counts of genes of very different means and variances."""
    rng = np.random.default_rng(seed)
    rate = np.random.default_rng(99).gamma(0.6, 2.5, n_genes)
    spread = np.random.default_rng(98).uniform(0.1, 1.1, n_genes)
    depth = rng.gamma(4.0, 0.25, (n_cells, 1))
    return rng.poisson(rate * depth * rng.lognormal(0, spread, (n_cells, n_genes)))


def of_donors(n_cells: int, donors: int = 10, prefix: str = "p", seed: int = 5) -> np.ndarray:
    names = np.array([f"{prefix}{i:02d}" for i in range(donors)])
    return names[np.random.default_rng(seed).integers(0, donors, n_cells)]


def spec_of(rules: str, resources: str = "") -> SweepSpec:
    """A spec with these lines of [data]; ``genes = 20`` and the mean's ranking unless told."""
    lines = [line.split("=")[0].strip() for line in rules.splitlines()]
    rules = ("" if "genes" in lines else "genes = 20\n") + rules
    rules = ("" if "gene_rule" in lines else 'gene_rule = "by_mean"\n') + rules
    return parse_spec(
        f"""
        name = "rules"
        grid = {{ sizes = ["XXS"], genes = [1], cells = ["all"], seeds = [1] }}
        lr.rates = [1e-2]
        {"resources." if resources else ""}{resources}
        [data]
        {rules}
        """
    )


@dataclass(frozen=True)
class Truth:
    """A Census as SOMA itself tells it: obs by joinid, counts (N, G), which data set measured which gene."""

    obs: pd.DataFrame
    counts: sp.csr_matrix
    measured: dict[str, np.ndarray]

    @property
    def primary(self) -> np.ndarray:
        """Joinids that pass the usual value filter, rising."""
        return np.flatnonzero(self.obs["is_primary_data"])

    def without_copies(self, cells: np.ndarray) -> np.ndarray:
        """Of ``cells``, rising, those whose counts no cell before them has, and the empty ones."""
        seen: set[bytes] = set()
        kept = []
        for cell in cells.tolist():
            row = self.counts[cell].toarray().tobytes()
            if row not in seen or not self.counts[cell].nnz:
                kept.append(cell)
            seen.add(row)
        return np.array(kept)


def truth_of(census: Path) -> Truth:
    # one thread and no merge of tile orders, which races in TileDB and now and then ends the process
    config: dict[str, str | float]
    config = {"sm.compute_concurrency_level": 1, "sm.query.sparse_global_order.preprocess_tile_merge": 0}
    with soma.open(str(census), context=soma.SOMATileDBContext(tiledb_config=config)) as root:
        assert isinstance(root, soma.Collection)
        human = root["census_data"]["homo_sapiens"]
        obs = human.obs.read().concat().to_pandas().sort_values("soma_joinid", ignore_index=True)
        table = human.ms["RNA"].X["raw"].read().tables().concat()
        presence = human.ms["RNA"]["feature_dataset_presence_matrix"].read().tables().concat()
        datasets = root["census_info"]["datasets"].read().concat().to_pandas()
        shape = (human.obs.count, human.ms["RNA"].var.count)
    for name in OBS_STRING_COLUMNS:
        obs[name] = obs[name].astype(str)
    place = (table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy())
    counts = sp.csr_matrix((table["soma_data"].to_numpy().astype(np.int64), place), shape=shape)
    measured = np.zeros((len(datasets), shape[1]), bool)
    measured[presence["soma_dim_0"].to_numpy(), presence["soma_dim_1"].to_numpy()] = True
    rows = zip(datasets["dataset_id"], datasets["soma_joinid"], strict=True)
    return Truth(obs, counts, {name: measured[row] for name, row in rows})


@dataclass(frozen=True)
class Built:
    """Shards as Parquet itself tells them: cells (N,) in order by split, and the ranked genes."""

    manifest: ShardManifest
    cells: dict[str, np.ndarray]
    genes: np.ndarray
    table: Any

    @property
    def everything(self) -> np.ndarray:
        """All cells, rising."""
        return np.sort(np.concatenate(list(self.cells.values())))


def read_back(out: Path, truth: Truth) -> Built:
    """The shards at ``out``, once every number in them was compared with the Census."""
    manifest = read_manifest(out)
    assert verify(out) == []
    table = pq.read_table(out / "genes.parquet")
    genes = table["soma_joinid"].to_numpy()
    assert len(genes) == manifest.genes and table["feature_id"].to_pylist() == [gene_id(g) for g in genes]
    presence = pq.read_table(out / "presence.parquet")
    measured = decode_block(presence["measured"], len(genes)).astype(bool)
    for name, row in zip(presence["dataset_id"].to_pylist(), measured, strict=True):
        assert np.array_equal(row, truth.measured[name][genes])
    cells = {}
    for split in SPLITS:
        entry = manifest.splits[split]
        files = [pq.read_table(out / file.path) for file in entry.files]
        assert [len(file) for file in files] == [file.rows for file in entry.files]
        found = {name: np.concatenate([file[name].to_numpy() for file in files]) for name in ("cell", "raw_sum")}
        cell = found["cell"]
        blocks = [name for name in files[0].column_names if name.startswith("counts_")]
        counts = np.concatenate(
            [np.concatenate([decode_block(f[b], f[b].type.byte_width // 2) for b in blocks], axis=1) for f in files]
        )
        assert np.array_equal(counts, truth.counts[cell][:, genes].toarray())
        assert np.array_equal(found["raw_sum"], np.asarray(truth.counts[cell].sum(1)).ravel())
        for name in CODE_COLUMNS:
            codes = np.concatenate([file[name].to_numpy() for file in files])
            assert [manifest.codes[name][code] for code in codes] == truth.obs[name][cell].tolist()
            if name == "donor_id":
                assert np.bincount(codes, minlength=len(manifest.codes[name])).tolist() == entry.donor_cells
        assert entry.cells == len(cell) == len(np.unique(cell))
        if manifest.split_by != "cell":
            assert set(truth.obs[manifest.split_by][cell]) <= set(entry.groups)
        cells[split] = cell
    built = Built(manifest, cells, genes, table)
    assert len(np.unique(built.everything)) == len(built.everything)
    assert len(truth.obs) == len(built.everything) + sum(manifest.dropped.values()), "cells are kept or dropped, once"
    return built


SHORT_RANGES = Layout(range_tiles=1)
"""By which 5,000 cells are read in three ranges, as millions are in many."""
SMALL_FILES = Layout(file_cells=12)


def build(
    rules: str,
    census: Path,
    out: Path,
    truth: Truth | None = None,
    resources: str = "",
    layout: Layout = DEFAULT_LAYOUT,
) -> Built:
    build_shards(spec_of(rules, resources), str(census), out, layout=layout)
    return read_back(out, truth or truth_of(census))


# Which cells: keep-lists, caps, copies, a minimum of counts.


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """900 cells with diseases of one and of several values, tissues, and some cells that are not primary."""
    rng = np.random.default_rng(1)
    diseases = np.array(["normal", "gout", "anaemia || gout", "anaemia || diabetes", "diabetes mellitus"])
    disease = diseases[rng.integers(0, 5, 900)]
    primary = rng.random(900) < 0.9
    disease[:2], primary[:2] = "rare", False
    census = write_census(
        tmp_path_factory.mktemp("labelled") / "census",
        overdispersed(900, 40),
        primary=primary,
        donor_id=of_donors(900),
        disease=disease,
        tissue_general=np.array(["lung", "blood", "eye"])[rng.choice(3, 900, p=[0.6, 0.35, 0.05])],
        sex=np.array(["female", "male"])[rng.integers(0, 2, 900)],
        assay=np.array(["v2", "v3"])[rng.integers(0, 2, 900)],
    )
    return census, truth_of(census)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (["gout"], {"gout", "anaemia || gout"}),
        (["anaemia"], {"anaemia || gout", "anaemia || diabetes"}),
        (["diabetes"], {"anaemia || diabetes"}),
        (["diabetes", "normal"], {"anaemia || diabetes", "normal"}),
        (["anaemia || gout"], {"anaemia || gout"}),
    ],
)
def test_keep_takes_the_cells_that_have_one_of_the_values(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, wanted: list[str], labels: set[str]
) -> None:
    """A disease may stand alone or among others; "diabetes" is no "diabetes mellitus"."""
    census, truth = labelled
    built = build(f"keep.disease = {wanted}\ndrop_duplicates = false", census, tmp_path / "shards", truth)
    chosen = truth.primary[truth.obs["disease"][truth.primary].isin(labels)]
    assert np.array_equal(built.everything, chosen)
    assert list(built.manifest.dropped.items()) == [
        ("value_filter", 900 - len(truth.primary)),
        ("keep.disease", len(truth.primary) - len(chosen)),
    ]
    assert set(built.manifest.codes["disease"]) == labels


def test_rules_act_one_after_the_other_and_each_says_what_it_took(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = labelled
    rules = 'keep = { tissue_general = ["lung", "blood"], disease = ["gout", "normal"], sex = ["female"] }\n'
    rules += 'cap_by = "tissue_general"\ncap_cells = 60\nmin_counts = 30'
    built = build(rules, census, tmp_path / "shards", truth)
    left = [truth.primary]
    for column, values in (
        ("tissue_general", {"lung", "blood"}),
        ("disease", {"gout", "anaemia || gout", "normal"}),
        ("sex", {"female"}),
    ):
        left.append(left[-1][truth.obs[column][left[-1]].isin(values)])
    sizes = truth.obs["tissue_general"][left[-1]].value_counts()
    assert sizes.min() > 30 and sizes.max() > 60
    capped = int(sizes.clip(upper=60).sum())
    sums = np.asarray(truth.counts[:, built.genes].sum(1)).ravel()
    assert np.isin(built.everything, left[-1]).all() and (sums[built.everything] >= 30).all()
    dropped = built.manifest.dropped
    assert list(dropped) == [
        *("value_filter", "keep.tissue_general", "keep.disease", "keep.sex", "cap_cells"),
        *("drop_duplicates", "min_counts"),
    ]
    assert [dropped["value_filter"], *(dropped[f"keep.{name}"] for name in ("tissue_general", "disease", "sex"))] == [
        900 - len(left[0]),
        *(len(before) - len(after) for before, after in zip(left, left[1:], strict=False)),
    ]
    assert dropped["cap_cells"] == len(left[-1]) - capped
    assert dropped["min_counts"] > 0
    assert len(built.everything) == capped - dropped["drop_duplicates"] - dropped["min_counts"]


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ('keep.disease = ["measles"]', r"data.keep.disease: \['measles'\]: matches no cell"),
        ('keep.disease = ["rare"]', r"data.keep.disease: \['rare'\]: matches no cell that the rules before it left"),
        ('keep.tissue_general = ["lung"]\nkeep.tissue = ["lobe"]', r"data.keep.tissue: \['lobe'\]: matches no cell"),
        ("cap_cells = { lung = 5, lungs = 7 }", "data.cap_cells.lungs: 7: is no tissue_general here"),
        ('cap_by = "assay"\ncap_cells = { lung = 5 }', "data.cap_cells.lung: 5: is no assay here"),
        ("value_filter = \"tissue_general == 'kidney'\"", "data.value_filter: .*matches no cell of this Census"),
        ("value_filter = 'tissue_general = lung'", "value_filter: .*is not understood"),
        ("genes = 41", "data.genes: 41: is more than the 40 genes of this Census"),
    ],
)
def test_a_rule_that_the_census_cannot_serve_is_one_line_and_leaves_nothing(
    labelled: tuple[Path, Truth], tmp_path: Path, rules: str, line: str
) -> None:
    with pytest.raises(BadInput, match=line) as refusal:
        build_shards(spec_of(rules), str(labelled[0]), tmp_path / "shards")
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cap", "most"),
    [
        ("cap_cells = 100", {"lung": 100, "blood": 100, "eye": 100}),
        ("cap_cells = { blood = 30, default = 200 }", {"lung": 200, "blood": 30, "eye": 200}),
        ("cap_cells = { lung = 1 }", {"lung": 1, "blood": 10_000, "eye": 10_000}),
        ('cap_by = "disease"\ncap_cells = { gout = 9 }', {"gout": 9}),
    ],
)
def test_a_cap_is_the_most_cells_of_a_value(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, cap: str, most: dict[str, int]
) -> None:
    census, truth = labelled
    column = "disease" if "disease" in cap else "tissue_general"
    built = build(f"{cap}\ndrop_duplicates = false", census, tmp_path / "shards", truth)
    before = truth.obs[column][truth.primary].value_counts()
    wanted = {name: min(count, most.get(name, count)) for name, count in before.items()}
    assert truth.obs[column][built.everything].value_counts().to_dict() == wanted
    assert np.isin(built.everything, truth.primary).all()
    assert built.manifest.dropped["cap_cells"] == len(truth.primary) - sum(wanted.values()) > 0


def test_a_cap_takes_cells_from_everywhere_by_the_salt(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = labelled
    cells = {}
    for name, rules in (("60", ""), ("90", ""), ("60-again", "salt = 'other'\n")):
        rules += f"cap_cells = {name[:2]}\ndrop_duplicates = false"
        cells[name] = build(rules, census, tmp_path / name, truth).everything
    assert set(cells["60"]) < set(cells["90"]), "fewer are a part of more"
    assert set(cells["60"]) != set(cells["60-again"])
    lung = np.flatnonzero(truth.obs["tissue_general"] == "lung")
    chosen = np.intersect1d(cells["60"], lung)
    assert abs(chosen.mean() - lung.mean()) < 4.5 * lung.std() / np.sqrt(len(chosen)), "from all over the Census"


RANGE_CELLS = 2_048
COPIES = {
    # copy: original, over ranges, donors and splits, and of what was itself a copy
    *((7, 3), (2_050, 11), (4_500, 2_051), (4_999, 11), (2_900, 2_899), (4_000, 20), (4_001, 21), (4_002, 22)),
    *((3_000 + i, 40 + i) for i in range(60)),
}


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """5,000 cells in three tiles of X and three data sets, with copies, empty cells and look-alikes.

    Data set d3 holds a few cells with counts in three genes: too little to rank genes in.
    """
    rng = np.random.default_rng(2)
    counts = overdispersed(5_000)
    dataset = np.array(["d0", "d1", "d2"])[np.minimum(rng.integers(0, 3, 5_000), np.arange(5_000) // 1_000)]
    counts[dataset == "d1", :60] //= 2
    for number in range(3):  # genes that vary most in one data set, or in two
        cells, genes = np.flatnonzero(dataset == f"d{number}"), np.arange(20 * number, 20 * number + 30)
        counts[np.ix_(cells, genes)] *= rng.integers(0, 3, (len(cells), 30))
    donor = of_donors(5_000, donors=15)
    for copy, original in sorted(COPIES):
        counts[copy] = counts[original]
    for cell in (500, 501, 3_333, 4_444):
        counts[cell] = 0
    counts[600] = counts[601][::-1]  # the same sum and the same values in other genes
    counts[602] = counts[603]
    counts[602, 0] += 1
    counts[602, 1] -= min(1, counts[602, 1])
    few = 700 + 7 * np.arange(6)
    counts[few], dataset[few] = 0, "d3"
    counts[few, :3] = rng.integers(1, 50, (6, 3))
    donor[few] = [f"p{i:02d}" for i in range(6)]
    primary = rng.random(5_000) < 0.95
    primary[[*(cell for pair in COPIES for cell in pair), 501, 3_333, 4_444, 600, 601, 602, 603]] = True
    primary[[20, 21, 500]] = False  # cells that the filter took say nothing about their copies
    census = write_census(
        tmp_path_factory.mktemp("repeated") / "census",
        counts,
        primary=primary,
        dataset_id=dataset,
        donor_id=donor,
        unmeasured=5,
    )
    return census, truth_of(census)


def test_of_cells_with_the_same_counts_the_first_stays(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = repeated
    lines: list[str] = []
    build_shards(spec_of(""), str(census), tmp_path / "shards", lines.append, SHORT_RANGES)
    built = read_back(tmp_path / "shards", truth)
    kept = truth.without_copies(truth.primary)
    dropped = set(truth.primary.tolist()) - set(kept.tolist())
    assert np.array_equal(built.everything, kept)
    assert built.manifest.dropped == {"value_filter": 5_000 - len(truth.primary), "drop_duplicates": len(dropped)}
    # what the Census was made to hold
    assert {7, 2_050, 4_500, 4_999, 2_900, 4_002} <= dropped and not {3, 11, 2_051, 4_000, 4_001} & dropped
    assert {501, 3_333, 4_444, 600, 601, 602, 603} <= set(kept.tolist())
    donors, split_of = truth.obs["donor_id"], {c: s for s, cells in built.cells.items() for c in cells.tolist()}
    pairs = [(copy, original) for copy, original in COPIES if copy in dropped]
    assert any(donors[copy] != donors[original] for copy, original in pairs)
    assert any(donors[copy] == donors[original] for copy, original in pairs)
    split_of_donor = {donors[cell]: split for cell, split in split_of.items()}
    across = {(split_of_donor[donors[original]], split_of_donor[donors[copy]]) for copy, original in pairs}
    assert {("train", "train"), ("train", "val"), ("train", "test")} <= across


def test_copies_stay_where_the_rule_is_off_and_the_order_of_the_others_is_the_same(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = repeated
    whole = build("drop_duplicates = false", census, tmp_path / "whole", truth, layout=SHORT_RANGES)
    built = build("", census, tmp_path / "shards", truth, layout=SHORT_RANGES)
    assert np.array_equal(whole.everything, truth.primary)
    assert list(whole.manifest.dropped) == ["value_filter"]
    for split in SPLITS:
        assert np.array_equal(built.cells[split], whole.cells[split][np.isin(whole.cells[split], built.everything)])
        assert built.manifest.splits[split].groups == whole.manifest.splits[split].groups
    assert whole.manifest.data_hash != built.manifest.data_hash


def varying(counts: sp.csr_matrix, genes: int, batch: np.ndarray | None = None) -> pd.DataFrame:
    """scanpy's table of highly variable genes."""
    anndata, scanpy = pytest.importorskip("anndata"), pytest.importorskip("scanpy")
    obs = None if batch is None else pd.DataFrame({"batch": pd.Categorical(batch)}, [str(i) for i in range(len(batch))])
    data = anndata.AnnData(counts.astype(np.float32), obs=obs)
    key = None if batch is None else "batch"
    scanpy.pp.highly_variable_genes(data, flavor="seurat_v3", n_top_genes=genes, batch_key=key)
    return data.var.reset_index(drop=True)


@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, SHORT_RANGES], ids=["one", "three"])
def test_genes_are_ranked_as_if_the_copies_had_never_been(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, layout: Layout
) -> None:
    """scanpy ranks the training cells that stayed; with the copies it would rank otherwise."""
    census, truth = repeated
    built = build("genes = 40\ngene_rule = 'seurat_v3'", census, tmp_path / "shards", truth, layout=layout)
    train = truth.counts[built.cells["train"]]
    table = varying(train, 40)
    assert np.array_equal(built.genes, table["highly_variable_rank"].dropna().sort_values().index)
    assert built.table["score"].to_numpy() == pytest.approx(table["variances_norm"][built.genes].to_numpy(), rel=1e-9)
    means = np.asarray(train.mean(0)).ravel()[built.genes]
    assert built.table["train_mean_count"].to_numpy() == pytest.approx(means, rel=1e-12)
    donors = set(truth.obs["donor_id"][built.cells["train"]])
    with_copies = truth.primary[truth.obs["donor_id"][truth.primary].isin(donors)]
    assert len(with_copies) > len(built.cells["train"])
    scores = varying(truth.counts[with_copies], 40)["variances_norm"][built.genes].to_numpy()
    assert np.abs(scores / built.table["score"].to_numpy() - 1).max() > 1e-6


@pytest.mark.parametrize("genes", [15, 50])
def test_genes_are_ranked_within_data_sets_as_scanpy_does(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, genes: int
) -> None:
    """Median rank, then number of data sets with a rank. scanpy leaves genes of equal keys in any order."""
    census, truth = repeated
    rules = f"genes = {genes}\ngene_rule = 'seurat_v3'\nbatch_key = 'dataset_id'"
    built = build(rules, census, tmp_path / "shards", truth, layout=SHORT_RANGES)
    assert built.manifest.batches_left_out == ["d3"]
    train = built.cells["train"]
    batch = truth.obs["dataset_id"][train].to_numpy()
    assert set(batch) == {"d0", "d1", "d2", "d3"}
    for name in ("d0", "d1", "d2"):
        scores = varying(truth.counts[train[batch == name]], genes)["variances_norm"].sort_values().to_numpy()
        assert np.diff(scores[-genes - 1 :]).min() > 1e-9, "ties within a data set: scanpy breaks them by chance"
    ranked = batch != "d3"
    table = varying(truth.counts[train[ranked]], genes, batch[ranked])
    median = table["highly_variable_rank"].fillna(np.inf).to_numpy()
    batches, score = table["highly_variable_nbatches"].to_numpy(), table["variances_norm"].to_numpy()
    keys = list(zip(median, -batches, strict=True))
    best = sorted(keys)[:genes]
    assert [keys[gene] for gene in built.genes] == best
    surely = {gene for gene, key in enumerate(keys) if key < best[-1]}
    of_scanpy = set(np.flatnonzero(table["highly_variable"]).tolist())
    assert surely <= set(built.genes.tolist()) & of_scanpy and len(surely) > 0.8 * genes == 0.8 * len(of_scanpy)
    # of genes with equal keys the more variable comes first
    assert built.genes.tolist() == np.lexsort((-score, -batches, median))[:genes].tolist()
    others = [np.argsort(-score)]
    if genes == 50:  # among the first 15 no two keys differ in one of their parts alone
        others += [np.lexsort((-score, median)), np.lexsort((-batches, median))]
    for other in others:
        assert built.genes.tolist() != other[:genes].tolist(), "the cells do not tell the rules apart"
    assert built.table["score"].to_numpy() == pytest.approx(score[built.genes], rel=1e-9)
    means = np.asarray(truth.counts[train].mean(0)).ravel()[built.genes]
    assert built.table["train_mean_count"].to_numpy() == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("rule", ["by_mean", "first_n"])
def test_the_plainer_rankings(repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, rule: str) -> None:
    census, truth = repeated
    built = build(f"gene_rule = '{rule}'", census, tmp_path / "shards", truth, layout=SHORT_RANGES)
    means = np.asarray(truth.counts[built.cells["train"]].mean(0)).ravel()
    wanted = np.argsort(-means, kind="stable") if rule == "by_mean" else np.arange(GENES)
    assert built.genes.tolist() == wanted[:20].tolist()


@pytest.mark.parametrize("copies", ["true", "false"])
def test_min_counts_are_over_the_chosen_genes(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, copies: str
) -> None:
    census, truth = repeated
    listed = [gene_id(gene) for gene in (90, 7, 33, 1, 119)]
    rules = f"gene_rule = 'list'\ngenes = 5\ngene_list = {listed}\nmin_counts = 6\ndrop_duplicates = {copies}"
    built = build(rules, census, tmp_path / "shards", truth, layout=SHORT_RANGES)
    sums = np.asarray(truth.counts[:, [90, 7, 33, 1, 119]].sum(1)).ravel()
    before = truth.without_copies(truth.primary) if copies == "true" else truth.primary
    wanted = before[sums[before] >= 6]
    assert np.array_equal(built.everything, wanted)
    assert 0 < len(wanted) < len(before) and (sums[wanted] == 6).any()
    assert built.manifest.dropped["min_counts"] == len(before) - len(wanted)
    assert list(built.manifest.dropped)[-1] == "min_counts"
    fractions = [built.manifest.splits[split].fraction for split in SPLITS]
    assert fractions == pytest.approx([len(built.cells[split]) / len(wanted) for split in SPLITS])


def test_a_split_of_many_files_is_the_split_of_one(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    """Files of 12 cells, so that copies and min_counts leave some without a cell: those are not there."""
    census, truth = repeated
    rules = "cap_by = 'dataset_id'\ncap_cells = 450\nmin_counts = 200"
    one = build(rules, census, tmp_path / "one", truth, layout=SHORT_RANGES)
    many = build(rules, census, tmp_path / "many", truth, layout=Layout(range_tiles=1, file_cells=12))
    assert {split: cells.tolist() for split, cells in many.cells.items()} == {
        split: cells.tolist() for split, cells in one.cells.items()
    }
    assert many.genes.tolist() == one.genes.tolist() and many.manifest.dropped == one.manifest.dropped
    assert one.manifest.dropped["drop_duplicates"] > 0, "the case under test"
    files = [file.path for split in SPLITS for file in many.manifest.splits[split].files]
    left_out = [name for name in expected_names(many) if name not in files]
    assert left_out, "the case under test"
    assert sorted(path.name for path in (tmp_path / "many").glob("*-*.parquet")) == sorted(files)
    for split in SPLITS:
        whole = read_split(tmp_path / "one", one.manifest, split, 20)
        assert np.array_equal(read_split(tmp_path / "many", many.manifest, split, 20).counts, whole.counts)
    order = shards_order(open_place(tmp_path / "many"), many.manifest, small_run())
    with closing(StreamFeed(tmp_path / "many", many.manifest, 20, order, cpus=0.0)) as feed:
        cells, _ = feed.batch(3, 64)
        assert np.array_equal(cells.cell, many.cells["train"][order.batch(3, 64)[0]])


def expected_names(built: Built) -> list[str]:
    """Names without a gap up to the last file of each split."""
    last = {split: built.manifest.splits[split].files[-1].path for split in SPLITS}
    return [f"{split}-{i:05d}.parquet" for split in SPLITS for i in range(int(last[split][-13:-8]) + 1)]


# Which genes.


def test_listed_genes_stand_in_the_order_of_the_list(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = labelled
    chosen = [31, 2, 39, 0, 17]
    rules = f"gene_rule = 'list'\ngenes = 5\ngene_list = {[gene_id(gene) for gene in chosen]}"
    assert build(rules, census, tmp_path / "shards", truth).genes.tolist() == chosen


@pytest.mark.parametrize(
    ("unknown", "shown"),
    [
        (["TP53"], "'TP53': is no feature_id of this Census"),
        (["N1", "N2", "N3"], "'N1, N2, N3': is no"),
        ([f"X{i}" for i in range(7)], "'X0, X1, X2 and 4 more': is no"),
    ],
)
def test_unknown_listed_genes_are_one_line_that_names_some(
    labelled: tuple[Path, Truth], tmp_path: Path, unknown: list[str], shown: str
) -> None:
    listed = [gene_id(3), *unknown, gene_id(4)]
    rules = f"gene_rule = 'list'\ngenes = {len(listed)}\ngene_list = {listed}"
    with pytest.raises(BadInput, match=re.escape(f"data.gene_list: {shown}")) as refusal:
        build_shards(spec_of(rules), str(labelled[0]), tmp_path / "shards")
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []


LARGE = 16_777_215
"""The largest count that a Census, in float32, holds beside its neighbours."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """200 cells of 150 genes; 140 genes of cell 77 sum up beyond 32 bits, gene 5 of cell 12 is at the limit."""
    counts = overdispersed(200, 150).astype(np.int64)
    counts[77, 10:] = LARGE
    counts[12, 5] = 65_535
    counts[13, 6] = 65_536
    census = write_census(tmp_path_factory.mktemp("deep") / "census", counts, donor_id=of_donors(200))
    return census, truth_of(census)


@pytest.mark.parametrize(
    ("genes", "line"),
    [
        ([3, 6, 5], r"counts: 65536: of gene ENSG00006 in cell 13 \(1 such\) is more than 65535; "),
        ([20, 6, 5], rf"counts: {LARGE}: of gene ENSG00020 in cell 77 \(2 such\) is more than 65535; "),
    ],
)
def test_a_count_too_large_for_a_chosen_gene_is_one_line(
    deep: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, genes: list[int], line: str
) -> None:
    rules = f"gene_rule = 'list'\ngenes = 3\ngene_list = {[gene_id(gene) for gene in genes]}"
    with pytest.raises(BadInput, match=line) as refusal:
        build_shards(spec_of(rules), str(deep[0]), tmp_path / "shards")
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 2
    assert "data.keep" in str(refusal.value) and "data.gene_list" in str(refusal.value)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_large_count_of_a_gene_that_is_not_chosen_counts_in_the_library(
    deep: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = deep
    rules = f"gene_rule = 'list'\ngenes = 3\ngene_list = {[gene_id(gene) for gene in (5, 0, 9)]}"
    built = build(rules, census, tmp_path / "shards", truth)
    (split,) = [split for split, cells in built.cells.items() if 77 in cells]
    cells = read_split(tmp_path / "shards", built.manifest, split, 3)
    (raw_sum,) = cells.raw_sum[cells.cell == 77]
    assert raw_sum == truth.counts[77].sum() > 140 * LARGE > 2**31
    (split,) = [split for split, cells in built.cells.items() if 12 in cells]
    cells = read_split(tmp_path / "shards", built.manifest, split, 3)
    assert cells.counts[cells.cell == 12][0, 0] == 65_535


# Which split.


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, Truth], tuple[Path, Truth]]:
    """A Census of 10 donors, and a later one of 9 of them with more cells, and 15 new ones."""
    at = tmp_path_factory.mktemp("grown")
    dataset = np.array(["d0", "d1", "d2", "d3"])
    old = write_census(
        at / "old", overdispersed(600, 40), "old", donor_id=of_donors(600), dataset_id=dataset[np.arange(600) % 4]
    )
    donor = np.where(np.arange(2_000) < 900, of_donors(2_000, 9, seed=1), of_donors(2_000, 15, "new", seed=2))
    counts = overdispersed(2_000, 40, seed=3)
    new = write_census(at / "new", counts, "new", donor_id=donor, dataset_id=dataset[np.arange(2_000) % 4])
    return (old, truth_of(old)), (new, truth_of(new))


def test_groups_keep_the_split_they_had(
    grown: tuple[tuple[Path, Truth], tuple[Path, Truth]], ray_cluster: None, tmp_path: Path
) -> None:
    (old, old_truth), (new, truth) = grown
    first = build("", old, tmp_path / "old", old_truth)
    before = {group: split for split in SPLITS for group in first.manifest.splits[split].groups}
    after = build(f"split_from = '{tmp_path / 'old'}'", new, tmp_path / "new", truth)
    now = {group: split for split in SPLITS for group in after.manifest.splits[split].groups}
    assert len(before) == 10 and set(now) == set(truth.obs["donor_id"])
    assert {group: now[group] for group in before if group in now} == {g: s for g, s in before.items() if g in now}
    assert after.manifest.split_from == first.manifest.data_hash and first.manifest.split_from is None
    new_splits = {now[group] for group in now if group.startswith("new")}
    assert new_splits == set(SPLITS), "new groups bring the shares back to those asked for"
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(after.manifest.splits[split].fraction - share) < 0.05
    anew = build("", new, tmp_path / "anew", truth)
    assert any(now[g] != s for s in SPLITS for g in anew.manifest.splits[s].groups if g in before), "it could differ"
    named = build(f"split_from = '{tmp_path / 'old' / 'manifest.json'}'", new, tmp_path / "named", truth)
    assert named.manifest.data_hash == after.manifest.data_hash != anew.manifest.data_hash


def test_a_split_is_carried_over_only_to_groups_of_the_same_kind(
    grown: tuple[tuple[Path, Truth], tuple[Path, Truth]], ray_cluster: None, tmp_path: Path
) -> None:
    (old, truth), (new, _) = grown
    build("split_by = 'dataset_id'", old, tmp_path / "old", truth)
    refused = {
        "split_by = 'donor_id'": "data.split_by: 'donor_id': the shards of data.split_from were split by dataset_id",
        "split_by = 'cell'": "data.split_from: .*carries over donors or data sets",
    }
    for rules, line in refused.items():
        with pytest.raises(BadInput, match=line) as refusal:
            build_shards(spec_of(f"{rules}\nsplit_from = '{tmp_path / 'old'}'"), str(new), tmp_path / "new")
        assert "\n" not in str(refusal.value) and not (tmp_path / "new").exists()
    for missing in (tmp_path / "nowhere", tmp_path / "nowhere" / "manifest.json"):
        with pytest.raises(BadInput, match="data.split_from: .*holds no manifest.json"):
            build_shards(spec_of(f"split_from = '{missing}'"), str(new), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_census_of_old_groups_alone_keeps_them_and_names_a_split_that_stays_empty(
    grown: tuple[tuple[Path, Truth], tuple[Path, Truth]], ray_cluster: None, tmp_path: Path
) -> None:
    (old, truth), _ = grown
    first = build("", old, tmp_path / "old", truth)
    groups = {split: first.manifest.splits[split].groups for split in SPLITS}
    rules = f"split_from = '{tmp_path / 'old'}'\ngenes = 10"
    again = build(rules, old, tmp_path / "again", truth)
    assert {split: again.manifest.splits[split].groups for split in SPLITS} == groups
    kept = sorted({*groups["train"], *groups["test"]})
    with pytest.raises(BadInput, match=r"data.split_from: \['val'\]: would be left without a group"):
        build_shards(spec_of(f"{rules}\nkeep.donor_id = {kept}"), str(old), tmp_path / "without")


# What a conversion refuses, and what it leaves as it was.


@pytest.mark.parametrize(
    ("genes", "resources", "line"),
    [
        (
            20_000,
            "task_memory_gib = 0.75",
            r"data.genes: 20000: needs [\d.]+ GiB .*task_memory_gib allows 0.75: raise that, or lower this",
        ),
        (20, "task_memory_gib = 100000.0", r"resources.task_memory_gib: 100000.0: is more than the [\d.]+ GiB"),
    ],
)
def test_a_bound_on_memory_that_cannot_be_kept_is_one_line(
    labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path, genes: int, resources: str, line: str
) -> None:
    with pytest.raises(BadInput, match=line) as refusal:
        build_shards(spec_of(f"genes = {genes}", resources), str(labelled[0]), tmp_path / "shards")
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 2
    assert not (tmp_path / "shards" / "manifest.json").exists()


def a_newer_encoding(census: Path) -> None:
    """The root says that it was written by a tiledbsoma of the future."""
    root: soma.Collection[Any]
    with soma.Collection.open(str(census), "w") as root:
        root._handle.set_metadata("soma_encoding_version", np.array(["99"], "S"), True)
    (census / "census.json").unlink()  # it knows the number of files


@pytest.mark.parametrize("reason", ["schema", "encoding"])
def test_a_census_of_another_age_is_one_line_and_exit_code_2(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = "3.0.0" if reason == "schema" else CENSUS_SCHEMA_VERSION
    counts = overdispersed(30, 20)
    census = write_census(tmp_path / "census", counts, donor_id=of_donors(30), schema_version=version)
    if reason == "encoding":
        a_newer_encoding(census)
    (tmp_path / "spec.toml").write_text(
        'name = "old"\ngrid = { sizes = ["XXS"], genes = [1], cells = ["all"], seeds = [1] }\nlr.rates = [1e-2]\n'
        "data.genes = 10\n"
    )
    asked = ["shards", "build", str(tmp_path / "spec.toml"), "--census", str(census), "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scaling-ray: ")]
    assert len(said) == 1 and "upgrade" in said[0]
    assert re.search({"schema": r"'3\.0\.0'.*2\.x", "encoding": "census: .*encoding version '99'"}[reason], said[0])
    assert not (tmp_path / "out").exists()


def test_a_place_that_holds_something_else_is_left_as_it_is(labelled: tuple[Path, Truth], tmp_path: Path) -> None:
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "mine" / "deeper" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("mine", "file"):
        with pytest.raises(BadInput) as refusal:
            build_shards(spec_of(""), str(labelled[0]), tmp_path / name)
        assert "\n" not in str(refusal.value) and str(tmp_path / name) in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


NOBODY = """
import os, sys
from scaling_ray.errors import BadInput
from scaling_ray.shards.convert import build_shards
from scaling_ray.spec import load_spec
spec = load_spec(sys.argv[1])
os.setgid(65534)
os.setuid(65534)
for out in sys.argv[3:]:
    try:
        build_shards(spec, sys.argv[2], out)
    except BadInput as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_a_place_that_cannot_be_written_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as folder:  # the folders above tmp_path are closed too
        at = Path(folder)
        census = write_census(at / "census", overdispersed(30, 20), donor_id=of_donors(30))
        (at / "spec.toml").write_text(
            'name = "x"\ngrid = { sizes = ["XXS"], genes = [1], cells = ["all"], seeds = [1] }\nlr.rates = [1e-2]\n'
            "data.genes = 10\n"
        )
        (at / "open").mkdir()
        (at / "open" / "shut").mkdir()
        for path in (at, *at.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (at / "open").chmod(0o777)
        targets = [at / "open" / "shut", at / "none"]
        command = [sys.executable, "-c", NOBODY, *map(str, (at / "spec.toml", census, *targets))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"--out: '{targets[0]}': cannot be used (Permission denied)")
        assert lines[1].startswith(f"--out: '{at}': is not writable")
        assert list((at / "open" / "shut").iterdir()) == [] and not (at / "none").exists()


# A conversion that stopped on the way.

TOO_MANY = "min_counts = 1000000"


@pytest.fixture
def stopped(labelled: tuple[Path, Truth], ray_cluster: None, tmp_path: Path) -> tuple[Path, Path, Truth]:
    """Everything was read, and then min_counts left no cell: a Census of the test's own, the target, the truth."""
    census = tmp_path / "census"
    shutil.copytree(labelled[0], census)
    with pytest.raises(BadInput, match=r"data.min_counts: .*leave none in train") as refusal:
        build_shards(spec_of(TOO_MANY), str(census), tmp_path / "shards")
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "shards" / "building" / "plan.json").is_file()
    return census, tmp_path / "shards", labelled[1]


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("salt = 'another'", "salt"),
        ("keep.sex = ['female']\ndrop_duplicates = false", "drop_duplicates, keep"),
        ("gene_rule = 'seurat_v3'\nbatch_key = 'dataset_id'", "batch_key"),
        ("fractions = { train = 0.6, val = 0.2, test = 0.2 }\nsplit_by = 'cell'", "fractions, split_by"),
    ],
)
def test_an_unfinished_build_by_other_rules_is_named_and_left(
    stopped: tuple[Path, Path, Truth], rules: str, named: str
) -> None:
    census, out, _ = stopped

    def files() -> dict[Path, bytes]:  # the lease names who held it last
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lease"}

    before = files()
    with pytest.raises(BadInput, match=rf"--out: .*unfinished build by other rules \({named}\); finish it") as refusal:
        build_shards(spec_of(rules), str(census), out)
    assert "\n" not in str(refusal.value)
    assert files() == before


def test_an_unfinished_build_of_another_census_is_named(stopped: tuple[Path, Path, Truth], tmp_path: Path) -> None:
    _, out, _ = stopped
    other = write_census(tmp_path / "other", overdispersed(60, 40), "another", donor_id=of_donors(60))
    with pytest.raises(BadInput, match=r"--out: .*unfinished build of another Census \(census\)"):
        build_shards(spec_of(TOO_MANY), str(other), out)


@pytest.mark.parametrize(
    "rules",
    [
        "min_counts = 40",
        "genes = 31\ngene_rule = 'seurat_v3'",
        f"genes = 3\ngene_rule = 'list'\ngene_list = {[gene_id(7), gene_id(1), gene_id(30)]}",
    ],
)
def test_other_rules_on_genes_go_on_without_another_look_at_the_census(
    stopped: tuple[Path, Path, Truth], tmp_path: Path, rules: str
) -> None:
    """The counts of the Census are not even there any more; the shards are those of a build that never stopped."""
    census, out, truth = stopped
    undisturbed = build(rules, census, tmp_path / "undisturbed", truth)
    counts = census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X"
    counts.rename(tmp_path / "counts-moved-away")
    ranges = {path: path.stat().st_mtime_ns for path in (out / "building" / "ranges").iterdir()}
    assert ranges
    with pytest.raises(BadInput, match="leave none in train"):
        build_shards(spec_of(TOO_MANY), str(census), out)
    assert {path: path.stat().st_mtime_ns for path in (out / "building" / "ranges").iterdir()} == ranges
    built = build(rules, census, out, truth)
    assert built.manifest.data_hash == undisturbed.manifest.data_hash
    assert built.manifest.splits == undisturbed.manifest.splits
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "undisturbed").iterdir()}


def test_files_of_an_attempt_with_other_genes_do_not_stay(ray_cluster: None, tmp_path: Path) -> None:
    """The first attempt wrote every training file and found no validation cell; few training cells pass the second."""
    donor, counts = of_donors(300), overdispersed(300, 40)
    census = write_census(tmp_path / "first", counts, "first", donor_id=donor)
    first = build("", census, tmp_path / "by-mean", layout=SMALL_FILES)
    split = np.array(["train"] * 300)
    for name in ("val", "test"):
        split[first.cells[name]] = name
    counts[:, 0], counts[:, 1] = split != "val", (split != "train") | (np.arange(300) % 40 == 0)
    census, out = write_census(tmp_path / "census", counts, donor_id=donor), tmp_path / "shards"
    rules = "gene_rule = 'list'\ngenes = 1\nmin_counts = 1\ngene_list = "
    with pytest.raises(BadInput, match="data.min_counts: .*leave none in val"):
        build_shards(spec_of(f"{rules}['{gene_id(0)}']"), str(census), out, layout=SMALL_FILES)
    written = {path.name for path in out.glob("train-*.parquet")}
    built = build(f"{rules}['{gene_id(1)}']", census, out)
    after = {path.name for path in out.glob("train-*.parquet")}
    assert after == {file.path for file in built.manifest.splits["train"].files}
    assert 0 < len(after) < len(written) - 5 and after < written, "it goes on with files of the size it began with"


# The identity of what was made.


def test_the_data_hash_is_of_cells_and_rules_not_of_memory_or_machine(
    repeated: tuple[Path, Truth], ray_cluster: None, tmp_path: Path
) -> None:
    census, truth = repeated
    rules = "genes = 40\ngene_rule = 'seurat_v3'\nbatch_key = 'dataset_id'\nmin_counts = 20"
    first = build(rules, census, tmp_path / "first", truth)
    hashes = {}
    for name, resources in (("little", "task_memory_gib = 0.75"), ("one", "cpus = 1"), ("two", "cpus = 2")):
        hashes[name] = build(rules, census, tmp_path / name, truth, resources).manifest
    resources = "task_memory_gib = 0.8"
    hashes["ranges"] = build(rules, census, tmp_path / "ranges", truth, resources, SHORT_RANGES).manifest
    for name, manifest in hashes.items():
        assert manifest.data_hash == first.manifest.data_hash, name
        assert manifest.splits == first.manifest.splits, name
        assert manifest.tables == first.manifest.tables, name
    others = {rules.replace("= 20", "= 21"), rules.replace("= 20", "= 19"), rules.replace("genes = 40", "genes = 39")}
    made = [build(r, census, tmp_path / f"other-{i}", truth).manifest.data_hash for i, r in enumerate(sorted(others))]
    assert len({*made, first.manifest.data_hash}) == 4
