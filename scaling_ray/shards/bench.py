"""How fast cells come out of shards here: streamed by Ray Data, out of memory, and by bare pyarrow on one thread."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from scaling_ray.cluster import ray_session
from scaling_ray.errors import BadInput
from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import read_manifest, row_groups
from scaling_ray.shards.order import WINDOW_ROWS, RunOrder, replicate_rows
from scaling_ray.shards.read import Feed, ResidentFeed, check_genes, columns_for, decode_cells, read_measured
from scaling_ray.shards.stream import StreamFeed, read_resident
from scaling_ray.storage import Place, open_place

WARM_CELLS = 10 * WINDOW_ROWS
"""Cells read before a clock starts: after fewer, a second reading worker would still import and take CPU time."""
LARGEST_SHARE = 0.2
"""Of this machine's memory, for cells that are held; reading them takes twice as much."""


def pyarrow_rate(shards: Place, manifest: ShardManifest, genes: int, cells: int) -> float:
    """Cells a second of one thread that only reads and decodes row group after row group."""
    measured = read_measured(shards, manifest, genes)
    done, began = 0, time.perf_counter()
    while done < cells:
        for entry in manifest.splits["train"].files:
            file = pq.ParquetFile(shards.parquet_source(entry.path))
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns_for(genes), use_threads=False)
                done += len(decode_cells(table, genes, manifest.genes, measured))
    return done / (time.perf_counter() - began)


def feed_rate(feed: Feed, cells_per_batch: int, cells: int) -> float:
    """Cells a second of batches in order, steady state."""
    warm, last = -(-WARM_CELLS // cells_per_batch), -(-(WARM_CELLS + cells) // cells_per_batch)
    for step in range(warm):
        feed.batch(step, cells_per_batch)
    began = time.perf_counter()
    for step in range(warm, last):
        feed.batch(step, cells_per_batch)
    return (last - warm) * cells_per_batch / (time.perf_counter() - began)


def bench_stream(
    where: str | Path, genes: int | None = None, cells_per_batch: int = 256, cells: int = 1_000_000, cpus: int = 2
) -> dict[str, Any]:
    """Rates of the three ways in one run, over at least ``cells`` cells each of the training split's permutation.

    Raises:
        BadInput: no shards there, or sizes below 1.
    """
    for field, value in (("--batch", cells_per_batch), ("--cells", cells), ("--cpus", cpus)):
        if value < 1:
            raise BadInput("D001", field, value, "must be at least 1")
    shards = open_place(where, "shards")
    manifest = read_manifest(shards)
    genes = manifest.genes if genes is None else genes
    check_genes(genes, manifest)
    n_train = manifest.splits["train"].cells
    order = RunOrder(replicate_rows(n_train, None, 0), row_groups(manifest, "train"), 0)
    pyarrow_rate(shards, manifest, genes, WARM_CELLS)
    with ray_session(cpus):
        bare = [pyarrow_rate(shards, manifest, genes, cells)]
        stream = StreamFeed(shards, manifest, genes, order)
        began = time.perf_counter()
        stream.batch(0, cells_per_batch)
        first = time.perf_counter() - began
        streamed = feed_rate(stream, cells_per_batch, cells)
        stream.close()
        bare.append(pyarrow_rate(shards, manifest, genes, cells))
        resident = None
        if 2 * genes * n_train < LARGEST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            held = ResidentFeed(read_resident(shards, manifest, "train", genes), order)
            resident = feed_rate(held, cells_per_batch, cells)
    return {
        "cells_per_second": streamed,
        "pyarrow_cells_per_second": float(np.mean(bare)),
        "resident_cells_per_second": resident,
        "genes": genes,
        "first_batch_seconds": first,
        "cells_per_batch": cells_per_batch,
        "train_cells": n_train,
    }
