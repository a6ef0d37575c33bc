"""Groups of spawned processes that train together over gloo, for tests outside Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

RANKS = 2


def join_group(rank: int, directory: Path) -> None:
    """Meets the other process through a file in ``directory``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    meeting = f"file://{directory}/rendezvous"
    torch.distributed.init_process_group("gloo", meeting, timedelta(minutes=10), rank=rank, world_size=RANKS)


def run_in_a_group(work: Callable[..., None], *arguments: Any, directory: Path) -> None:
    """``work(rank, *arguments)`` in each of two processes that have met; their first error is raised here."""
    torch.multiprocessing.spawn(_member, (work, arguments, directory), nprocs=RANKS)


def _member(rank: int, work: Callable[..., None], arguments: tuple[Any, ...], directory: Path) -> None:
    """Ends without Python's own shutdown, which aborts now and then after a group.

    gloo's threads free the tensors of the last collective a moment after it has returned; a thread that needs the
    interpreter for that while it shuts down is ended inside C++ code, which ends the process by SIGABRT (torch 2.13,
    Python 3.11; one group of thirty on two busy cores).
    """
    join_group(rank, directory)
    work(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
