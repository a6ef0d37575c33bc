"""What a sweep will do and cost, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from scaling_ray.errors import BadInput
from scaling_ray.execution import device_here
from scaling_ray.public.specs import load_spec
from scaling_ray.spec import SweepSpec
from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.cost import read_rates
from scaling_ray.sweep.plan import make_plan
from scaling_ray.sweep.plan_text import format_plan

_SETTINGS = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "role", "size")),
        *((name, pa.int64()) for name in ("params", "genes")),
        ("cells", pa.string()),  # a number, or "all"
        ("seed", pa.int64()),
        ("lr", pa.float64()),
        ("max_cells_seen", pa.int64()),
        ("flops", pa.float64()),
        *((name, pa.int64()) for name in ("bytes", "disk_bytes", "workers")),
        *((name, pa.float64()) for name in ("hours", "hours_low", "hours_high", "gpu_hours", "cpu_hours", "cost")),
        *((name, pa.string()) for name in ("hours_from", "node")),
    ]
)


@dataclass(frozen=True)
class PlanTotals:
    """What the whole sweep takes.

    ``flops`` are those of matrix products. ``hours`` is the time from first start to last end, within ``hours_low`` to
    ``hours_high``; GPU-hours and CPU-hours count each device that is held. ``cost`` is in ``currency``, and None
    where the spec has no prices. ``disk_bytes`` are those of checkpoints and weights.
    """

    runs: int
    flops: float
    hours: float
    hours_low: float
    hours_high: float
    cpu_hours: float
    gpu_hours: float
    disk_bytes: int
    object_store_bytes: int
    cost: float | None
    cost_low: float | None
    cost_high: float | None
    currency: str | None


@dataclass(frozen=True, repr=False)
class Plan:
    """A sweep before it runs: R settings with what each costs, and the sum.

    ``settings`` is an Arrow table of R rows: ``cells`` training cells ("all": as many as the shards have), ``lr`` the
    peak learning rate (null where others choose it), ``flops`` of matrix products, ``bytes`` of memory that a run
    needs on its device, ``disk_bytes``, ``hours`` of one run with a low and a high end, ``hours_from`` "model" or
    "measured". ``document`` is all that ``scaling-ray plan --json`` prints.
    """

    name: str
    device: Literal["cpu", "cuda"]
    settings: pa.Table = field(repr=False)
    totals: PlanTotals
    document: Mapping[str, Any] = field(repr=False)

    def __len__(self) -> int:
        return int(self.settings.num_rows)

    def __repr__(self) -> str:
        return format_plan(self.document)


def plan(
    spec: str | Path | Mapping[str, Any] | SweepSpec,
    *,
    rates: str | Path | Sequence[str | Path] = (),
    cluster: str | Path | None = None,
    max_gpu_hours: float | None = None,
    max_cpu_hours: float | None = None,
    max_cost: float | None = None,
    max_wall_hours: float | None = None,
) -> Plan:
    """What a sweep will do and cost: settings, parameters, FLOP, bytes, hours, money. Needs no cluster.

    Args:
        spec: a TOML file, the name of a shipped example, the tables of one as a dict, or what ``load_spec`` returned.
        rates: JSON files of measured rates that ``scaling-ray bench train --spec`` wrote, one for each kind of machine.
        cluster: the file that ``ray up`` starts the cluster from; without one, this machine or the spec's ``[prices]``.
        max_gpu_hours: budget in whole GPUs times hours; this and the next three say what they would leave undone.
        max_cpu_hours: budget in CPUs times hours.
        max_cost: budget in the currency of the spec's ``[prices]``.
        max_wall_hours: budget in hours from the first start.

    Raises:
        BadInput: no such spec, a run that the cluster can never hold, too little disk, or a budget in money without
            prices.

    Example:
        >>> plan = scaling_ray.plan("demo")
        >>> len(plan), plan.totals.hours < 1
        (20, True)
    """
    asked = {
        "max_gpu_hours": max_gpu_hours,
        "max_cpu_hours": max_cpu_hours,
        "max_cost": max_cost,
        "max_wall_hours": max_wall_hours,
    }
    files = [rates] if isinstance(rates, str | Path) else rates
    document = plan_document(load_spec(spec), [Path(each) for each in files], cluster, asked)
    totals = document["totals"]
    rows = [
        {name: setting[name] for name in _SETTINGS.names} | {"cells": str(setting["cells"])}
        for setting in document["settings"]
    ]
    return Plan(
        name=document["name"],
        device=document["device"],
        settings=pa.Table.from_pylist(rows, schema=_SETTINGS),
        totals=PlanTotals(**{name: totals[name] for name in PlanTotals.__dataclass_fields__}),
        document=document,
    )


def plan_document(
    spec: SweepSpec, rates: Sequence[Path], cluster: str | Path | None, limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """The content of ``plan.json``, under further limits of its budget (fields of ``BudgetSpec``; None: no limit).

    Raises:
        BadInput: as :func:`plan`.
    """
    given = {name: value for name, value in limits.items() if value is not None}
    for name, value in given.items():
        if not value > 0:
            raise BadInput("V008", name, value, "must be more than 0")
    spec = spec.model_copy(update={"budget": spec.budget.model_copy(update=given)})
    known = {} if spec.prices is None else {name: node.resources for name, node in spec.prices.nodes.items()}
    capacity = Capacity.of_file(Path(cluster), known) if cluster is not None else None
    device = device_here() if spec.resources.device == "auto" else None
    document, _ = make_plan(spec, device, rates=read_rates(list(rates)), capacity=capacity)
    return document
