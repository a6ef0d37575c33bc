"""The ladder of sizes: exact parameters, matrix FLOPs and bytes from the shape alone. No torch.

Shape legend: D width, H heads, r feed-forward multiple, V genes in the panel, K masked genes of a cell, O outputs of
the head per gene.
Sizes are those of arXiv 2602.15253; custom ones stand in a spec's ``[sizes]`` table.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling_ray.errors import BadInput


@dataclass(frozen=True)
class Shape:
    """Width, layers, heads and feed-forward multiple of one transformer."""

    width: int
    layers: int
    heads: int
    feedforward: int

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "feedforward"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput("S001", f"sizes.{name}", value, "give a whole number of at least 1")
        if self.width % self.heads:
            raise BadInput(
                "S002", "sizes.width", self.width, f"must be divisible by heads = {self.heads}; change one of them"
            )


LADDER: dict[str, Shape] = {
    "XXS": Shape(1, 1, 1, 1),
    "TINY": Shape(16, 1, 1, 1),
    "XS": Shape(64, 2, 4, 4),
    "S": Shape(128, 4, 8, 4),
    "M": Shape(512, 6, 8, 4),
    "L": Shape(1020, 8, 12, 4),
    "XL": Shape(1536, 12, 16, 4),
}


def block_parameters(shape: Shape) -> int:
    """Parameters of one pre-LN block: attention 4D^2 + 4D, feed-forward 2rD^2 + rD + D, two LayerNorms 4D."""
    d, r = shape.width, shape.feedforward
    return 4 * d * d + 4 * d + 2 * r * d * d + r * d + d + 4 * d


def parameters(shape: Shape, genes: int, outputs_per_gene: int = 1) -> int:
    """All parameters at a panel of ``genes``: embedding VD, value projection 2D, mask token D, blocks, head.

    The head has O(D + 1), O being ``outputs_per_gene``.
    """
    return genes * shape.width + parameters_without_embedding(shape, outputs_per_gene)


def parameters_without_embedding(shape: Shape, outputs_per_gene: int = 1) -> int:
    """Parameters that do not grow with the panel (the gene embedding left out)."""
    d = shape.width
    return 2 * d + d + shape.layers * block_parameters(shape) + outputs_per_gene * (d + 1)


def forward_flops_per_cell(shape: Shape, genes: int, masked_genes: float) -> float:
    """Matrix FLOPs (2 per multiply-add) of one forward pass over one cell.

    All layers but the last work on V tokens: V(8D^2 + 4rD^2) + 4V^2 D. The last one needs keys and values of all
    V tokens (4VD^2) but queries, attention output, feed-forward and head only where a gene is masked:
    K(4D^2 + 4rD^2) + 4KVD, head 2KD. Input: value projection and embedding sum, 3VD.
    """
    d, r, v, k = shape.width, shape.feedforward, genes, masked_genes
    full = v * (8 * d * d + 4 * r * d * d) + 4 * v * v * d
    last = 4 * v * d * d + k * (4 * d * d + 4 * r * d * d) + 4 * k * v * d
    return 3 * v * d + (shape.layers - 1) * full + last + 2 * k * d


def training_flops_per_cell(shape: Shape, genes: int, masked_genes: float) -> float:
    """Matrix FLOPs of one training presentation of a cell: forward, and twice that for the backward pass."""
    return 3 * forward_flops_per_cell(shape, genes, masked_genes)


def training_bytes(shape: Shape, genes: int, micro_batch: int) -> int:
    """Bytes of weights, gradients and two AdamW moments (fp32), plus an upper estimate of kept activations.

    Per layer and token about (10 + 2r)D activations are kept for the backward pass; attention scores are not kept
    (fused attention keeps one value per query and head).
    """
    d, r = shape.width, shape.feedforward
    activations = 4 * micro_batch * genes * shape.layers * ((10 + 2 * r) * d + shape.heads)
    return 16 * parameters(shape, genes) + activations


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process of a run needs: on the device it trains on, and beside that in the machine's memory."""

    device_bytes: int
    host_bytes: int


def training_memory(
    shape: Shape,
    genes: int,
    micro_batch: int,
    *,
    members: int = 1,
    workers: int = 1,
    zero_stage: int = 0,
    offload_optimizer: bool = False,
    deepspeed: bool = False,
    dropout: float = 0.0,
    on_cpu: bool = False,
    outputs_per_gene: int = 1,
) -> TrainingMemory:
    """Memory of one process by engine: weights, gradients, AdamW's moments, activations.

    A stack of ``members`` holds each of them. A DDP worker holds everything whole. DeepSpeed keeps a master copy of the
    weights in fp32 beside the moments; ZeRO shares both among ``workers`` (stage 1), gradients too (2) and weights (3),
    and ``offload_optimizer`` keeps master and moments in the machine's memory. Dropout on a CPU keeps attention
    matrices (fp32, and a byte for what was kept), which fused attention does not.
    """
    count = members * parameters(shape, genes, outputs_per_gene)
    weights, gradients = 4 * count, 4 * count
    optimizer = (12 if deepspeed else 8) * count
    weights //= workers if zero_stage >= 3 else 1
    gradients //= workers if zero_stage >= 2 else 1
    optimizer //= workers if zero_stage >= 1 else 1
    activations = members * (training_bytes(shape, genes, micro_batch) - 16 * parameters(shape, genes))
    if dropout > 0 and on_cpu:
        activations += 5 * members * micro_batch * shape.layers * shape.heads * genes * genes
    host = optimizer if offload_optimizer else 0
    return TrainingMemory(weights + gradients + (0 if offload_optimizer else optimizer) + activations, host)
