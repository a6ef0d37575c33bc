"""Files as people have them: read right, or refused in one line that says why. Every file is made here."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scaling_ray.census.beliefs import Rules
from scaling_ray.census.gene_names import SPECIES, ids_by_name, table_source
from scaling_ray.census.importer import import_h5ad
from scaling_ray.census.source import Census
from scaling_ray.cli import main
from scaling_ray.errors import BadInput


def cells(seed: int = 0, n: int = 120, genes: int = 80, donors: int = 5) -> anndata.AnnData:
    """n cells of overdispersed counts, each with a library of its own, of some donors."""
    random = np.random.default_rng(seed)
    programs = random.gamma(0.3, 1.0, (4, genes))
    programs /= programs.sum(1, keepdims=True)
    kind, library = random.integers(0, 4, n), random.lognormal(6.5, 0.4, n)
    counts = sp.csr_matrix(random.poisson(programs[kind] * library[:, None]).astype(np.float32))
    obs = pd.DataFrame(
        {"donor_id": [f"D{i % donors}" for i in range(n)], "cell_type": [f"type {k}" for k in kind]},
        index=[f"BC{seed}-{i}" for i in range(n)],
    )
    var = pd.DataFrame({"feature_name": [f"GENE{i}" for i in range(genes)]}, index=ensembl(genes))
    return anndata.AnnData(counts, obs=obs, var=var)


def ensembl(genes: int, prefix: str = "ENSG") -> list[str]:
    return [f"{prefix}{i + 1000:011d}" for i in range(genes)]


def write(adata: anndata.AnnData, path: Path) -> Path:
    adata.write_h5ad(path)
    return path


def dense(adata: anndata.AnnData) -> np.ndarray:
    return np.asarray(adata.X.toarray())


class Imported:
    """The whole content of an import and what it said."""

    def __init__(self, files: list[Path], out: Path, **rules: Any) -> None:
        lines: list[str] = []
        with Census.open(import_h5ad(files, out, rules=Rules(**rules), progress=lines.append)) as census:
            self.counts = census.counts(0, census.n_cells).toarray()
            self.obs, self.var, self.organism = census.obs(), census.var(), census.organism
            self.twin_of = census.twin_of()
        self.said = "\n".join(lines)

    @property
    def donors(self) -> list[str]:
        return sorted(self.obs["donor_id"].unique())


def refusal(files: list[Path], out: Path, **rules: Any) -> str:
    with pytest.raises(BadInput) as refused:
        import_h5ad(files, out, rules=Rules(**rules))
    assert "\n" not in str(refused.value) and not out.exists()
    return str(refused.value)


# Containers: the counts are those that anndata reads.


def as_h5ad(adata: anndata.AnnData, at: Path) -> Path:
    return write(adata, at / "cells.h5ad")


def as_packed_h5ad(adata: anndata.AnnData, at: Path) -> Path:
    plain = write(adata, at / "plain.h5ad")
    with open(plain, "rb") as source, gzip.open(at / "cells.h5ad.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    return at / "cells.h5ad.gz"


def as_zarr(adata: anndata.AnnData, at: Path) -> Path:
    adata.write_zarr(at / "cells.zarr")
    return at / "cells.zarr"


def as_h5mu(adata: anndata.AnnData, at: Path) -> Path:
    with h5py.File(at / "cells.h5mu", "w") as file:
        proteins = anndata.AnnData(np.ones((len(adata), 3), np.float32))
        anndata.io.write_elem(file, "mod/prot", proteins)
        anndata.io.write_elem(file, "mod/rna", adata)
    return at / "cells.h5mu"


def as_old_h5ad(adata: anndata.AnnData, at: Path) -> Path:
    """As anndata 0.6 wrote it: tables of one compound type each, a matrix that says its format in h5sparse's words."""
    with h5py.File(at / "cells.h5ad", "w") as file:
        matrix = file.create_group("X")
        matrix.attrs["h5sparse_format"], matrix.attrs["h5sparse_shape"] = b"csr", np.array(adata.shape)
        for key in ("data", "indices", "indptr"):
            matrix.create_dataset(key, data=getattr(adata.X, key))
        obs = np.zeros(adata.n_obs, dtype=[("index", "S20"), ("donor_id", "S5")])
        obs["index"], obs["donor_id"] = adata.obs_names.to_numpy(), adata.obs["donor_id"].to_numpy(str)
        var = np.zeros(adata.n_vars, dtype=[("index", "S20")])
        var["index"] = adata.var_names.to_numpy()
        file.create_dataset("obs", data=obs)
        file.create_dataset("var", data=var)
    return at / "cells.h5ad"


