"""What only a GPU can show: that a training step never waits for the host, and that it computes what a CPU does."""

from __future__ import annotations

import pytest
import torch
from conftest import small_run, synthetic_cells

from scaling_ray.shards.read import ResidentFeed, run_order
from scaling_ray.train.batches import BatchSource
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.stack_loop import StackedLoop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

CELLS = synthetic_cells(300, unmeasured=9)
DATA = RunData(CELLS, CELLS, CELLS, "synthetic")


def test_no_step_waits_for_the_host() -> None:
    run = small_run("max_cells_seen = 6400", lr=1e-3)
    runs = [run.model_copy(update={"seed": seed}) for seed in range(3)]
    device = torch.device("cuda")
    feeds = [ResidentFeed(CELLS, run_order(one, len(CELLS))) for one in runs]
    for loop in (
        TrainingLoop(run, DATA, PlainEngine(run, device)),
        StackedLoop(runs, list(feeds), CELLS, CELLS, device),
    ):
        loop.update()
        loop.settle()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                loop.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loop.settle()


@pytest.mark.parametrize("recipe", ["corrected", "published"])
def test_losses_are_those_of_a_cpu(recipe: str) -> None:
    run = small_run(f'max_cells_seen = 6400\nrecipe = "{recipe}"', lr=1e-3)
    here, there = (TrainingLoop(run, DATA, PlainEngine(run, torch.device(name))) for name in ("cpu", "cuda"))
    for _ in range(20):
        one, other = here.train_one_update()[0], there.train_one_update()[0]
        assert one.masked_genes == other.masked_genes
        assert one.mean == pytest.approx(other.mean, rel=1e-4)


def test_cells_kept_on_the_device_make_the_same_batches() -> None:
    run = small_run("max_cells_seen = 6400")
    feed = ResidentFeed(CELLS, run_order(run, len(CELLS)))
    device = torch.device("cuda")
    kept, made = (BatchSource(feed, run.train, run.seed, device, keep=keep) for keep in (True, False))
    for step in (0, 5, 11):
        one, other = kept.batch(step, slice(4, 20)), made.batch(step, slice(4, 20))
        assert torch.equal(one.values, other.values) and torch.equal(one.masks.positions, other.masks.positions)
