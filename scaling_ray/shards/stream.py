"""Shards by Ray Data: whole splits into memory, or a run's windows one after the other for as long as it trains.

The source of both pipelines is a plan, so the order is the plan's, and a stream can begin at any batch.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scaling_ray import errors
from scaling_ray.cluster import own_errors, ray
from scaling_ray.errors import DamagedFiles, ScalingRayError
from scaling_ray.records import ShardManifest
from scaling_ray.runs import RunSpec
from scaling_ray.shards.order import WINDOW_ROWS, RunOrder, Window
from scaling_ray.shards.read import (
    Cells,
    Feed,
    ResidentFeed,
    check_genes,
    groups_of,
    joined,
    read_measured,
    read_rows,
    shards_order,
)
from scaling_ray.storage import Place, open_place

PIPELINE_WINDOWS = 256
"""Windows of one Ray Data pipeline; a longer run continues with another. With more, the first batch comes later."""
READING_TASKS = 2
"""Tasks of one stream that read at the same time."""
LARGEST_BLOCK = 2**30
"""Bytes above which Ray Data cuts the block that a task returns."""
FAILED = "failed"
"""Column of a block that carries an error of this package: Ray Data would drop its class and message."""
READ_CPUS = 0.5
"""CPUs that Ray reserves for a task that reads."""

Ints = NDArray[np.int64]


def _table(cells: Cells) -> pa.Table:
    """Cells as one block with all counts in one column: the receiver reads them without a copy."""
    width = 2 * cells.counts.shape[1]
    counts = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(cells), [None, pa.py_buffer(cells.counts)])
    ids = {"cell": cells.cell, "raw_sum": cells.raw_sum, "dataset": cells.dataset, "donor": cells.donor}
    return pa.table({"counts": counts, **ids})


def _cells(tables: list[pa.Table], genes: int, measured: NDArray[np.bool_]) -> Cells:
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables)
    table = table.combine_chunks()
    (chunk,) = table["counts"].chunks or [pa.array([], table.schema.field("counts").type)]
    flat = np.frombuffer(chunk.buffers()[1] or b"", dtype="<u2")
    counts = flat[chunk.offset * genes : (chunk.offset + len(chunk)) * genes].reshape(len(chunk), genes)
    ids = {name: table[name].to_numpy() for name in ("cell", "raw_sum", "dataset", "donor")}
    return Cells(counts, ids["raw_sum"], ids["cell"], ids["dataset"], ids["donor"], measured)


def _arguments(error: ScalingRayError) -> list[Any]:
    """The arguments that construct this error of the package again."""
    return list(error.__reduce__()[1])


def _pipeline(items: list[dict[str, Any]], read: Any, cpus: float, tasks: int) -> Generator[pa.Table, None, None]:
    """Blocks of a Ray Data pipeline with one task per item, in the order of the items."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = LARGEST_BLOCK
    source = ray.data.from_items(items, override_num_blocks=len(items))
    # Without a bound on tasks, a stage that asks for no CPU would start one for every item at once.
    pool = ray.data.TaskPoolStrategy(size=min(tasks, len(items)))

    def guarded(batch: pa.Table) -> pa.Table:
        try:
            table: pa.Table = read(batch)
        except ScalingRayError as error:
            return pa.table({FAILED: [json.dumps([type(error).__name__, _arguments(error)], default=str)]})
        return table

    blocks = source.map_batches(guarded, batch_size=1, batch_format="pyarrow", num_cpus=cpus, compute=pool)
    with own_errors():
        tables: Any = blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        for table in tables:
            if table.column_names == [FAILED]:
                name, arguments = json.loads(table[FAILED][0].as_py())
                raise getattr(errors, name)(*arguments)
            yield table


def read_resident(where: Path | str | Place, manifest: ShardManifest, split: str, genes: int) -> Cells:
    """All cells of a split over the first ``genes`` genes, read by the cluster's tasks, in the permutation's order."""
    check_genes(genes, manifest)
    shards = open_place(where, "shards")
    measured = read_measured(shards, manifest, genes)
    items = [{"start": group.start, "stop": group.stop} for group in groups_of(manifest, split)]

    def read(batch: pa.Table) -> pa.Table:
        (item,) = batch.to_pylist()
        return _table(read_rows(shards, manifest, split, genes, np.arange(item["start"], item["stop"]), measured))

    cells = _cells(list(_pipeline(items, read, 1.0, len(items))), genes, measured)
    if len(cells) != manifest.splits[split].cells:
        raise DamagedFiles(
            "D042", [f"{split}: holds {len(cells)} cells, the manifest says {manifest.splits[split].cells}"]
        )
    return cells