def as_mtx(adata: anndata.AnnData, at: Path, prefix: str = "", packed: bool = True, features: str = "features") -> Path:
    folder = at / "filtered_feature_bc_matrix"
    folder.mkdir()
    ending = ".gz" if packed else ""
    opened: Any = gzip.open if packed else open
    with opened(folder / f"{prefix}matrix.mtx{ending}", "wb") as file:
        scipy.io.mmwrite(file, adata.X.T.astype(int))
    kind = "\tGene Expression" if features == "features" else ""
    lines = [f"{i}\t{n}{kind}" for i, n in zip(adata.var_names, adata.var["feature_name"], strict=True)]
    with opened(folder / f"{prefix}{features}.tsv{ending}", "wb") as file:
        file.write("\n".join(lines).encode())
    with opened(folder / f"{prefix}barcodes.tsv{ending}", "wb") as file:
        file.write("\n".join(adata.obs_names).encode())
    return folder


def as_old_mtx(adata: anndata.AnnData, at: Path) -> Path:
    return as_mtx(adata, at, packed=False, features="genes")


def as_mtx_of_geo(adata: anndata.AnnData, at: Path) -> Path:
    return as_mtx(adata, at, prefix="GSM1_donor_") / "GSM1_donor_matrix.mtx.gz"


def as_tenx_h5(adata: anndata.AnnData, at: Path) -> Path:
    with h5py.File(at / "cells.h5", "w") as file:
        matrix, rows = file.create_group("matrix"), adata.X.tocsr()
        for key, value in (("data", rows.data.astype("i4")), ("indices", rows.indices), ("indptr", rows.indptr)):
            matrix.create_dataset(key, data=value)
        matrix.create_dataset("shape", data=[adata.n_vars, adata.n_obs])
        matrix.create_dataset("barcodes", data=adata.obs_names.to_numpy().astype("S"))
        features = matrix.create_group("features")
        names = {"id": adata.var_names, "name": adata.var["feature_name"], "feature_type": ["Gene Expression"] * 80}
        for key, words in names.items():
            features.create_dataset(key, data=np.array(list(words), dtype="S"))
    return at / "cells.h5"


def as_loom(adata: anndata.AnnData, at: Path) -> Path:
    pytest.importorskip("loompy")
    adata.write_loom(at / "cells.loom")
    return at / "cells.loom"


WRITERS = (
    as_h5ad,
    as_packed_h5ad,
    as_zarr,
    as_h5mu,
    as_old_h5ad,
    as_mtx,
    as_old_mtx,
    as_mtx_of_geo,
    as_tenx_h5,
    as_loom,
)


@pytest.mark.filterwarnings("ignore")  # of the libraries that write
@pytest.mark.parametrize("container", WRITERS, ids=lambda writer: str(writer.__name__))
def test_counts_of_every_container_are_those_that_were_written(
    container: Callable[[anndata.AnnData, Path], Path], tmp_path: Path
) -> None:
    adata = cells()
    found = Imported([container(adata, tmp_path)], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, dense(adata))
    assert list(found.var["feature_id"]) == list(adata.var_names)
    assert list(found.obs["observation_joinid"]) == list(adata.obs_names)
    if "donor_id from" in found.said or " from donor_id" in found.said:
        assert list(found.obs["donor_id"]) == list(adata.obs["donor_id"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("object.rds", b"x", "R object.*write_h5ad"),
        ("table.csv.gz", b"x", "table of text"),
        ("cells.h5ad", b"no HDF5", "no whole .h5ad"),
        ("cells.h5ad.gz", b"no gzip", "no whole gzip file"),
        ("matrix.mtx", b"%%MatrixMarket", "no features.tsv beside it"),
    ],
)
def test_what_is_not_read_says_the_way_to_what_is(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=reason):
        import_h5ad([tmp_path / name], tmp_path / "census")


