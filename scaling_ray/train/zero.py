"""The engine of DeepSpeed ZeRO: ranks share out the optimizer state, gradients and parameters of one model."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import Any

import torch
from torch import Tensor, distributed, nn

from scaling_ray.runs import RunSpec
from scaling_ray.train.engine import (
    build_model,
    build_optimizer,
    check_fit,
    model_tensors,
    share_from_rank_zero,
    storage_bytes,
    sum_over_ranks,
)
from scaling_ray.train.sharded import MOMENTS, STEP, Layout, Shard

WHOLE_PARAMETER_ELEMENTS = 100_000
"""ZeRO 3 keeps parameters of fewer elements than this whole on every rank (DeepSpeed's own default)."""


class DeepSpeedEngine:
    """DeepSpeed ZeRO: ranks share out the optimizer state (stage 1), gradients too (2), parameters too (3).

    Weights are fp32 at every stage, under bf16 autocast where the spec says so; stage 0 shares out nothing.
    Checkpoints are not DeepSpeed's own: ``shard`` names a rank's pieces of each parameter, ``weights`` and ``state``
    gather every tensor, one at a time, under the names the other engines use. So the chosen weights load into a plain
    process, and a run resumes at any stage and number of ranks.
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
        self._stage = run.execution.zero_stage
        self._gradient_bytes, self._counting = 0, True
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
        outputs: Tensor = self._engine(values_BG, hidden_BG, positions_BK)
        return outputs

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)
        if self._counting:
            self._gradient_bytes = max(self._gradient_bytes, storage_bytes(self._gradients()))
        if not last:
            self._engine.step()  # counts the micro-batch, changes nothing

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        self._counting = False
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
        return sum_over_ranks(values, self.device)

    def share(self, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See Engine."""
        return share_from_rank_zero(value, tensors, self.rank, self.device)

    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        return self._on_rank_zero({name: (parameter, None) for name, parameter in self.model.named_parameters()})

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """See Engine."""
        check_fit(self._shapes, weights)
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
                steps[f"{STEP}.{name}"] = next(iter(self._optimizer.state.values()))["step"].clone()
        return self._on_rank_zero(wanted) | steps

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See Engine."""
        self.load_weights(model_tensors(tensors))
        names = dict(self.model.named_parameters())
        step = tensors.get(f"{STEP}.{next(iter(names))}")
        if step is not None:
            self._prepare_moments(step)
        for name, parameter in names.items():
            self._set_master(parameter, tensors[f"model.{name}"], None)
            if step is not None:
                for key in MOMENTS:
                    self._set_master(parameter, tensors[f"optimizer.{key}.{name}"], key)

    def shard(self) -> Shard | None:
        """See Engine."""
        if self._stage == 0:
            return None
        fragments, tensors = {}, {}
        begun = bool(self._optimizer.state)
        for name, parameter in self.model.named_parameters():
            start, elements = self._fragment(parameter)
            if not elements:
                continue
            fragments[name] = start, elements
            tensors[f"model.{name}"] = self._held(parameter, None)
            if begun:
                tensors |= {f"optimizer.{key}.{name}": self._held(parameter, key) for key in MOMENTS}
        if begun:
            tensors[STEP] = next(iter(self._optimizer.state.values()))["step"]
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        layout = Layout(self._stage, self.rank, self.ranks, shapes, fragments)
        return Shard(layout, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def load_shard(self, shard: Shard) -> None:
        """See Engine."""
        if STEP in shard.tensors:
            self._prepare_moments(shard.tensors[STEP])
        for name, parameter in self.model.named_parameters():
            if name in shard.layout.fragments:
                self._set_held(parameter, shard.tensors[f"model.{name}"], None)
                if STEP in shard.tensors:
                    for key in MOMENTS:
                        self._set_held(parameter, shard.tensors[f"optimizer.{key}.{name}"], key)
        if self._stage < 3:
            self._engine.optimizer.update_lp_params()
            return
        whole: list[Any] = [p for p in self.model.parameters() if p.numel()]
        for parameter in whole:
            parameter.data.copy_(self._deepspeed.utils.safe_get_full_fp32_param(parameter))

    def resident_bytes(self) -> dict[str, int]:
        """See Engine."""
        parameters = list(self.model.parameters())
        held = [parameters, [getattr(parameter, "ds_tensor", None) for parameter in parameters]]
        owners = self._optimizer_owners()
        return {
            "parameters": storage_bytes(held),
            "master": storage_bytes([held, owners]) - storage_bytes(held),
            "gradients": self._gradient_bytes,
            "optimizer": storage_bytes(self._optimizer.state.values()),
        }

    def _gradients(self) -> list[Any]:
        """Wherever DeepSpeed keeps the gradients of this update so far."""
        zero = self._engine.optimizer
        kept = ("averaged_gradients", "all_grad_tensors", "accumulated_grads_in_cpu", "grad_partitions_flat_buffer")
        return [
            [[parameter.grad, getattr(parameter, "grad_accum", None)] for parameter in self.model.parameters()],
            [owner.grad for owner in self._optimizer_owners()],
            [getattr(zero, name, None) for name in kept],
        ]

    def _optimizer_owners(self) -> list[Tensor]:
        """The tensors AdamW steps on: this rank's flat shares, or at stage 0 the parameters."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [owner for group in self._optimizer.param_groups for owner in group["params"]]

    def _prepare_moments(self, step: Tensor) -> None:
        """Give AdamW moments to fill, as after ``step`` updates."""
        for owner in self._optimizer_owners():
            if owner in self._optimizer.state:
                # DeepSpeed has named its parts already: they are filled in place, never replaced
                self._optimizer.state[owner]["step"].copy_(step)
                continue
            self._optimizer.state[owner] = {"step": step.clone().to(owner.device)} | {
                key: torch.zeros_like(owner, requires_grad=False) for key in MOMENTS
            }
        if self._stage in (1, 2):
            # what DeepSpeed does itself before its first step: name each parameter's part of the flat state
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

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

    def _fragment(self, parameter: Any) -> tuple[int, int]:
        """Start and number of the elements of the flattened parameter that this rank holds (stages 1 to 3)."""
        if self._stage == 3:
            # equal shares, the last one padded
            share = parameter.ds_tensor.numel()
            start = self.rank * share
            return start, max(0, min(share, parameter.ds_numel - start))
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0
        return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel

    def _held(self, parameter: Any, key: str | None) -> Tensor:
        """(elements,): this rank's fragment of the fp32 weight (key None) or of a moment (stages 1 to 3)."""
        if self._stage < 3:
            fragment: Tensor = parameter._hp_mapping.get_hp_fragment(key)
            return fragment.flatten()
        if key is None:
            share = self._deepspeed.utils.safe_get_local_fp32_param(parameter)
        else:
            share = self._deepspeed.utils.safe_get_local_optimizer_state(parameter, key)
        return share.flatten()[: self._fragment(parameter)[1]]

    def _set_held(self, parameter: Any, own: Tensor, key: str | None) -> None:
        """The inverse of ``_held``, into what AdamW steps on and, at stage 3, what is gathered to run."""
        if self._stage < 3:
            fragment = parameter._hp_mapping.get_hp_fragment(key)
            with torch.no_grad():
                fragment.copy_(own.to(fragment.device).view_as(fragment))
            return
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=own.dtype, device=self.device)
        padded[: own.numel()] = own
        if key is not None:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, padded, key)
            return
        self._deepspeed.utils.safe_set_local_fp32_param(parameter, padded)
        parameter.ds_tensor.data.copy_(padded)

    def _set_master(self, parameter: Any, full: Tensor, key: str | None) -> None:
        """Write the fp32 weight (key None) or a moment of one parameter into what AdamW steps on."""
        if self._stage == 0:
            if key is not None:
                self._optimizer.state[parameter][key].copy_(full)
            return
        start, elements = self._fragment(parameter)
        if elements:
            self._set_held(parameter, full.flatten()[start : start + elements], key)


def zero_config(run: RunSpec, ranks: int, whole_parameter_elements: int = WHOLE_PARAMETER_ELEMENTS) -> dict[str, Any]:
    """DeepSpeed's configuration for a run: all of it follows from the spec."""
    share = run.train.cells_per_step // ranks
    micro_batch = min(run.execution.micro_batch, share)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": math.ceil(share / micro_batch),
        "gradient_clipping": run.train.grad_clip,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": run.execution.zero_stage,
            "stage3_param_persistence_threshold": whole_parameter_elements,
        }
        | ({"offload_optimizer": {"device": "cpu"}} if run.execution.offload_optimizer else {}),
        # the optimizer stays torch's AdamW where its state is offloaded: the same numbers, and no compiler
        "zero_force_ds_cpu_optimizer": False,
        # weights, gradients and what travels stay fp32, as in the other engines
        "torch_autocast": {
            "enabled": run.execution.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def _start_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, joined to the existing process group."""
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
