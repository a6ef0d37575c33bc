"""Opens cells in the containers that people have them in, each by the library that owns the format.

``.h5ad``, the RNA of ``.h5mu`` and ``.zarr`` are streamed (``census.h5ad``); old ``.h5ad``, 10x ``.h5``, 10x folders of
``matrix.mtx`` and ``.loom`` are read whole by anndata or scanpy. ``.gz`` around a file is opened for the call.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata
import h5py
import pandas as pd
import zarr

from scaling_ray.census.h5ad import CellFile, LoadedCells, StoredCells, is_group_of_cells, is_old, unreadable
from scaling_ray.errors import BadInput

READABLE = ".h5ad, .zarr, .h5mu, .loom, 10x .h5, or a 10x folder with matrix.mtx, features.tsv and barcodes.tsv"
_RNA = ("rna", "RNA", "gex", "GEX", "gene_expression", "Gene Expression")
_CONVERT = {
    ".rds": "is an R object; in R, write it with anndata::write_h5ad or as a 10x folder with DropletUtils",
    ".rdata": "is an R workspace; in R, write the object with anndata::write_h5ad",
    ".h5seurat": "is Seurat's own format; in R, SeuratDisk::Convert(FILE, dest = 'h5ad') writes .h5ad",
    ".csv": "is a table of text; read it with scanpy.read_csv, check which way it lies, and write_h5ad",
    ".tsv": "is a table of text; read it with scanpy.read_text, check which way it lies, and write_h5ad",
    ".txt": "is a table of text; read it with scanpy.read_text, check which way it lies, and write_h5ad",
    ".xlsx": "is a spreadsheet; gene names in it may have become dates; get the matrix from its source",
    ".tar": "is an archive; unpack it and name a file in it",
    ".zip": "is an archive; unpack it and name a file in it",
}


def cell_file_name(path: Path) -> str:
    """The name of a file of cells without its endings: a data set's id."""
    name = path.name
    for ending in (".gz", ".h5ad", ".zarr", ".h5mu", ".loom", ".h5", ".mtx"):
        if name.lower().endswith(ending) and len(name) > len(ending):
            name = name[: -len(ending)]
    return name


@contextmanager
def open_cells(path: Path) -> Iterator[CellFile]:
    """The cells of a file or folder, readable for as long as the block runs.

    Raises:
        BadInput: nothing there, a format that is not read here (with the way to one that is), or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput("C029", "file", str(path), "does not exist; correct its name")
    with ExitStack() as stack:
        yield _opened(path, stack)


def _opened(path: Path, stack: ExitStack) -> CellFile:
    if path.is_dir():
        return _folder(path, stack)
    lower = path.name.lower()
    if ".mtx" in lower:
        return _mtx(path.parent, path.name[: lower.index("matrix.mtx")] if "matrix.mtx" in lower else None, path.name)
    plain = path
    if lower.endswith(".gz"):
        lower = lower.removesuffix(".gz")
        _refuse_known(path, lower)
        plain = _unpacked(path, stack)
    _refuse_known(path, lower)
    if not h5py.is_hdf5(plain):
        raise BadInput(
            "C030", "file", str(path), f"is no whole .h5ad file nor any other that is read here; give {READABLE}"
        )
    if lower.endswith(".loom"):
        return _loom(path, plain)
    try:
        file = stack.enter_context(h5py.File(plain, "r"))
    except OSError as error:
        raise BadInput(
            "C031", "file", str(path), f"is no whole .h5ad file, it was cut short ({_first(error)}); copy it again"
        ) from error
    if "mod" in file:
        return _stored(f"{path.name}", ".h5mu", _rna_of(path, file))
    if is_group_of_cells(file):
        if is_old(file):
            return _old_h5ad(path, plain)
        return _stored(path.name, ".h5ad", file)
    if "matrix" in file or any(isinstance(node, h5py.Group) and "barcodes" in node for node in file.values()):
        return _tenx_h5(path, plain, file)
    if {"matrix", "row_attrs", "col_attrs"} <= set(file):
        return _loom(path, plain)
    held = ", ".join(list(file)[:6])
    raise BadInput(
        "C032",
        "file",
        str(path),
        f"is HDF5 with {held or 'nothing in it'}, and none of {READABLE}; name the file of counts",
    )


def _refuse_known(path: Path, lower: str) -> None:
    if re.search(r"(^|[._-])(barcodes|features|genes)\.tsv(\.gz)?$", Path(lower).name):
        raise BadInput("C086", "file", str(path), "is a part of a 10x folder; name the folder, or its matrix.mtx")
    for ending, what_it_is_and_the_way_out in _CONVERT.items():
        if lower.endswith(ending):
            raise BadInput("C033", "file", str(path), f"{what_it_is_and_the_way_out}; read here: {READABLE}")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _stored(name: str, container: str, root: Any) -> StoredCells:
    cells = StoredCells(name, container, root)
    for place in cells.places:
        cells.shape(place)
    return cells


def _unpacked(path: Path, stack: ExitStack) -> Path:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scaling-ray-"))
    plain = Path(folder) / path.name[: -len(".gz")]
    try:
        with gzip.open(path, "rb") as packed, open(plain, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**24)
    except (OSError, EOFError) as error:
        raise BadInput("C034", "file", str(path), f"is no whole gzip file ({_first(error)}); copy it again") from error
    return plain


def _rna_of(path: Path, file: h5py.File) -> h5py.Group:
    held = list(file["mod"])
    found = next((name for name in _RNA if name in held), None)
    if found is None:
        raise BadInput(
            "C035",
            "file",
            str(path),
            f"holds {', '.join(held)} and no modality of RNA ({', '.join(_RNA)}); give a file of RNA",
        )
    return file["mod"][found]


@contextmanager
def _quiet() -> Iterator[None]:
    """What a library warns of while it reads is told in this package's own words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _loaded(path: Path, container: str, read: Any) -> LoadedCells:
    try:
        with _quiet():
            return LoadedCells(path.name, f"{container}, read whole", read())
    except MemoryError as error:
        raise BadInput("C036", "file", str(path), "does not fit this machine's memory; write it as .h5ad") from error
    except Exception as error:  # noqa: BLE001 - other people's readers raise anything on a damaged file
        raise unreadable(path.name, error) from error


