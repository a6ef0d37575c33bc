"""The shard format: Parquet with raw counts in gene blocks, small tables beside it, a manifest with hashes.

A directory holds ``manifest.json``, ``<split>-NNNNN.parquet`` (row groups of 16,384 cells), ``genes.parquet`` (one row
per gene in rank order), ``presence.parquet`` (one row per dataset: which genes it measured) and, for planted cells,
``plant.json``. A counts block is FixedSizeBinary of 256 little-endian uint16, so the first V genes are a prefix of
columns and the first D cells a prefix of rows.
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

BLOCK_GENES = 256
ROW_GROUP_CELLS = 16_384
FILE_CELLS = 262_144
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


def file_entry(path: Path, rows: int) -> FileEntry:
    """Size and sha256 of a file that was just written."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return FileEntry(path=path.name, rows=rows, bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_table(path: Path, table: pa.Table) -> FileEntry:
    """Write a small table next to the shards."""
    pq.write_table(table, path, compression="zstd", compression_level=1)
    return file_entry(path, table.num_rows)


def write_split(
    directory: Path, split: str, genes: int, tables: Iterable[pa.Table]
) -> tuple[list[FileEntry], str, int]:
    """Write the cells of one split in the order given: its files, the sha256 of its contents, its number of cells.

    The hash runs over the columns one by one, so it does not depend on how the cells were cut into tables.
    """
    schema = shard_schema(genes)
    content = {name: hashlib.sha256(name.encode()) for name in schema.names}
    entries: list[FileEntry] = []
    cells = 0
    writer: pq.ParquetWriter | None = None
    path, rows = directory, 0
    for table in tables:
        table = table.select(schema.names).cast(schema).combine_chunks()
        for name in ("cell", "raw_sum", *CODE_COLUMNS):
            content[name].update(np.ascontiguousarray(table[name].to_numpy(), dtype="<i8").tobytes())
        for index, width in enumerate(block_widths(genes)):
            content[block_name(index)].update(decode_block(table[block_name(index)], width).tobytes())
        if writer is None:
            path, rows = directory / f"{split}-{len(entries):05d}.parquet", 0
            writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)
        writer.write_table(table, row_group_size=ROW_GROUP_CELLS)
        rows += table.num_rows
        cells += table.num_rows
        if rows >= FILE_CELLS:
            writer.close()
            writer = None
            entries.append(file_entry(path, rows))
    if writer is not None:
        writer.close()
        entries.append(file_entry(path, rows))
    return entries, hashlib.sha256(b"".join(column.digest() for column in content.values())).hexdigest(), cells


def read_manifest(directory: Path) -> ShardManifest:
    """The manifest of a shard directory; BadInput if there is none, DamagedFiles where a group is in two splits."""
    manifest = _manifest(directory)
    overlaps = _groups_in_two_splits(manifest)
    if overlaps:
        raise DamagedFiles(overlaps)
    return manifest


def _manifest(directory: Path) -> ShardManifest:
    if not (directory / "manifest.json").is_file():
        raise BadInput("shards", str(directory), "holds no manifest.json; make shards with `scaling-ray shards build`")
    return ShardManifest.read(directory / "manifest.json")


def _groups_in_two_splits(manifest: ShardManifest) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for split, entry in manifest.splits.items():
        for group in entry.groups:
            if group in seen:
                problems.append(f"manifest.json: {manifest.split_by} {group!r} is in {seen[group]} and in {split}")
            seen[group] = split
    return problems


def verify(directory: Path) -> list[str]:
    """Each file that is missing, damaged or not in the manifest, one sentence each; empty where all is well."""
    manifest = _manifest(directory)
    problems = []
    expected = {entry.path: entry for split in manifest.splits.values() for entry in split.files}
    expected |= {entry.path: entry for entry in manifest.tables}
    for name, entry in expected.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name}: has {path.stat().st_size} bytes, the manifest says {entry.bytes}")
        elif file_entry(path, entry.rows).sha256 != entry.sha256:
            problems.append(f"{name}: its contents changed since it was written (sha256 differs)")
    known = set(expected) | {"manifest.json"}
    problems += [
        f"{path.name}: is not in the manifest" for path in sorted(directory.iterdir()) if path.name not in known
    ]
    return problems + _groups_in_two_splits(manifest)
