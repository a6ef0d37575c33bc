"""annbatch on the cells that ``peers.py`` hands over: a process of its own, because annbatch needs Python 3.12.

    python annbatch_peer.py COUNTS.npy FOLDER --batch 256

FOLDER keeps the collection that the first call makes of the counts, in the format annbatch recommends: shuffled,
sharded, sparse Zarr. One JSON line comes out. Only numpy is imported before annbatch is found, and nothing of
scaling_ray: ``peers.py`` takes its clock and its check from here, so every peer has the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARM_SECONDS, TIMED_SECONDS = 8.0, 4.0
"""Whole epochs are read for at least as long, first without the clock, for Ray's workers need seconds to start."""
SETTINGS: dict[str, dict[str, int]] = {"annbatch": {}, "annbatch_32x256": {"chunk_size": 32, "preload_nchunks": 256}}
"""Loader settings: its own defaults (32 chunks of 512 cells at a time), and those of its README."""

Epoch = Callable[[], Iterable[Any]]
"""Begins a shuffled epoch: batches (B, V) of counts."""


def rate(epoch: Epoch) -> float:
    """Cells a second of whole epochs, from the call that begins one to the last batch."""
    _run(epoch, WARM_SECONDS)
    cells, seconds = _run(epoch, TIMED_SECONDS)
    return cells / seconds


def _run(epoch: Epoch, least_seconds: float) -> tuple[int, float]:
    cells, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < least_seconds:
        for batch in epoch():
            cells += len(batch)
    return cells, seconds


def check_rows(name: str, batches: Iterable[Any], counts: NDArray[np.uint16], columns: Any = slice(None)) -> None:
    """RuntimeError unless ``batches`` are the rows of ``counts``, each as often as there, in another order.

    Args:
        name: of the peer.
        batches: one epoch, each (B, V).
        counts: (N, V), what is expected.
        columns: of ``counts``, in the order in which the batches have them.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, (counts.shape[1],), dtype=np.uint64)
    found = np.concatenate([np.asarray(batch).astype(np.uint64) @ weights[columns] for batch in batches])
    blocks = np.array_split(counts, -(-len(counts) // 4096))
    wanted = np.concatenate([block.astype(np.uint64) @ weights for block in blocks])
    if not np.array_equal(np.sort(found), np.sort(wanted)):
        raise RuntimeError(f"{name}: an epoch is not the counts of the training cells, each cell once")
    if np.array_equal(found, wanted):
        raise RuntimeError(f"{name}: an epoch comes in the stored order; it was to be shuffled")


def convert(counts: NDArray[np.uint16], folder: Path) -> Path:
    """The collection of these counts, made where it is not there yet."""
    import anndata
    import scipy.sparse as sp
    from annbatch import DatasetCollection

    made = folder / "collection.zarr"
    if not made.exists():
        source = folder / "counts.h5ad"
        anndata.AnnData(sp.csr_matrix(counts)).write_h5ad(source)
        DatasetCollection(made).add_adatas([source])
    return made


def loader_epoch(collection: Path, cells_per_batch: int, settings: dict[str, int]) -> Epoch:
    """Epochs of annbatch's loader, its sparse batches made dense; counts only, as annbatch advises for speed."""
    import anndata
    from annbatch import DatasetCollection, Loader

    loader = Loader(batch_size=cells_per_batch, shuffle=True, **settings).use_collection(
        DatasetCollection(collection, mode="r"),
        load_adata=lambda group: anndata.AnnData(X=anndata.io.sparse_dataset(group["X"])),
    )

    def epoch() -> Iterator[NDArray[Any]]:
        for batch in loader:
            yield batch["X"].toarray()

    return epoch


def main() -> None:
    """Print {"versions", "cells_per_second"}; no rates where annbatch is not installed."""
    parser = argparse.ArgumentParser(description="annbatch's rates on the counts of peers.py")
    parser.add_argument("counts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    names = [name for name in ("annbatch", "zarrs", "zarr", "anndata") if find_spec(name)]
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    rates = {}
    if "annbatch" in names:
        import zarr

        if "zarrs" in names:
            zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        counts = np.load(arguments.counts, mmap_mode="r")
        collection = convert(counts, arguments.folder)
        for name, settings in SETTINGS.items():
            epoch = loader_epoch(collection, arguments.batch, settings)
            rates[name] = rate(epoch)
            check_rows(name, epoch(), counts)
    print(json.dumps({"versions": versions, "cells_per_second": rates}))


if __name__ == "__main__":
    main()
