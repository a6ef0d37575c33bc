"""Compare every count of shards with the Census they came from: ``python benchmarks/exactness.py CENSUS SHARDS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from scaling_ray.census.source import Census
from scaling_ray.shards.format import SPLITS, read_manifest
from scaling_ray.shards.read import read_split

RANGE_CELLS = 65_536


def compare(census: str | Path, shards: Path) -> dict[str, Any]:
    """How many counts, library sizes and (data set, gene) marks were compared, and how many differ."""
    manifest = read_manifest(shards)
    genes = pq.read_table(shards / "genes.parquet")["soma_joinid"].to_numpy()
    splits = {name: read_split(shards, manifest, name, manifest.genes) for name in SPLITS}
    found = {"cells": 0, "counts": 0, "differing_counts": 0, "differing_raw_sums": 0}
    with Census.open(census) as source:
        dataset_ids, presence = source.presence()
        for start in range(0, source.n_cells, RANGE_CELLS):
            stop = min(start + RANGE_CELLS, source.n_cells)
            counts = source.counts(start, stop)
            for cells in splits.values():
                own = np.flatnonzero((cells.cell >= start) & (cells.cell < stop))
                rows = counts[cells.cell[own] - start]
                found["cells"] += len(own)
                found["counts"] += len(own) * len(genes)
                found["differing_counts"] += int((cells.counts[own] != rows[:, genes].toarray()).sum())
                found["differing_raw_sums"] += int((cells.raw_sum[own] != np.asarray(rows.sum(1)).ravel()).sum())
    rows = [dataset_ids.index(name) for name in manifest.codes["dataset_id"]]
    measured = presence[rows][:, genes].toarray()
    found["unmeasured_pairs"] = int((~measured).sum())
    found["differing_pairs"] = sum(int((cells.measured != measured).sum()) for cells in splits.values())
    ids = np.concatenate([cells.cell for cells in splits.values()])
    found["cells_twice"] = len(ids) - len(np.unique(ids))
    return found


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], Path(sys.argv[2]))))
