"""Cells as a shallower sequencing run would have seen them: each molecule kept with one probability, on any device.

Draws come from the counter hash of the masks and from integer tables of binomial distribution functions, so a cell is
thinned in the same way on CPU and GPU and in any process. A count is drawn as the sum of its low byte and of each
higher bit, every one an independent binomial draw; the law is exact but for the 2^-32 steps of the tables.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from scaling_ray.model.masking import gene_hash, mix32

LOW_VALUES = 256
"""Counts below this have a table each; larger counts are drawn bit by bit."""
HIGHEST_BIT = 15
"""Above this bit a count is a number of draws of the highest table."""

_UNIT = 1 << 32
_SALT = 0x7417


def _thresholds(molecules: int, fraction: float) -> np.ndarray:
    """(molecules,) int64: P(X <= k) of Binomial(molecules, fraction) in units of 2^-32, for k below molecules."""
    return np.floor(binom.cdf(np.arange(molecules), molecules, fraction) * _UNIT).astype(np.int64)


@lru_cache(maxsize=4)
def _tables(fraction: float, device: torch.device) -> tuple[Tensor, dict[int, Tensor]]:
    low = np.full((LOW_VALUES, LOW_VALUES), _UNIT, dtype=np.int64)
    for molecules in range(LOW_VALUES):
        low[molecules, :molecules] = _thresholds(molecules, fraction)
    # Each row starts where the one before it ends, so one sorted table serves all counts.
    low += np.arange(LOW_VALUES, dtype=np.int64)[:, None] * _UNIT
    high = {bit: torch.from_numpy(_thresholds(1 << bit, fraction)).to(device) for bit in range(8, HIGHEST_BIT + 1)}
    return torch.from_numpy(low.ravel()).to(device), high


def _draw(count: Tensor, hashes: Tensor, most: int, fraction: float) -> Tensor:
    """Binomial(count, fraction), elementwise. count: int64, at most ``most``; hashes: as many in [0, 2^32)."""
    low, high = _tables(fraction, count.device)
    byte = count & (LOW_VALUES - 1)
    drawn = torch.searchsorted(low, byte * _UNIT + hashes, right=True) - byte * LOW_VALUES
    for bit in range(8, HIGHEST_BIT):
        if most >> bit:
            more = torch.searchsorted(high[bit], mix32(hashes ^ (bit * 0x9E3779B1)), right=True)
            drawn = drawn + more * ((count >> bit) & 1)
    whole = most >> HIGHEST_BIT
    if whole:
        number = torch.arange(whole, device=count.device)
        salted = mix32(hashes[..., None] ^ mix32((number + 0x51ED27) & (_UNIT - 1)))
        more = torch.searchsorted(high[HIGHEST_BIT], salted, right=True)
        drawn = drawn + (more * (number < (count >> HIGHEST_BIT)[..., None])).sum(-1)
    return drawn


def thin(
    counts: Tensor,
    raw_sum: Tensor,
    fraction: float,
    seed: int | Tensor,
    epochs: Tensor,
    cells: Tensor,
    most: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Keep each molecule of B cells with probability ``fraction``; the library includes molecules outside the panel.

    Args:
        counts: (B, V) int64.
        raw_sum: (B,) int64, molecules over all genes.
        fraction: in (0, 1).
        seed: of the run, or (B,) int64 of each cell's.
        epochs: (B,) int64.
        cells: (B,) int64 cell ids.
        most: no count, and no raw_sum, of the batch is larger (known without asking the device).

    Returns:
        counts (B, V) and raw_sum (B,), int64.
    """
    hashes = gene_hash(seed ^ _SALT, epochs, cells, counts.shape[1] + 1)
    thinned = _draw(counts, hashes[:, :-1], most[0], fraction)
    outside = (raw_sum - counts.sum(1)).clamp(min=0)
    return thinned, thinned.sum(1) + _draw(outside, hashes[:, -1], most[1], fraction)
