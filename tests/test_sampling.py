"""A sample says what this process takes; nothing is sampled unless somebody asks."""

from __future__ import annotations

import threading
import time

from scaling_ray.train.sampling import Sampler, sampled


def wait_for_row(sampler: Sampler) -> dict[str, float]:
    for _ in range(1_000):
        if (row := sampler.row(7, 224)) is not None:
            return row
        time.sleep(0.01)
    raise AssertionError("no sample came")


def test_a_busy_process_takes_a_cpu_and_each_sample_is_told_once() -> None:
    with sampled(0.3) as sampler:
        assert sampler is not None
        busy = time.process_time() + 1.0
        while time.process_time() < busy:
            pass
        row = wait_for_row(sampler)
        assert (row["kind"], row["optimizer_steps"], row["cells_seen"]) == ("system", 7, 224)
        assert row["cpu_percent"] > 5 and row["memory_gib"] > 0.01 and row["node_memory_free_gib"] > 0
        assert sampler.row(7, 224) is None, "a sample is one row"
    assert "sampling" not in {thread.name for thread in threading.enumerate()}


def test_nothing_runs_where_no_interval_is_given() -> None:
    with sampled(None) as sampler:
        assert sampler is None
        assert "sampling" not in {thread.name for thread in threading.enumerate()}
