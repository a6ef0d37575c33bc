"""New cells through a model: the mean over measured genes of the plain encoder's output, whatever the file's layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from test_census_import import REAL_CELLS
from test_network import GENES, Reference, network_of

from scaling_ray.census.source import Census
from scaling_ray.cli import main
from scaling_ray.embedding import EMBEDDING
from scaling_ray.model.exported import read_record, save_model
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.neighbours import NEIGHBOURS, Sample, compare_with_components
from scaling_ray.sizes import Shape

WIDE, WIDTH_ONE = Shape(12, 2, 3, 4), Shape(1, 1, 1, 1)
real_cells = pytest.mark.skipif(not REAL_CELLS.is_file(), reason="the real cells are not on this machine")


def save(
    directory: Path, network: MaskedGeneTransformer, feature_ids: list[str], recipe: str = "corrected"
) -> tuple[Path, MaskedGeneTransformer]:
    """A model directory around a network of some gene ids."""
    directory.mkdir()
    facts: dict[str, Any] = dict.fromkeys(("width", "layers", "heads", "feedforward"))
    facts = {name: getattr(network.shape, name) for name in facts}
    facts |= {"run_id": "law-test", "size": "TEST", "params": sum(p.numel() for p in network.parameters())}
    facts |= {"feature_ids": feature_ids, "feature_names": feature_ids, "recipe": recipe, "mask_fraction": 0.15}
    facts |= {"umi_fraction": 1.0, "precision": "fp32", "seed": 1, "lr": 0.01, "val_loss": 1.0, "test_loss": None}
    facts |= {"objective": "mse", "loss_unit": "mse", "data_hash": "hash", "census": {}, "scaling_ray_version": "0"}
    save_model(directory, dict(network.state_dict()), facts)
    return directory, network


def embed(model: Path, file: Path, out: Path, *options: str) -> anndata.AnnData:
    assert main(["embed", str(model), str(file), "--out", str(out), *options]) == 0
    return anndata.read_h5ad(out)


def expected(
    network: MaskedGeneTransformer,
    counts: NDArray[np.float64],
    library: NDArray[np.float64],
    measured: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """(B, D) by torch's own encoder layers in double precision. counts (B, G), library (B,), measured (G,)."""
    values = torch.from_numpy(np.log1p(counts * 1e4 / np.maximum(library, 1)[:, None]))
    reference = Reference(network.double()).double()
    found = []
    with torch.no_grad():
        for cell in values:
            hidden = torch.from_numpy(~measured)[None]
            shown = reference.project(cell[None, :, None])
            x = torch.where(hidden[:, :, None], reference.mask_token.expand_as(shown), shown)
            x = x + reference.embedding.weight
            for layer in reference.layers:
                x = layer(x)
            found.append(x[0, torch.from_numpy(measured)].mean(0).numpy())
    network.float()
    return np.stack(found)


def planted_cells(census: Path, cells: int = 90) -> anndata.AnnData:
    """The first planted cells with their genes, as a file of a stranger would hold them."""
    with Census.open(census) as opened:
        counts, var, obs = opened.counts(0, cells), opened.var(), opened.obs()
    return anndata.AnnData(
        sp.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(
            {"donor": obs["donor_id"][:cells].astype(str).to_numpy()}, index=[f"c{i}" for i in range(cells)]
        ),
        var=pd.DataFrame({"symbol": "?"}, index=list(var["feature_id"])),
    )


@pytest.fixture(scope="module")
def cells(planted_census: Path) -> anndata.AnnData:
    return planted_cells(planted_census)


@pytest.fixture(scope="module")
def panel(cells: anndata.AnnData) -> list[str]:
    """Fifty gene ids in an order that is not the file's."""
    return list(np.random.default_rng(5).permutation(cells.var_names)[:GENES])


