"""Cells a second of this project's two feeds and of other loaders, on the same cells, in one run.

    python benchmarks/peers.py --census DIR --shards DIR [--peers-path DIR] [--annbatch PYTHON] [--repeats 3] --json

Everyone hands over the training cells of the shards, the same genes, in shuffled epochs, as dense batches (256, V) of
raw counts and without masks; what they handed over is checked row by row, outside the clock. The repeats take turns,
so that a busy machine is busy for all. A rate is of whole epochs: tiledbsoma-ml fetches 65,536 cells before its first
batch, so a part of an epoch would time its memory and not its reading.

tiledbsoma-ml and annbatch are no dependencies of this project. Without the folder of
``pip install --no-deps --target DIR tiledbsoma-ml``, or a Python with ``annbatch[zarrs]``, they are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pyarrow.parquet as pq
import tiledbsoma as soma
import torch
from annbatch_peer import Epoch, check_rows, rate
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from scaling_ray.cluster import ray_session
from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import read_manifest, row_groups
from scaling_ray.shards.order import RunOrder, replicate_rows
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, read_split
from scaling_ray.shards.stream import StreamFeed, read_resident

CELLS_PER_BATCH = 256
CPUS = 2
"""Of the private Ray cluster, which runs only while this project reads shards."""
OWN = ("stream", "resident")

Measure = Callable[[], dict[str, float]]
"""One repeat: cells a second by name."""


class Rows(Dataset[torch.Tensor]):
    """One cell after the other out of memory."""

    def __init__(self, counts: NDArray[np.uint16]) -> None:
        self._counts = counts

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._counts[index])


def feed_rate(name: str, feed: Feed, counts: NDArray[np.uint16]) -> float:
    """Cells a second of a feed, whose batches run on from epoch to epoch; its first epoch is checked afterwards."""
    n_batches, steps = -(-len(counts) // CELLS_PER_BATCH), count()

    def epoch() -> Iterator[NDArray[np.uint16]]:
        for _ in range(n_batches):
            yield feed.batch(next(steps), CELLS_PER_BATCH)[0].counts

    def first() -> Iterator[NDArray[np.uint16]]:
        for step in range(n_batches):
            yield feed.batch(step, CELLS_PER_BATCH)[0].counts[: len(counts) - step * CELLS_PER_BATCH]

    measured = rate(epoch)
    check_rows(name, first(), counts)
    return measured


def stream(shards: Path, manifest: ShardManifest, order: RunOrder, counts: NDArray[np.uint16]) -> Measure:
    """This project's stream, on a cluster of its own each time, so that none runs beside the others."""

    def measure() -> dict[str, float]:
        with ray_session(CPUS):
            with closing(StreamFeed(shards, manifest, manifest.genes, order)) as feed:
                return {"stream": feed_rate("stream", feed, counts)}

    return measure


def resident(shards: Path, manifest: ShardManifest, order: RunOrder, counts: NDArray[np.uint16]) -> Measure:
    """This project's cells in memory."""
    with ray_session(CPUS):
        # copied, because a cluster may take its memory back when it ends
        cells = read_resident(shards, manifest, "train", manifest.genes).rows(np.arange(len(counts)))
    feed = ResidentFeed(cells, order)
    return lambda: {"resident": feed_rate("resident", feed, counts)}


def epochs_rate(name: str, epoch: Epoch, counts: NDArray[np.uint16], columns: Any = slice(None)) -> Measure:
    """A loader that is begun anew each epoch; one more is checked at the first repeat."""
    unchecked = [name]

    def measure() -> dict[str, float]:
        measured = rate(epoch)
        if unchecked:
            check_rows(unchecked.pop(), epoch(), counts, columns)
        return {name: measured}

    return measure


