"""Shards into memory by Ray Data: a plan of (file, row group) items is the source, so order is the plan's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaling_ray.cluster import own_errors, ray
from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest
from scaling_ray.shards.read import Cells, columns_for, decode_cells, read_measured


def read_resident(directory: Path, manifest: ShardManifest, split: str, genes: int) -> Cells:
    """All cells of a split over the first ``genes`` genes, read by the cluster's tasks, in the permutation's order."""
    if genes > manifest.genes:
        raise BadInput(
            "grid.genes", genes, f"is more than the {manifest.genes} genes of the shards; build them with more"
        )
    items = [
        {"path": str((directory / entry.path).resolve()), "row_group": group}
        for entry in manifest.splits[split].files
        for group in range(_row_groups(directory / entry.path))
    ]
    columns = columns_for(genes)

    def read(batch: pa.Table) -> pa.Table:
        (item,) = batch.to_pylist()
        return pq.ParquetFile(item["path"]).read_row_group(item["row_group"], columns=columns)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    source = ray.data.from_items(items, override_num_blocks=len(items))
    with own_errors():
        tables: list[Any] = list(
            source.map_batches(read, batch_size=1, batch_format="pyarrow").iter_batches(
                batch_size=None, batch_format="pyarrow"
            )
        )
    table = pa.concat_tables(tables)
    if table.num_rows != manifest.splits[split].cells:
        raise DamagedFiles([f"{split}: holds {table.num_rows} cells, the manifest says {manifest.splits[split].cells}"])
    return decode_cells(table, genes, manifest.genes, read_measured(directory, manifest, genes))


def _row_groups(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_row_groups)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedFiles([f"{path.name}: {error}"]) from error