def test_a_folder_that_is_no_matrix_names_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "is a folder with nothing" in refusal([tmp_path / "in"], tmp_path / "census")
    write(cells(), tmp_path / "in" / "good.h5ad")
    assert "name what is in it, such as" in refusal([tmp_path / "in"], tmp_path / "census")


# Values.


def test_repeated_entries_of_a_cell_and_a_gene_are_summed(tmp_path: Path) -> None:
    adata = cells()
    path = write(adata, tmp_path / "cells.h5ad")
    rows = adata.X.tocsr()
    half = np.minimum(rows.data - 1, 3)  # every count above one as two entries
    twice = sp.csr_matrix(
        (
            np.stack([rows.data - half, half], axis=1).ravel(),
            np.repeat(rows.indices, 2),
            rows.indptr * 2,
        ),
        shape=rows.shape,
    )
    with h5py.File(path, "r+") as file:
        for key in ("data", "indices", "indptr"):
            del file[f"X/{key}"]
            file["X"].create_dataset(key, data=getattr(twice, key))
    found = Imported([path], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, dense(adata))
    np.testing.assert_array_equal(found.counts, anndata.read_h5ad(path).X.toarray())
    assert f"{rows.nnz:,} entries named a cell and a gene once more; the count is their sum" in found.said


def test_almost_whole_numbers_are_read_and_said_and_fractions_are_not(tmp_path: Path) -> None:
    adata, noisy = cells(), cells()
    random = np.random.default_rng(1)
    noisy.X = noisy.X.astype(np.float64)
    noisy.X.data += 1e-7 * random.standard_normal(noisy.X.nnz)
    found = Imported([write(noisy, tmp_path / "noisy.h5ad")], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, dense(adata))
    assert "were read as whole numbers" in found.said and "tolerance 0.001" in found.said
    noisy.X.data += 0.01
    assert "fractional" in refusal([write(noisy, tmp_path / "off.h5ad")], tmp_path / "off")
    small = cells()
    small.X = sp.csr_matrix(dense(small) / 1e6)
    assert "rounding would lose" in refusal([write(small, tmp_path / "small.h5ad")], tmp_path / "small")


def test_half_precision_is_read(tmp_path: Path) -> None:
    adata = cells()
    adata.X = dense(adata).astype(np.float16)
    found = Imported([write(adata, tmp_path / "half.h5ad")], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, dense(cells()))


def rounded(transform: Callable[[np.ndarray, np.ndarray], np.ndarray], genes: slice = slice(None)) -> anndata.AnnData:
    adata = cells(n=300, genes=200)
    counts = dense(adata)
    adata.X = sp.csr_matrix(np.rint(transform(counts, counts.sum(1, keepdims=True))).astype(np.float32))
    return adata[:, genes].copy()


NO_COUNTS = {
    "seen or not": (lambda x, _: x > 0, slice(None), "is 1: a matrix of seen or not seen"),
    "CP10K": (lambda x, total: x / total * 1e4, slice(None), "same total"),
    "CP10K of a panel": (lambda x, total: x / total * 1e4, slice(50), "no gene with one count"),
    "log of CP10K": (lambda x, total: np.log1p(x / total * 1e4), slice(None), "no gene with one count"),
    "log of counts": (lambda x, _: np.log1p(x), slice(None), "rounded logarithms"),
    "log2 of counts": (lambda x, _: np.log2(1 + x), slice(50), "rounded logarithms"),
}


