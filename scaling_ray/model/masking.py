"""The choice of masked genes: an integer counter hash of (seed, epoch, cell id, gene), the same on CPU and GPU.

`corrected` masks exactly K = round(fraction x measured genes) per cell, the genes of smallest hash; `published` masks
each gene independently with that probability. Unmeasured genes are hidden from the network and are never targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling_ray.recipe import Recipe

EVALUATION_MASK_SEED = 20_251_108
"""Validation and test masks are drawn under this seed and epoch 0, for every run of every sweep."""

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Masks:
    """positions (B, K) gene index of each masked gene; weights (B, K) 1 or, for padding, 0; hidden (B, V) bool."""

    positions: Tensor
    weights: Tensor
    hidden: Tensor

    def rows(self, start: int, stop: int) -> Masks:
        """The masks of cells start..stop."""
        return self.through(lambda part: part[start:stop])

    def repeated(self, times: int) -> Masks:
        """The same masks repeated, one after the other."""
        return self.through(lambda part: part.repeat(times, 1))

    def through(self, change: Callable[[Tensor], Tensor]) -> Masks:
        """The same change of every part."""
        return Masks(change(self.positions), change(self.weights), change(self.hidden))


def mix32(x: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (constants found by C. Wellons' search), on int64 tensors."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _LOW_32
    return x ^ (x >> 15)


def gene_hash(seed: int | Tensor, epochs: Tensor, cells: Tensor, genes: int) -> Tensor:
    """(B, V) int64 in [0, 2^32): the hash of every gene of every cell. epochs, cells: (B,) int64; so seed, or one."""
    key = torch.zeros_like(cells) + (seed & _LOW_32)
    for word in (epochs, cells & _LOW_32, cells >> 32):
        key = mix32((mix32(key) + word + 0x9E3779B9) & _LOW_32)
    gene = torch.arange(genes, dtype=torch.int64, device=cells.device) * 0x9E3779B1 & _LOW_32
    return mix32(mix32(key[:, None] ^ gene[None, :]) ^ key[:, None])


def draw_masks(
    recipe: Recipe, fraction: float, seed: int | Tensor, epochs: Tensor, cells: Tensor, measured: Tensor
) -> Masks:
    """Masks of B cells. epochs, cells: (B,) int64; measured: (B, V) bool; seed: one, or (B,) int64."""
    genes = measured.shape[1]
    hashes = gene_hash(seed, epochs, cells, genes)
    if recipe == "corrected":
        masked_genes = torch.floor(measured.sum(1) * fraction + 0.5).to(torch.int64)
        most = max(1, int(genes * fraction + 0.5))
        order = hashes * 65_536 + torch.arange(genes, device=cells.device)
        order = torch.where(measured, order, torch.iinfo(torch.int64).max)
        positions = order.topk(most, dim=1, largest=False, sorted=True).indices
    else:
        masked = (hashes < int(fraction * 2**32)) & measured
        masked_genes = masked.sum(1)
        most = max(1, int(masked_genes.max()))
        positions = torch.argsort((~masked).to(torch.uint8), dim=1, stable=True)[:, :most]
    weights = (torch.arange(most, device=cells.device)[None, :] < masked_genes[:, None]).to(torch.float32)
    hidden = ~measured
    hidden = hidden.scatter(1, positions, hidden.gather(1, positions) | (weights > 0))
    return Masks(positions, weights, hidden)


def log_normalise(counts: Tensor, raw_sum: Tensor, recipe: Recipe) -> Tensor:
    """(B, V) float32 log1p of counts per 10,000: of the library (``corrected``) or of these genes (``published``)."""
    values = counts.to(torch.float32)
    total = raw_sum.to(torch.float32) if recipe == "corrected" else values.sum(1)
    return torch.log1p(values * (1e4 / total.clamp(min=1.0))[:, None])
