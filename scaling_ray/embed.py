"""New cells through an exported model: one vector a cell, written beside the cells.

Shape legend: B cells of a batch, G genes of the model, D width.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.census.h5ad import RawCounts, count_chunks, find_raw_counts
from scaling_ray.errors import BadInput
from scaling_ray.model.exported import load_model
from scaling_ray.model.masking import log_normalise
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.records import ModelRecord
from scaling_ray.storage import output_directory, published_file

EMBEDDING, ABOUT = "X_scaling_ray", "scaling_ray"
"""Names in ``obsm`` and ``uns`` of the file that is written."""

_VERSIONED = re.compile(r"(ENS[A-Z]*\d+)\.\d+(_PAR_Y)?")


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
    wanted = {_without_version(name): position for position, name in enumerate(model_ids)}
    if len(wanted) < len(model_ids):
        raise BadInput("model", "feature_ids", "differ in their versions only; train on genes that are distinct")
    columns = np.full(len(model_ids), -1, dtype=np.int64)
    for column, name in enumerate(file_ids):
        position = wanted.get(_without_version(name))
        if position is None:
            continue
        if columns[position] >= 0:
            raise BadInput("feature_id", str(name), "occurs more than once in the file; make gene ids unique")
        columns[position] = column
    return columns


def _most_like(model_ids: Sequence[str], counts: RawCounts) -> str:
    """Which of a file's ids name most of the model's genes; the importer's choice where several do."""
    wanted = {_without_version(name) for name in model_ids}
    order = sorted(counts.ids, key=lambda name: name != counts.ids_from)
    return max(order, key=lambda name: len(wanted & {_without_version(each) for each in counts.ids[name]}))


def _without_version(feature_id: str) -> str:
    versioned = _VERSIONED.fullmatch(feature_id)
    return versioned[1] + (versioned[2] or "") if versioned else feature_id


def embed_h5ad(
    model: Path,
    file: Path,
    out: Path | str,
    *,
    batch_cells: int = 64,
    layer: str | None = None,
    device: str = "cpu",
    min_genes: float = 0.5,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a copy of ``file`` with ``obsm["X_scaling_ray"]`` (cells, D) float32 and ``uns["scaling_ray"]``.

    Counts are normalised by the model's recipe: ``corrected`` by all of a cell's counts in the file, ``published`` by
    those in the model's genes. They go in whole, also where the model was trained on a share of each cell's molecules.

    Args:
        model: directory of an exported model.
        file: cells with raw counts; which place they were found in is reported.
        out: file to write, in one rename; one that is there is replaced.
        batch_cells: cells in the network at a time.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.
        device: ``cpu`` or ``cuda``.
        min_genes: share of the model's genes that the file must have.
        progress: called with one line of text now and then.

    Raises:
        BadInput: no whole model, no raw counts, too few of the model's genes, or an ``out`` that cannot be.
    """
    file, target = Path(file), Path(out)
    if batch_cells < 1:
        raise BadInput("--batch", batch_cells, "must be at least one cell")
    if not 0 <= min_genes <= 1:
        raise BadInput("--min-genes", min_genes, "is a share of the model's genes; give 0 to 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", device, "this machine offers no CUDA; use cpu")
    if target.is_dir():
        raise BadInput("--out", str(target), "is a directory; name a file")
    if target.exists() and file.exists() and os.path.samefile(target, file):
        raise BadInput("--out", str(target), "is the input file; name another")
    network, record = load_model(Path(model))
    counts = find_raw_counts(file, layer)
    ids_from = _most_like(record.feature_ids, counts)
    columns = gene_columns(record.feature_ids, counts.ids[ids_from].tolist())
    matched, genes = int((columns >= 0).sum()), len(columns)
    if matched == 0 or matched < min_genes * genes:
        remedy = f"has {matched} of the model's {genes} genes, and {min_genes:.0%} are asked for (--min-genes)"
        raise BadInput("file", file.name, f"{remedy}; gene ids were taken from {ids_from}")
    output_directory(out if "://" in str(out) else target.parent)
    progress(f"{file.name}: raw counts from {counts.place}; gene ids from {ids_from}")
    progress(f"{file.name}: {matched:,} of the model's {genes:,} genes; the others go in as unmeasured")
    try:
        with published_file(target) as building:
            shutil.copyfile(file, building)
            with h5py.File(building, "r+") as written:
                _describe(written, record, counts.place, matched)
                embedding = _new_dataset(written, len(counts.obs), network.shape.width)
                _embed_into(embedding, network.to(device), record, counts, columns, batch_cells, progress)
    except torch.OutOfMemoryError as error:
        raise BadInput(
            "--batch", batch_cells, f"cells do not fit the memory of {device} at a time; lower it"
        ) from error
    except OSError as error:
        raise BadInput("--out", str(target), f"cannot be written ({error.strerror or error})") from error
    return target


def _group(file: h5py.File, name: str) -> h5py.Group:
    if name not in file:
        anndata.io.write_elem(file, name, {})
    if not isinstance(file[name], h5py.Group):
        raise BadInput("file", name, "is stored as old versions of anndata did; write the file again with write_h5ad")
    return file[name]


def _describe(file: h5py.File, record: ModelRecord, place: str, matched: int) -> None:
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
    }
    anndata.io.write_elem(group, ABOUT, about)


def _new_dataset(file: h5py.File, cells: int, width: int) -> h5py.Dataset:
    group = _group(file, "obsm")
    if EMBEDDING in group:
        del group[EMBEDDING]
    dataset = group.create_dataset(EMBEDDING, (cells, width), dtype=np.float32)
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return dataset


def _embed_into(
    embedding: h5py.Dataset,
    network: MaskedGeneTransformer,
    record: ModelRecord,
    counts: RawCounts,
    columns: NDArray[np.int64],
    batch_cells: int,
    progress: Callable[[str], None],
) -> None:
    device = network.mask_token.device
    there = columns >= 0
    measured_G = torch.from_numpy(there).to(device)
    for first, rows in count_chunks(counts.path, counts.place):
        library = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel().astype(np.int64)
        panel = sp.csr_matrix(rows[:, columns[there]])
        for start in range(0, rows.shape[0], batch_cells):
            stop = min(start + batch_cells, rows.shape[0])
            counts_BG = np.zeros((stop - start, len(columns)), dtype=np.float32)
            counts_BG[:, there] = panel[start:stop].toarray()
            seen = torch.from_numpy(counts_BG).to(device)
            values_BG = log_normalise(seen, torch.from_numpy(library[start:stop]).to(device), record.recipe)
            found = cell_embeddings(network, values_BG, measured_G.expand_as(values_BG))
            embedding[first + start : first + stop] = found.cpu().numpy()
        progress(f"embedded {first + rows.shape[0]:,} of {len(counts.obs):,} cells")
