"""Which errors say that memory did not suffice."""

from __future__ import annotations

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""What the RuntimeError of torch's CPU allocator says; it has no class of its own."""


_KILLED = ("OutOfMemoryError", "low on memory", "memory on the node", "killing policy")
"""What Ray says of a process that it killed since its node ran short of memory; by version, and cut short at times."""


def killed_for_memory(words: str) -> bool:
    """Whether Ray's words about a process that died say that it was killed for its node's memory."""
    return any(word in words for word in _KILLED)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, a GPU's, torch's CPU allocator's or Ray's way of saying that memory fell short."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if type(error).__module__.startswith("ray."):
        return killed_for_memory(str(error))
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
