"""The masked-gene transformer of arXiv 2602.15253, written from its mathematics.

A gene's token is its embedding plus a linear map of its value, or a learned mask token in that map's place where the
value is hidden. Pre-LayerNorm encoder blocks with GELU, no position code, no final norm, a linear head to
the outputs of the objective (one value, for squared error).

The last block is computed where a gene is masked only: every token gives keys and values, masked tokens alone ask.
Nothing else reaches the loss, so loss and gradients are those of the whole block.

Shape legend: B cells, G genes of the panel, K masked genes, D width, H heads, O outputs of the head per gene.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaling_ray.model.dropout import attention, dropout
from scaling_ray.sizes import Shape


class Block(nn.Module):
    """One pre-LN encoder block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.dropout = shape.heads, dropout
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward_in = nn.Linear(width, shape.feedforward * width)
        self.feedforward_out = nn.Linear(shape.feedforward * width, width)

    def forward(self, x_BGD: Tensor, positions_BK: Tensor | None) -> Tensor:
        """(B, G, D) -> the same, or (B, K, D) at ``positions_BK`` where they are given."""
        width = x_BGD.shape[2]
        normed = self.norm_attention(x_BGD)
        if positions_BK is None:
            query, key, value = self.query_key_value(normed).split(width, dim=2)
            kept = x_BGD
        else:
            index = positions_BK[:, :, None].expand(-1, -1, width)
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = functional.linear(normed.gather(1, index), weight[:width], bias[:width])
            key, value = functional.linear(normed, weight[width:], bias[width:]).split(width, dim=2)
            kept = x_BGD.gather(1, index)
        rate = self.dropout if self.training else 0.0
        mixed = attention(self._split_heads(query), self._split_heads(key), self._split_heads(value), rate)
        kept = kept + dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)), rate)
        inner = functional.gelu(self.feedforward_in(self.norm_feedforward(kept)))
        return kept + dropout(self.feedforward_out(dropout(inner, rate)), rate)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def visible_and_hidden(values: Tensor, hidden: Tensor) -> Tensor:
    """(..., 2): a gene's value, 0 where it is hidden, and 1 where it is hidden."""
    return torch.stack([values.masked_fill(hidden, 0.0), hidden.to(values.dtype)], -1)


class MaskedGeneTransformer(nn.Module):
    """Predicts the values of masked genes of a panel of ``genes`` genes."""

    def __init__(self, shape: Shape, genes: int, dropout: float = 0.0, outputs_per_gene: int = 1) -> None:
        super().__init__()
        self.shape, self.genes = shape, genes
        self.gene_embedding = nn.Parameter(torch.empty(genes, shape.width))
        self.value_projection = nn.Linear(1, shape.width)
        self.mask_token = nn.Parameter(torch.empty(shape.width))
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, outputs_per_gene)

    def initialise(self, seed: int) -> None:
        """Draw every weight from ``seed`` alone.

        Embedding and mask token with deviation 0.02, linear maps with 1/sqrt(fan-in), the two that write to the
        residual stream divided by sqrt(2 layers), biases zero, norms one.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 1.0 / math.sqrt(2.0 * self.shape.layers)
        with torch.no_grad():
            for parameter in (self.gene_embedding, self.mask_token):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            for name, module in self.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                scale = 1.0 / math.sqrt(module.in_features)
                if name.endswith(("attention_out", "feedforward_out")):
                    scale *= residual
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
                module.bias.zero_()

    def _tokens(self, values_BG: Tensor, hidden_BG: Tensor) -> Tensor:
        """Embedding plus value or mask token, (B, G, D), as one matrix product.

        With s 1 where a gene is hidden and v 0 there: v w + b + s (m - b) + e = [v, s] [w, m - b] + (e + b).
        """
        told_BG2 = visible_and_hidden(values_BG, hidden_BG)
        bias = self.value_projection.bias
        rows_2D = torch.stack([self.value_projection.weight[:, 0], self.mask_token - bias])
        cells = len(values_BG)
        return torch.baddbmm(
            (self.gene_embedding + bias).expand(cells, -1, -1), told_BG2, rows_2D.expand(cells, -1, -1)
        )

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor) -> Tensor:
        """(B, G) values, (B, G) bool hidden, (B, K) positions of masked genes -> (B, K, O) outputs."""
        x_BGD = self._tokens(values_BG, hidden_BG)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x_BGD = block(x_BGD, positions_BK if index == last else None)
        outputs_BKO: Tensor = self.head(x_BGD)
        return outputs_BKO

    def encode(self, values_BG: Tensor, hidden_BG: Tensor) -> Tensor:
        """(B, G) values, (B, G) bool hidden -> (B, G, D): the last block's output for every gene."""
        x_BGD = self._tokens(values_BG, hidden_BG)
        for block in self.blocks:
            x_BGD = block(x_BGD, None)
        return x_BGD
