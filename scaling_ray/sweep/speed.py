"""Seconds of training work on a device: kinds of work, and how long one unit of each takes.

An update is a sum of kinds of work times seconds of each (:class:`Terms`). Those of a CPU were fitted by
``benchmarks/planning.py --refit`` to the rows of reports/benchmarks/planning.json. Those of a GPU follow from its data
sheet and from what starting a kernel takes, and were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from scaling_ray.errors import BadInput
from scaling_ray.sizes import Shape, parameters


class Terms(NamedTuple):
    """Kinds of work of one update: how much of each there is, or the seconds of one unit of each on a device.

    ``updates`` are optimizer steps, ``layer_passes`` layers times micro-batches: both cost mostly the start of
    operations, whatever the size. ``cell_genes`` are genes of cells made into batches, ``activations`` values that
    layers hand on (``cast_activations`` those under bf16 again), ``scores`` entries of attention matrices
    (``wide_scores`` those of heads wider than 1 again, ``dropped_scores`` those under dropout on a CPU, which are in
    neither), ``padding`` values of zero-padded heads, ``weights`` parameters that the optimizer walks; the last two are
    matrix FLOPs by precision.
    """

    updates: float = 0.0
    layer_passes: float = 0.0
    cell_genes: float = 0.0
    activations: float = 0.0
    cast_activations: float = 0.0
    scores: float = 0.0
    wide_scores: float = 0.0
    dropped_scores: float = 0.0
    padding: float = 0.0
    weights: float = 0.0
    fp32_flops: float = 0.0
    bf16_flops: float = 0.0


CPU = Terms(
    updates=1.07e-3,
    layer_passes=1.18e-3,
    cell_genes=1.22e-7,
    activations=1.12e-9,
    cast_activations=5.21e-9,
    scores=1.32e-9,
    wide_scores=1.42e-9,
    dropped_scores=9.75e-9,
    padding=2.83e-9,
    weights=2.8e-9,
    fp32_flops=1 / 100e9,
    bf16_flops=1 / 250e9,
)
"""Seconds on one core of an AMD EPYC with AVX512-BF16, fitted but for FLOPs: those are its square products' rate."""

CALIBRATED_GFLOPS = 100.0
"""fp32 matrix rate of the CPU that the terms were fitted on; another CPU's terms are all scaled by its own."""

HEAD_WIDTH = 16
"""Heads of width 2 to 8 are padded to this on a CPU (:mod:`scaling_ray.model.dropout`)."""

ACTIVATION_BYTES = 22.0
"""Memory traffic behind a value handed on, forward and backward: the fitted seconds at a core's 20 GB/s."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense matrix rates in TFLOP/s (without TF32), bandwidth in GB/s, memory in GiB."""

    fp32_tflops: float
    bf16_tflops: float
    gigabytes_per_second: float
    gib: float


GPUS: dict[str, Gpu] = {
    "T4": Gpu(8.1, 8.1, 320, 15),
    "V100": Gpu(15.7, 15.7, 900, 16),
    "A10G": Gpu(31.2, 70, 600, 22),
    "L4": Gpu(30.3, 121, 300, 22),
    "L40S": Gpu(91.6, 362, 864, 44),
    "A100": Gpu(19.5, 312, 1555, 39),
    "H100": Gpu(67, 989, 3350, 79),
    "H200": Gpu(67, 989, 4800, 140),
}
"""Kinds of GPUs that a plan knows, NVIDIA's figures; T4 and V100 have no bf16 units. A100 is the one of 40 GB."""

ASSUMED_GPU = "L4"
"""The GPU of a plan that nothing names one for: a small one, so that what fits there fits elsewhere."""

GPU_SHARE_OF_PEAK = 0.5
SERIAL_SHARE = 0.1
"""Share of the work that more threads of a CPU do not shorten (assumed)."""

GPU_UPDATE_SECONDS, GPU_LAYER_PASS_SECONDS = 1.5e-3, 6e-4
"""Starting a step's kernels (batch, clipping, AdamW) and those of a layer's two passes, at 5 to 10 us each."""