def tiledbsoma_ml(stack: ExitStack, census: Path, genes: NDArray[np.int64], cells: Cells) -> Measure:
    """tiledbsoma-ml straight from the Census, with its own defaults; its genes come by rising joinid."""
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    root = stack.enter_context(cellxgene_census.open_soma(uri=str(census.absolute())))
    query = root["census_data"]["homo_sapiens"].axis_query(
        "RNA",
        obs_query=soma.AxisQuery(coords=(np.sort(cells.cell),)),
        var_query=soma.AxisQuery(coords=(np.sort(genes),)),
    )
    dataset = ExperimentDataset(stack.enter_context(query), layer_name="raw", batch_size=CELLS_PER_BATCH, shuffle=True)
    loader = experiment_dataloader(dataset, num_workers=0)
    return epochs_rate(
        "tiledbsoma_ml", lambda: (counts for counts, _ in loader), cells.counts, columns=np.argsort(genes)
    )


def annbatch(python: str, folder: Path, counts: NDArray[np.uint16], notes: dict[str, Any]) -> Measure:
    """A Python that has annbatch; the first call converts the counts, outside its clock."""
    stored = folder / "counts.npy"
    np.save(stored, counts)
    program = Path(__file__).with_name("annbatch_peer.py")
    command = [python, str(program), str(stored), str(folder), "--batch", str(CELLS_PER_BATCH)]

    def measure() -> dict[str, float]:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"annbatch_peer.py failed:\n{done.stderr}")
        answer = json.loads(done.stdout)
        notes["annbatch"] = answer["versions"] if answer["cells_per_second"] else "not installed"
        return answer["cells_per_second"]

    return measure


def compare(census: Path, shards: Path, annbatch_python: str | None, repeats: int) -> dict[str, Any]:
    """Medians, repeats and ratios of all that is installed.

    Raises:
        BadInput: no shards there.
        RuntimeError: a peer handed over other rows, or annbatch failed.
    """
    torch.set_num_threads(1)
    manifest = read_manifest(shards)
    n_train = manifest.splits["train"].cells
    order = RunOrder(replicate_rows(n_train, None, 0), row_groups(manifest, "train"), 0)
    cells = read_split(shards, manifest, "train", manifest.genes)
    genes = pq.read_table(shards / "genes.parquet")["soma_joinid"].to_numpy()
    notes: dict[str, Any] = {
        "train_cells": n_train,
        "genes": manifest.genes,
        "cells_per_batch": CELLS_PER_BATCH,
        "ray_cpus": CPUS,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("scaling-ray", "ray", "torch", "pyarrow", "numpy", "tiledbsoma")},
        "tiledbsoma_ml": "not installed",
        "annbatch": "not installed",
    }
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        loader = DataLoader(Rows(cells.counts), batch_size=CELLS_PER_BATCH, shuffle=True, num_workers=0)
        measures = [
            stream(shards, manifest, order, cells.counts),
            resident(shards, manifest, order, cells.counts),
            epochs_rate("torch_dataloader", lambda: loader, cells.counts),
        ]
        if find_spec("tiledbsoma_ml"):
            notes["tiledbsoma_ml"] = version("tiledbsoma_ml")
            measures.append(tiledbsoma_ml(stack, census, genes, cells))
        if annbatch_python:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            measures.append(annbatch(annbatch_python, folder, cells.counts, notes))
        for _ in range(repeats):
            for measure in measures:
                for name, value in measure().items():
                    taken.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    peers = [name for name in medians if name not in OWN]
    ratios = {own: {name: medians[own] / medians[name] for name in peers} for own in OWN}
    return {"cells_per_second": medians, "repeats": taken, "ratios": ratios, "notes": notes}


def main() -> None:
    """Print the comparison, as JSON or as a table."""
    parser = argparse.ArgumentParser(description="Cells a second of this project and of other loaders.")
    parser.add_argument("--census", type=Path, required=True, help="the local Census that the shards were built from")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--peers-path", type=Path, help="folder in which tiledbsoma-ml is unpacked")
    parser.add_argument("--annbatch", metavar="PYTHON", help="a Python of 3.12 or later with annbatch[zarrs]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.peers_path:
        sys.path.append(str(arguments.peers_path.absolute()))
    result = compare(arguments.census, arguments.shards, arguments.annbatch, arguments.repeats)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result["cells_per_second"].items():
        print(f"{name:18}{value:12,.0f} cells/s")


if __name__ == "__main__":
    main()
