"""Raw counts of an .h5ad file: found, checked value by value, never guessed, read in bounded memory.

The search covers ``X``, ``raw.X`` and every layer. Where several of them hold different raw counts, the user chooses.
Only ``obs`` and ``var`` are read besides the counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scaling_ray.errors import BadInput

_CHUNK_CELLS = 2048
_CHUNK_VALUES = 2**24
"""Values of one chunk of a dense matrix at most: 64 MB of float32."""


@dataclass(frozen=True)
class RawCounts:
    """The place of a file's raw counts, with their genes and cells.

    place: ``X``, ``raw.X`` or a layer's name; feature_id, feature_name: (G,) of its columns; ids_from: the source of
    feature_id; ids: every source of gene ids in the file, by its name; obs: one row per cell.
    """

    path: Path
    place: str
    feature_id: np.ndarray
    feature_name: np.ndarray
    ids_from: str
    ids: dict[str, np.ndarray]
    obs: pd.DataFrame


def find_raw_counts(path: Path, layer: str | None = None) -> RawCounts:
    """The raw counts of a file, every value of them looked at.

    Args:
        path: an .h5ad file.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.

    Raises:
        BadInput: no whole .h5ad, no raw counts (with the reason for each place), or differing candidates.
    """
    if not path.is_file():
        raise BadInput("file", str(path), "does not exist")
    if not _is_h5ad(path):
        raise BadInput("file", str(path), "is no whole .h5ad file; write one with anndata's write_h5ad")
    place = _find_counts(path, layer)
    with h5py.File(path, "r") as file:
        obs, var = _table(path, file["obs"]), _table(path, file["raw/var" if place == "raw.X" else "var"])
        shape = _shape(file[_key(place)])
    if shape != (len(obs), len(var)):
        raise BadInput(f"{path.name}:{place}", shape, f"does not fit {len(obs)} cells and {len(var)} genes")
    ids = _gene_ids(var)
    # Ensembl ids are preferred, from any column; the index is the fallback
    ids_from = next((name for name, values in ids.items() if _looks_ensembl(values)), next(iter(ids)))
    return RawCounts(path, place, ids[ids_from], _gene_names(var), ids_from, ids, obs)


def count_chunks(path: Path, place: str) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(first cell, rows as csr) of one matrix of the file, in order.

    A matrix stored by columns is transposed in memory once; all others are read a chunk at a time.
    """
    with ExitStack() as stack:
        file = stack.enter_context(h5py.File(path, "r"))
        node = file[_key(place)]
        try:
            if isinstance(node, h5py.Dataset):
                rows = max(1, _CHUNK_VALUES // max(node.shape[1], 1))
                for start in range(0, node.shape[0], rows):
                    yield start, sp.csr_matrix(node[start : start + rows])
                return
            matrix = anndata.io.sparse_dataset(node)
            if node.attrs["encoding-type"] == "csc_matrix":
                # columns first: cells cannot be read in ranges
                matrix = matrix.to_memory().tocsr()
            for start in range(0, matrix.shape[0], _CHUNK_CELLS):
                yield start, sp.csr_matrix(matrix[start : start + _CHUNK_CELLS])
        except OSError as error:
            raise BadInput(f"{path.name}:{place}", str(error), "is damaged; write the file again") from error


def fault_of(block: sp.csr_matrix) -> str:
    """The reason why some rows are no raw counts, or the empty text."""
    values = block.data
    if not len(values):
        return ""
    if not np.isfinite(values).all():
        return "holds values that are not finite"
    if (values < 0).any():
        return f"holds negative values ({values[values < 0][0]:g})"
    fractional = values != np.rint(values)
    if fractional.any():
        return f"holds fractional values ({values[fractional][0]:g})"
    if values.max() > 2**24:
        return f"holds values beyond 2^24 ({values.max():g}), which float32 does not keep exactly"
    return ""


def _is_h5ad(path: Path) -> bool:
    if not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            return {"obs", "var"} <= set(file)
    except OSError:  # begins like HDF5 but was cut short
        return False


def _key(place: str) -> str:
    return {"X": "X", "raw.X": "raw/X"}.get(place, f"layers/{place}")


def _shape(node: h5py.Group | h5py.Dataset) -> tuple[int, ...]:
    return tuple(int(n) for n in (node.shape if isinstance(node, h5py.Dataset) else node.attrs["shape"]))


def _table(path: Path, node: h5py.Group | h5py.Dataset) -> pd.DataFrame:
    try:
        return anndata.io.read_elem(node)
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(f"{path.name}:{node.name}", str(error), "cannot be read; write the file again") from error


def _places(path: Path) -> list[str]:
    with h5py.File(path, "r") as file:
        places = ["X"] if "X" in file and file["X"].attrs.get("encoding-type") != "null" else []
        places += ["raw.X"] if "raw" in file and "X" in file["raw"] else []
        return places + (sorted(file["layers"]) if "layers" in file else [])


def _find_counts(path: Path, layer: str | None) -> str:
    """Name of the place that holds raw counts."""
    places = _places(path)
    if layer is not None and layer not in places:
        raise BadInput("layer", layer, f"is not in {path.name}; it has {', '.join(places)}")
    reasons: dict[str, str] = {}
    good: list[str] = []
    for place in [layer] if layer is not None else places:
        wrong = _first_fault(path, place)
        if wrong:
            reasons[place] = wrong
        else:
            good.append(place)
    if not good:
        why = "; ".join(f"{place}: {reason}" for place, reason in reasons.items()) or "the file has no matrix"
        raise BadInput(path.name, "no raw counts", f"{why}. Store raw counts in X, raw.X or a layer")
    differing = [p for p in good[1:] if not _same(path, good[0], p)]
    if differing:
        raise BadInput(
            "layer", [good[0], *differing], f"hold different raw counts in {path.name}; say which one with --layer"
        )
    return good[0]


def _first_fault(path: Path, place: str) -> str:
    """The reason why a place holds no raw counts, or the empty text. Reads until the first fault."""
    total = 0.0
    for _, block in count_chunks(path, place):
        wrong = fault_of(block)
        if wrong:
            return wrong
        total += float(block.data.sum())
    return "" if total else "holds no count at all"


def _same(path: Path, first: str, second: str) -> bool:
    for (_, a), (_, b) in zip(count_chunks(path, first), count_chunks(path, second), strict=True):
        if a.shape != b.shape or (a != b).nnz:
            return False
    return True


def _gene_ids(var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of ``var`` that may name genes, by their name there; the index comes first."""
    folded = {str(c).lower(): c for c in var.columns}
    found = {"the var index": var.index.to_numpy().astype(str).astype(object)}
    for name in ("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl", "ensembl_gene_id"):
        if name in folded:
            found[f"var column {folded[name]}"] = var[folded[name]].astype(str).to_numpy().astype(object)
    return found


def _gene_names(var: pd.DataFrame) -> np.ndarray:
    folded = {str(c).lower(): c for c in var.columns}
    for name in ("feature_name", "gene_name", "gene_symbol", "gene_symbols", "symbol"):
        if name in folded:
            return var[folded[name]].astype(str).to_numpy().astype(object)
    return var.index.to_numpy().astype(str).astype(object)


def _looks_ensembl(values: np.ndarray) -> bool:
    return len(values) > 0 and sum(str(v).startswith("ENS") for v in values) > 0.9 * len(values)
