"""Writes a local Census: the SOMA layout of schema 2.4.0, in row ranges, published by one rename.

The tables and their columns follow the public Census schema document; compression is lighter than in the
published releases because a local Census is written once per machine and not served to the world.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from scaling_ray.errors import BadInput

CENSUS_SCHEMA_VERSION = "2.4.0"
DATASET_SCHEMA_VERSION = "7.0.0"
ORGANISM = "homo_sapiens"
ORGANISMS: dict[str, tuple[str, str]] = {
    "homo_sapiens": ("Homo sapiens", "NCBITaxon:9606"),
    "mus_musculus": ("Mus musculus", "NCBITaxon:10090"),
}
"""Name of an organism's experiment -> its label and its term."""
RECORD_NAME = "census.json"
TILEDB_SAFE: dict[str, Any] = {
    "sm.query.sparse_global_order.preprocess_tile_merge": 0,
    "sm.enable_signal_handlers": "false",
}
"""What keeps TileDB from ending the process with SIGSEGV. Its merge of tile orders before a read races with itself (in
SparseGlobalOrderReader: 8 of 30 loops of 15 openings; without it none of 30). Its handler of SIGINT calls the one
before it, even where that is "ignore" (a command in the background of a script), which is no function."""
X_TILE_CELLS = 2048
"""Row extent of X's tiles: reads that start and stop at multiples of it touch no tile twice."""
_X_TILE_GENES = 2048

OBS_STRING_COLUMNS = (
    "dataset_id",
    "assay",
    "assay_ontology_term_id",
    "cell_type",
    "cell_type_ontology_term_id",
    "development_stage",
    "development_stage_ontology_term_id",
    "disease",
    "disease_ontology_term_id",
    "donor_id",
    "self_reported_ethnicity",
    "self_reported_ethnicity_ontology_term_id",
    "sex",
    "sex_ontology_term_id",
    "suspension_type",
    "tissue",
    "tissue_ontology_term_id",
    "tissue_type",
    "tissue_general",
    "tissue_general_ontology_term_id",
)
"""Dictionary-encoded obs columns, in the order of the schema."""

