"""The choice of a run's engine."""

from __future__ import annotations

import torch

from scaling_ray.errors import BadInput
from scaling_ray.runs import RunSpec
from scaling_ray.train.engine import DdpEngine, Engine, PlainEngine
from scaling_ray.train.zero import DeepSpeedEngine


def build_engine(run: RunSpec, device: torch.device, rank: int = 0, ranks: int = 1) -> Engine:
    """Build the engine that a run asks for. With several ranks the process group (gloo or nccl) must exist already."""
    if run.execution.workers != ranks:
        raise BadInput(
            "M035",
            "resources.workers",
            ranks,
            f"processes came up, {run.execution.workers} were asked for; start as many",
        )
    if run.execution.engine == "ddp":
        return DdpEngine(run, device, rank, ranks)
    if run.execution.engine == "deepspeed":
        return DeepSpeedEngine(run, device, rank, ranks)
    return PlainEngine(run, device)
