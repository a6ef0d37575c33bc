"""What a training process takes of its machine (CPU, memory, GPU), as rows of its run's metrics.jsonl.

A thread samples every so often and keeps the latest; the training thread writes it beside its next row, so that a
metrics.jsonl has one writer and one thread. Reads /proc and torch's own counters: where they are missing, a sample says
less.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STAT, _MEMORY, _MACHINE = Path("/proc/self/stat"), Path("/proc/self/statm"), Path("/proc/meminfo")
_TICKS_PER_SECOND, _PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
_GIB = 2**30

SAMPLE_SECONDS = 10.0
"""Time between two samples of a process that trains for a sweep."""


class Sampler:
    """Samples this process.

    Args:
        seconds: between two samples.
    """

    def __init__(self, seconds: float = SAMPLE_SECONDS) -> None:
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._latest: dict[str, float] | None = None
        self._before = (time.monotonic(), _cpu_seconds())

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a sample that nobody took stays."""
        self._stop.set()
        self._thread.join()

    def row(self, optimizer_steps: int, cells_seen: int) -> dict[str, Any] | None:
        """The latest sample as a row of kind "system" at this point of training; None where it was taken already.

        ``cpu_percent`` is of one CPU since the sample before, so two busy threads make 200; memory is in GiB.
        """
        # One assignment each: the thread may put a newer sample in between, which is then the next row's.
        latest, self._latest = self._latest, None
        if latest is None:
            return None
        return {"kind": "system", "optimizer_steps": optimizer_steps, "cells_seen": cells_seen} | latest

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            now, used = time.monotonic(), _cpu_seconds()
            (then, before), self._before = self._before, (now, used)
            share = {"cpu_percent": 100 * (used - before) / max(now - then, 1e-6)}
            self._latest = share | _memory() | _gpu()


@contextmanager
def sampled(seconds: float = SAMPLE_SECONDS) -> Iterator[Sampler]:
    """A sampler that runs while the block does."""
    sampler = Sampler(seconds)
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stop()


def _cpu_seconds() -> float:
    """CPU seconds of this process with its threads."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()
    except OSError:
        return time.process_time()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def _memory() -> dict[str, float]:
    try:
        resident = int(_MEMORY.read_text().split()[1]) * _PAGE_BYTES / _GIB
        lines = dict(line.split(":", 1) for line in _MACHINE.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 / _GIB
    except (OSError, KeyError, IndexError, ValueError):
        return {}
    return {"memory_gib": resident, "node_memory_free_gib": free}


def _gpu() -> dict[str, float]:
    if not torch.cuda.is_initialized():
        return {}
    free, whole = torch.cuda.mem_get_info()
    found = {
        "gpu_memory_gib": torch.cuda.memory_allocated() / _GIB,
        "gpu_memory_used_percent": 100 * (1 - free / whole),
    }
    try:
        return found | {"gpu_percent": float(torch.cuda.utilization())}
    except (ModuleNotFoundError, RuntimeError):  # it needs NVIDIA's own library beside torch
        return found