_DICTIONARY = pa.dictionary(pa.int32(), pa.large_string())
_OBS_SCHEMA = pa.schema(
    [("soma_joinid", pa.int64())]
    + [(name, _DICTIONARY) for name in OBS_STRING_COLUMNS[:10]]
    + [("is_primary_data", pa.bool_()), ("observation_joinid", pa.large_string())]
    + [(name, _DICTIONARY) for name in OBS_STRING_COLUMNS[10:]]
    + [
        ("raw_sum", pa.float64()),
        ("nnz", pa.int64()),
        ("raw_mean_nnz", pa.float64()),
        ("raw_variance_nnz", pa.float64()),
        ("n_measured_vars", pa.int64()),
    ]
)
TWIN_OF = "twin_of"
"""Obs column of an imported Census in which some cells stand several times: the joinid of the copy that counts, for
every other cell its own. Beside the schema's columns; a Census without such cells has none."""
_SUMMARISED = (
    "cell_type",
    "assay",
    "tissue",
    "tissue_general",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "suspension_type",
)
_ZSTD = {"_type": "ZstdFilter", "level": 3}
_X_CONFIG = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": X_TILE_CELLS, "filters": [_ZSTD]},
                "soma_dim_1": {"tile": _X_TILE_GENES, "filters": ["ByteShuffleFilter", _ZSTD]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


@dataclass(frozen=True)
class Dataset:
    """One row of ``census_info/datasets``: the origin of a group of cells."""

    dataset_id: str
    title: str
    collection_name: str
    collection_id: str
    citation: str = ""


def existing(out: Path) -> dict[str, Any] | None:
    """The record of the complete local Census at ``out``, or None where ``out`` is absent or empty.

    Raises:
        BadInput: ``out`` holds something that is not a complete Census written by this package.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise BadInput("C019", "out", str(out), "is a file; name a new directory")
    if not any(out.iterdir()):
        return None
    record_path = out / RECORD_NAME
    if not record_path.is_file():
        raise BadInput(
            "C020", "out", str(out), "is not empty and holds no complete Census; remove it or name a new directory"
        )
    record = json.loads(record_path.read_text())
    check_whole(out, record)
    return record


def check_whole(root: Path, record: dict[str, Any]) -> None:
    """Refuses a copy of a local Census that lost files or was cut short on the way."""
    found = _tree_size(root)
    promised = (record["files"], record["bytes"])
    if found != promised:
        raise BadInput(
            "C021",
            "census",
            str(root),
            f"is incomplete: {found[0]} files of {found[1]} bytes, {promised[0]} of {promised[1]} expected; "
            "remove it and make it again",
        )


def _tree_size(root: Path) -> tuple[int, int]:
    """Number and total bytes of the SOMA's files; this package's own JSON beside them is not counted."""
    files = size = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if Path(folder) == root and name.endswith(".json"):
                continue
            files += 1
            size += os.stat(os.path.join(folder, name)).st_size
    return files, size


class CensusWriter:
    """Writes one organism's cells range by range; ``publish`` makes the result appear, whole or not at all.

    It is a context manager: leaving it without ``publish``, as an error does, removes the files written so far.

    Args:
        out: directory to appear at the end; must not exist, or be empty.
        var: columns ``feature_id``, ``feature_name``, ``feature_length``, one row per gene (G).
        datasets: one entry per dataset, in the row order of ``presence``.
        presence: (datasets, G) bool, True where the dataset measured the gene.
        n_cells: number of obs rows to come.
        categories: for each column of ``OBS_STRING_COLUMNS`` every value that will occur. Given up front so
            that each range is written with one and the same dictionary.
        build_tag: ISO date or name, written as the Census build date.
        schema_version: Census schema that its summary names.
        organism: a name of ``ORGANISMS``.
        twins: whether obs has the column ``TWIN_OF``.
    """

    def __init__(
        self,
        out: Path,
        *,
        var: pd.DataFrame,
        datasets: Sequence[Dataset],
        presence: np.ndarray,
        n_cells: int,
        categories: Mapping[str, Sequence[str]],
        build_tag: str,
        schema_version: str = CENSUS_SCHEMA_VERSION,
        organism: str = ORGANISM,
        twins: bool = False,
    ) -> None:
        if presence.shape != (len(datasets), len(var)):
            raise ValueError(f"presence: {presence.shape}: expected {(len(datasets), len(var))}")
        self.out = Path(out)
        self._var, self._datasets, self._presence = var.reset_index(drop=True), list(datasets), presence.astype(bool)
        self._n_cells, self._build_tag, self._schema_version = n_cells, build_tag, schema_version
        self._organism = organism
        self._obs_schema = _OBS_SCHEMA.append(pa.field(TWIN_OF, pa.int64())) if twins else _OBS_SCHEMA
        self._categories = {name: pa.array(list(categories[name]), pa.large_string()) for name in OBS_STRING_COLUMNS}
        self._codes = {name: pd.Index(values.to_pylist()).astype(object) for name, values in self._categories.items()}
        self._dataset_row = {d.dataset_id: i for i, d in enumerate(datasets)}
        self._written = 0
        self._gene_nnz = np.zeros(len(var), np.int64)
        self._dataset_cells = np.zeros(len(datasets), np.int64)
        self._cell_counts: dict[tuple[str, str, str], np.ndarray] = {}
        self._donors: set[tuple[str, str]] = set()
        self._primary = 0

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.out.parent / f".{self.out.name}.partial-{uuid.uuid4().hex[:8]}"
        uri = str(self.partial)
        root: Any = soma.Collection.create(uri, context=_context())
        with root as census:
            census.add_new_collection("census_info")
            data = census.add_new_collection("census_data")
            experiment = data.add_new_collection(self._organism, soma.Experiment)
            experiment.add_new_dataframe("obs", schema=self._obs_schema, domain=[(0, max(self._n_cells - 1, 0))])
            experiment.add_new_collection("ms")
            rna = experiment.ms.add_new_collection("RNA", soma.Measurement)
            layers = rna.add_new_collection("X")
            layers.add_new_sparse_ndarray(
                "raw",
                type=pa.float32(),
                shape=(max(self._n_cells, 1), max(len(self._var), 1)),
                platform_config=_X_CONFIG,
            )
            rna.add_new_sparse_ndarray("feature_dataset_presence_matrix", type=pa.bool_(), shape=self._presence.shape)
        # Handles are opened anew for writing: a dictionary column written through the handle that created
        # its frame loses its categories, and value filters then match nothing.
        base = f"{uri}/census_data/{self._organism}"
        self._obs = soma.DataFrame.open(f"{base}/obs", "w", context=_context())
        self._x = soma.SparseNDArray.open(f"{base}/ms/RNA/X/raw", "w", context=_context())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self.partial.exists():
            shutil.rmtree(self.partial)

    def _close(self) -> None:
        for handle in (self._obs, self._x):
            if not handle.closed:
                handle.close()

    def append(self, obs: pd.DataFrame, counts: sp.csr_matrix) -> None:
        """Adds the next B cells.

        Args:
            obs: B rows with the string columns of the schema, ``is_primary_data`` and ``observation_joinid``, and
                ``TWIN_OF`` where the Census has it; joinids and the sums over counts are filled in here.
            counts: (B, G) raw counts without explicit zeros.
        """
        n = len(obs)
        if counts.shape != (n, len(self._var)):
            raise ValueError(f"counts: {counts.shape}: expected {(n, len(self._var))}")
        if self._written + n > self._n_cells:
            raise ValueError(f"append: {self._written + n} cells: only {self._n_cells} were announced")
        joinids = np.arange(self._written, self._written + n, dtype=np.int64)
        nnz = np.diff(counts.indptr).astype(np.int64)
        values = counts.data.astype(np.float64)
        row = np.repeat(np.arange(n), nnz)
        raw_sum = np.bincount(row, values, minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(nnz > 0, raw_sum / nnz, 0.0)
            centred = np.bincount(row, (values - mean[row]) ** 2, minlength=n)
            # ddof=1 as in the published tables; a single non-zero has no variance and is stored as 0
            variance = np.where(nnz > 1, centred / np.maximum(nnz - 1, 1), 0.0)
        dataset_rows = obs["dataset_id"].map(self._dataset_row).to_numpy()
        measured = self._presence.sum(axis=1)[dataset_rows].astype(np.int64)

        columns: dict[str, pa.Array] = {"soma_joinid": pa.array(joinids)}
        for name in OBS_STRING_COLUMNS:
            codes = self._codes[name].get_indexer(obs[name].astype(object))
            if (codes < 0).any():
                raise ValueError(f"{name}: {obs[name].iloc[int(np.argmin(codes))]!r}: not among the categories given")
            columns[name] = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), self._categories[name])
        columns["is_primary_data"] = pa.array(obs["is_primary_data"].to_numpy(bool))
        columns["observation_joinid"] = pa.array(obs["observation_joinid"].astype(str), pa.large_string())
        columns["raw_sum"] = pa.array(raw_sum)
        columns["nnz"] = pa.array(nnz)
        columns["raw_mean_nnz"] = pa.array(mean)
        columns["raw_variance_nnz"] = pa.array(variance)
        columns["n_measured_vars"] = pa.array(measured)
        if TWIN_OF in self._obs_schema.names:
            columns[TWIN_OF] = pa.array(obs[TWIN_OF].to_numpy(np.int64))
        self._obs.write(pa.table([columns[f.name] for f in self._obs_schema], schema=self._obs_schema))
        if counts.nnz:
            self._write_counts(joinids[row], counts.indices.astype(np.int64), counts.data.astype(np.float32))
        self._tally(obs, counts, dataset_rows)
        self._written += n

    def _write_counts(self, cell: np.ndarray, gene: np.ndarray, value: np.ndarray) -> None:
        # sorted here into TileDB's global order: its own sort takes five times the whole write
        tile = X_TILE_CELLS * _X_TILE_GENES
        tiles_across = -(-len(self._var) // _X_TILE_GENES)
        which = cell // X_TILE_CELLS * tiles_across + gene // _X_TILE_GENES
        order = np.argsort(which * tile + cell % X_TILE_CELLS * _X_TILE_GENES + gene % _X_TILE_GENES, kind="stable")
        table = pa.table({"soma_dim_0": cell[order], "soma_dim_1": gene[order], "soma_data": value[order]})
        self._x.write(table, platform_config=soma.TileDBWriteOptions(sort_coords=False))

    def _tally(self, obs: pd.DataFrame, counts: sp.csr_matrix, dataset_rows: np.ndarray) -> None:
        self._gene_nnz += np.bincount(counts.indices, minlength=len(self._var))
        self._dataset_cells += np.bincount(dataset_rows, minlength=len(self._datasets))
        primary = obs["is_primary_data"].to_numpy(bool)
        self._primary += int(primary.sum())
        self._donors.update(zip(obs["dataset_id"], obs["donor_id"], strict=True))
        for name in _SUMMARISED:
            term = f"{name}_ontology_term_id"
            terms = obs[term] if term in obs else pd.Series("na", index=obs.index)
            for (label, term_id), rows in _cell_counts_by_label(obs[name], terms, primary):
                tally = self._cell_counts.setdefault((name, label, term_id), np.zeros(2, np.int64))
                tally += rows

    def publish(self, *, about: dict[str, Any], documents: dict[str, str] | None = None) -> Path:
        """Writes the tables over all cells, checks the result and renames it into place.

        Args:
            about: the origin of this Census; kept in ``census.json`` and returned by ``existing``.
            documents: further JSON texts to lie beside it, by file name.
        """
        if self._written != self._n_cells:
            raise ValueError(f"publish: {self._written} cells written: {self._n_cells} were announced")
        self._close()
        root = str(self.partial)
        base = f"{root}/census_data/{self._organism}"
        self._write_presence(f"{base}/ms/RNA/feature_dataset_presence_matrix")
        with soma.Measurement.open(f"{base}/ms/RNA", "w", context=_context()) as rna:
            _write_frame(rna, "var", self._var_table())
        tables: Any = soma.Collection.open(f"{root}/census_info", "w", context=_context())
        with tables as info:
            for name, table in self._info_tables().items():
                _write_frame(info, name, table)
        self._assert_filters_work(f"{base}/obs")
        for name, text in (documents or {}).items():
            (self.partial / name).write_text(text)
        files, size = _tree_size(self.partial)
        record = {"about": about, "cells": self._n_cells, "genes": len(self._var), "files": files, "bytes": size}
        (self.partial / RECORD_NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        if self.out.is_dir():
            self.out.rmdir()  # fails unless it is empty, on purpose
        os.rename(self.partial, self.out)
        return self.out

    def _write_presence(self, uri: str) -> None:
        dataset, gene = np.nonzero(self._presence)
        with soma.SparseNDArray.open(uri, "w", context=_context()) as presence:
            presence.write(
                pa.table(
                    {
                        "soma_dim_0": dataset.astype(np.int64),
                        "soma_dim_1": gene.astype(np.int64),
                        "soma_data": np.ones(len(gene), bool),
                    }
                )
            )

    def _var_table(self) -> pa.Table:
        measured_cells = self._presence.T.astype(np.int64) @ self._dataset_cells
        return pa.table(
            {
                "soma_joinid": np.arange(len(self._var), dtype=np.int64),
                "feature_id": pa.array(self._var["feature_id"].astype(str), pa.large_string()),
                "feature_name": pa.array(self._var["feature_name"].astype(str), pa.large_string()),
                "feature_type": pa.array(["protein_coding"] * len(self._var), pa.large_string())
                if "feature_type" not in self._var
                else pa.array(self._var["feature_type"].astype(str), pa.large_string()),
                "feature_length": self._var["feature_length"].to_numpy(np.int64),
                "nnz": self._gene_nnz,
                "n_measured_obs": measured_cells,
            }
        )

    def _info_tables(self) -> dict[str, pa.Table]:
        summary = {
            "census_schema_version": self._schema_version,
            "census_build_date": self._build_tag,
            "dataset_schema_version": DATASET_SCHEMA_VERSION,
            "total_cell_count": str(self._n_cells),
            "unique_cell_count": str(self._primary),
        } | {f"number_donors_{name}": str(len(self._donors) if name == self._organism else 0) for name in ORGANISMS}
        counts = [("all", "na", "na", self._n_cells, self._primary)]
        counts += [(*key, int(tally[0]), int(tally[1])) for key, tally in sorted(self._cell_counts.items())]
        sets = self._datasets
        label, term = ORGANISMS[self._organism]
        return {
            "summary": _strings(label=list(summary), value=list(summary.values())),
            "summary_cell_counts": _strings(
                organism=[label] * len(counts),
                category=[c[0] for c in counts],
                label=[c[1] for c in counts],
                ontology_term_id=[c[2] for c in counts],
            )
            .append_column("total_cell_count", pa.array([c[3] for c in counts], pa.int64()))
            .append_column("unique_cell_count", pa.array([c[4] for c in counts], pa.int64())),
            "datasets": _strings(
                citation=[d.citation for d in sets],
                collection_id=[d.collection_id for d in sets],
                collection_name=[d.collection_name for d in sets],
                collection_doi=[""] * len(sets),
                collection_doi_label=[""] * len(sets),
                dataset_id=[d.dataset_id for d in sets],
                dataset_version_id=[d.dataset_id for d in sets],
                dataset_title=[d.title for d in sets],
                dataset_h5ad_path=[f"{d.dataset_id}.h5ad" for d in sets],
            ).append_column("dataset_total_cell_count", pa.array(self._dataset_cells)),
            "organisms": _strings(organism_ontology_term_id=[term], organism_label=[label], organism=[self._organism]),
        }

    def _assert_filters_work(self, uri: str) -> None:
        if not self._n_cells:
            return
        largest = self._datasets[int(self._dataset_cells.argmax())].dataset_id
        with soma.DataFrame.open(uri, context=_context()) as obs:
            found = len(obs.read(value_filter=f"dataset_id == '{largest}'", column_names=["soma_joinid"]).concat())
        if found != self._dataset_cells.max():
            raise RuntimeError(f"obs filter finds {found} cells of {largest}: {self._dataset_cells.max()} were written")


@cache
def _context() -> soma.SOMATileDBContext:
    return soma.SOMATileDBContext(tiledb_config=TILEDB_SAFE)


def _cell_counts_by_label(
    labels: pd.Series, terms: pd.Series, primary: np.ndarray
) -> list[tuple[tuple[str, str], np.ndarray]]:
    """(label, term) pairs with their (all, primary) cell counts."""
    frame = pd.DataFrame(
        {"label": labels.to_numpy(), "term": terms.to_numpy(), "all": 1, "primary": primary.astype(int)}
    )
    sums = frame.groupby(["label", "term"], sort=True, observed=True).sum()
    return [((str(key[0]), str(key[1])), row) for key, row in zip(sums.index, sums.to_numpy(np.int64), strict=True)]


def _strings(**columns: list[str]) -> pa.Table:
    length = len(next(iter(columns.values())))
    table = {"soma_joinid": pa.array(range(length), pa.int64())}
    return pa.table(table | {name: pa.array(values, pa.large_string()) for name, values in columns.items()})


def _write_frame(parent: Any, name: str, table: pa.Table) -> None:
    frame = parent.add_new_dataframe(name, schema=table.schema, domain=[(0, max(len(table) - 1, 0))])
    uri = frame.uri
    frame.close()
    with soma.DataFrame.open(uri, "w", context=_context()) as writable:
        writable.write(table)