@pytest.mark.parametrize("name", NO_COUNTS)
def test_whole_numbers_that_are_no_counts_are_refused_unless_trusted(name: str, tmp_path: Path) -> None:
    transform, genes, reason = NO_COUNTS[name]
    adata = rounded(transform, genes)
    path = write(adata, tmp_path / "cells.h5ad")
    said = refusal([path], tmp_path / "census")
    assert reason in said and "--trust-counts" in said
    found = Imported([path], tmp_path / "trusted", trust_counts=True)
    np.testing.assert_array_equal(found.counts, dense(adata)[dense(adata).sum(1) > 0])


@pytest.mark.parametrize("share", [1.0, 0.3, 0.1, 0.03])
def test_real_counts_are_not_refused_however_shallow(share: float, tmp_path: Path) -> None:
    adata = cells(n=300, genes=200)
    random = np.random.default_rng(2)
    adata.X = sp.csr_matrix(random.binomial(dense(adata).astype(int), share).astype(np.float32))
    assert len(Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census").counts) > 200


def test_cells_without_counts_are_dropped_and_said(tmp_path: Path) -> None:
    adata = cells()
    counts = dense(adata)
    counts[:20], counts[:, :10] = 0, 0
    adata.X = sp.csr_matrix(counts)
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, counts[20:])
    assert list(found.obs["observation_joinid"]) == list(adata.obs_names[20:])
    assert "20 cells without counts" in found.said


