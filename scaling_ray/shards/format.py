"""The shard format: Parquet with raw counts in gene blocks, small tables beside it, a manifest with hashes.

A directory or S3 prefix holds ``manifest.json``, ``<split>-NNNNN.parquet`` (131,072 cells or fewer, row groups of
16,384), ``genes.parquet`` (one row per gene in rank order), ``presence.parquet`` (one row per dataset: which genes it
measured) and, for planted cells, ``plant.json``. A counts block is FixedSizeBinary of 256 little-endian uint16, so the
first V genes are a prefix of columns and the first D cells a prefix of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import FileEntry, ShardManifest
from scaling_ray.storage import Place, open_place, unseal

MANIFEST = "manifest.json"
"""Written last: a directory without it holds no shards."""

BLOCK_GENES = 256
ROW_GROUP_CELLS = 16_384
FILE_CELLS = 131_072
SPLITS = ("train", "val", "test")
CODE_COLUMNS = ("dataset_id", "donor_id", "cell_type", "disease", "tissue", "assay")
LARGEST_COUNT = int(np.iinfo(np.uint16).max)


def block_widths(genes: int) -> list[int]:
    """Genes per block: 256 each, the last one what remains."""
    return [min(BLOCK_GENES, genes - start) for start in range(0, genes, BLOCK_GENES)]


def block_name(index: int) -> str:
    """Column name of counts block ``index``."""
    return f"counts_{index:03d}"


def shard_schema(genes: int) -> pa.Schema:
    """Columns of a shard file."""
    fields = [pa.field("cell", pa.int64()), pa.field("raw_sum", pa.int64())]
    fields += [pa.field(name, pa.int32()) for name in CODE_COLUMNS]
    fields += [pa.field(block_name(i), pa.binary(2 * width)) for i, width in enumerate(block_widths(genes))]
    return pa.schema([field.with_nullable(False) for field in fields])


def encode_block(counts: NDArray[np.uint16]) -> pa.FixedSizeBinaryArray:
    """(B, genes of the block) uint16 as one fixed-size binary value per cell."""
    packed = np.ascontiguousarray(counts, dtype="<u2")
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * packed.shape[1]), packed.shape[0], [None, pa.py_buffer(packed.tobytes())]
    )


def decode_block(column: pa.ChunkedArray | pa.Array, width: int) -> NDArray[np.uint16]:
    """(B, width) uint16 from a counts column."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        values = np.frombuffer(chunk.buffers()[1], dtype="<u2") if len(chunk) else np.empty(0, dtype="<u2")
        parts.append(values[chunk.offset * width : (chunk.offset + len(chunk)) * width].reshape(len(chunk), width))
    return np.concatenate(parts) if parts else np.empty((0, width), dtype=np.uint16)


