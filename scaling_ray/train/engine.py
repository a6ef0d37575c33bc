"""Engines make the updates: in one process, with DDP, or with DeepSpeed ZeRO. The loop knows only this interface.

The loss that reaches ``accumulate`` is a sum over this rank's cells, already divided by the number of masked genes of
the whole global batch, so gradients have to be *summed* over ranks; DDP and DeepSpeed average them, hence a factor.

Calls marked "every rank" are collective: all ranks make them, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from scaling_ray.errors import BadInput
from scaling_ray.execution import Execution
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.rules import TrainingRules
from scaling_ray.runs import RunSpec
from scaling_ray.train.sharded import MOMENTS, Shard


def device_of(execution: Execution) -> torch.device:
    """Where a process of its own computes: on a GPU where its execution says so and one is there, else on the CPU."""
    return torch.device("cuda" if execution.device == "cuda" and torch.cuda.is_available() else "cpu")


class Engine(Protocol):
    """Forward, accumulate, update, and sums over ranks; ``state`` is what exact resuming needs."""

    rank: int
    ranks: int
    device: torch.device
    model: MaskedGeneTransformer

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """Outputs (B, K, O) of a micro-batch; ``last`` marks the update's final one. Every rank, equally often."""

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the loss. Every rank."""

    def update(self, lr: float) -> Tensor:
        """Clip, step with ``lr``, clear gradients; returns the gradient norm before clipping, (). Every rank."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, the same bits on each. Every rank."""

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Give rank 0's value and tensors to all ranks; the arguments of other ranks are ignored. Every rank."""

    def weights(self) -> dict[str, Tensor]:
        """Full weights by name on rank 0; other ranks may return anything. Every rank."""

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The inverse of ``weights``, for evaluation. Every rank, with the same full weights."""

    def state(self) -> dict[str, Tensor]:
        """Full weights and optimizer state on rank 0, under the same names for every engine. Every rank."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``, whichever engine wrote it. Every rank, with the same full tensors."""

    def shard(self) -> Shard | None:
        """This rank's part of a state that the ranks share out; None where every rank holds all of it. Every rank."""

    def load_shard(self, shard: Shard) -> None:
        """The inverse of ``shard``, for pieces of the same layout. Every rank."""

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that this rank holds, whole storages, each counted once.

        "parameters", "master" (a copy of its share of them that the optimizer steps on, where there is one) and
        "optimizer" (its moments) as they are now; "gradients" are the most there were after a micro-batch of the first
        update. Communication buffers of gradients are not counted.
        """


def build_optimizer(model: nn.Module, train: TrainingRules) -> torch.optim.AdamW:
    """AdamW over all parameters, as in arXiv 2602.15253 (weight decay 0.01 on every one)."""
    return torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, train.adam_beta2), weight_decay=train.weight_decay, fused=True
    )


def build_model(run: RunSpec, device: torch.device) -> MaskedGeneTransformer:
    """The run's network with weights drawn from its seed."""
    model = MaskedGeneTransformer(run.shape, run.genes, run.train.dropout, run.outputs_per_gene)
    model.initialise(run.seed)
    return model.to(device)


class PlainEngine:
    """One process, one device."""

    def __init__(self, run: RunSpec, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.model = build_model(run, device)
        self.optimizer = build_optimizer(self.model, run.train)
        self._grad_clip = run.train.grad_clip
        self._names = [name for name, _ in self.model.named_parameters()]
        self._gradient_bytes = 0
        self._trained: Callable[..., Any] = (
            torch.compile(self.model, dynamic=False) if run.execution.compile else self.model
        )

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """See Engine."""
        outputs: Tensor = self._trained(values_BG, hidden_BG, positions_BK)
        return outputs

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        loss.backward()
        if not self._gradient_bytes:  # the same after every micro-batch
            self._gradient_bytes = storage_bytes(p.grad for p in self.model.parameters())

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See Engine."""
        return values

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See Engine."""
        return value, tensors

    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        return dict(self.model.state_dict())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See Engine."""
        load_weights(self.model, weights)

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        tensors = {f"model.{name}": tensor for name, tensor in self.weights().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            for key, tensor in moments.items():
                tensors[f"optimizer.{key}.{self._names[index]}"] = tensor
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See Engine."""
        self.load_weights(model_tensors(tensors))
        restored = self.optimizer.state_dict()
        restored["state"] = {
            index: {
                key: tensors[f"optimizer.{key}.{name}"]
                for key in ("step", *MOMENTS)
                if f"optimizer.{key}.{name}" in tensors
            }
            for index, name in enumerate(self._names)
        }
        self.optimizer.load_state_dict(restored)

    def shard(self) -> Shard | None:
        """See Engine."""
        return None

    def load_shard(self, shard: Shard) -> None:
        """See Engine."""
        raise TypeError(f"{type(self).__name__} holds all of its state; load_state takes it")

    def resident_bytes(self) -> dict[str, int]:
        """See Engine."""
        return {
            "parameters": storage_bytes(self.model.parameters()),
            "master": 0,
            "gradients": self._gradient_bytes,
            "optimizer": storage_bytes(self.optimizer.state.values()),
        }


class DdpEngine(PlainEngine):
    """torch DistributedDataParallel: every rank holds all, gradients are reduced with the last micro-batch only."""

    def __init__(self, run: RunSpec, device: torch.device, rank: int, ranks: int) -> None:
        super().__init__(run, device, rank, ranks)
        devices = [device] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(self.model, device_ids=devices)

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """See Engine."""
        with self._reducing(last):
            outputs: Tensor = self._ddp(values_BG, hidden_BG, positions_BK)
        return outputs

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        with self._reducing(last):
            super().accumulate(loss * self.ranks, last)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See Engine."""
        return sum_over_ranks(values, self.device)

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See Engine."""
        return share_from_rank_zero(value, tensors, self.rank, self.device)


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights among the tensors of a checkpoint, under the model's own names."""
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def load_weights(model: MaskedGeneTransformer, weights: dict[str, Tensor]) -> None:
    """Load weights by name; raises BadInput naming the first parameter that does not fit."""
    check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, weights)
    model.load_state_dict(weights)


def check_fit(shapes: dict[str, torch.Size], weights: dict[str, Tensor]) -> None:
    """Raise BadInput naming the first parameter whose shape is not the model's."""
    for name in sorted(set(shapes) | set(weights)):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            found = list(weights[name].shape) if name in weights else "absent"
            raise BadInput(
                "M038", f"checkpoint.{name}", found, "does not fit this model; use the checkpoint of the same spec"
            )


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum over ranks on ``device`` (nccl takes no CPU tensors); the sum is on the device of ``values``."""
    summed = values.detach().to(device, copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def share_from_rank_zero(
    value: Any, tensors: dict[str, Tensor], rank: int, device: torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """Rank 0's value and CPU copies of its tensors, on all ranks; tensors are sent one at a time."""
    names = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    box = [(value, names) if rank == 0 else None]
    distributed.broadcast_object_list(box, src=0, device=device)
    assert box[0] is not None
    value, names = box[0]
    received = {}
    for name, shape, dtype in names:
        if rank == 0:
            tensor = tensors[name].detach().to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        distributed.broadcast(tensor, src=0)
        received[name] = tensor.cpu()
    return value, received


def storage_bytes(tensors: Any) -> int:
    """Bytes of the storages under tensors in lists and dicts of any depth, each storage once; None has no bytes."""
    storages: dict[int, int] = {}
    waiting = [tensors]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif one is not None and not isinstance(one, str | int | float):
            waiting += one
    return sum(storages.values())