def test_counts_cut_to_a_panel_are_told_by_the_total_that_obs_says(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["total_counts"] = dense(adata).sum(1)
    most = np.argsort(-dense(adata).sum(0))
    whole = Imported([write(adata, tmp_path / "whole.h5ad")], tmp_path / "whole")
    assert "of obs column total_counts" not in whole.said
    some = Imported([write(adata[:, most[:40]].copy(), tmp_path / "some.h5ad")], tmp_path / "some")
    assert "% of obs column total_counts" in some.said and "WARNING" in some.said
    cut = write(adata[:, most[40:]].copy(), tmp_path / "cut.h5ad")
    assert "cut to a panel" in refusal([cut], tmp_path / "cut")
    assert "% of obs column total_counts" in Imported([cut], tmp_path / "asked", cut_counts=True).said


# Which matrix.


def test_several_integer_matrices_need_a_choice_that_run_takes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = cells()
    adata.layers["detected"] = adata.X > 0
    path = write(adata, tmp_path / "cells.h5ad")
    assert "['X', 'detected']" in (said := refusal([path], tmp_path / "census")) and "--layer" in said
    assert main(["run", "--cells", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "--layer" in capsys.readouterr().err.splitlines()[-1]
    np.testing.assert_array_equal(Imported([path], tmp_path / "census", layer="X").counts, dense(cells()))


def test_a_layer_in_a_folder_of_its_own_hides_no_other(tmp_path: Path) -> None:
    path = write(cells(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file.copy("X", file.require_group("layers").require_group("RNA"), name="counts")
    found = Imported([path], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, dense(cells()))
    assert "WARNING    RNA is no matrix but a group (of RNA/counts)" in found.said
    assert "is no matrix" in refusal([path], tmp_path / "other", layer="RNA")


# Genes.


def test_versions_of_ids_are_dropped_and_collisions_refused(tmp_path: Path) -> None:
    plain, versioned = cells(), cells(seed=2)
    versioned.var_names = [f"{gene}.{number % 17 + 1}" for number, gene in enumerate(plain.var_names)]
    files = [write(plain, tmp_path / "plain.h5ad"), write(versioned, tmp_path / "versioned.h5ad")]
    found = Imported(files, tmp_path / "census")
    assert list(found.var["feature_id"]) == list(plain.var_names)
    np.testing.assert_array_equal(found.counts, np.concatenate([dense(plain), dense(versioned)]))
    assert "80 Ensembl ids had a version, which was dropped" in found.said
    versioned.var_names = [f"{plain.var_names[0]}.1", f"{plain.var_names[0]}.2", *versioned.var_names[2:]]
    assert "occurs more than once" in refusal([write(versioned, tmp_path / "twice.h5ad")], tmp_path / "twice")


def test_names_are_matched_by_the_other_files_of_an_import(tmp_path: Path) -> None:
    plain, named = cells(), cells(seed=2)
    named.var = pd.DataFrame(index=[f"GENE{i}" for i in range(80)])
    files = [write(named, tmp_path / "named.h5ad"), write(plain, tmp_path / "plain.h5ad")]
    found = Imported(files, tmp_path / "census")
    assert list(found.var["feature_id"]) == list(plain.var_names)
    assert "names by the ids of the other files (80); 100.0% of 80 genes" in found.said
    alone = refusal(files[:1], tmp_path / "alone")
    assert "0 of 80 known" in alone and "GENCODE" in alone
    given = Imported(files[:1], tmp_path / "given", gene_ids="given", organism="homo_sapiens")
    assert list(given.var["feature_id"]) == list(named.var_names)


HUMAN = ["TP53", "CD3E", "CD4", "CD8A", "MS4A1", "NKG7", "LYZ", "GNLY", "PPBP", "CST3", "IL7R", "CCR7", "ERCC1", "ACTB"]
MOUSE = [
    "Trp53",
    "Cd3e",
    "Cd4",
    "Cd8a",
    "Ms4a1",
    "Nkg7",
    "Lyz2",
    "Ppbp",
    "Cst3",
    "Il7r",
    "Ccr7",
    "Actb",
    "Xkr4",
    "Sox17",
]


@pytest.mark.parametrize(
    ("names", "organism", "first"),
    [(HUMAN, "homo_sapiens", "ENSG00000141510"), (MOUSE, "mus_musculus", "ENSMUSG00000059552")],
)
def test_names_are_matched_by_the_pinned_table_and_others_keep_their_counts(
    names: list[str], organism: str, first: str, tmp_path: Path
) -> None:
    adata = cells(genes=16)
    adata.var = pd.DataFrame(index=[*names, "my-transgene", "tdTomato"])
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    assert found.organism == organism
    assert found.var["feature_id"][0] == first and list(found.var["feature_name"]) == list(adata.var_names)
    assert list(found.var["feature_id"][-2:]) == ["my-transgene", "tdTomato"]
    np.testing.assert_array_equal(found.counts, dense(adata))
    assert "GENCODE release" in found.said and "(14); 87.5% of 16 genes" in found.said
    assert "2 genes have no known id" in found.said


def test_an_id_column_with_gaps_falls_back_to_names(tmp_path: Path) -> None:
    adata = cells()
    ids: list[str | None] = list(adata.var_names)
    ids[3], ids[5], ids[7] = None, "", "nan"
    adata.var = pd.DataFrame({"gene_ids": ids}, index=[*(f"GENE{i}" for i in range(79)), "TP53"])
    adata.var.loc["GENE3", "gene_ids"] = None
    names = list(adata.var_names)
    names[5] = "ACTB"
    adata.var_names = names
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    assert list(found.var["feature_id"][[3, 5, 7]]) == ["GENE3", "ENSG00000075624", "GENE7"]
    np.testing.assert_array_equal(found.counts, dense(adata))


def test_one_census_holds_one_species(tmp_path: Path) -> None:
    human, mouse, both = cells(), cells(seed=7), cells(seed=8)
    mouse.var_names = ensembl(80, "ENSMUSG")
    both.var_names = [*ensembl(50), *ensembl(30, "ENSMUSG")]
    files = [write(a, tmp_path / f"{n}.h5ad") for n, a in (("human", human), ("mouse", mouse), ("both", both))]
    said = refusal(files[:2], tmp_path / "census")
    assert "80 genes of homo_sapiens" in said and "80 genes of mus_musculus" in said
    said = refusal(files[2:], tmp_path / "census")
    assert "homo_sapiens 50" in said and "mus_musculus 30" in said and "--organism" in said
    found = Imported(files[2:], tmp_path / "half", organism="mus_musculus")
    np.testing.assert_array_equal(found.counts, dense(both)[:, 50:])
    assert found.organism == "mus_musculus" and "50 genes of other species" in found.said
    assert Imported(files[1:2], tmp_path / "whole").organism == "mus_musculus"
    fish = cells()
    fish.var_names = ensembl(80, "ENSDARG")
    assert "is not supported" in refusal([write(fish, tmp_path / "fish.h5ad")], tmp_path / "fish")


@pytest.mark.parametrize("by_type", [True, False])
def test_antibodies_are_no_genes_and_no_part_of_a_library(by_type: bool, tmp_path: Path) -> None:
    adata = cells()
    counts = dense(adata)
    counts[:, 60:] = np.random.default_rng(0).poisson(400, (120, 20))
    adata.X = sp.csr_matrix(counts)
    adata.var["gene_ids"] = [*adata.var_names[:60], *(f"CD{i}_TotalSeqB" for i in range(20))]
    adata.var_names = [f"GENE{i}" for i in range(60)] + [f"CD{i}_TotalSeqB" for i in range(20)]
    if by_type:
        adata.var["feature_types"] = ["Gene Expression"] * 60 + ["Antibody Capture"] * 20
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    np.testing.assert_array_equal(found.counts, counts[:, :60])
    np.testing.assert_array_equal(found.obs["raw_sum"], counts[:, :60].sum(1))
    assert "20 antibodies: no genes" in found.said


def test_peaks_alone_are_refused(tmp_path: Path) -> None:
    adata = cells()
    adata.X.data[:] = 1
    adata.var_names = [f"chr1:{i * 1000}-{i * 1000 + 500}" for i in range(80)]
    for name, column in (("typed", ["Peaks"] * 80), ("bare", ["?"] * 80)):
        adata.var["feature_types" if name == "typed" else "note"] = column
        said = refusal([write(adata, tmp_path / f"{name}.h5ad")], tmp_path / "census")
        assert "80 peaks" in said and "no genes" in said


def test_genes_of_several_files_are_joined_by_the_rule_that_is_asked_for(tmp_path: Path) -> None:
    first, second = cells(), cells(seed=2)
    files = [write(first[:, :60].copy(), tmp_path / "a.h5ad"), write(second[:, 20:].copy(), tmp_path / "b.h5ad")]
    union = Imported(files, tmp_path / "union")
    assert union.counts.shape == (240, 80) and "80 (union); 40 are in every file" in union.said
    shared = Imported(files, tmp_path / "shared", genes="intersection")
    assert list(shared.var["feature_id"]) == list(first.var_names[20:60])
    np.testing.assert_array_equal(shared.counts[:120], dense(first)[:, 20:60])
    assert "libraries of the shared genes are" in shared.said
    second.var_names = ensembl(80, "ENSG9")
    none = [files[0], write(second, tmp_path / "c.h5ad")]
    assert "share no gene" in refusal(none, tmp_path / "none")


# Donors.


def with_donors(labels: list[Any], column: str = "donor_id", seed: int = 0) -> anndata.AnnData:
    adata = cells(seed)
    adata.obs = adata.obs.drop(columns="donor_id")
    adata.obs[column] = [labels[i % len(labels)] for i in range(len(adata))]
    return adata


def test_spellings_of_one_donor_are_one_donor(tmp_path: Path) -> None:
    numbers, fractions = with_donors([1, 2, 3, 4, 5]), with_donors([1.0, 2.0, 3.0, 4.0, 5.0], seed=2)
    fractions.obs.loc[fractions.obs_names[:3], "donor_id"] = np.nan
    texts = with_donors(["P1 ", "p1", "P-01", "P2", "P11", "P1.1"], seed=3)
    files = [write(a, tmp_path / f"{n}.h5ad") for n, a in (("ints", numbers), ("floats", fractions), ("texts", texts))]
    found = Imported(files[:2], tmp_path / "two")
    assert found.donors == ["1", "2", "3", "4", "5", "unknown"]
    assert (found.obs["donor_id"] == "unknown").sum() == 3 and "3 cells ('missing' 3)" in found.said
    found = Imported(files[2:], tmp_path / "three")
    assert found.donors == ["P1", "P1.1", "P11", "P2"]
    assert "'P-01', 'p1' as 'P1'" in found.said


def test_labels_that_name_nobody_are_no_donors(tmp_path: Path) -> None:
    adata = with_donors(["pooled", "unknown", "N/A", "Doublet", "D1", "D2", "D3", "D4"])
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    assert found.donors == ["D1", "D2", "D3", "D4", "pooled", "unknown"]
    assert "4 from donor_id" in found.said
    assert "60 cells" in found.said and "'pooled' 15" in found.said and "in training only" in found.said


@pytest.mark.parametrize("column", ["SampleID", "orig.ident", "Biopsy Number"])
def test_a_column_like_donors_is_proposed_and_taken_when_asked_for(column: str, tmp_path: Path) -> None:
    path = write(with_donors(["a", "b", "c", "d"], column), tmp_path / "cells.h5ad")
    found = Imported([path], tmp_path / "census")
    assert found.donors == ["unknown"] and "--donor" in found.said and column in found.said
    assert Imported([path], tmp_path / "asked", donor=(column,)).donors == ["a", "b", "c", "d"]
    said = refusal([path], tmp_path / "wrong", donor=("nonesuch",))
    assert "--donor" in said and column in said


@pytest.mark.parametrize("column", ["patient", "Donor ID", "subject_id", "Individual"])
def test_columns_of_donors_go_by_their_names(column: str, tmp_path: Path) -> None:
    path = write(with_donors(["a", "b", "c", "d"], column), tmp_path / "cells.h5ad")
    assert Imported([path], tmp_path / "census").donors == ["a", "b", "c", "d"]


def test_a_file_can_be_a_donor_and_its_differences_then_are_no_proof(tmp_path: Path) -> None:
    files = [write(with_donors(["?"], "note", seed=seed), tmp_path / f"person{seed}.h5ad") for seed in range(3)]
    found = Imported(files, tmp_path / "census", donor=("@file",))
    assert found.donors == ["person0", "person1", "person2"]
    assert "each of 3 files is one donor" in found.said and "a split by donor needs" not in found.said


def test_donors_that_are_batches_are_warned_of(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["batch"] = ["run " + donor for donor in adata.obs["donor_id"]]
    found = Imported([write(adata, tmp_path / "cells.h5ad")], tmp_path / "census")
    assert "each of 5 donors is a batch of its own (batch)" in found.said


# The table.


def test_check_tells_the_table_of_an_import_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, logs = cells(), cells()
    logs.X = logs.X.log1p()
    files = [str(write(good, tmp_path / "good.h5ad")), str(write(logs, tmp_path / "logs.h5ad"))]
    before = sorted(tmp_path.iterdir())
    assert main(["census", "check", files[0]]) == 0
    table = capsys.readouterr().out
    for row in (
        "counts     raw counts from X",
        "genes      80 of homo_sapiens",
        "donors     5 from donor_id",
        "libraries",
    ):
        assert row in table
    assert "% zeros" in table
    found = Imported([Path(files[0])], tmp_path / "census")
    assert all(line in found.said for line in table.splitlines())
    shutil.rmtree(tmp_path / "census")
    assert main(["census", "check", *files]) == 2
    told = capsys.readouterr()
    assert "counts     raw counts from X" in told.out, "the good file is told all the same"
    assert "REFUSED" in told.out and "fractional" in told.out
    assert len(told.err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_title_and_source_name_the_data_sets(tmp_path: Path) -> None:
    path = write(cells(), tmp_path / "cells.h5ad")
    out = import_h5ad([path], tmp_path / "census", rules=Rules(title="Our marrow", source="doi:10.1/x"))
    with Census.open(out) as census:
        table = census._root["census_info"]["datasets"].read().concat().to_pandas()
    assert list(table["dataset_title"]) == ["Our marrow"] and list(table["citation"]) == ["doi:10.1/x"]


def test_flags_of_reading_need_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--donor", "x", "--out", str(tmp_path)]) == 2
    assert "goes with --cells" in capsys.readouterr().err
    assert main(["run", "--out", str(tmp_path)]) == 2
    assert "--cells" in capsys.readouterr().err
    assert main(["run", "--cells", "a.h5ad", "cells.toml", "--out", str(tmp_path)]) == 2
    assert "name it before --cells" in capsys.readouterr().err


def test_the_pinned_tables_say_where_they_are_from_and_hold_each_id_once() -> None:
    for organism, prefix in SPECIES.items():
        table = ids_by_name(organism)
        assert len(table) > 40_000 and len(set(table.values())) == len(table)
        assert all(
            feature_id.startswith(prefix) and len(feature_id) == len(prefix) + 11 for feature_id in table.values()
        )
        assert table_source(organism).startswith("GENCODE release ")
    # on X and on Y: the id on X; of several genes: none
    assert ids_by_name("homo_sapiens")["CD99"] == "ENSG00000002586"
    assert "Y_RNA" not in ids_by_name("homo_sapiens")


# Slips that people make.


def test_a_column_that_names_no_people_is_doubted(tmp_path: Path) -> None:
    found = Imported([write(cells(), tmp_path / "cells.h5ad")], tmp_path / "census", donor=("cell_type",))
    assert "donors are from cell_type, which was read as cell_type too: are its values people?" in found.said


def test_one_label_over_all_donors_of_another_file_is_doubted(tmp_path: Path) -> None:
    adata = cells(donors=4)
    files = [write(a, tmp_path / f"{n}.h5ad") for n, a in (("all", adata), ("again", adata[:60].copy()))]
    found = Imported(files, tmp_path / "census", donor=("@file",))
    assert found.donors == ["all"] and "became one" not in found.said
    del adata.obs["donor_id"]
    again = write(adata[:60].copy(), tmp_path / "nobody.h5ad")
    found = Imported([files[0], again], tmp_path / "two", donor=("donor_id", "@file"))
    assert "4 donors of all.h5ad became one, 'D3', since they share cells with 'nobody' of another file" in found.said
    assert "1 donor in all: a split by donor needs 3" in found.said


def test_a_layer_that_holds_no_counts_names_the_one_that_does(tmp_path: Path) -> None:
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.37
    path = write(adata, tmp_path / "cells.h5ad")
    assert "Raw counts are in counts: name it, or leave --layer out" in refusal([path], tmp_path / "c", layer="X")
    np.testing.assert_array_equal(Imported([path], tmp_path / "census").counts, dense(cells()))


def test_a_part_of_a_folder_and_a_matrix_on_its_side_are_told(tmp_path: Path) -> None:
    folder = as_mtx(cells(), tmp_path)
    assert "name the folder" in refusal([folder / "barcodes.tsv.gz"], tmp_path / "c")
    adata = cells()
    side = anndata.AnnData(
        adata.X.T.tocsr(), obs=pd.DataFrame(index=adata.var_names), var=pd.DataFrame(index=adata.obs_names)
    )
    said = refusal([write(side, tmp_path / "side.h5ad")], tmp_path / "c")
    assert "100% of the cells' names are known genes: the matrix lies on its side" in said


def test_donors_are_counted_before_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = cells()
    adata.obs = adata.obs.rename(columns={"donor_id": "batch"})
    path, out = write(adata, tmp_path / "cells.h5ad"), tmp_path / "out"
    assert main(["run", "--cells", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "needs 3 donors and these cells have 0 (none)" in said and "--split cell" in said and "--donor" in said
    assert not (out / "census").exists()
    assert not (out / "cells.toml").exists()


def test_another_import_at_the_same_place_says_what_differs(tmp_path: Path) -> None:
    path, other = (write(cells(seed), tmp_path / f"{seed}.h5ad") for seed in (0, 1))
    out = tmp_path / "census"
    import_h5ad([path], out, rules=Rules())
    by_donor = Rules(donor=("cell_type",))
    for file, rules, word in ((path, by_donor, "by other flags"), (other, Rules(), "of other files")):
        with pytest.raises(BadInput, match=f"was imported {word}; remove it or name a new directory"):
            import_h5ad([file], out, rules=rules)
