"""Weights to start from that know the cells: gene programs in the embedding, each gene's best constant at the head.

A token is an embedding plus value times a direction. Drawn small beside the value, an embedding says nothing about
which gene a token is, and a network spends its first hundreds of updates at the loss of the gene mean, on a saddle for
every program of genes. So the embedding starts from the principal components of the run's own training cells, turned at
random by the run's seed, the value's direction starts smaller than it, and embedding and head together say each gene's
best constant where a gene is hidden. Measured in ``benchmarks/learning.py``.

What writes to the residual stream stays as drawn: started at zero it learns as well, but nothing reaches what stands
before it at first, and Adam, which divides by the size of a gradient, then makes updates out of rounding.

Shape legend: N cells, G genes, D width, O outputs of the head per gene.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

START_CELLS = 2048
"""Most training cells that a start is taken from: the first of the run's own order."""
EMBEDDING_SCALE, VALUE_SCALE = 0.3, 0.2
"""Root mean square of embedding and mask token, and of the direction that a value is written along."""
_TURN_SEED = 7_919


def gene_means(values_NG: Tensor, measured_NG: Tensor) -> Tensor:
    """(G,) float64: mean value of each gene over the cells that measured it; 0 for a gene that none did."""
    counts = measured_NG.sum(0)
    return torch.where(measured_NG, values_NG.double(), 0.0).sum(0) / counts.clamp(min=1)


def starting_weights(
    drawn: Mapping[str, Tensor], values_NG: Tensor, measured_NG: Tensor, constants_GO: Tensor, seed: int
) -> dict[str, Tensor]:
    """The weights of a ``MaskedGeneTransformer`` to start from, on the CPU.

    Args:
        drawn: its weights by name as ``initialise`` drew them; most stay as they are.
        values_NG: normalised values of training cells.
        measured_NG: which of them were measured, bool.
        constants_GO: for each gene the outputs of least loss among those that are the same for all cells.
        seed: of the run.
    """
    weights = {name: tensor.detach().cpu().clone() for name, tensor in drawn.items()}
    drawn_embedding, token = weights["gene_embedding"], weights["mask_token"]
    token *= EMBEDDING_SCALE / 0.02
    weights["value_projection.weight"] *= VALUE_SCALE
    embedding = _turned_components(values_NG, measured_NG, drawn_embedding.shape[1], seed)
    size = embedding.square().mean().sqrt()
    embedding = (
        embedding * (EMBEDDING_SCALE / size) if size > 0 else drawn_embedding.double() * (EMBEDDING_SCALE / 0.02)
    )
    head, constants = weights["head.weight"].double(), constants_GO.double().cpu()
    bias = constants.mean(0)
    said = (embedding + token.double()) @ head.T + bias
    embedding = embedding + (constants - said) @ torch.linalg.pinv(head).T
    weights["gene_embedding"] = embedding.to(drawn_embedding.dtype)
    weights["head.bias"] = bias.to(drawn_embedding.dtype)
    return weights


def components(values_NG: Tensor, measured_NG: Tensor) -> Tensor:
    """(C, G) float64: loadings of the cells' principal components, strongest first, on the CPU.

    A component's sign is fixed by its largest loading, so that every machine finds the same.
    """
    values, measured = values_NG.double().cpu(), measured_NG.cpu()
    centred = torch.where(measured, values - gene_means(values, measured), 0.0)
    if len(centred) < centred.shape[1]:
        _, root, loadings_CG = torch.linalg.svd(centred, full_matrices=False)
        strength = root.square()
    else:
        strength, loadings_GC = torch.linalg.eigh(centred.T @ centred)
        strength, loadings_CG = strength.flip(0), loadings_GC.T.flip(0)
    loadings_CG = loadings_CG[: int((strength > 1e-12 * strength.max().clamp(min=1e-30)).sum())]
    largest = loadings_CG.abs().argmax(dim=1, keepdim=True)
    return loadings_CG * loadings_CG.gather(1, largest).sign()


def _turned_components(values_NG: Tensor, measured_NG: Tensor, width: int, seed: int) -> Tensor:
    """(G, D) float64: loadings of the first D principal components, all of one length, in a random orthogonal turn."""
    loadings_CG = components(values_NG, measured_NG)[:width]
    generator = torch.Generator().manual_seed(seed + _TURN_SEED)
    turn_DD, upper = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    turn_DD = turn_DD * upper.diagonal().sign()
    return loadings_CG.T @ turn_DD[: len(loadings_CG)]
