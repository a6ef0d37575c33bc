"""Progress of a step that has an end: how much is done, how fast, how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_SECONDS = 5.0


class Step(str):
    """A line of progress that knows what it says, so that a terminal can draw a bar instead."""

    verb: str
    done: int
    total: int
    unit: str

    def __new__(cls, words: str, verb: str, done: int, total: int, unit: str) -> Step:
        """The line ``words``: ``verb`` ("read") is true of ``done`` of ``total`` of a ``unit`` ("cells")."""
        made = super().__new__(cls, words)
        made.verb, made.done, made.total, made.unit = verb, done, total, unit
        return made


class Pace:
    """Counts what is done and tells it every few seconds, and at the end.

    Args:
        verb: what was done to each, such as "read".
        total: how many there are in all.
        progress: called with a :class:`Step`.
        before: how many were done by an earlier call; they say nothing of the rate.
        unit: what is counted.
        every_seconds: of the clock, between two lines.
    """

    def __init__(
        self,
        verb: str,
        total: int,
        progress: Callable[[str], None],
        *,
        before: int = 0,
        unit: str = "cells",
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self._verb, self._total, self._progress, self._unit = verb, total, progress, unit
        self._before, self._done, self._every = before, before, every_seconds
        self._began = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count some that are done."""
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._last < self._every:
            return
        self._last = now
        rate = (self._done - self._before) / max(now - self._began, 1e-9)
        left = self._total - self._done
        words = f"{self._verb} {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        words += f", {span(left / rate)} left" if left > 0 and rate > 0 else ""
        self._progress(Step(words, self._verb, self._done, self._total, self._unit))


def span(seconds: float) -> str:
    """Such as "2 d 03 h", "3 h 05 min", "12 min" or "45 s"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"
