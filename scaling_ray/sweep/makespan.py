"""When units would start and end on a cluster of a given capacity: list scheduling, longest first of what is ready."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scaling_ray.sweep.capacity import Capacity

_SLACK = 1e-6


class Demand(NamedTuple):
    """Resources that a unit holds in all while it runs."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Job:
    """A unit as a schedule sees it.

    ``needs`` are positions of jobs that must have ended before it starts.
    """

    seconds: float
    demand: Demand
    needs: tuple[int, ...] = ()


class Span(NamedTuple):
    """Seconds after the start of all at which a job starts and ends."""

    start: float
    end: float


def schedule(jobs: Sequence[Job], capacity: Capacity) -> list[Span]:
    """The span of each job. Totals of CPUs and GPUs bound what runs at once; packing into nodes is not simulated.

    A job that asks for more than there is runs alone, so that every job has an end.
    """
    total = Demand(capacity.total("CPU"), capacity.total("GPU"))
    waits, followers = [len(set(job.needs)) for job in jobs], [[] for _ in jobs]  # type: list[int], list[list[int]]
    for place, job in enumerate(jobs):
        for needed in set(job.needs):
            followers[needed].append(place)
    ready: dict[Demand, list[tuple[float, int]]] = {}
    running: list[tuple[float, int]] = []
    spans: list[Span] = [Span(0.0, 0.0)] * len(jobs)
    cpus, gpus, now = total.cpus, total.gpus, 0.0

    def offer(place: int) -> None:
        heapq.heappush(ready.setdefault(jobs[place].demand, []), (-jobs[place].seconds, place))

    for place, count in enumerate(waits):
        if count == 0:
            offer(place)
    while ready or running:
        for demand in sorted(ready, key=lambda demand: ready[demand][0]):
            queue = ready[demand]
            while queue and (_holds(demand, cpus, gpus) or not running):
                _, place = heapq.heappop(queue)
                spans[place] = Span(now, now + jobs[place].seconds)
                heapq.heappush(running, (spans[place].end, place))
                cpus, gpus = cpus - demand.cpus, gpus - demand.gpus
            if not queue:
                del ready[demand]
        now, place = heapq.heappop(running)
        cpus, gpus = cpus + jobs[place].demand.cpus, gpus + jobs[place].demand.gpus
        for follower in followers[place]:
            waits[follower] -= 1
            if waits[follower] == 0:
                offer(follower)
    return spans


def _holds(demand: Demand, cpus: float, gpus: float) -> bool:
    return demand.cpus <= cpus + _SLACK and demand.gpus <= gpus + _SLACK
