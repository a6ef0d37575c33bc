"""Batches of cells on the training device: raw counts are normalised, masked and thinned there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.model.masking import EVALUATION_MASK_SEED, Masks, draw_masks, log_normalise
from scaling_ray.model.objectives import objective_named
from scaling_ray.model.thinning import thin
from scaling_ray.rules import TrainingRules
from scaling_ray.shards.read import Cells, Feed, ResidentFeed

LARGEST_DEVICE_SHARE = 0.25
"""Largest share of a GPU's free memory that training cells may occupy throughout a run."""


@dataclass(frozen=True)
class Batch:
    """values (B, V) normalised, at the depth the network sees; masks; the objective's targets (B, K, ...)."""

    values: Tensor
    masks: Masks
    targets: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """Cells start..stop."""
        return Batch(self.values[start:stop], self.masks.rows(start, stop), self.targets[start:stop])


@dataclass(frozen=True)
class DeviceCells:
    """Raw cells on a device: counts (N, V) int16 with the bits of uint16, raw_sum, cell and dataset (N,) int64.

    ``measured`` is (datasets, V) bool; ``most`` holds upper bounds of the counts and of raw_sum.
    """

    counts: Tensor
    raw_sum: Tensor
    cell: Tensor
    dataset: Tensor
    measured: Tensor
    most: tuple[int, int]

    @classmethod
    def of(cls, cells: Cells, device: torch.device) -> DeviceCells:
        """Copy cells to a device; a count takes two bytes there."""
        return cls(
            torch.from_numpy(cells.counts.view(np.int16).copy()).to(device),
            torch.from_numpy(cells.raw_sum.copy()).to(device),
            torch.from_numpy(cells.cell.copy()).to(device),
            torch.from_numpy(cells.dataset.astype(np.int64)).to(device),
            torch.from_numpy(cells.measured.copy()).to(device),
            (int(cells.counts.max(initial=0)), int(cells.raw_sum.max(initial=0))),
        )

    def rows(self, index: Tensor) -> DeviceCells:
        """The cells at ``index`` (B,) int64."""
        return DeviceCells(
            self.counts[index], self.raw_sum[index], self.cell[index], self.dataset[index], self.measured, self.most
        )

    def batch(self, epochs: Tensor, train: TrainingRules, mask_seed: int | Tensor) -> Batch:
        """A batch of all these cells: normalised, masked and, where the spec says so, thinned.

        ``epochs`` is (N,) int64 on the device; ``mask_seed`` is one for all cells, or (N,) int64.
        """
        counts = self.counts.to(torch.int32) & 0xFFFF
        values = log_normalise(counts, self.raw_sum, train.recipe)
        measured = self.measured[self.dataset]
        masks = draw_masks(train.recipe, train.mask_fraction, mask_seed, epochs, self.cell, measured)
        objective = objective_named(train.objective)
        targets = objective.targets(values, counts, self.raw_sum, masks.positions)
        if train.umi_fraction < 1:
            whole = counts.to(torch.int64)
            seen = thin(whole, self.raw_sum, train.umi_fraction, mask_seed, epochs, self.cell, self.most)
            values = log_normalise(*seen, train.recipe)
        return Batch(values, masks, targets)


def make_batch(
    cells: Cells, epochs: NDArray[np.int64], train: TrainingRules, mask_seed: int | Tensor, device: torch.device
) -> Batch:
    """Normalise, mask and, where the spec says so, thin cells on the device."""
    return DeviceCells.of(cells, device).batch(torch.from_numpy(epochs).to(device), train, mask_seed)


def evaluation_batches(cells: Cells, train: TrainingRules, cells_per_batch: int, device: torch.device) -> list[Batch]:
    """Cells under the fixed evaluation masks, in order."""
    parts = [cells.rows(slice(start, start + cells_per_batch)) for start in range(0, len(cells), cells_per_batch)]
    return [make_batch(part, np.zeros(len(part), np.int64), train, EVALUATION_MASK_SEED, device) for part in parts]


class BatchSource:
    """A run's global batches, or a rank's share of them, on its device.

    Args:
        feed: where the cells come from. Cells of a ResidentFeed stay on a GPU that has room for them, as raw counts.
        train: the recipe.
        seed: of the run's masks.
        device: where batches are made.
        keep: whether cells stay on the device; None lets free memory decide.
    """

    def __init__(
        self, feed: Feed, train: TrainingRules, seed: int, device: torch.device, keep: bool | None = None
    ) -> None:
        self._feed, self._train, self._seed, self._device = feed, train, seed, device
        self._held: DeviceCells | None = None
        if isinstance(feed, ResidentFeed) and (_has_room(feed, device) if keep is None else keep):
            self._held = DeviceCells.of(feed.cells, device)

    def batch(self, step: int, share: slice) -> Batch:
        """Global batch number ``step``, cut to ``share``."""
        whole = self._train.cells_per_step
        if self._held is None or not isinstance(self._feed, ResidentFeed):
            cells, epochs = self._feed.batch(step, whole, share)
            return make_batch(cells, epochs, self._train, self._seed, self._device)
        index, epochs = self._feed.indices(step, whole, share)
        there = torch.from_numpy(np.stack([index, epochs])).to(self._device, non_blocking=True)
        return self._held.rows(there[0]).batch(there[1], self._train, self._seed)


def _has_room(feed: ResidentFeed, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return feed.cells.counts.nbytes < LARGEST_DEVICE_SHARE * free
