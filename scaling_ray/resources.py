"""What a sweep may use and spend, and what nodes cost: never part of a run's identity."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from scaling_ray.errors import BadInput
from scaling_ray.execution import Device
from scaling_ray.rules import Frozen, PositiveInt


class ResourceSpec(Frozen):
    """What a run may use. Never part of a run's identity.

    ``offload_optimizer`` keeps what ZeRO shares out of the optimizer in the memory of the machine, not of its GPUs.
    ``task_memory_gib`` bounds one task of a conversion; training cells of more than ``resident_gib`` are streamed.
    ``gflops_per_cpu`` is what one CPU reaches in large matrix products of fp32, for planned hours (by device if None).
    ``device`` is what runs train on ("auto": what this machine has); ``stack`` how many tiny models of one size train
    as one at most; ``compile`` puts torch.compile before a GPU's runs; ``disk_gib`` is what a sweep may take.
    ``workers`` are processes of a run by size: a number, or the fewest and the most of a group that trains on what
    there is.
    """

    cpus: PositiveInt = 2
    workers: dict[str, int | list[int]] = {}
    engine: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Annotated[int, Field(ge=0, le=3, strict=True)] = 1
    offload_optimizer: bool = False
    max_failures: Annotated[int, Field(ge=0, strict=True)] = 2
    gflops_per_cpu: Annotated[float, Field(gt=0)] | None = None
    task_memory_gib: Annotated[float, Field(ge=0.75)] = 1.5
    resident_gib: Annotated[float, Field(gt=0)] = 0.5
    device: Device | Literal["auto"] = "auto"
    stack: PositiveInt | Literal["auto"] = "auto"
    compile: bool = False
    disk_gib: Annotated[float, Field(gt=0)] | None = None

    def workers_of(self, size: str) -> tuple[int, int]:
        """(fewest, most) processes of a run of a size; equal where the spec gives one number, (1, 1) where none."""
        given = self.workers.get(size, 1)
        return (given[0], given[1]) if isinstance(given, list) else (given, given)

    @model_validator(mode="after")
    def _offload_has_an_engine(self) -> ResourceSpec:
        if self.offload_optimizer and (self.engine != "deepspeed" or self.zero_stage < 1):
            raise BadInput(
                "S019",
                "resources.offload_optimizer",
                True,
                f"goes with engine = 'deepspeed' and zero_stage >= 1, not {self.engine!r} and {self.zero_stage}; "
                "set them, or remove it",
            )
        return self


class BudgetSpec(Frozen):
    """What a sweep may spend in all; without a limit it trains the whole grid. Never part of a run's identity.

    A GPU-hour is a whole GPU held for an hour, a CPU-hour one CPU; shares of them count as such. ``max_cost`` is in
    the currency of ``[prices]``, which a plan then asks for; ``max_wall_hours`` counts from the sweep's first start.
    """

    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    max_cpu_hours: Annotated[float, Field(gt=0)] | None = None
    max_cost: Annotated[float, Field(gt=0)] | None = None
    max_wall_hours: Annotated[float, Field(gt=0)] | None = None

    @property
    def is_limited(self) -> bool:
        """Whether anything is bounded."""
        return any(getattr(self, name) is not None for name in BudgetSpec.model_fields)


class NodePrice(Frozen):
    """A kind of node that can be rented, and its price an hour: on demand, and spot where it has such a price.

    ``gpu`` names the kind of its GPUs; ``max_nodes`` is how many there can be, as many as wanted where it is left out.
    """

    cpus: PositiveInt
    memory_gib: Annotated[float, Field(gt=0)]
    gpus: Annotated[int, Field(ge=0, strict=True)] = 0
    gpu: str | None = None
    per_hour: Annotated[float, Field(gt=0)]
    spot_per_hour: Annotated[float, Field(gt=0)] | None = None
    max_nodes: PositiveInt | None = None

    @property
    def resources(self) -> dict[str, float]:
        """What a node of the kind offers, in Ray's names."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    @property
    def lowest_per_hour(self) -> float:
        """The spot price where there is one, else that on demand."""
        return self.per_hour if self.spot_per_hour is None else self.spot_per_hour


class PricesSpec(Frozen):
    """Prices of kinds of nodes, of the day ``as_of``. Never part of a run's identity."""

    as_of: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    nodes: Annotated[dict[str, NodePrice], Field(min_length=1)]

    @field_validator("as_of")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        try:
            date.fromisoformat(value)
        except ValueError as error:
            raise ValueError("is no day; write it as YYYY-MM-DD") from error
        return value

    @model_validator(mode="after")
    def _gpus_agree(self) -> PricesSpec:
        for name, node in self.nodes.items():
            if node.gpu is not None and not node.gpus:
                raise BadInput(
                    "S020", f"prices.nodes.{name}.gpu", node.gpu, "names a GPU of a node without; give gpus = 1"
                )
        return self
