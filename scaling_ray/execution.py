"""How a run is carried out: device, micro-batch, precision, workers, how many tiny models train as one. No torch.

None of it is part of a run's identity, yet much of it may move a digit: so the choice is written to plan.json before
the first step, and a later call repeats it. The tables of choices were measured (``benchmarks/training.py``); a spec
that names a value overrules them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from scaling_ray.sizes import Shape

Device = Literal["cpu", "cpu_bf16", "cuda"]
"""A CPU, a CPU with bf16 dot products (AVX512-BF16 or AMX), a CUDA GPU."""
Precision = Literal["fp32", "bf16"]
Engine = Literal["plain", "ddp", "deepspeed"]


class Execution(BaseModel):
    """How one run is carried out; the whole of what a run's identity leaves out.

    ``cpus`` are threads of one worker, ``gpus`` the share of a GPU that one worker holds; ``stack`` models train as one
    (0: the plan has not said yet). ``checkpoint_seconds`` pass between two saved states. Where ``least_workers`` is not
    0, a group trains on as few workers as that while there is no room for all ``workers``.

    Every field may be changed between two calls of a sweep, and the run stays the same run. Those in ``FOLLOWS_SPEC``
    then take the new value; all others are repeated from plan.json, so that no digit moves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    FOLLOWS_SPEC: ClassVar[frozenset[str]] = frozenset(
        {"gpus", "workers", "least_workers", "engine", "zero_stage", "offload_optimizer", "checkpoint_seconds"}
    )

    device: Device
    precision: Precision
    micro_batch: int
    cpus: int = 1
    gpus: float = 0.0
    workers: int = 1
    least_workers: int = 0
    engine: Engine = "plain"
    zero_stage: int = 0
    offload_optimizer: bool = False
    compile: bool = False
    stack: int = 0
    checkpoint_seconds: float = 30.0

    @property
    def in_group(self) -> bool:
        """Whether it trains in a worker group, which may be of one for a while."""
        return self.workers > 1 or self.least_workers > 0

    def repeating(self, planned: dict[str, Any]) -> Self:
        """This execution with the values of an earlier plan, except for the fields in ``FOLLOWS_SPEC``."""
        kept = {name: value for name, value in planned.items() if name not in self.FOLLOWS_SPEC}
        return self.model_validate(self.model_dump() | kept)


def device_here() -> Device:
    """The device that runs would train on in this process: a GPU that it may use, else the CPU."""
    if os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return "cuda"
    return cpu_here()


def cpu_here() -> Device:
    """What kind of CPU this machine has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "cpu"
    return "cpu_bf16" if flags & {"avx512_bf16", "amx_bf16"} else "cpu"


def gpu_here() -> str | None:
    """The name of this machine's first GPU as its driver gives it, None where there is none."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None


def gpus_here() -> int:
    """How many GPUs this machine has, whether or not this process may use them."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def cpu_named_here() -> str:
    """The name of this machine's CPU as the kernel gives it, "unknown" where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


SHARES_OF_A_GPU = 8
"""Most processes on one GPU: each holds a context of its own, and a CPU that starts its kernels."""

GPU_CONTEXT_BYTES = 800 << 20
"""What CUDA's context and torch's kernels and workspaces take of a GPU for each process, before any tensor."""

GPU_USED_SHARE = 0.9
"""Share of a GPU's memory that is planned with: the allocator's blocks leave gaps."""


def choose_gpu_share(device_bytes: float, busy: float, gpu_bytes: float) -> float:
    """The share of a GPU that one process of a run needs: 1/n with n whole and at most ``SHARES_OF_A_GPU``.

    Memory bounds n: n processes, each with its context, must fit at once, for one that is refused memory dies. So does
    the time in which the GPU computes: kernels of several processes take turns, and runs that keep it busy for half of
    their time or more gain nothing from company. What is idle between them is the start of kernels by the CPU, which
    is most of a tiny model's time. What needs more than half of the GPU gets it whole.

    Args:
        device_bytes: planned bytes of the process on the GPU, without its context.
        busy: share of the run's time in which the GPU computes, in (0, 1].
        gpu_bytes: memory of the GPU.
    """
    by_memory = GPU_USED_SHARE * gpu_bytes // (device_bytes + GPU_CONTEXT_BYTES)
    return 1.0 / max(1, min(SHARES_OF_A_GPU, int(by_memory), int(1.0 / busy)))


def choose_precision(shape: Shape, device: Device) -> Precision:
    """bf16 where matrices are wide enough to gain by it."""
    least_width = {"cpu": None, "cpu_bf16": 128, "cuda": 128}[device]
    return "bf16" if least_width is not None and shape.width >= least_width else "fp32"


def choose_micro_batch(shape: Shape, genes: int, cells_per_step: int, dropout: float, device: Device) -> int:
    """Cells of one forward and backward pass: what keeps activations in a CPU's cache, or a GPU busy.

    A model of one layer never makes a whole attention matrix, so it takes all cells of an update at once. Deeper models
    on a CPU take few cells, and fewer still where dropout keeps each matrix for the backward pass.
    """
    if device == "cuda":
        most = max(1, (1 << 25) // (shape.width * genes * shape.layers))
    elif shape.layers == 1:
        most = cells_per_step
    else:
        most = 4 if dropout > 0 else 8
    most = min(most, cells_per_step)
    return most if device != "cuda" else 1 << (most.bit_length() - 1)


def choose_stack(shape: Shape, micro_batch: int, device: Device) -> int:
    """Most models of this shape that train as one; more than 1 where starting an operation costs more than doing it.

    On a CPU, more models fit into the cache where each is smaller; beyond the cache they would only take turns.
    """
    if shape.layers > 1 or shape.width > 16:
        return 1
    if device == "cuda":
        return 64
    units = shape.width * micro_batch
    return 8 if units <= 64 else 4 if units <= 256 else 1
