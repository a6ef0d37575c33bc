"""New cells through an exported model: one vector a cell, written beside the cells.

Shape legend: B cells of a batch, G genes of the model, D width.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.census.counts import as_counts
from scaling_ray.census.features import id_sources, kinds_of, name_source, without_version
from scaling_ray.census.gene_names import SPECIES, ids_by_name
from scaling_ray.census.h5ad import CellFile
from scaling_ray.census.matrices import FoundCounts, doubts_of_totals, find_counts
from scaling_ray.census.readers import open_cells
from scaling_ray.errors import BadInput
from scaling_ray.model.exported import load_model
from scaling_ray.model.masking import log_normalise
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.neighbours import SAMPLED_CELLS, Comparison, Sample, compare_with_components, labels_of
from scaling_ray.pace import Pace
from scaling_ray.records import ModelRecord
from scaling_ray.storage import output_directory, published_file

EMBEDDING, ABOUT = "X_scaling_ray", "scaling_ray"
"""Names in ``obsm`` and ``uns`` of the file that is written."""


@torch.inference_mode()
def cell_embeddings(network: MaskedGeneTransformer, values_BG: Tensor, measured_BG: Tensor) -> Tensor:
    """(B, D) float32: the mean over a cell's measured genes of the last block's output, no gene masked.

    Unmeasured genes go in as the mask token. values_BG: normalised; measured_BG: bool, at least one gene in each row.
    """
    encoded_BGD = network.encode(values_BG, ~measured_BG)
    share_BG = measured_BG.to(encoded_BGD.dtype) / measured_BG.sum(1, keepdim=True)
    return torch.einsum("bgd,bg->bd", encoded_BGD, share_BG)


def gene_columns(model_ids: Sequence[str], file_ids: Sequence[str]) -> NDArray[np.int64]:
    """(G,) the column of each gene of the model among a file's, -1 where there is none.

    Versions of Ensembl ids (ENSG00000121410.3) are left out of the comparison on both sides.

    Raises:
        BadInput: a gene of the model has several columns.
    """
    wanted = {without_version(name): position for position, name in enumerate(model_ids)}
    if len(wanted) < len(model_ids):
        raise BadInput(
            "M001", "model", "feature_ids", "differ in their versions only; train on genes that are distinct"
        )
    columns = np.full(len(model_ids), -1, dtype=np.int64)
    for column, name in enumerate(file_ids):
        position = wanted.get(without_version(name))
        if position is None:
            continue
        if columns[position] >= 0:
            raise BadInput("M002", "feature_id", str(name), "occurs more than once in the file; make gene ids unique")
        columns[position] = column
    return columns


def best_columns(record: ModelRecord, var: pd.DataFrame) -> tuple[NDArray[np.int64], str]:
    """(column of each of the model's genes among the features of a file or -1, what they were matched by).

    Every source of ids is tried, and every source as gene names: by the model's own names, then by the pinned table.
    Features that are no genes are matched by nothing.
    """
    is_gene = kinds_of(var) == ""
    sources = id_sources(var)
    named = name_source(var)
    tried = {f"gene ids from {name}": np.where(is_gene, texts, "") for name, texts in sources.items()}
    wanted = {without_version(name) for name in record.feature_ids}
    known = {
        name: feature_id
        for organism in SPECIES
        for name, feature_id in ids_by_name(organism).items()
        if feature_id in wanted
    } | _distinct(record.feature_names, record.feature_ids)
    names = dict(sources) if named is None else sources | {named[0]: named[1]}
    for source, texts in names.items():
        mapped = np.array([known[text] if text in known else "" for text in texts], dtype=object)
        tried[f"gene names from {source}"] = np.where(is_gene, mapped, "")
    best = max(tried, key=lambda name: len(wanted & {without_version(text) for text in tried[name]}))
    return gene_columns(record.feature_ids, tried[best].tolist()), best


def _distinct(names: Sequence[str], ids: Sequence[str]) -> dict[str, str]:
    """Name -> id, without names of several ids."""
    count = Counter(names)
    return {name: feature_id for name, feature_id in zip(names, ids, strict=True) if count[name] == 1}


def embed_h5ad(
    model: Path,
    file: Path,
    out: Path | str,
    *,
    batch_cells: int = 64,
    layer: str | None = None,
    device: str = "cpu",
    min_genes: float = 0.5,
    cut_counts: bool = False,
    trust_counts: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the cells of ``file`` with ``obsm["X_scaling_ray"]`` (cells, D) float32 and ``uns["scaling_ray"]``.

    Counts are normalised by the model's recipe: ``corrected`` by all of a cell's counts in the file, ``published`` by
    those in the model's genes. They go in whole, also where the model was trained on a share of each cell's molecules.
    Genes of the model that the file lacks go in as unmeasured. The last lines compare the embedding with principal
    components of the same values.

    Args:
        model: directory of an exported model.
        file: cells with raw counts in any format of ``census.readers``; an .h5ad is copied whole.
        out: file to write, in one rename; one that is there is replaced.
        batch_cells: cells in the network at a time.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.
        device: ``cpu`` or ``cuda``.
        min_genes: share of the model's genes that the file must have.
        cut_counts: take counts that are cut to a panel as whole libraries.
        trust_counts: take whole numbers as counts that look like none.
        progress: called with one line of text now and then.

    Raises:
        BadInput: no whole model, no raw counts, too few of the model's genes, or an ``out`` that cannot be.
    """
    file, target = Path(file), Path(out)
    if batch_cells < 1:
        raise BadInput("M003", "--batch", batch_cells, "must be at least one cell")
    if not 0 <= min_genes <= 1:
        raise BadInput("M004", "--min-genes", min_genes, "is a share of the model's genes; give 0 to 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("M005", "--device", device, "this machine offers no CUDA; use cpu")
    if target.is_dir():
        raise BadInput("M006", "--out", str(target), "is a directory; name a file")
    if target.exists() and file.exists() and os.path.samefile(target, file):
        raise BadInput("M007", "--out", str(target), "is the input file; name another")
    network, record = load_model(Path(model))
    with open_cells(file) as cells:
        counts = find_counts(cells, layer, trust_counts=trust_counts)
        columns, ids_from = best_columns(record, counts.var)
        matched, genes = int((columns >= 0).sum()), len(columns)
        if matched == 0 or matched < min_genes * genes:
            remedy = f"has {matched} of the model's {genes} genes, and {min_genes:.0%} are asked for (--min-genes)"
            raise BadInput("M008", "file", file.name, f"{remedy}; best by {ids_from}")
        output_directory(out if "://" in str(out) else target.parent)
        doubts = _doubts(record, counts, cells, cut_counts)
        progress(f"{file.name}: raw counts from {counts.place}; {ids_from}")
        share = f"{matched / genes:.1%}; the others go in as unmeasured"
        progress(f"{file.name}: {matched:,} of the model's {genes:,} genes ({share})")
        for doubt in doubts:
            progress(f"{file.name}: WARNING {doubt}")
        try:
            with published_file(target) as building:
                _copy_of(cells, counts, file, building)
                with h5py.File(building, "r+") as written:
                    embedding = _new_dataset(written, len(cells.obs), network.shape.width)
                    source = _Source(cells, counts, columns)
                    sample = _embed_into(embedding, network.to(device), record, source, batch_cells, progress)
                    found = compare_with_components(sample, embedding[sample.cells], labels_of(cells.obs, sample.cells))
                    _describe(written, record, counts.place, matched, found)
        except torch.OutOfMemoryError as error:
            raise BadInput(
                "M009", "--batch", batch_cells, f"cells do not fit the memory of {device} at a time; lower it"
            ) from error
        except OSError as error:
            raise BadInput(
                "M010", "--out", str(target), f"cannot be written ({error.strerror or error}); name another place"
            ) from error
    for line in found.lines():
        progress(line)
    return target


CUT_LIBRARY = 0.5
"""Median library of the file over that of the training cells, below which a warning says that genes may be missing."""


def _doubts(record: ModelRecord, counts: FoundCounts, cells: CellFile, cut_counts: bool) -> list[str]:
    """What may be wrong with the library sizes, which the recipe ``corrected`` divides by."""
    if record.recipe != "corrected":
        return []
    doubts = doubts_of_totals(cells.name, counts.stats, cells.obs, cut_counts)
    totals = counts.stats.totals
    median = float(np.median(totals[totals > 0])) if (totals > 0).any() else 0.0
    if record.library_median is not None and median < CUT_LIBRARY * record.library_median:
        doubts.append(
            f"a cell here has {median:,.0f} counts and one that the model was trained on {record.library_median:,.0f} "
            f"(medians): where genes were cut off, the {counts.stats.genes:,} of this file are too large a share"
        )
    empty = int((totals == 0).sum())
    if empty:
        doubts.append(f"{empty:,} cells have no counts; their embedding is that of an empty cell")
    return doubts


def _copy_of(cells: CellFile, counts: FoundCounts, file: Path, building: Path) -> None:
    """The cells as a file that anndata writes today: a copy where it is one, else the counts with obs and var."""
    if cells.container == ".h5ad" and file.suffix == ".h5ad":
        shutil.copyfile(file, building)
        return
    blocks = [as_counts(block) for _, block in cells.chunks(counts.place)]
    obs, var = cells.obs.copy(), counts.var.copy()
    for table in (obs, var):
        table.index = table.index.astype(str)
    adata = anndata.AnnData(sp.csr_matrix(sp.vstack(blocks), dtype=np.float32), obs=obs, var=var)
    adata.write_h5ad(building)


def _group(file: h5py.File, name: str) -> h5py.Group:
    if name not in file:
        anndata.io.write_elem(file, name, {})
    if not isinstance(file[name], h5py.Group):
        raise BadInput(
            "M011", "file", name, "is stored as old versions of anndata did; write the file again with write_h5ad"
        )
    return file[name]


def _describe(file: h5py.File, record: ModelRecord, place: str, matched: int, found: Comparison) -> None:
    group = _group(file, "uns")
    if ABOUT in group:
        del group[ABOUT]
    about = {
        "run_id": record.run_id,
        "weights_sha256": record.weights_sha256,
        "recipe": record.recipe,
        "genes": len(record.feature_ids),
        "genes_matched": matched,
        "counts_from": place,
        **found.facts(),
    }
    anndata.io.write_elem(group, ABOUT, about)


def _new_dataset(file: h5py.File, cells: int, width: int) -> h5py.Dataset:
    group = _group(file, "obsm")
    if EMBEDDING in group:
        del group[EMBEDDING]
    dataset = group.create_dataset(EMBEDDING, (cells, width), dtype=np.float32)
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return dataset


@dataclass(frozen=True)
class _Source:
    """Counts to embed: columns (G,) of the model's genes among the file's features, -1 where there is none."""

    cells: CellFile
    counts: FoundCounts
    columns: NDArray[np.int64]


def _embed_into(
    embedding: h5py.Dataset,
    network: MaskedGeneTransformer,
    record: ModelRecord,
    source: _Source,
    batch_cells: int,
    progress: Callable[[str], None],
) -> Sample:
    """Fill the embedding; returns the normalised values of some cells, evenly spaced, over the genes that are there."""
    device = network.mask_token.device
    there = source.columns >= 0
    measured_G = torch.from_numpy(there).to(device)
    total = len(source.cells.obs)
    sampled = np.unique(np.linspace(0, total - 1, min(total, SAMPLED_CELLS)).astype(np.int64))
    values: list[NDArray[np.float32]] = []
    is_gene = np.flatnonzero(source.counts.kinds == "")
    pace = Pace("embedded", total, progress)
    for first, block in source.cells.chunks(source.counts.place):
        rows = as_counts(block)
        library = np.asarray(rows[:, is_gene].sum(axis=1, dtype=np.float64)).ravel().astype(np.int64)
        panel = sp.csr_matrix(rows[:, source.columns[there]])
        for start in range(0, rows.shape[0], batch_cells):
            stop = min(start + batch_cells, rows.shape[0])
            counts_BG = np.zeros((stop - start, len(source.columns)), dtype=np.float32)
            counts_BG[:, there] = panel[start:stop].toarray()
            seen = torch.from_numpy(counts_BG).to(device)
            values_BG = log_normalise(seen, torch.from_numpy(library[start:stop]).to(device), record.recipe)
            found = cell_embeddings(network, values_BG, measured_G.expand_as(values_BG))
            embedding[first + start : first + stop] = found.cpu().numpy()
            low, high = np.searchsorted(sampled, [first + start, first + stop])
            if high > low:
                values.append(values_BG.cpu().numpy()[sampled[low:high] - first - start][:, there])
        pace.add(rows.shape[0])
    return Sample(sampled, np.concatenate(values) if values else np.zeros((0, int(there.sum())), np.float32))
