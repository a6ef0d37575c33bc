"""Groups that train on what there is: how many workers start, and when a smaller group is to become a larger one.

Ray's own elastic groups take any number between two bounds; ours take only those that share an update's cells evenly.
What is wanted stays asked for: an autoscaler sees it as demand.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from scaling_ray.cluster import ray  # isort: skip  (first: it sets what ray reads once)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from scaling_ray.runs import RunSpec

PATIENCE_SECONDS = 60.0
"""How long a group waits for room for all of its workers, before it looks for room for fewer."""

LOOK_SECONDS = 5.0
"""How long it waits at each smaller number; for the smallest, without end."""


def workers_to_start(run: RunSpec, patience_seconds: float) -> int:
    """The most workers of ``run.worker_counts`` that there is room for within a while; else the fewest."""
    *more, fewest = run.worker_counts
    seconds = patience_seconds
    for count in more:
        with _asked_for(run, count) as places:
            if places.wait(seconds):
                return count
        seconds = LOOK_SECONDS
    return fewest


class Growth:
    """Asks the cluster for some more workers of a run while a block trains without them.

    Args:
        run: as it trains now.
        missing: workers that it would have beside those of now; 0 asks for nothing.
    """

    def __init__(self, run: RunSpec, missing: int) -> None:
        self._run, self._missing = run, missing
        self._came, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait, name="growth", daemon=True)

    def __enter__(self) -> Growth:
        if self._missing:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._missing:
            self._thread.join()

    @property
    def came(self) -> bool:
        """Whether there is room for more workers: to have them, the group must end and start anew."""
        return self._came.is_set()

    def _wait(self) -> None:
        with _asked_for(self._run, self._missing) as places:
            while not self._done.wait(1.0):
                if places.wait(1.0):
                    self._came.set()
                    self._done.wait()


@contextlib.contextmanager
def _asked_for(run: RunSpec, workers: int) -> Iterator[PlacementGroup]:
    """A reservation of the shares of some workers, not yet granted; it ends with the block."""
    places = placement_group([shares_of(run)] * workers, strategy="PACK")
    try:
        yield places
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            remove_placement_group(places)


def shares_of(run: RunSpec) -> dict[str, float]:
    """What one worker of a group holds, in Ray's names."""
    execution = run.execution
    return {"CPU": float(execution.cpus)} | ({"GPU": execution.gpus} if execution.gpus else {})