class _Content:
    """A running sha256 of what cells say, column by column: the same however they are chunked or compressed."""

    def __init__(self, genes: int) -> None:
        self._schema = shard_schema(genes)
        self._columns = {name: hashlib.sha256(name.encode()) for name in self._schema.names}

    def add(self, table: pa.Table) -> None:
        for name, digest in self._columns.items():
            kind = self._schema.field(name).type
            if pa.types.is_fixed_size_binary(kind):
                digest.update(np.ascontiguousarray(decode_block(table[name], kind.byte_width // 2)).data)
            else:
                digest.update(np.ascontiguousarray(table[name].to_numpy(), dtype="<i8").data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._columns.values())).hexdigest()


def write_file(
    place: Place, name: str, tables: Iterable[pa.Table], genes: int, row_group_cells: int = ROW_GROUP_CELLS
) -> FileEntry | None:
    """Write cells as one shard file, in the order given; its entry for the manifest, None where there are no cells.

    A row group ends with a table at the latest: tables of ``row_group_cells`` cells, the last one of fewer, are wanted.
    """
    schema, content, rows = shard_schema(genes), _Content(genes), 0
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", compression_level=1) as writer:
        for table in tables:
            table = table.select(schema.names).cast(schema)
            content.add(table)
            writer.write_table(table, row_group_size=row_group_cells)
            rows += table.num_rows
    return _put(place, name, sink, rows, content.hexdigest()) if rows else None


def write_table(place: Place, name: str, table: pa.Table) -> FileEntry:
    """Write a small table beside the shards."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    return _put(place, name, sink, table.num_rows)


def _put(place: Place, name: str, sink: pa.BufferOutputStream, rows: int, content: str | None = None) -> FileEntry:
    data = sink.getvalue().to_pybytes()
    place.write(name, data)
    return file_entry(name, data, rows, content)


def file_entry(name: str, data: bytes, rows: int, content: str | None = None) -> FileEntry:
    """A file that was just written, for the manifest."""
    sha256 = hashlib.sha256(data).hexdigest()
    return FileEntry(path=name, rows=rows, bytes=len(data), sha256=sha256, content_sha256=content)


def split_content(files: list[FileEntry]) -> str:
    """What a split holds, from its files' contents in their order."""
    return hashlib.sha256("".join(f"{file.rows} {file.content_sha256}\n" for file in files).encode()).hexdigest()


def row_groups(manifest: ShardManifest, split: str) -> NDArray[np.int64]:
    """First row of each row group of a split and, last, its number of cells: (groups + 1,), rising."""
    edges = [0]
    for entry in manifest.splits[split].files:
        begin = edges[-1]
        edges += range(begin + manifest.row_group_cells, begin + entry.rows, manifest.row_group_cells)
        edges.append(begin + entry.rows)
    return np.array(edges, dtype=np.int64)


def read_manifest(where: Path | str | Place) -> ShardManifest:
    """The manifest of a shard directory; BadInput if there is none, DamagedFiles where a group is in two splits."""
    manifest = _manifest(open_place(where, "shards"))
    overlaps = _groups_in_two_splits(manifest)
    if overlaps:
        raise DamagedFiles("D011", overlaps)
    return manifest


def _manifest(shards: Place) -> ShardManifest:
    try:
        return ShardManifest.parse(shards.read(MANIFEST), f"{shards}/{MANIFEST}")
    except FileNotFoundError as error:
        remedy = f"holds no {MANIFEST}; make shards with `scaling-ray shards build`"
        raise BadInput("D012", "shards", str(shards), remedy) from error


def _groups_in_two_splits(manifest: ShardManifest) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for split, entry in manifest.splits.items():
        for group in entry.groups:
            if group in seen:
                problems.append(f"{MANIFEST}: {manifest.split_by} {group!r} is in {seen[group]} and in {split}")
            seen[group] = split
    return problems


def verify(where: Path | str | Place) -> list[str]:
    """Each file that is missing, damaged or not in the manifest, one sentence each; empty where all is well."""
    shards = open_place(where, "shards")
    text = shards.read_if_there(MANIFEST)
    if text is not None:
        try:
            unseal(text, MANIFEST, "build the shards anew")
        except BadInput as error:
            return [error.said]
    manifest = _manifest(shards)
    expected = {entry.path: entry for split in manifest.splits.values() for entry in split.files}
    expected |= {entry.path: entry for entry in manifest.tables}
    found = shards.names()
    problems = []
    for name, entry in expected.items():
        if name not in found:
            problems.append(f"{name}: is missing")
        elif found[name] != entry.bytes:
            problems.append(f"{name}: has {found[name]} bytes, the manifest says {entry.bytes}")
        elif hashlib.sha256(shards.read(name)).hexdigest() != entry.sha256:
            problems.append(f"{name}: its contents changed since it was written (sha256 differs)")
    problems += [f"{name}: is not in the manifest" for name in found if name not in expected and name != MANIFEST]
    return problems + _groups_in_two_splits(manifest)
