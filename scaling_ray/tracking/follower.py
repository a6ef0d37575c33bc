"""A thread that keeps a tracker in step while a sweep runs; whatever the server does, the sweep goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from scaling_ray.runs import RunSpec
from scaling_ray.tracking.tracker import Tracker

HEALTHY_SECONDS, BEHIND_SECONDS = 120.0, 20.0
"""How long the end of a sweep waits for the rest to be logged: to a server that answers, and to one that did not."""


class Follower:
    """Follows one sweep.

    Args:
        open_tracker: makes the tracker; called in the thread, and again after an error.
        runs: gives the sweep's runs as they are known by then.
        say: takes one line: where to look at the sweep, or what could not be logged.
        seconds: between two looks at the files.
    """

    def __init__(
        self,
        open_tracker: Callable[[], Tracker],
        runs: Callable[[], list[RunSpec]],
        say: Callable[[str], None],
        seconds: float = 5.0,
    ) -> None:
        self._open, self._runs, self._say, self._seconds = open_tracker, runs, say, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)
        self._problem: str | None = None
        self._where: str | None = None
        self._failed = False

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def finish(self, failed: bool, timeout_seconds: float | None = None) -> None:
        """Log the rest and stop; says where it is, or what is missing and the command that logs it.

        Args:
            failed: whether runs of the sweep are missing a result.
            timeout_seconds: the longest wait; if left out it is short for a server that did not answer last.
        """
        self._failed = failed
        self._stop.set()
        if timeout_seconds is None:
            timeout_seconds = HEALTHY_SECONDS if self._problem is None else BEHIND_SECONDS
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() or self._problem:
            why = self._problem or f"no answer within {timeout_seconds:.0f} s"
            self._say(f"tracking is behind ({why}); `scaling-ray track replay` logs the rest")
        elif self._where:
            self._say(f"in MLflow: {self._where}")

    def _follow(self) -> None:
        tracker: Tracker | None = None
        while True:
            last = self._stop.wait(self._seconds)
            try:
                tracker = tracker or self._open()
                tracker.sync(self._runs())
                if last and tracker.is_open:
                    tracker.close(self._failed)
                    self._where = tracker.where()
                self._problem = None
            except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the sweep goes on
                self._problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if last:
                return