def _old_h5ad(path: Path, plain: Path) -> LoadedCells:
    return _loaded(path, ".h5ad older than anndata 0.7", lambda: anndata.read_h5ad(plain))


def _loom(path: Path, plain: Path) -> LoadedCells:
    if find_spec("loompy") is None:
        raise BadInput("C037", "file", str(path), "is a .loom file; pip install 'scaling-ray[loom]' reads it")
    return _loaded(path, ".loom", lambda: _read_loom(plain))


def _read_loom(plain: Path) -> anndata.AnnData:
    adata = anndata.io.read_loom(plain, X_name="", sparse=True)
    # anndata writes the names of both axes as columns, and reads those of other programs as names
    for table, column in ((adata.obs, "obs_names"), (adata.var, "var_names")):
        if column in table:
            table.index = table[column].astype(str).to_numpy()
    return adata


def _tenx_h5(path: Path, plain: Path, file: h5py.File) -> LoadedCells:
    genomes = [] if "matrix" in file else [name for name, node in file.items() if "barcodes" in node]
    if len(genomes) > 1:
        raise BadInput(
            "C038", "file", str(path), f"holds several genomes ({', '.join(genomes)}); a Census holds one species"
        )
    import scanpy

    return _loaded(path, "10x .h5", lambda: scanpy.read_10x_h5(plain, gex_only=False))


def _folder(path: Path, stack: ExitStack) -> CellFile:
    names = sorted(entry.name for entry in path.iterdir())
    if any(name in names for name in (".zgroup", "zarr.json", ".zattrs", ".zmetadata")):
        try:
            with _quiet():
                root = zarr.open_group(path, mode="r")
                whole = {"obs", "var"} <= set(root)
        except Exception as error:  # noqa: BLE001 - zarr raises its stores' own errors
            raise unreadable(path.name, error) from error
        if not whole:
            raise BadInput("C039", "file", str(path), "is a .zarr store without obs and var; write it with write_zarr")
        return _stored(path.name, ".zarr", root)
    matrices = [name for name in names if name.lower().removesuffix(".gz").endswith("matrix.mtx")]
    if len(matrices) == 1:
        return _mtx(path, matrices[0][: matrices[0].lower().index("matrix.mtx")], path.name)
    if matrices:
        remedy = f"holds {len(matrices)} matrices; name each file, such as {path / matrices[0]}"
        raise BadInput("C040", "file", str(path), remedy)
    inside = [name for name in names if name.lower().endswith((".h5ad", ".h5", ".loom", ".h5mu", ".zarr"))]
    inner = [name for name in names if (path / name).is_dir() and "feature_bc_matrix" in name]
    if inside or inner:
        remedy = f"is a folder; name what is in it, such as {path / (inside + inner)[0]}"
        raise BadInput("C041", "file", str(path), remedy)
    shown = ", ".join(names[:4]) or "nothing"
    raise BadInput(
        "C042", "file", str(path), f"is a folder with {shown}, and none of {READABLE}; name the file of counts"
    )


def _mtx(folder: Path, prefix: str | None, name: str) -> LoadedCells:
    """A 10x folder, of any version of Cell Ranger, also with a prefix before its three files (as GEO has them)."""
    if prefix is None:
        raise BadInput(
            "C043", "file", str(folder / name), "is no matrix.mtx; a 10x folder has one, and two tables beside"
        )
    there = {entry.name for entry in folder.iterdir()}

    def beside(*stems: str) -> Path:
        for stem in stems:
            for ending in ("", ".gz"):
                if f"{prefix}{stem}{ending}" in there:
                    return folder / f"{prefix}{stem}{ending}"
        raise BadInput(
            "C044",
            "file",
            str(folder),
            f"has {prefix}matrix.mtx and no {prefix}{stems[0]} beside it; copy the whole folder",
        )

    matrix, features, barcodes = beside("matrix.mtx"), beside("features.tsv", "genes.tsv"), beside("barcodes.tsv")
    return _loaded(folder if prefix == "" else folder / name, "10x mtx", lambda: _read_mtx(matrix, features, barcodes))


def _read_mtx(matrix: Path, features: Path, barcodes: Path) -> anndata.AnnData:
    # Not scanpy.read_10x_mtx: it wants Cell Ranger's compression for its version, and names made unique.
    adata = anndata.io.read_mtx(matrix).T
    table = pd.read_csv(features, sep="\t", header=None, dtype=str, keep_default_na=False)
    cells = pd.read_csv(barcodes, sep="\t", header=None, dtype=str, keep_default_na=False)[0]
    if (len(cells), len(table)) != adata.shape:
        raise ValueError(
            f"{matrix.name} is {adata.shape[1]} x {adata.shape[0]}: {len(table)} features, {len(cells)} barcodes"
        )
    adata.obs_names, adata.var_names = cells.to_numpy(), table[0].to_numpy()
    if table.shape[1] > 1:
        adata.var["gene_symbols"] = table[1].to_numpy()
    if table.shape[1] > 2:
        adata.var["feature_types"] = table[2].to_numpy()
    return adata
