"""Places of a cluster that nobody holds any more are freed, and no others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from scaling_ray.results.sweep_files import JOBS, write_sealed
from scaling_ray.storage import open_place

pytestmark = pytest.mark.ray


def state_of(group: Any) -> str:
    from scaling_ray.cluster import ray

    return str(ray.util.placement_group_table(group)["state"])


def until(group: Any, state: str) -> bool:
    for _ in range(200):
        if state_of(group) == state:
            return True
        time.sleep(0.1)
    return False


def test_what_a_dead_actor_reserved_is_freed_and_what_a_living_one_holds_is_not(
    ray_cluster: None, tmp_path: Path
) -> None:
    from scaling_ray.cluster import ray
    from scaling_ray.sweep.reservations import freed

    class Maker:
        def make(self) -> Any:
            return ray.util.placement_group([{"CPU": 0.01}])

    makers: list[Any] = [ray.remote(num_cpus=0)(Maker).remote() for _ in range(2)]
    living, dead = ray.get([maker.make.remote() for maker in makers])
    own = ray.util.placement_group([{"CPU": 0.01}])
    assert all(until(group, "CREATED") for group in (living, dead, own))
    ray.kill(makers[1])
    place = open_place(tmp_path)
    with freed(place):
        assert until(dead, "REMOVED")
    with freed(place):  # the same process sweeps once more
        time.sleep(6)
        assert state_of(living) == state_of(own) == "CREATED"
    context = ray.get_runtime_context()
    write_sealed(place, JOBS, {"session": "another cluster", "jobs": [context.get_job_id()]})
    with freed(place):
        assert state_of(living) == state_of(own) == "CREATED"
    for group in (living, own):
        ray.util.remove_placement_group(group)
    ray.kill(makers[0])