def write(adata: anndata.AnnData, path: Path) -> Path:
    adata.write_h5ad(path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    code = main(["embed", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


@torch.no_grad()
def test_the_head_on_the_encoded_genes_is_the_prediction() -> None:
    network = network_of(WIDE)
    values, hidden = torch.rand(4, GENES), torch.rand(4, GENES) < 0.3
    everywhere = network.head(network.encode(values, hidden))
    positions = torch.arange(GENES).expand(4, GENES)
    torch.testing.assert_close(everywhere, network(values, hidden, positions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["corrected", "published"])
@pytest.mark.parametrize("shape", [WIDE, WIDTH_ONE], ids=str)
def test_an_embedding_is_the_mean_of_the_plain_encoder_over_measured_genes(
    shape: Shape, recipe: str, cells: anndata.AnnData, panel: list[str], tmp_path: Path
) -> None:
    model, network = save(tmp_path / "model", network_of(shape), panel, recipe)
    absent = set(panel[::7])
    some = cells[:, [gene for gene in cells.var_names if gene not in absent]].copy()
    found = embed(model, write(some, tmp_path / "in.h5ad"), tmp_path / "out.h5ad", "--batch", "7")
    measured = np.array([gene not in absent for gene in panel])
    counts = cells[:, panel].X.toarray().astype(np.float64) * measured
    library = np.asarray(some.X.sum(1)).ravel() if recipe == "corrected" else counts.sum(1)
    want = expected(network, counts, library, measured)
    assert found.obsm[EMBEDDING].dtype == np.float32 and found.obsm[EMBEDDING].shape == (90, shape.width)
    np.testing.assert_allclose(found.obsm[EMBEDDING], want, rtol=1e-4, atol=1e-5)
    about = found.uns["scaling_ray"]
    assert (about["run_id"], about["recipe"]) == ("law-test", recipe)
    assert (about["genes_matched"], about["genes"]) == (measured.sum(), GENES)
    assert (found.X != some.X).nnz == 0
    pd.testing.assert_frame_equal(found.obs, some.obs, check_categorical=False, check_dtype=False)
    if shape != WIDTH_ONE:
        assert found.obsm[EMBEDDING].std(0).min() > 1e-3, "cells are not told apart"


def test_the_order_and_the_names_of_genes_in_a_file_do_not_matter(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    want = embed(model, write(cells, tmp_path / "in.h5ad"), tmp_path / "out.h5ad").obsm[EMBEDDING]

    def same(adata: anndata.AnnData) -> None:
        found = embed(model, write(adata, tmp_path / "in.h5ad"), tmp_path / "out.h5ad")
        assert np.array_equal(found.obsm[EMBEDDING], want)
        assert found.uns["scaling_ray"]["genes_matched"] == GENES

    same(cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy())
    versioned = cells.copy()
    versioned.var_names = [f"{gene}.{number % 4 + 1}" for number, gene in enumerate(cells.var_names)]
    same(versioned)
    for column in ("feature_id", "gene_ids"):
        named = cells.copy()
        named.var[column] = named.var_names.to_numpy()
        named.var_names = [f"GENE{number}" for number in range(named.n_vars)]
        same(named)
    dense, by_columns, raw, layer = (cells.copy() for _ in range(4))
    dense.X = dense.X.toarray()
    by_columns.X = by_columns.X.tocsc()
    raw.raw = raw.copy()
    raw.X = raw.X.log1p()
    layer.layers["counts"] = layer.X.copy()
    layer.X = layer.X.log1p()
    for adata in (dense, by_columns, raw, layer):
        same(adata)


def test_genes_outside_the_panel_change_the_library_only(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    published, _ = save(tmp_path / "published", network_of(WIDE), panel, "published")
    outside = ~cells.var_names.isin(panel)
    moved, more = cells.copy(), cells.copy()
    # the same library in one other gene; then five times as much of it
    dense = cells.X.toarray()
    moved_counts = dense.copy()
    moved_counts[:, outside] = 0
    moved_counts[:, np.flatnonzero(outside)[0]] = dense[:, outside].sum(1)
    moved.X, more.X = sp.csr_matrix(moved_counts), sp.csr_matrix(dense * np.where(outside, 5, 1))
    found = {}
    for name, adata in (("as is", cells), ("moved", moved), ("more", more)):
        file = write(adata, tmp_path / "in.h5ad")
        found[name] = [embed(m, file, tmp_path / "out.h5ad").obsm[EMBEDDING] for m in (model, published)]
    assert np.array_equal(found["as is"][0], found["moved"][0])
    assert np.abs(found["as is"][0] - found["more"][0]).max() > 1e-3
    assert np.array_equal(found["as is"][1], found["more"][1]), "recipe published sees the panel only"


def test_a_file_with_few_of_the_genes_is_refused_unless_asked_for(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    outside = [gene for gene in cells.var_names if gene not in panel]
    few = write(cells[:, panel[:20] + outside].copy(), tmp_path / "few.h5ad")
    none = write(cells[:, outside].copy(), tmp_path / "none.h5ad")
    out = tmp_path / "out.h5ad"
    assert re.search("has 20 of the model's 50 genes.*--min-genes", refusal(capsys, model, few, "--out", out))
    assert "has 0 of the model's 50" in refusal(capsys, model, none, "--out", out, "--min-genes", "0")
    assert not out.exists()
    assert embed(model, few, out, "--min-genes", "0.4").uns["scaling_ray"]["genes_matched"] == 20


def test_bad_input_is_one_line_and_leaves_nothing(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    file = write(cells, tmp_path / "in.h5ad")
    before = file.read_bytes()
    logged = cells.copy()
    logged.X = logged.X.log1p()
    write(logged, tmp_path / "logged.h5ad")
    (tmp_path / "cut.h5ad").write_bytes(before[: len(before) // 2])
    repeated = cells.copy()
    repeated.var["gene_ids"] = [panel[0], panel[0], *repeated.var_names[2:]]
    repeated.var_names = [f"GENE{number}" for number in range(repeated.n_vars)]
    write(repeated, tmp_path / "repeated.h5ad")
    (tmp_path / "same.h5ad").symlink_to(file)
    there = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / "out.h5ad"
    assert "fractional" in refusal(capsys, model, tmp_path / "logged.h5ad", "--out", out)
    assert "no whole .h5ad" in refusal(capsys, model, tmp_path / "cut.h5ad", "--out", out)
    assert "more than once" in refusal(capsys, model, tmp_path / "repeated.h5ad", "--out", out)
    assert "is not in in.h5ad" in refusal(capsys, model, file, "--out", out, "--layer", "nonesuch")
    assert "is the input file" in refusal(capsys, model, file, "--out", tmp_path / "same.h5ad")
    assert "is a directory" in refusal(capsys, model, file, "--out", tmp_path)
    assert "cannot be a directory" in refusal(capsys, model, file, "--out", file / "out.h5ad")
    assert "no local path" in refusal(capsys, model, file, "--out", "s3://bucket/out.h5ad")
    assert "--batch" in refusal(capsys, model, file, "--out", out, "--batch", "0")
    assert "--min-genes" in refusal(capsys, model, file, "--out", out, "--min-genes", "50")
    if not torch.cuda.is_available():
        assert "--device" in refusal(capsys, model, file, "--out", out, "--device", "cuda")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refusal(capsys, model, file, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == there and file.read_bytes() == before


def test_what_the_input_holds_besides_stays_and_an_older_embedding_goes(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    adata = cells.copy()
    adata.obsm[EMBEDDING], adata.obsm["X_umap"] = np.ones((90, 2)), np.full((90, 2), 3.0)
    adata.uns = {"scaling_ray": {"run_id": "older"}, "note": "mine"}
    adata.layers["more"] = adata.X.copy()
    out = tmp_path / "out.h5ad"
    out.write_text("replaced")
    (tmp_path / ".partial-out.h5ad-01234567").write_text("left by a kill")
    found = embed(model, write(adata, tmp_path / "in.h5ad"), out)
    assert found.obsm[EMBEDDING].shape == (90, 12) and found.uns["scaling_ray"]["run_id"] == "law-test"
    assert (found.obsm["X_umap"] == 3).all() and found.uns["note"] == "mine"
    assert (found.layers["more"] != adata.X).nnz == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in.h5ad", "out.h5ad"}


@real_cells
def test_real_cells_get_the_embedding_of_the_plain_encoder(tmp_path: Path) -> None:
    backed = anndata.read_h5ad(REAL_CELLS, backed="r")
    some = backed[::40].to_memory()
    backed.file.close()
    often = np.argsort(-some.var["nnz"].to_numpy(), kind="stable")[: GENES - 5]
    ids = [*some.var["feature_id"].astype(str).to_numpy()[often], *(f"ENSG9000000000{n}" for n in range(5))]
    model, network = save(tmp_path / "model", network_of(WIDE), ids)
    some.var_names = some.var["feature_name"].astype(str).to_numpy()
    some.var_names_make_unique()
    found = embed(model, write(some, tmp_path / "in.h5ad"), tmp_path / "out.h5ad")
    counts = np.zeros((len(some), GENES))
    counts[:, : GENES - 5] = some.X[:, often].toarray()
    want = expected(network, counts, some.obs["raw_sum"].to_numpy(np.float64), np.arange(GENES) < GENES - 5)
    np.testing.assert_allclose(found.obsm[EMBEDDING], want, rtol=1e-4, atol=1e-5)
    assert found.uns["scaling_ray"]["genes_matched"] == GENES - 5


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def names_of(ids: list[str]) -> list[str]:
    return [f"NAME-{gene[-5:]}" for gene in ids]


def rename(model: Path, names: list[str], **facts: Any) -> Path:
    """The model with gene names of its own, and other facts."""
    record = read_record(model)
    changed = record.model_copy(update={"feature_names": names, **facts})
    (model / "model.json").write_text(changed.to_json())
    return model


def test_names_are_matched_by_the_model_and_by_the_pinned_table(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, network = save(tmp_path / "model", network_of(WIDE), panel)
    want = embed(model, write(cells, tmp_path / "in.h5ad"), tmp_path / "out.h5ad").obsm[EMBEDDING]
    rename(model, names_of(panel))
    named = cells.copy()
    named.var = pd.DataFrame(index=names_of(list(cells.var_names)))
    capsys.readouterr()
    found = embed(model, write(named, tmp_path / "named.h5ad"), tmp_path / "out.h5ad")
    assert np.array_equal(found.obsm[EMBEDDING], want)
    said = said_by(capsys)
    assert "gene names from the var index" in said and "50 of the model's 50 genes (100.0%;" in said
    # a model of real genes that kept no names: the table knows them
    ids = ["ENSG00000141510", "ENSG00000075624", *panel[2:]]
    other, _ = save(tmp_path / "other", network, ids)
    real = cells[:, panel].copy()
    real.var = pd.DataFrame(index=["TP53", "ACTB", *names_of(panel[2:])])
    found = embed(other, write(real, tmp_path / "real.h5ad"), tmp_path / "out.h5ad", "--min-genes", "0")
    assert found.uns["scaling_ray"]["genes_matched"] == 2


def test_a_matrix_folder_is_embedded_as_the_same_cells_in_h5ad(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    want = embed(model, write(cells, tmp_path / "in.h5ad"), tmp_path / "out.h5ad").obsm[EMBEDDING]
    folder = tmp_path / "mtx"
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", cells.X.T.astype(int))
    (folder / "features.tsv").write_text("\n".join(f"{gene}.3\t?\tGene Expression" for gene in cells.var_names))
    (folder / "barcodes.tsv").write_text("\n".join(cells.obs_names))
    found = embed(model, folder, tmp_path / "from-mtx.h5ad")
    assert np.array_equal(found.obsm[EMBEDDING], want)
    assert list(found.obs_names) == list(cells.obs_names) and (found.X != cells.X).nnz == 0


def test_antibodies_are_no_part_of_a_cells_library(cells: anndata.AnnData, panel: list[str], tmp_path: Path) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    want = embed(model, write(cells, tmp_path / "in.h5ad"), tmp_path / "out.h5ad").obsm[EMBEDDING]
    tagged = anndata.AnnData(
        sp.csr_matrix(sp.hstack([cells.X, np.full((90, 3), 500.0)]), dtype=np.float32),
        obs=cells.obs,
        var=pd.DataFrame(
            {"feature_types": ["Gene Expression"] * cells.n_vars + ["Antibody Capture"] * 3},
            index=[*cells.var_names, "CD3", "CD4", "CD8"],
        ),
    )
    found = embed(model, write(tagged, tmp_path / "tagged.h5ad"), tmp_path / "out.h5ad")
    assert np.array_equal(found.obsm[EMBEDDING], want)


def test_counts_cut_to_a_panel_are_warned_of_or_refused(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    totals = np.asarray(cells.X.sum(1)).ravel()
    rename(model, panel, library_median=float(np.median(totals)))
    out = tmp_path / "out.h5ad"
    embed(model, write(cells, tmp_path / "whole.h5ad"), out)
    assert "WARNING a cell here" not in said_by(capsys)
    cut = cells[:, panel].copy()
    embed(model, write(cut, tmp_path / "cut.h5ad"), out)
    assert f"and one that the model was trained on {np.median(totals):,.0f}" in said_by(capsys)
    cut.obs["n_counts"] = totals
    told = write(cut, tmp_path / "told.h5ad")
    assert "cut to a panel" in refusal(capsys, model, told, "--out", out)
    embed(model, told, out, "--cut-counts")
    assert "% of obs column n_counts" in said_by(capsys)


def test_the_summary_compares_with_principal_components(
    cells: anndata.AnnData, panel: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = save(tmp_path / "model", network_of(WIDE), panel)
    about = embed(model, write(cells, tmp_path / "in.h5ad"), tmp_path / "out.h5ad").uns["scaling_ray"]
    assert "principal components of the same genes" in said_by(capsys)
    assert 0 <= about["pca_neighbour_agreement"] <= 1
    assert about["pca_neighbour_chance"] == pytest.approx(NEIGHBOURS / 89)
    few = embed(model, write(cells[:20].copy(), tmp_path / "few.h5ad"), tmp_path / "out.h5ad")
    assert "pca_neighbour_agreement" not in few.uns["scaling_ray"] and "too few to compare" in said_by(capsys)


def test_neighbours_agree_where_they_are_the_same_and_only_there() -> None:
    random = np.random.default_rng(0)
    kind = random.integers(0, 4, 400)
    values = (5 * np.eye(4, 20)[kind] + random.standard_normal((400, 20))).astype(np.float32)
    sample = Sample(np.arange(400), values)
    labels = ("cell_type", kind.astype(str).astype(object))
    turned = (values @ np.linalg.qr(random.standard_normal((20, 20)))[0]).astype(np.float32)
    good = compare_with_components(sample, turned, labels)
    assert good.agreement is not None and good.agreement > 0.99
    assert good.same_by_embedding == pytest.approx(good.same_by_components, abs=0.01)
    assert not any("WARNING" in line for line in good.lines())
    noise = random.standard_normal((400, 12)).astype(np.float32)
    bad = compare_with_components(sample, noise, labels)
    assert bad.agreement is not None and bad.chance is not None
    assert bad.agreement == pytest.approx(bad.chance, abs=0.02)
    assert bad.same_by_embedding == pytest.approx(0.25, abs=0.05)
    assert "WARNING principal components keep cell_type better" in bad.lines()[-1]
    assert (
        "WARNING this embedding and principal components hardly agree"
        in (compare_with_components(sample, noise, None).lines()[-1])
    )
