"""A watchdog for a training process: after too long without progress it says where, and ends the process.

Ranks wait for each other in collective calls. Where one rank never makes such a call, the others wait without end, and
Ray sees processes that are alive. So each rank counts its own steps, and a thread ends the process once the count has
stood still; Ray then takes the group down, and the failure says what every rank was doing.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

STALL_SECONDS = 300.0
"""Time without a step of any kind after which a training process is ended."""

STALLED_EXIT = 70
"""Exit code of a process that its watchdog ended."""


class Watchdog:
    """Ends this process once ``beat`` has not been called for ``seconds``; a context manager.

    Args:
        seconds: longest time without a beat.
        leave: called once, before the process ends, with what every thread was doing.
    """

    def __init__(self, seconds: float, leave: Callable[[str], None]) -> None:
        self._seconds, self._leave = seconds, leave
        self._last, self._beats = time.monotonic(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Note that something was done."""
        self._last, self._beats = time.monotonic(), self._beats + 1

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, quiet = self._beats, 0.0
        step = min(1.0, self._seconds / 10)
        while not self._done.wait(step):
            # The clock runs on while the whole process is stopped (SIGSTOP, a suspended machine). So the watchdog adds
            # up its own waiting and does not compare times.
            quiet = quiet + step if self._beats == seen else 0.0
            seen = self._beats
            if quiet < self._seconds:
                continue
            try:
                self._leave(f"no progress for {self._seconds:.0f} s after {self._beats} beats\n{_stacks()}")
            finally:
                os._exit(STALLED_EXIT)


def stall_note(rank: int) -> str:
    """Name of the run's file in which a rank's watchdog notes what the rank was doing."""
    return f"stalled-rank{rank}.txt"


def _stacks() -> str:
    """What every thread of this process is doing."""
    with tempfile.TemporaryFile("w+") as stream:
        faulthandler.dump_traceback(stream, all_threads=True)
        stream.seek(0)
        return stream.read()
