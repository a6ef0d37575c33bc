"""Samples of what a process takes of its machine (CPU, memory, GPU), as rows of its run's metrics.jsonl.

A thread takes a sample every so often and keeps it; the training process writes what was taken with its next row, so
that a metrics.jsonl has one writer and one thread. Reads /proc and torch's own counters: where there is neither, a
sample says less.
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
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GIB = 2**30


class Sampler:
    """Keeps the samples that were taken since ``take`` was last called.

    Args:
        seconds: between two samples.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._waiting: list[dict[str, Any]] = []
        self._last = (time.monotonic(), _cpu_seconds())

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; samples that nobody took stay."""
        self._stop.set()
        self._thread.join()

    def take(self, optimizer_steps: int, cells_seen: int) -> list[dict[str, Any]]:
        """Rows of kind "system" for the samples since the last call, as of this point of training.

        ``cpu_percent`` is of one CPU (two busy threads: 200), since the sample before; memory is in GiB.
        """
        with self._lock:
            found, self._waiting = self._waiting, []
        where = {"kind": "system", "optimizer_steps": optimizer_steps, "cells_seen": cells_seen}
        return [where | sample for sample in found[-1:]]

    def sample(self) -> dict[str, float]:
        """One sample, now."""
        now, used = time.monotonic(), _cpu_seconds()
        (then, before), self._last = self._last, (now, used)
        found = {"cpu_percent": 100 * (used - before) / max(now - then, 1e-6)} | _memory()
        return found | _gpu()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            sample = self.sample()
            with self._lock:
                self._waiting.append(sample)


@contextmanager
def sampled(seconds: float | None) -> Iterator[Sampler | None]:
    """A sampler that runs while the block does; None, and nothing is sampled, where ``seconds`` is None."""
    if seconds is None:
        yield None
        return
    sampler = Sampler(seconds)
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stop()


def _cpu_seconds() -> float:
    """CPU seconds of this process and its threads."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()
    except OSError:
        return time.process_time()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _memory() -> dict[str, float]:
    try:
        resident = int(_MEMORY.read_text().split()[1]) * _PAGE / _GIB
        lines = dict(line.split(":", 1) for line in _MACHINE.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 / _GIB
    except (OSError, KeyError, IndexError, ValueError):
        return {}
    return {"memory_gib": resident, "node_memory_free_gib": free}


def _gpu() -> dict[str, float]:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    free, whole = torch.cuda.mem_get_info()
    found = {
        "gpu_memory_gib": torch.cuda.memory_allocated() / _GIB,
        "gpu_memory_used_percent": 100 * (1 - free / whole),
    }
    try:
        return found | {"gpu_percent": float(torch.cuda.utilization())}
    except (ModuleNotFoundError, RuntimeError):  # needs NVIDIA's library beside torch
        return found
