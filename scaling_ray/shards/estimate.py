"""The cells, bytes and hours of a conversion, estimated from obs alone: ``scaling-ray shards build --dry-run``.

Times were measured on the machine of reports/benchmarks/data-plane.json: one CPU of a small server and a local disk.
From S3 a conversion may wait for the network instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scaling_ray.census.source import Census
from scaling_ray.shards.format import SPLITS
from scaling_ray.shards.parts import DEFAULT_LAYOUT, plan_ranges
from scaling_ray.shards.prepare import check_memory, choose
from scaling_ray.spec import SweepSpec

CPU_SECONDS_PER_NNZ = 1.1e-7
"""To read, count, hash, cut into pieces and gather again."""
CPU_SECONDS_PER_CELL, CPU_SECONDS_PER_GENE = 4e-6, 1e-8
"""To write a shard: for each cell, and for each gene of its panel."""
PART_BYTES_PER_NNZ = 2.0
"""Of the files between the two phases, which are removed at the end."""
CENSUS_BYTES_PER_NNZ = 2.5
"""Of X in the Census."""
SHARD_BYTES_PER_GENE = 0.3
"""Of a cell in a shard, compressed."""


def estimate(spec: SweepSpec, census: str) -> dict[str, Any]:
    """Cells by split, cells dropped by each rule on obs, non-zeros, bytes and hours of a conversion.

    Raises:
        BadInput: as the conversion itself would.
    """
    data, resources, layout = spec.data, spec.resources, DEFAULT_LAYOUT
    memory_bytes = int(resources.task_memory_gib * 2**30)
    check_memory(data, memory_bytes, layout.file_cells)
    with Census.open(census) as source:
        selection, nnz, _ = choose(source, data)
        parts = plan_ranges(selection.joinid, nnz, source.tile_cells, memory_bytes, layout.range_tiles)
    cells, entries = len(selection.joinid), int(nnz.sum())
    seconds = entries * CPU_SECONDS_PER_NNZ + cells * (CPU_SECONDS_PER_CELL + data.genes * CPU_SECONDS_PER_GENE)
    split_cells = np.bincount(selection.split, minlength=len(SPLITS)).tolist()
    return {
        "cells": cells,
        "splits": dict(zip(SPLITS, split_cells, strict=True)),
        "dropped": selection.dropped,
        "nnz": entries,
        "ranges": len(parts),
        "census_bytes": int(entries * CENSUS_BYTES_PER_NNZ),
        "part_bytes": int(entries * PART_BYTES_PER_NNZ),
        "shard_bytes": int(cells * data.genes * SHARD_BYTES_PER_GENE),
        "cpu_hours": seconds / 3600,
        "hours": seconds / 3600 / resources.cpus,
        "cpus": resources.cpus,
        "task_memory_bytes": memory_bytes,
    }


def format_estimate(found: dict[str, Any]) -> str:
    """An estimate for people."""
    splits = ", ".join(f"{name} {cells:,}" for name, cells in found["splits"].items())
    dropped = ", ".join(f"{rule} {cells:,}" for rule, cells in found["dropped"].items())
    gib = {name: found[f"{name}_bytes"] / 2**30 for name in ("census", "part", "shard", "task_memory")}
    return "\n".join(
        [
            f"cells     {found['cells']:,} ({splits}); left out: {dropped}; duplicates show when counts are read",
            f"reads     {found['nnz']:,} counts in {found['ranges']:,} ranges, about {gib['census']:,.2f} GiB",
            f"writes    about {gib['shard']:,.2f} GiB of shards, and {gib['part']:,.2f} GiB removed at the end",
            f"takes     about {found['cpu_hours']:,.3f} CPU-hours, {found['hours']:,.3f} hours on {found['cpus']} CPUs",
            f"memory    at most {gib['task_memory']:,.2f} GiB a task",
        ]
    )
