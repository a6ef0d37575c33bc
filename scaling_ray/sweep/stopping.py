"""How a sweep is asked to stop: SIGTERM to its driver leaves a file that every run of it looks for."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


def stop_file(sweep: Path) -> Path:
    """What stands there once the sweep's driver was told to stop."""
    return sweep / ".stop"


def asked_to_stop(sweep: Path) -> bool:
    """Whether the sweep's driver was told to stop."""
    return stop_file(sweep).exists()


@contextlib.contextmanager
def stop_on_sigterm(sweep: Path) -> Iterator[None]:
    """Take SIGTERM as a wish to stop until the block ends; an older wish is forgotten.

    Only a main thread can hear signals; elsewhere nothing changes. To be entered after ``ray.init``, which puts a
    handler of its own in place.
    """
    path = stop_file(sweep)
    path.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave_word(number: int, frame: FrameType | None) -> None:
        path.touch()

    before = signal.signal(signal.SIGTERM, leave_word)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
