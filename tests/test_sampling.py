"""A sample says what this process takes, and stands in the rows of a run that trains."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from conftest import files_at, small_run, synthetic_cells

from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result
from scaling_ray.train.sampling import Sampler, sampled


def wait_for_row(sampler: Sampler) -> dict[str, float]:
    for _ in range(1_000):
        if (row := sampler.row(7, 224)) is not None:
            return row
        time.sleep(0.01)
    raise AssertionError("no sample came")


def test_a_busy_process_takes_a_cpu_and_each_sample_is_told_once() -> None:
    with sampled(0.3) as sampler:
        busy = time.process_time() + 1.0
        while time.process_time() < busy:
            pass
        row = wait_for_row(sampler)
        assert (row["kind"], row["optimizer_steps"], row["cells_seen"]) == ("system", 7, 224)
        assert row["cpu_percent"] > 5 and row["memory_gib"] > 0.01 and row["node_memory_free_gib"] > 0
        assert sampler.row(7, 224) is None, "a sample is one row"
    assert "sampling" not in {thread.name for thread in threading.enumerate()}


def test_samples_stand_beside_the_rows_of_training(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 6400\ncells_per_step = 8")
    train, val, test = (synthetic_cells(n, first_id=1000 * n) for n in (100, 40, 30))
    files = files_at(tmp_path)
    with sampled(0.02) as sampler:
        signals = Signals(sample=sampler.row)
        run_to_result(run, RunData(train, val, test, "x"), PlainEngine(run, torch.device("cpu")), files, signals)
    rows = files.rows()
    taken = [row for row in rows if row["kind"] == "system"]
    trained = {(row["optimizer_steps"], row["cells_seen"]) for row in rows if row["kind"] == "train"}
    assert taken and {(row["optimizer_steps"], row["cells_seen"]) for row in taken} <= trained
    assert all(row["memory_gib"] > 0.01 for row in taken)
