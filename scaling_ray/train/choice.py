"""Which engine a run trains with."""

from __future__ import annotations

import torch

from scaling_ray.errors import BadInput
from scaling_ray.runs import RunSpec
from scaling_ray.train.engine import DdpEngine, Engine, PlainEngine
from scaling_ray.train.zero import DeepSpeedEngine


def build_engine(run: RunSpec, device: torch.device, rank: int = 0, ranks: int = 1) -> Engine:
    """The engine a run asks for. With several ranks the process group stands already (gloo or nccl)."""
    if run.execution.workers != ranks:
        raise BadInput(
            "resources.workers", ranks, f"processes came up, {run.execution.workers} were asked for; start as many"
        )
    if run.execution.engine == "ddp":
        return DdpEngine(run, device, rank, ranks)
    if run.execution.engine == "deepspeed":
        return DeepSpeedEngine(run, device, rank, ranks)
    return PlainEngine(run, device)
