"""The loop a user would write: torch.nn.TransformerEncoder over every gene, one cell after the other from a Dataset.

As the study's recipe has it (arXiv 2602.15253): micro-batches of 4 cells, 8 of them to an update, AdamW, clipping at
1.0, a learned mask token in place of the value projection, and a loss over the masked genes of the whole output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scaling_ray.shards.read import Cells
from scaling_ray.sizes import Shape

MASK_FRACTION = 0.15


class CellDataset(Dataset[tuple[Tensor, Tensor]]):
    """A cell's normalised values and its mask, made anew each time it is asked for."""

    def __init__(self, cells: Cells) -> None:
        self.counts, self.raw_sum = cells.counts.astype(np.float32), cells.raw_sum

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(np.log1p(self.counts[index] * (1e4 / self.raw_sum[index])))
        mask = torch.zeros(len(values), dtype=torch.bool)
        mask[torch.randperm(len(values))[: round(MASK_FRACTION * len(values))]] = True
        return values.float(), mask


class PlainTransformer(nn.Module):
    """Gene embedding plus value, an encoder over all genes, one value per gene."""

    def __init__(self, shape: Shape, genes: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(genes, shape.width)
        self.value = nn.Linear(1, shape.width)
        self.mask_token = nn.Parameter(torch.randn(shape.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            shape.width,
            shape.heads,
            shape.feedforward * shape.width,
            dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.head = nn.Linear(shape.width, 1)
        self.register_buffer("genes", torch.arange(genes))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, G), (B, G) bool -> (B, G)."""
        seen = torch.where(mask.unsqueeze(-1), self.mask_token, self.value(values.unsqueeze(-1)))
        return self.head(self.encoder(seen + self.embedding(self.genes))).squeeze(-1)


def reference_updates(
    shape: Shape, cells: Cells, dropout: float, batch: int, accumulation: int, device: torch.device
) -> Callable[[], None]:
    """A function that does one update of ``batch`` x ``accumulation`` cells."""
    model = PlainTransformer(shape, cells.counts.shape[1], dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    loader = DataLoader(CellDataset(cells), batch_size=batch, shuffle=True, drop_last=True)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def update() -> None:
        for _ in range(accumulation):
            values, mask = (part.to(device) for part in next(batches))
            predicted = model(values, mask)
            loss = nn.functional.mse_loss(predicted[mask], values[mask]) / accumulation
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(float(norm)):
            raise RuntimeError("the reference loop diverged")

    return update
