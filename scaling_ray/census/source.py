"""Reads cells out of a Census: planted, imported or live, all through ``cellxgene_census.open_soma``.

One string locates a Census and opens it again in another process: a local path, a ``file://`` or ``s3://`` URI, or a
release name such as ``2025-11-08`` or ``stable``. The public Census buckets on S3 are read anonymously from the region
in their name; any other bucket is read with the usual AWS credentials and region of the environment.
``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` names another S3 service (MinIO, a test server).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlparse

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import requests
import scipy.sparse as sp
import tiledbsoma as soma

from scaling_ray.census.layout import ORGANISM, RECORD_NAME, TILEDB_SAFE, TWIN_OF, check_whole
from scaling_ray.errors import BadInput
from scaling_ray.storage import patiently

SCHEMA_MAJOR = 2
"""The Census schema that this reader knows: the tables and columns of 2.x."""

_RELEASE = re.compile(r"stable|latest|\d{4}-\d{2}-\d{2}")
_PUBLIC_BUCKET = re.compile(r"cellxgene-census-public-(?P<region>[a-z]+-[a-z]+-\d)")
_WAYS = "give a directory, an s3:// URI of a Census, or a release such as 2025-11-08 or stable"


class Census:
    """One organism of one Census, open for reading. A context manager; ``uri`` alone opens it again.

    Attributes:
        uri: its location; plain text, so it travels to other processes.
        census_version: build date or name out of the Census's own summary.
        schema_version: version of the Census schema it was written in.
        n_cells: obs rows (N); joinids run from 0 to N - 1.
        n_genes: var rows (G).
        tile_cells: row extent of a tile of X; ranges aligned to it read no tile twice.
    """

    def __init__(self, root: soma.Collection, uri: str, organism: str | None) -> None:
        self._root, self.uri = root, uri
        if not {"census_info", "census_data"} <= set(root):
            root.close()
            raise BadInput("C047", "census", uri, f"is a SOMA collection but no Census; {_WAYS}")
        held = sorted(root["census_data"])
        if organism is None:
            organism = held[0] if len(held) == 1 else ORGANISM
        self.organism = organism
        if organism not in held:
            root.close()
            raise BadInput("C048", "organism", organism, f"is not in this Census; it holds {held}")
        experiment = root["census_data"][organism]
        self._obs, self._rna = experiment.obs, experiment.ms["RNA"]
        self._x = self._rna.X["raw"]
        summary = root["census_info"]["summary"].read().concat().to_pandas()
        labels = dict(zip(summary["label"], summary["value"], strict=True))
        self.census_version: str = labels["census_build_date"]
        self.schema_version: str = labels["census_schema_version"]
        if not self.schema_version.startswith(f"{SCHEMA_MAJOR}."):
            root.close()
            raise BadInput(
                "C049",
                "census schema",
                self.schema_version,
                f"is not the {SCHEMA_MAJOR}.x this version reads; upgrade scaling-ray, or name an older release",
            )
        self.n_cells: int = self._obs.count
        self.n_genes: int = self._rna.var.count
        dimensions = json.loads(self._x.schema_config_options().dims)
        self.tile_cells = int(dimensions["soma_dim_0"]["tile"])

    @classmethod
    def open(
        cls,
        uri_or_version: str | Path,
        organism: str | None = None,
        *,
        threads: int = 1,
        buffer_bytes: int = 64 * 2**20,
        region: str | None = None,
        anonymous: bool | None = None,
        check: bool = True,
    ) -> Census:
        """Opens a Census.

        Args:
            uri_or_version: local path, ``file://`` or ``s3://`` URI, or a release name.
            organism: name of the experiment inside ``census_data``; None: the only one, of several homo_sapiens.
            threads: compute threads of TileDB; the default suits a task that was given one CPU.
            buffer_bytes: read buffer per column; one read holds a small multiple of it in memory, beside its
                result.
            region: AWS region, where it is neither in the bucket's name nor in the environment.
            anonymous: send unsigned requests; default: only to the public Census buckets.
            check: check whether a local Census has lost files.

        Raises:
            BadInput: nothing there, not a Census, an incomplete local one, or an unknown release.
        """
        where = str(uri_or_version)
        remote = "://" in where or _RELEASE.fullmatch(where) is not None
        config: dict[str, Any] = {
            **TILEDB_SAFE,
            "soma.init_buffer_bytes": buffer_bytes,
            "py.init_buffer_bytes": buffer_bytes,
            "sm.compute_concurrency_level": threads,
            # reads from S3 wait for the network, so a few more in flight cost no CPU
            "sm.io_concurrency_level": max(4, threads) if remote else threads,
        }
        try:
            if _RELEASE.fullmatch(where) and not Path(where).exists():
                return cls._open_release(where, organism, config)
            uri = _local_path(where, check)
            if uri is None:
                if not where.startswith("s3://"):
                    raise BadInput("C050", "census", where, f"is neither; {_WAYS}")
                uri = where
                config |= _s3_config(uri, region, anonymous)
            context = cellxgene_census.get_default_soma_context(tiledb_config=config)
            return cls(cellxgene_census.open_soma(uri=uri, context=context), uri, organism)
        except soma.DoesNotExistError as error:
            raise BadInput("C051", "census", where, f"holds no Census; {_WAYS}") from error
        except ValueError as error:
            if isinstance(error, BadInput) or "encoding" not in str(error):
                raise
            raise BadInput(
                "C052", "census", where, f"cannot be read by this tiledbsoma ({_first_line(error)}); upgrade it"
            ) from error
        except soma.SOMAError as error:
            raise BadInput("C053", "census", where, f"cannot be read ({_first_line(error)}); {_WAYS}") from error

    @classmethod
    def _open_release(cls, version: str, organism: str | None, config: dict[str, Any]) -> Census:
        try:
            context = cellxgene_census.get_default_soma_context(tiledb_config=config)
            root = cellxgene_census.open_soma(census_version=version, context=context)
        except requests.RequestException as error:
            raise BadInput(
                "C054",
                "census",
                version,
                "the directory of releases cannot be reached; check the network, or give a URI",
            ) from error
        except ValueError as error:
            raise BadInput("C055", "census", version, "is no known Census release; try stable") from error
        return cls(root, root.uri, organism)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every handle."""
        self._root.close()

    def obs_codes(
        self, columns: Sequence[str], value_filter: str | None = None
    ) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, list[str]]]]:
        """Cell metadata as integers, so that a hundred million cells fit in memory.

        Returns:
            soma_joinid (N,) int64, rising; and for each column its codes (N,) int32 and its labels, sorted.

        Raises:
            BadInput: as ``obs``.
        """
        self._check_columns(columns)
        joinids: list[np.ndarray] = []
        codes: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        known: dict[str, dict[str, int]] = {name: {} for name in columns}
        names = list(dict.fromkeys(["soma_joinid", *columns]))
        for table in self._obs_tables(names, value_filter):
            joinids.append(table["soma_joinid"].to_numpy())
            for name in columns:
                column = table[name].combine_chunks()
                if not pa.types.is_dictionary(column.type):
                    column = column.cast(pa.string()).dictionary_encode()
                seen = known[name]
                labels = ["" if label is None else str(label) for label in column.dictionary.to_pylist()]
                place = np.array([seen.setdefault(label, len(seen)) for label in labels], np.int32)
                codes[name].append(place[column.indices.to_numpy()])
        joinid = np.concatenate([np.empty(0, np.int64), *joinids])
        order = None if (np.diff(joinid) > 0).all() else np.argsort(joinid, kind="stable")
        found = {}
        for name in columns:
            column = np.concatenate([np.empty(0, np.int32), *codes.pop(name)])
            used = np.flatnonzero(np.bincount(column, minlength=len(known[name])))
            every = list(known[name])
            rising = sorted(used.tolist(), key=lambda code: every[code])
            rank = np.zeros(len(every), np.int32)
            rank[rising] = np.arange(len(rising), dtype=np.int32)
            column = rank[column]
            found[name] = (column if order is None else column[order], [every[code] for code in rising])
        return joinid if order is None else joinid[order], found

    def _check_columns(self, columns: Sequence[str]) -> None:
        known = list(self._obs.keys())
        for name in columns:
            if name not in known:
                raise BadInput("C056", "obs column", name, f"is not in this Census; it has {', '.join(known)}")

    def _obs_tables(self, columns: Sequence[str] | None, value_filter: str | None) -> Iterator[pa.Table]:
        try:
            yield from self._obs.read(column_names=columns, value_filter=value_filter or None)
        except soma.SOMAError as error:
            raise BadInput(
                "C057",
                "value_filter",
                value_filter,
                f"is not understood ({_first_line(error)}); write e.g. tissue_general == 'lung' and "
                "is_primary_data == True, with obs columns of this Census",
            ) from error

    def nnz(self, value_filter: str | None = None) -> np.ndarray:
        """Genes with a count, (N,) int64 by rising soma_joinid, from the Census's own column."""
        tables = list(self._obs_tables(["soma_joinid", "nnz"], value_filter))
        joinid = np.concatenate([np.empty(0, np.int64), *(table["soma_joinid"].to_numpy() for table in tables)])
        nnz = np.concatenate([np.empty(0, np.int64), *(table["nnz"].to_numpy() for table in tables)])
        return nnz[np.argsort(joinid, kind="stable")]

    def twin_of(self, value_filter: str | None = None) -> np.ndarray | None:
        """The joinid of the copy that counts for each cell (``census.layout.TWIN_OF``), (N,) by rising soma_joinid.

        None where no cell of the Census has a second copy.
        """
        if TWIN_OF not in self._obs.keys():
            return None
        tables = list(self._obs_tables(["soma_joinid", TWIN_OF], value_filter))
        joinid = np.concatenate([np.empty(0, np.int64), *(table["soma_joinid"].to_numpy() for table in tables)])
        twin = np.concatenate([np.empty(0, np.int64), *(table[TWIN_OF].to_numpy() for table in tables)])
        return twin[np.argsort(joinid, kind="stable")]

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pd.DataFrame:
        """Cell metadata, sorted by ``soma_joinid`` (always included), as plain numpy and object columns.

        Args:
            columns: names of obs columns; None reads all.
            value_filter: a condition in SOMA's language, e.g. ``tissue_general == 'lung' and is_primary_data == True``.

        Raises:
            BadInput: an unknown column, or a condition that SOMA does not understand.
        """
        if columns is not None:
            self._check_columns(columns)
            columns = list(dict.fromkeys(["soma_joinid", *columns]))
        table = pa.concat_tables(list(self._obs_tables(columns, value_filter)))
        frame = _plain(table.to_pandas())
        return frame if columns is None else frame[list(columns)]  # SOMA adds the columns of the condition

    def var(self) -> pd.DataFrame:
        """Gene metadata (soma_joinid, feature_id, feature_name, ...), sorted by ``soma_joinid``."""
        return _plain(self._rna.var.read().concat().to_pandas())

    def presence(self) -> tuple[list[str], sp.csr_matrix]:
        """The presence matrix: the genes that each dataset measured.

        Returns:
            The dataset_id of each row, and a (datasets, G) bool matrix whose columns are var joinids.
        """
        datasets = _plain(
            self._root["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
        )
        ids = [""] * (int(datasets["soma_joinid"].max()) + 1)
        for row, name in zip(datasets["soma_joinid"], datasets["dataset_id"], strict=True):
            ids[row] = str(name)
        table = self._rna["feature_dataset_presence_matrix"].read().tables().concat()
        present = table["soma_data"].to_numpy().astype(bool)
        row, column = table["soma_dim_0"].to_numpy()[present], table["soma_dim_1"].to_numpy()[present]
        return ids, sp.csr_matrix((np.ones(len(row), bool), (row, column)), shape=(len(ids), self.n_genes))

    def counts(self, start: int, stop: int) -> sp.csr_matrix:
        """Raw counts of the cells with start <= soma_joinid < stop.

        Returns:
            (stop - start, G) int32; a cell without counts is an empty row, a gene's column is its var joinid.

        Raises:
            BadInput: the range leaves the Census, or a value is negative, fractional or beyond int32.
        """
        if not 0 <= start < stop <= self.n_cells:
            raise BadInput("C058", "cell range", (start, stop), f"choose 0 <= start < stop <= {self.n_cells}")
        table = patiently(
            lambda: self._x.read((slice(start, stop - 1), slice(None))).tables().concat(), self._may_come_back
        )
        counts = _as_counts(table["soma_data"].to_numpy(), f"cells {start} to {stop}")
        rows = (table["soma_dim_0"].to_numpy() - start).astype(np.int32)
        genes = table["soma_dim_1"].to_numpy().astype(np.int32)
        shape = (stop - start, self.n_genes)
        if not len(rows) or (np.diff(rows) >= 0).all():
            # one tile across: the entries come row by row
            first = np.zeros(shape[0] + 1, dtype=np.int32)
            np.cumsum(np.bincount(rows, minlength=shape[0]), out=first[1:])
            matrix = sp.csr_matrix((counts, genes, first), shape=shape)
        else:
            matrix = sp.coo_matrix((counts, (rows, genes)), shape=shape).tocsr()
        matrix.sort_indices()
        return matrix

    def _may_come_back(self, error: Exception) -> bool:
        """Whether a failed read is worth another try: an object store may be away for a while, a disk is not."""
        return "://" in self.uri and isinstance(error, soma.SOMAError | OSError)


def _as_counts(values: np.ndarray, where: str) -> np.ndarray:
    """The same as int32; BadInput for a value that is negative, fractional, infinite or beyond int32."""
    with np.errstate(invalid="ignore"):  # nan and values beyond int32 become the smallest int32
        counts = values.astype(np.int32)
    wrong = counts.astype(values.dtype) != values
    if wrong.any() or (len(counts) and counts.min() < 0):
        first = float(values[np.argmax(wrong | (counts < 0))])
        raise BadInput("C059", "X/raw", first, f"is no count ({where}); a Census of raw counts is needed")
    return counts


def _local_path(where: str, check: bool) -> str | None:
    """The absolute path of a local Census, checked for lost files; None for a remote URI."""
    if "://" in where and not where.startswith("file://"):
        return None
    path = Path(unquote(urlparse(where).path) if where.startswith("file://") else where).absolute()
    if not path.exists():
        raise BadInput("C060", "census", where, f"does not exist; {_WAYS}")
    record = path / RECORD_NAME
    if check and record.is_file():
        check_whole(path, json.loads(record.read_text()))
    return str(path)


def _s3_config(uri: str, region: str | None, anonymous: bool | None) -> dict[str, str]:
    public = _PUBLIC_BUCKET.fullmatch(urlparse(uri).netloc)
    environment = os.environ
    region = region or (public and public["region"]) or environment.get("AWS_REGION")
    region = region or environment.get("AWS_DEFAULT_REGION") or "us-west-2"
    unsigned = bool(public) if anonymous is None else anonymous
    config = {"vfs.s3.region": region, "vfs.s3.no_sign_request": str(unsigned).lower()}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        address = urlparse(endpoint)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise BadInput("C061", "AWS_ENDPOINT_URL", endpoint, "must look like http://host:port")
        config |= {
            "vfs.s3.endpoint_override": address.netloc,
            "vfs.s3.scheme": address.scheme,
            "vfs.s3.use_virtual_addressing": "false",
        }
    return config


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted by joinid, dictionary columns as objects that share their strings."""
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = np.asarray(frame[name].astype(object))
    return frame.sort_values("soma_joinid", ignore_index=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
