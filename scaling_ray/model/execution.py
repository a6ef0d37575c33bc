"""How a run is carried out on a kind of device: micro-batch, precision, how many tiny models train as one. No torch.

None of it is part of a run's identity, yet each may move a digit: so the choice is written to plan.json before the
first step, and a later call repeats what stands there. The tables were measured (``benchmarks/training.py``); a spec
that names a value overrules them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from scaling_ray.model.sizes import Shape

Device = Literal["cpu", "cpu_bf16", "cuda"]
"""A CPU, a CPU with bf16 dot products (AVX512-BF16 or AMX), a CUDA GPU."""
Precision = Literal["fp32", "bf16"]

STACKED_WIDTH = 16
"""Models up to this width and one layer train several at a time."""


def device_here() -> Device:
    """What this machine's runs would train on."""
    if os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return "cuda"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "cpu"
    return "cpu_bf16" if flags & {"avx512_bf16", "amx_bf16"} else "cpu"


def choose_precision(shape: Shape, device: Device) -> Precision:
    """bf16 where matrices are wide enough to gain by it."""
    least_width = {"cpu": None, "cpu_bf16": 128, "cuda": 128}[device]
    return "bf16" if least_width is not None and shape.width >= least_width else "fp32"


def choose_micro_batch(shape: Shape, genes: int, cells_per_step: int, device: Device) -> int:
    """Cells of one forward and backward pass: what keeps activations in a CPU's cache, or a GPU busy."""
    units = shape.width * genes
    if device == "cuda":
        most = max(1, (1 << 25) // (units * shape.layers))
    else:
        most = max(4, (1 << 18) // units)
    most = min(most, cells_per_step)
    return 1 << (most.bit_length() - 1)


def choose_stack(shape: Shape, micro_batch: int, device: Device) -> int:
    """Most models of this shape that train as one."""
    if shape.layers > 1 or shape.width > STACKED_WIDTH:
        return 1
    return 64 if device == "cuda" else 8