def gpu_named(name: str, field: str) -> str:
    """The known kind of a GPU's name ("NVIDIA H100 80GB HBM3" is an H100); BadInput for one that is not known."""
    found = [kind for kind in GPUS if kind.lower() in name.lower().replace("-", " ").split()]
    found = found or [kind for kind in GPUS if kind.lower() in name.lower()]
    if not found:
        raise BadInput("W050", field, name, f"is no GPU that a plan knows; use {', '.join(GPUS)}")
    return max(found, key=len)


@cache
def gpu_terms(kind: str) -> Terms:
    """Seconds of each kind of work on a whole GPU."""
    gpu = GPUS[kind]
    per_value = ACTIVATION_BYTES / (gpu.gigabytes_per_second * 1e9 * GPU_SHARE_OF_PEAK)
    return Terms(
        updates=GPU_UPDATE_SECONDS,
        layer_passes=GPU_LAYER_PASS_SECONDS,
        cell_genes=4 * per_value,
        activations=per_value,
        cast_activations=per_value / 2,
        # exponentials run at a quarter of the rate of fp32 products, forward and backward
        scores=3 * 8 / (gpu.fp32_tflops * 1e12),
        dropped_scores=3 * 8 / (gpu.fp32_tflops * 1e12),
        padding=per_value,
        weights=ACTIVATION_BYTES * 1.5 / (gpu.gigabytes_per_second * 1e9),
        fp32_flops=1 / (gpu.fp32_tflops * 1e12 * GPU_SHARE_OF_PEAK),
        bf16_flops=1 / (gpu.bf16_tflops * 1e12 * GPU_SHARE_OF_PEAK),
    )


def work_of_update(
    shape: Shape,
    genes: int,
    masked: float,
    cells: int,
    micro_batch: int,
    members: int = 1,
    dropout: float = 0.0,
    precision: str = "fp32",
    on_gpu: bool = False,
) -> Terms:
    """What one process does in one update of ``cells``, ``members`` models at once.

    The last layer works on masked genes only (see :func:`scaling_ray.sizes.forward_flops_per_cell`): d width, r
    feed-forward, v genes, k masked genes.
    """
    d, r, v, k = shape.width, shape.feedforward, genes, masked
    before, heads, head_width = shape.layers - 1, shape.heads, shape.width // shape.heads
    rows, all_cells = before * v, cells * members
    activations = 3 * v * d + rows * (10 + 2 * r) * d + 4 * v * d + k * (8 + 2 * r) * d
    scores = heads * (before * v * v + k * v)
    drops = dropout > 0 and not on_gpu
    padded = head_width if on_gpu or drops or head_width == 1 or head_width > 8 else HEAD_WIDTH
    padding = heads * (3 * rows + 2 * v + k) * padded if padded != head_width else 0
    products = 3 * v * d + rows * (8 + 4 * r) * d * d + 4 * v * d * d + k * (4 + 4 * r) * d * d + 2 * k * d
    flops = all_cells * 3 * (products + 4 * padded * scores)
    return Terms(
        updates=1,
        layer_passes=-(-cells // micro_batch) * shape.layers,
        cell_genes=all_cells * v,
        activations=all_cells * activations,
        cast_activations=all_cells * activations if precision == "bf16" else 0,
        scores=0 if drops else all_cells * scores,
        wide_scores=0 if drops or head_width == 1 else all_cells * scores,
        dropped_scores=all_cells * scores if drops else 0,
        padding=all_cells * padding,
        weights=members * parameters(shape, genes),
        fp32_flops=flops if precision == "fp32" else 0,
        bf16_flops=flops if precision == "bf16" else 0,
    )


def seconds_of(work: Terms, speed: Terms, threads: int = 1) -> float:
    """Seconds of the work at a speed; more threads of a CPU shorten all but starts and a serial share."""
    starts = work.updates * speed.updates + work.layer_passes * speed.layer_passes
    rest = sum(amount * seconds for amount, seconds in zip(work[2:], speed[2:], strict=True))
    return starts + rest * (SERIAL_SHARE + (1 - SERIAL_SHARE) / threads)
