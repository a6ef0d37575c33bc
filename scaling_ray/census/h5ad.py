"""Matrices and tables in anndata's layout, read a chunk of cells at a time: .h5ad, the RNA of .h5mu, .zarr.

anndata reads the tables and the sparse rows here. What this module does itself is to go through the groups of a store
that anndata would read whole: a file of several matrices of a million cells does not fit a laptop, and one matrix that
anndata cannot read (a layer whose name holds "/") would hide all others. Files older than anndata 0.7 are left to
``census.readers``, which has anndata read them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scaling_ray.errors import BadInput

CHUNK_CELLS = 2048
CHUNK_VALUES = 2**24
"""Values of one chunk of a dense matrix at most: 64 MB of float32."""

_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError)


@dataclass
class StoredCells:
    """Cells in an open store of anndata's layout.

    name: for messages; container: the format in words; root: the group that holds X, obs and var; unread: matrices that
    cannot be read, by their names, with the reason.
    """

    name: str
    container: str
    root: Any
    unread: dict[str, str] = field(default_factory=dict)
    _by_columns: dict[str, sp.csr_matrix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = self._places()
        self.obs = self._table("obs")

    def _places(self) -> list[str]:
        places = ["X"] if "X" in self.root and self._kind(self.root["X"]) != "null" else []
        # what an AnnData lacks is written as nothing, or as an element of nothing
        places += ["raw.X"] if self._holds("raw") and "X" in self.root["raw"] else []
        if self._holds("layers"):
            for name in sorted(self.root["layers"]):
                node = self.root["layers"][name]
                if hasattr(node, "shape") or self._kind(node) in ("csr_matrix", "csc_matrix"):
                    places.append(name)
                else:
                    inner = ", ".join(f"{name}/{each}" for each in list(node)[:3])
                    self.unread[name] = f"is no matrix but a group (of {inner or 'nothing'}); no name may hold '/'"
        return places

    def _holds(self, key: str) -> bool:
        return key in self.root and hasattr(self.root[key], "keys")

    @staticmethod
    def _kind(node: Any) -> str:
        return str(node.attrs["encoding-type"]) if "encoding-type" in node.attrs else ""

    def _node(self, place: str) -> Any:
        return self.root[{"X": "X", "raw.X": "raw/X"}[place] if place in ("X", "raw.X") else f"layers/{place}"]

    def _table(self, key: str) -> pd.DataFrame:
        try:
            return anndata.io.read_elem(self.root[key])
        except _UNREADABLE as error:
            raise unreadable(f"{self.name}:{key}", error) from error

    def var(self, place: str) -> pd.DataFrame:
        """One row for each column of a matrix."""
        return self._table("raw/var" if place == "raw.X" else "var")

    def shape(self, place: str) -> tuple[int, int]:
        """(cells, features) of a matrix."""
        node = self._node(place)
        rows, columns = node.shape if hasattr(node, "shape") else node.attrs["shape"]
        return int(rows), int(columns)

    def chunks(self, place: str) -> Iterator[tuple[int, sp.csr_matrix]]:
        """(first cell, rows as csr) of one matrix, in order, values as stored.

        A matrix stored by columns is transposed in memory once; all others are read a chunk at a time.
        """
        node = self._node(place)
        try:
            if hasattr(node, "shape"):
                yield from dense_chunks(node)
                return
            matrix: Any = anndata.io.sparse_dataset(node)
            if self._kind(node) == "csc_matrix":
                # columns first: cells cannot be read in ranges
                if place not in self._by_columns:
                    self._by_columns = {place: matrix.to_memory().tocsr()}
                matrix = self._by_columns[place]
            for start in range(0, matrix.shape[0], CHUNK_CELLS):
                yield start, _summable(sp.csr_matrix(matrix[start : start + CHUNK_CELLS]))
        except _UNREADABLE as error:
            if isinstance(error, BadInput):
                raise
            raise unreadable(f"{self.name}:{place}", error, "is damaged") from error


@dataclass
class LoadedCells:
    """Cells that a library read whole into memory; the same face as ``StoredCells``."""

    name: str
    container: str
    adata: anndata.AnnData
    unread: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.obs = self.adata.obs
        self.places = ["X"] if self.adata.X is not None else []
        self.places += ["raw.X"] if self.adata.raw is not None else []
        self.places += sorted(str(name) for name in self.adata.layers if self.adata.layers[name] is not None)

    def _matrix(self, place: str) -> Any:
        if place == "X":
            return self.adata.X
        return self.adata.raw.X if place == "raw.X" else self.adata.layers[place]

    def var(self, place: str) -> pd.DataFrame:
        """One row for each column of a matrix."""
        return self.adata.raw.var if place == "raw.X" else self.adata.var

    def shape(self, place: str) -> tuple[int, int]:
        """(cells, features) of a matrix."""
        rows, columns = self._matrix(place).shape
        return int(rows), int(columns)

    def chunks(self, place: str) -> Iterator[tuple[int, sp.csr_matrix]]:
        """(first cell, rows as csr) of one matrix, in order, values as stored."""
        matrix = self._matrix(place)
        if not sp.issparse(matrix):
            yield from dense_chunks(matrix)
            return
        rows = matrix.tocsr()
        for start in range(0, rows.shape[0], CHUNK_CELLS):
            yield start, _summable(sp.csr_matrix(rows[start : start + CHUNK_CELLS]))


CellFile = StoredCells | LoadedCells


def dense_chunks(matrix: Any) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(first cell, rows as csr) of a dense matrix."""
    rows = max(1, CHUNK_VALUES // max(matrix.shape[1], 1))
    for start in range(0, matrix.shape[0], rows):
        block = np.asarray(matrix[start : start + rows])
        yield start, sp.csr_matrix(_summable(block))


def _summable(block: Any) -> Any:
    """Truth values and half precision as numbers that scipy adds up: it has no sparse half precision."""
    return block.astype(np.float32) if block.dtype in (np.float16, np.bool_) else block


def unreadable(field: str, error: Exception, what: str = "cannot be read") -> BadInput:
    """The line for a part of a file that a library does not read."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return BadInput("C011", field, first, f"{what}; write the file again")


def is_group_of_cells(group: h5py.Group) -> bool:
    """Whether a group has the layout of anndata, of any version."""
    return {"obs", "var"} <= set(group)


def is_old(root: Any) -> bool:
    """Whether a store was written before anndata 0.7: its tables or matrices do not say how they are encoded."""
    tables = [root[key] for key in ("obs", "var")]
    return any(hasattr(node, "shape") or "encoding-type" not in node.attrs for node in tables)
