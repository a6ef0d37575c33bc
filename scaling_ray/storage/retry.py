"""Trying again: what a store that is gone for a while costs is time, and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

OUTAGE_SECONDS = 300.0
"""How long a request is tried again before the caller is told; a store gone for less costs time only."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 10.0

T = TypeVar("T")


def patiently(
    action: Callable[[], T],
    transient: Callable[[Exception], bool],
    limit: float = OUTAGE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of ``action``, tried again while its errors are ``transient``, for ``limit`` seconds from the first.

    Waits double, with jitter; the last error rises as it is.
    """
    failing_since: float | None = None
    wait = FIRST_WAIT_SECONDS
    while True:
        try:
            return action()
        except Exception as error:
            now = clock()
            failing_since = now if failing_since is None else failing_since
            if not transient(error) or now - failing_since + wait > limit:
                raise
        sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
