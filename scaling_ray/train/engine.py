"""What an update is done with: one process, DDP, or DeepSpeed ZeRO. The loop knows only this interface.

The loss that reaches ``accumulate`` is a sum over this rank's cells, already divided by the number of masked genes of
the whole global batch, so gradients have to be *summed* over ranks; DDP and DeepSpeed average them, hence a factor.

Calls marked "every rank" are collective: all ranks make them, in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from scaling_ray.errors import BadInput
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.spec import RunSpec, TrainSpec

MOMENTS = ("exp_avg", "exp_avg_sq")

WHOLE_PARAMETER_ELEMENTS = 100_000
"""ZeRO 3 keeps parameters of fewer elements than this whole on every rank (DeepSpeed's own default)."""


class Engine(Protocol):
    """Forward, accumulate, update, and sums over ranks; ``state`` is what exact resuming needs."""

    rank: int
    ranks: int
    device: torch.device
    model: MaskedGeneTransformer

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """Predictions (B, K) of a micro-batch; ``last`` marks the update's final one. Every rank, equally often."""

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the loss. Every rank."""

    def update(self, lr: float) -> Tensor:
        """Clip, step with ``lr``, clear gradients; the gradient norm before clipping, (). Every rank."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, the same bits on each. Every rank."""

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """What rank 0 gave, on all ranks; what the others give is ignored. Every rank."""

    def weights(self) -> dict[str, Tensor]:
        """Full weights by name on rank 0; nothing is promised of the other ranks' answer. Every rank."""

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The inverse of ``weights``, for evaluation. Every rank, with the same full weights."""

    def state(self) -> dict[str, Tensor]:
        """Full weights and optimizer state on rank 0, under the same names for every engine. Every rank."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``, whichever engine wrote it. Every rank, with the same full tensors."""

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of parameters and of optimizer state that this rank holds between updates."""


def build_engine(run: RunSpec, device: torch.device, rank: int = 0, ranks: int = 1) -> Engine:
    """The engine a run asks for. With several ranks the process group stands already (gloo or nccl)."""
    if run.workers != ranks:
        raise BadInput("resources.workers", ranks, f"processes came up, {run.workers} were asked for; start as many")
    if run.engine == "ddp":
        return DdpEngine(run, device, rank, ranks)
    if run.engine == "deepspeed":
        return DeepSpeedEngine(run, device, rank, ranks)
    return PlainEngine(run, device)


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.AdamW:
    """AdamW over all parameters, as in arXiv 2602.15253 (weight decay 0.01 on every one)."""
    return torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, train.adam_beta2), weight_decay=train.weight_decay, fused=True
    )


def build_model(run: RunSpec, device: torch.device) -> MaskedGeneTransformer:
    """The run's network with weights drawn from its seed."""
    model = MaskedGeneTransformer(run.shape, run.genes, run.train.dropout)
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

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """See Engine."""
        predictions: Tensor = self.model(values_BG, hidden_BG, positions_BK)
        return predictions

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        loss.backward()

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

    def resident_bytes(self) -> dict[str, int]:
        """See Engine."""
        return {"parameters": _bytes(self.model.parameters()), "optimizer": _optimizer_bytes(self.optimizer)}


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
            predictions: Tensor = self._ddp(values_BG, hidden_BG, positions_BK)
        return predictions

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        with self._reducing(last):
            (loss * self.ranks).backward()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See Engine."""
        return _sum_over_ranks(values, self.device)

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See Engine."""
        return _share(value, tensors, self.rank, self.device)


class DeepSpeedEngine:
    """DeepSpeed ZeRO: ranks share out the optimizer state (stage 1), gradients too (2), parameters too (3).

    Weights are fp32 at every stage, under bf16 autocast where the spec says so; stage 0 shares out nothing.
    Checkpoints are not DeepSpeed's own: every tensor is gathered, one at a time, under the names the other engines
    use. So the chosen weights load into a plain process, and a run resumes at any stage and number of ranks.
    """

    def __init__(
        self,
        run: RunSpec,
        device: torch.device,
        rank: int,
        ranks: int,
        whole_parameter_elements: int = WHOLE_PARAMETER_ELEMENTS,
    ) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.model = build_model(run, device)
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self._stage = run.zero_stage
        self._deepspeed = _start_deepspeed(device)
        self._optimizer = build_optimizer(self.model, run.train)
        self._engine, *_ = self._deepspeed.initialize(
            model=self.model,
            optimizer=self._optimizer,
            config=zero_config(run, ranks, whole_parameter_elements),
            dist_init_required=False,
        )

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """See Engine."""
        predictions: Tensor = self._engine(values_BG, hidden_BG, positions_BK)
        return predictions

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch, changes nothing

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            # here DeepSpeed clips without saying what the norm was; the gradients are whole and reduced
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            whole = nn.utils.get_total_norm(gradients)
            self._engine.step()
            return whole
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed says -1 where a gradient is not finite
        return torch.tensor(norm if norm >= 0 else math.nan, device=self.device)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See Engine."""
        return _sum_over_ranks(values, self.device)

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See Engine."""
        return _share(value, tensors, self.rank, self.device)

    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        return self._on_rank_zero({name: (parameter, None) for name, parameter in self.model.named_parameters()})

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See Engine."""
        _check_fit(self._shapes, weights)
        for name, parameter in self.model.named_parameters():
            gathered: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if self._stage == 3:
                gathered = self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gathered, torch.no_grad():
                parameter.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        wanted: dict[str, tuple[nn.Parameter, str | None]] = {}
        steps = {}
        for name, parameter in self.model.named_parameters():
            wanted[f"model.{name}"] = parameter, None
            if self._optimizer.state:
                wanted |= {f"optimizer.{key}.{name}": (parameter, key) for key in MOMENTS}
                steps[f"optimizer.step.{name}"] = next(iter(self._optimizer.state.values()))["step"].clone()
        return self._on_rank_zero(wanted) | steps

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See Engine."""
        self.load_weights(model_tensors(tensors))
        names = dict(self.model.named_parameters())
        step = tensors.get(f"optimizer.step.{next(iter(names))}")
        if step is not None:
            for owner in self._optimizer_owners():
                if owner in self._optimizer.state:
                    # DeepSpeed has named its parts already: they are filled in place, never replaced
                    self._optimizer.state[owner]["step"].copy_(step)
                    continue
                self._optimizer.state[owner] = {"step": step.clone().to(self.device)} | {
                    key: torch.zeros_like(owner, requires_grad=False) for key in MOMENTS
                }
            if self._stage in (1, 2):
                # what DeepSpeed does itself before its first step: name each parameter's part of the flat state
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in names.items():
            self._set_master(parameter, tensors[f"model.{name}"], None)
            if step is not None:
                for key in MOMENTS:
                    self._set_master(parameter, tensors[f"optimizer.{key}.{name}"], key)

    def resident_bytes(self) -> dict[str, int]:
        """See Engine."""
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
        return {"parameters": _bytes(held), "optimizer": _optimizer_bytes(self._optimizer)}

    def _optimizer_owners(self) -> list[Tensor]:
        """The tensors AdamW steps on: this rank's flat shares, or at stage 0 the parameters."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [owner for group in self._optimizer.param_groups for owner in group["params"]]

    def _on_rank_zero(self, wanted: dict[str, tuple[nn.Parameter, str | None]]) -> dict[str, Tensor]:
        """Full fp32 weights (key None) or moments, gathered one by one and kept, on the CPU, by rank 0 alone."""
        kept = {}
        for name, (parameter, key) in wanted.items():
            if self._stage == 0:
                full = parameter.detach() if key is None else self._optimizer.state[parameter][key]
            elif key is None:
                full = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            else:
                full = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            if self.rank == 0:
                kept[name] = full.detach().to("cpu", copy=True)
        return kept

    def _set_master(self, parameter: Any, full: Tensor, key: str | None) -> None:
        """Write the fp32 weight (key None) or a moment of one parameter into what AdamW steps on."""
        full = full.to(self.device)
        if self._stage == 0:
            if key is not None:
                self._optimizer.state[parameter][key].copy_(full)
        elif self._stage == 3:
            # equal shares of the flattened parameter, the last one padded
            share = parameter.ds_tensor.numel()
            padded = torch.zeros(share * self.ranks, dtype=full.dtype, device=self.device)
            padded[: full.numel()] = full.flatten()
            own = padded[self.rank * share : (self.rank + 1) * share]
            if key is None:
                self._deepspeed.utils.safe_set_local_fp32_param(parameter, own)
            else:
                self._deepspeed.utils.safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, full)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, full, key)


def zero_config(run: RunSpec, ranks: int, whole_parameter_elements: int = WHOLE_PARAMETER_ELEMENTS) -> dict[str, Any]:
    """DeepSpeed's configuration for a run: all of it follows from the spec."""
    share = run.train.cells_per_step // ranks
    micro_batch = min(run.micro_batch, share)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": math.ceil(share / micro_batch),
        "gradient_clipping": run.train.grad_clip,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": run.zero_stage,
            "stage3_param_persistence_threshold": whole_parameter_elements,
        },
        # weights, gradients and what travels stay fp32, as in the other engines
        "torch_autocast": {
            "enabled": run.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def _start_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, joined to the process group that stands."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # A C++ all-reduce for inference, which nothing here calls: without it no compiler runs at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    return deepspeed


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights among the tensors of a checkpoint, under the model's own names."""
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def load_weights(model: MaskedGeneTransformer, weights: dict[str, Tensor]) -> None:
    """Load weights by name; BadInput naming the parameter that does not fit."""
    _check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, weights)
    model.load_state_dict(weights)


def _check_fit(shapes: dict[str, torch.Size], weights: dict[str, Tensor]) -> None:
    for name in sorted(set(shapes) | set(weights)):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            found = list(weights[name].shape) if name in weights else "absent"
            raise BadInput(f"checkpoint.{name}", found, "does not fit this model; use the checkpoint of the same spec")


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum on ``device``, where the process group can reach it (nccl knows no CPU tensors); the answer lies as given."""
    summed = values.detach().to(device, copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def _share(value: Any, tensors: dict[str, Tensor], rank: int, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """Rank 0's value and CPU copies of its tensors, on all ranks; tensors travel one by one."""
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


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(_bytes(t for t in moments.values() if isinstance(t, Tensor)) for moments in optimizer.state.values())
