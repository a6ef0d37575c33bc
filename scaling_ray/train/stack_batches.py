"""The cells of a stack: global batch k of every member, one member after the other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, joined
from scaling_ray.train.batches import Batch, DeviceCells, make_batch

BLOCK_UPDATES = 64
"""Number of updates whose cells are looked up at once."""


class StackSource:
    """Global batch k of every member, one member after the other.

    Args:
        runs: R of them.
        feeds: the batches of each.
        device: where batches are made; cells that all members share stay on a GPU.
    """

    def __init__(self, runs: list[RunSpec], feeds: list[Feed], device: torch.device) -> None:
        self._train, self._feeds, self._device = runs[0].train, feeds, device
        cells = self._train.cells_per_step
        self._seeds = torch.tensor([run.seed for run in runs], device=device).repeat_interleave(cells)
        self._held: DeviceCells | Cells | None = None
        shared = feeds[0].cells if isinstance(feeds[0], ResidentFeed) else None
        if shared is not None and all(isinstance(feed, ResidentFeed) and feed.cells is shared for feed in feeds):
            self._held = DeviceCells.of(shared, device) if device.type == "cuda" else shared
        self._block = -1
        self._index: NDArray[np.int64] = np.empty(0, np.int64)
        self._there: Tensor = torch.empty(0)

    def batch(self, step: int) -> Batch:
        """The batch of update number ``step``: R x B cells."""
        cells = self._train.cells_per_step
        if self._held is None:
            parts = [feed.batch(step, cells) for feed in self._feeds]
            epochs = np.concatenate([epoch for _, epoch in parts])
            return make_batch(joined([part for part, _ in parts]), epochs, self._train, self._seeds, self._device)
        block, within = divmod(step, BLOCK_UPDATES)
        if block != self._block:
            found = [
                feed.indices(block, BLOCK_UPDATES * cells) for feed in self._feeds if isinstance(feed, ResidentFeed)
            ]
            # (2, R, updates, B): the cell, and its epoch
            self._index = np.stack([np.stack(pair) for pair in found], axis=1).reshape(
                2, len(found), BLOCK_UPDATES, cells
            )
            self._there = torch.from_numpy(self._index).to(self._device)
            self._block = block
        if isinstance(self._held, DeviceCells):
            index, when = self._there[:, :, within].flatten(1)
            return self._held.rows(index).batch(when, self._train, self._seeds)
        rows, epochs = self._index[:, :, within].reshape(2, -1)
        return make_batch(self._held.rows(rows), epochs, self._train, self._seeds, self._device)


def repeated(targets: Tensor, times: int) -> Tensor:
    """Targets (B, K, ...) so many times, one after the other: (times x B, K, ...)."""
    return targets.repeat(times, *(1 for _ in targets.shape[1:]))


def columns(batch: Batch, models: int, start: int, stop: int) -> Batch:
    """Cells start..stop of every model."""

    def cut(part: Tensor) -> Tensor:
        return part.view(models, -1, *part.shape[1:])[:, start:stop].flatten(0, 1)

    return Batch(cut(batch.values), batch.masks.through(cut), cut(batch.targets))
