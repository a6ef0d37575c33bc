"""How a sweep is asked to stop: SIGTERM or SIGINT to its driver leaves a marker file that every run of it looks for.

The driver itself is told besides: on a file system that is full or read-only there is no marker.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from scaling_ray.errors import ScalingRayError
from scaling_ray.results.sweep_files import SweepFiles

STOP_POLL_SECONDS = {True: 1.0, False: 5.0}
"""Time between two checks for a stop request; True for a sweep on a disk, False for one on S3."""


@dataclass
class Stopping:
    """Whether this process was told to stop, and from the keyboard. No lock or event: Ray Tune pickles these."""

    requested: bool = False
    from_keyboard: bool = False


@contextlib.contextmanager
def stop_on_signals(sweep: SweepFiles, stopping: Stopping) -> Iterator[None]:
    """Treat SIGTERM and SIGINT as stop requests until the block ends; clear earlier ones. ``stopping`` is told too.

    A second SIGINT does not wait for anything to be saved. Only a main thread can hear signals; elsewhere nothing
    changes. To be entered after ``ray.init``, which puts a handler of its own in place.
    """
    sweep.clear_stop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            stopping.from_keyboard = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not in the handler itself: it interrupts the main thread anywhere, and a request over S3 takes a while.
        threading.Thread(target=leave_word, name="stop", daemon=True).start()

    def leave_word() -> None:
        stopping.requested = True
        with contextlib.suppress(OSError, ScalingRayError):
            sweep.request_stop()

    # a process in the background of a script inherits that SIGINT, meant for others, is ignored
    heard = [signal.SIGTERM]
    heard += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, request) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
