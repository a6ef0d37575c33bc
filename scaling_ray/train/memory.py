"""Which errors say that memory did not suffice."""

from __future__ import annotations

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""What the RuntimeError of torch's CPU allocator says; it has no class of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, a GPU's or torch's CPU allocator's way of saying that memory did not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )
