"""Reservations that nobody holds any more: placement groups of Ray whose maker died.

Ray frees what a driver reserved when the driver ends. What an actor reserved it frees only once the driver has ended
too, and not what was reserved while the driver was being cleaned up; a helper of Ray Train sees to that, where the
cluster has a dashboard. Without one, the places of a killed worker group stay taken for ever. So a sweep writes down
under which job of Ray it runs, and frees what its earlier jobs, and dead actors of its own, have left.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from scaling_ray.cluster import ray
from scaling_ray.results.sweep_files import JOBS, read_sealed, write_sealed
from scaling_ray.storage import Place

LOOK_SECONDS = 5.0


@contextlib.contextmanager
def freed(place: Place) -> Iterator[None]:
    """Free abandoned reservations of the sweep at ``place``, now and every few seconds until the block ends.

    For whoever holds the sweep's lease: an earlier driver that still lived would lose its worker groups.
    """
    context = ray.get_runtime_context()
    session, own = context.get_session_name(), context.get_job_id()
    there = read_sealed(place, JOBS)
    known = [str(job) for job in there["jobs"]] if there is not None and there["session"] == session else []
    earlier = [job for job in known if job != own]  # one process may sweep twice: its own places are not abandoned
    write_sealed(place, JOBS, {"session": session, "jobs": [*earlier, own]})
    free_abandoned(own, earlier)
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError, OSError, ValueError):
                free_abandoned(own, earlier)

    thread = threading.Thread(target=look, name="reservations", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def free_abandoned(own: str, earlier: list[str]) -> int:
    """Free every reservation of the jobs ``earlier``, and of dead actors of the job ``own``; returns how many."""
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    count = 0
    for group in _reservations():
        job, maker = group.creator_job_id.hex(), group.creator_actor_id.hex()
        if job in earlier or (job == own and not _nobody(maker) and not _lives(maker)):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            count += 1
    return count


def _reservations() -> list[Any]:
    """Ray's own records of the placement groups that hold or want something. Its public table leaves out the maker."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    accessor = state._connect_and_get_accessor()
    found = [PlacementGroupTableData.FromString(raw) for raw in accessor.get_placement_group_table()]
    return [group for group in found if group.state != PlacementGroupTableData.REMOVED]


def _nobody(actor: str) -> bool:
    """Whether an id of an actor is Ray's word for none: the driver itself made it."""
    return set(actor) <= {"f"}


def _lives(actor: str) -> bool:
    from ray._private.state import actors

    found = actors(actor_id=actor)
    return bool(found) and found["State"] != "DEAD"