class StreamFeed:
    """Batches of a run from a Ray Data pipeline over its windows: the same as ResidentFeed gives, in little memory.

    Batches requested in order share one pipeline; any other step begins a new one there. A run of one window is read
    once and kept.

    Args:
        where: the shards.
        manifest: their manifest.
        genes: the first V.
        order: of the run.
        cpus: CPUs that Ray reserves for each reading task; 0 where the caller's own processes hold all of them.
        pipeline_windows: windows of one Ray Data pipeline.
    """

    def __init__(
        self,
        where: Path | str | Place,
        manifest: ShardManifest,
        genes: int,
        order: RunOrder,
        cpus: float = READ_CPUS,
        pipeline_windows: int = PIPELINE_WINDOWS,
    ) -> None:
        check_genes(genes, manifest)
        self._shards, self._manifest, self._genes, self.order = open_place(where, "shards"), manifest, genes, order
        self._measured = read_measured(self._shards, manifest, genes)
        self._cpus, self._pipeline_windows = cpus, pipeline_windows
        self._next_position = -1
        self._source: Generator[tuple[Window, Cells], None, None] = self._read_windows(iter(()))
        self._window: Window | None = None
        self._shuffled: Ints = np.empty(0, dtype=np.int64)
        self._stored: Cells | None = None

    def batch(self, step: int, cells_per_step: int, share: slice = slice(None)) -> tuple[Cells, Ints]:
        """Global batch number ``step``, or a share of it: (its cells, the epoch of each)."""
        start, stop, _ = share.indices(cells_per_step)
        first = step * cells_per_step
        if first != self._next_position:
            self._begin(first)
        self._next_position = first + cells_per_step
        n_cells = len(self.order.rows)
        at, end = first + start, first + stop
        parts = []
        while at < end:
            epoch, within = divmod(at, n_cells)
            stored, shuffled, window = self._holding(epoch, within)
            begin = within - window.first
            taken = min(window.rows - begin, end - at)
            parts.append(stored.rows(shuffled[begin : begin + taken]))
            at += taken
        epochs = (first + np.arange(start, stop, dtype=np.int64)) // n_cells
        return parts[0] if len(parts) == 1 else joined(parts), epochs

    def close(self) -> None:
        """Stop reading. A later batch makes the feed begin again."""
        self._source.close()
        self._next_position, self._window, self._stored = -1, None, None

    def _begin(self, position: int) -> None:
        self.close()
        self._source = self._read_windows(self._windows_from(position))

    def _holding(self, epoch: int, within: int) -> tuple[Cells, Ints, Window]:
        """The window that holds a position: the present one, or the next such window of the stream."""
        while (
            self._window is None
            or self._stored is None
            or self._window.epoch != epoch
            or not self._window.first <= within < self._window.first + self._window.rows
        ):
            self._window, self._stored = next(self._source)
            self._shuffled = self.order.shuffle(self._window)
        return self._stored, self._shuffled, self._window

    def _windows_from(self, position: int) -> Iterator[Window]:
        epoch, within = divmod(position, len(self.order.rows))
        first = self.order.window_at(epoch, within).number
        while True:
            yield from self.order.windows(epoch)[first:]
            epoch, first = epoch + 1, 0

    def _read_windows(self, windows: Iterator[Window]) -> Generator[tuple[Window, Cells], None, None]:
        if len(self.order.rows) <= self.order.window_rows:
            window = next(windows)
            ((_, cells),) = self._read([window])
            yield window, cells
            for window in windows:
                yield window, cells
        while some := list(islice(windows, self._pipeline_windows)):
            yield from self._read(some)

    def _read(self, windows: list[Window]) -> Generator[tuple[Window, Cells], None, None]:
        shards, manifest, genes, order = self._shards, self._manifest, self._genes, self.order
        measured = self._measured
        shared = ray.put((windows, order.rows, order.cuts, measured))

        def read(batch: pa.Table) -> pa.Table:
            planned, rows, cuts, known = ray.get(shared)
            window = planned[batch["window"][0].as_py()]
            stored = np.concatenate([np.arange(cuts[chunk], cuts[chunk + 1]) for chunk in window.chunks])
            return _table(read_rows(shards, manifest, "train", genes, rows.at(stored), known))

        # Ray stops a pipeline only in the thread that runs it, so it is closed here and never left to the collector.
        with closing(
            _pipeline([{"window": index} for index in range(len(windows))], read, self._cpus, READING_TASKS)
        ) as blocks:
            for window in windows:
                tables: list[pa.Table] = []
                while sum(table.num_rows for table in tables) < window.rows:  # Ray may cut a large block
                    tables.append(next(blocks))
                yield window, _cells(tables, genes, measured)


def open_feed(
    where: Path | str | Place,
    manifest: ShardManifest,
    run: RunSpec,
    resident_bytes: float,
    cpus: float = READ_CPUS,
    window_rows: int = WINDOW_ROWS,
) -> Feed:
    """A run's batches straight from the shards: from this process's memory where its cells fit, else streamed.

    Args:
        where: the shards.
        manifest: their manifest.
        run: the run that asks for them.
        resident_bytes: most bytes of counts to hold.
        cpus: as StreamFeed.
        window_rows: as RunOrder.
    """
    check_genes(run.genes, manifest)
    shards = open_place(where, "shards")
    order = shards_order(shards, manifest, run, window_rows)
    if len(order.rows) * run.genes * 2 > resident_bytes:
        return StreamFeed(shards, manifest, run.genes, order, cpus)
    measured = read_measured(shards, manifest, run.genes)
    return ResidentFeed(read_rows(shards, manifest, "train", run.genes, order.rows.all(), measured), order, own=True)
