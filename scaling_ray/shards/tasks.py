"""What a conversion's tasks do on the nodes: read a range, count duplicated cells, gather a shard file.

Each returns its result and the most memory that its process held, in bytes.
"""

from __future__ import annotations

import contextlib
import re
import resource
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.records import FileEntry, Record
from scaling_ray.shards.format import ROW_GROUP_CELLS, write_file
from scaling_ray.shards.genes import CountHistogram
from scaling_ray.shards.parts import Range, convert_range, gather_file, histograms_of_cells, read_piece, unpack
from scaling_ray.storage import Place, patiently

TASK_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
"""Of the processes that run tasks. Without it TileDB's threads leave memory behind in arenas of glibc's allocator, up
to eight for each core of the machine, and a task's memory grows with the tasks before it."""
Ints = NDArray[np.int64]


class GatheredFile(Record):
    """One shard file that is done; no entry where no cell was left for it."""

    split: str
    entry: FileEntry | None
    donor_cells: list[int]
    below_min_counts: int


def range_task(census: str, building: Place, part: Range, memory_bytes: int) -> tuple[None, int]:
    """Read one range and write its files, the facts last; a range with facts is done."""
    _begin_task()
    cells = unpack(building.read(part.slice_name), part.slice_name)
    rows, counts, facts = convert_range(_open_census(census), part, cells, memory_bytes)
    building.write(part.rows_name, rows)
    building.write(part.counts_name, counts)
    building.write(part.facts_name, facts)
    return None, _peak_bytes()


def duplicates_task(
    building: Place, part: Range, pieces: Ints, joinids: Ints, n_genes: int
) -> tuple[list[tuple[int, CountHistogram]], int]:
    """Histograms of the counts of cells of one range, for what they take away from a ranking."""
    _begin_task()
    read = (read_piece(building, part, int(start), int(size)) for _, _, start, size in pieces)
    return histograms_of_cells(read, joinids, n_genes), _peak_bytes()


def gather_task(
    target: Place,
    building: Place,
    record: str,
    file: tuple[str, str],
    pieces: Ints,
    dropped: Ints,
    min_counts: int,
    common: tuple[Ints, list[Range], int, int, int],
) -> tuple[None, int]:
    """Write one shard file and then its entry; a file with an entry is done."""
    _begin_task()
    split, name = file
    order, parts, n_genes, donors, file_cells = common
    read = (read_piece(building, parts[index], int(start), int(size)) for index, start, size in pieces)
    found = gather_file(read, order, n_genes, dropped, min_counts, file_cells)
    entry = write_file(target, name, found.tables(ROW_GROUP_CELLS), len(order))
    donor_cells = np.bincount(found.columns["donor_id"], minlength=donors).tolist()
    done = GatheredFile(split=split, entry=entry, donor_cells=donor_cells, below_min_counts=found.below_min_counts)
    building.write(record, done.to_json().encode())
    return None, _peak_bytes()


@lru_cache(maxsize=1)
def _open_census(census: str) -> Census:
    """The Census, opened once in each process; the driver has checked that it is whole."""
    # The driver has opened it too, so where a task cannot, the store is away for a while.
    away = (lambda error: isinstance(error, BadInput)) if "://" in census else (lambda error: False)
    return patiently(lambda: Census.open(census, check=False), away)


def _begin_task() -> None:
    """Release memory that earlier tasks of this process left unused, and reset its high-water mark."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Most memory of this process since ``_begin_task``; over its whole life where the kernel has no such mark."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
