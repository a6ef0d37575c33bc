"""Progress of a verb, on standard error."""

from __future__ import annotations

import sys
import time


def say(line: str) -> None:
    """A line of progress on standard error, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
