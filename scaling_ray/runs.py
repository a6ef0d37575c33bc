"""The grid of a sweep as runs: what each run is, said once, and beside it how it is carried out.

``RunSpec`` is a run's identity plus a nested ``Execution``. Whoever asks whether two runs are the same, what a stack
shares, what plan.json repeats or what a checkpoint refuses reads it from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

from pydantic import SerializeAsAny

from scaling_ray.execution import Device, Execution, choose_micro_batch, choose_precision
from scaling_ray.recipe import OBJECTIVES
from scaling_ray.rules import Frozen, TrainingRules
from scaling_ray.sizes import Shape, parameters, parameters_without_embedding
from scaling_ray.spec import SweepSpec, canonical_json, content_hash, text_hash

NUMERICS_VERSION = 3
"""Raised by any change that moves a digit of a run; part of every run's identity."""

MEMBERS_OWN = frozenset({"run_id", "cells", "donors", "seed", "lr", "lr_candidates", "lr_factor"})
"""Fields of the identity in which the runs of one stack may differ."""


class RunSpec(Frozen):
    """One run of a setting of the grid, whole: everything a training process needs besides the shards.

    Every field but ``execution`` is part of what the run is. ``role`` is "law" for a point of the grid and "rate" for a
    learning-rate trial. ``lr`` is None until the choice among ``lr_candidates`` (run ids) has been made, which is
    taken times ``lr_factor``.
    """

    run_id: str
    role: Literal["law", "rate"]
    size: str
    width: int
    layers: int
    heads: int
    feedforward: int
    genes: int
    cells: int | None
    donors: int | None
    seed: int
    lr: float | None
    lr_candidates: list[str]
    lr_factor: float = 1.0
    train: TrainingRules
    execution: SerializeAsAny[Execution]

    @property
    def shape(self) -> Shape:
        """The model's shape."""
        return Shape(self.width, self.layers, self.heads, self.feedforward)

    @property
    def outputs_per_gene(self) -> int:
        """Values that the head gives for a gene."""
        return OBJECTIVES[self.train.objective].outputs_per_gene

    @property
    def params(self) -> int:
        """All parameters, the gene embedding included."""
        return parameters(self.shape, self.genes, self.outputs_per_gene)

    @property
    def params_without_embedding(self) -> int:
        """Parameters that do not grow with the panel."""
        return parameters_without_embedding(self.shape, self.outputs_per_gene)

    @property
    def masked_genes_per_cell(self) -> float:
        """Masked genes of a cell in which every gene of the panel was measured (the mean of it for ``published``)."""
        masked = self.genes * self.train.mask_fraction
        return float(int(masked + 0.5)) if self.train.recipe == "corrected" else masked

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is, as JSON, with the numerics version: all that two attempts at it must agree in."""
        found = {"numerics": NUMERICS_VERSION} | self.model_dump(mode="json", exclude={"execution"})
        if self.train.wsd is None:
            del found["train"]["trunk"]
        if not self.train.held_out_in_training:
            del found["train"]["held_out_in_training"]
        if self.lr_factor == 1.0:
            del found["lr_factor"]
        return found

    @property
    def worker_counts(self) -> list[int]:
        """How many workers may train the run, the most first: every worker has the same share of an update's cells."""
        most, least = self.execution.workers, self.execution.least_workers or self.execution.workers
        return [count for count in range(most, least - 1, -1) if self.train.cells_per_step % count == 0]

    def carried_out(self, **changes: Any) -> RunSpec:
        """The same run with some fields of its execution changed."""
        return self.model_copy(update={"execution": self.execution.model_copy(update=changes)})


def differing(there: dict[str, Any], here: dict[str, Any], above: str = "") -> list[str]:
    """Dotted names of the fields in which two identities differ, sorted."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differing(one, other, f"{above}{name}.")
        elif one != other:
            found.append(above + name)
    return found


def trunk_name(run: RunSpec) -> str:
    """Hash of all that a trunk depends on: runs that differ in their budget, or in how they decay, share one."""
    identity = run.identity
    for name in ("run_id", "role", "size", "lr_candidates", "lr_factor"):
        identity.pop(name, None)
    for name in ("max_cells_seen", "final_lr_fraction"):
        del identity["train"][name]
    for name in ("decay_share", "branches"):
        del identity["train"]["trunk"][name]
    return content_hash(identity)[:16]


def stack_mates(run: RunSpec) -> str:
    """Hash of what runs must have in common to train as one."""
    shared = run.model_dump(mode="json", exclude=set(MEMBERS_OWN))
    shared["execution"].pop("stack")
    return content_hash(shared)


def runs_of(spec: SweepSpec, device: Device | None = None) -> list[RunSpec]:
    """Every run of the sweep, learning-rate trials first, in a fixed order.

    Args:
        spec: the sweep's.
        device: that they train on, which decides micro-batches and precision. None takes the spec's, or a CPU where
            that is "auto". Identities are the same for every device.
    """
    if device is None:
        device = "cpu" if spec.resources.device == "auto" else spec.resources.device
    rate_runs: dict[tuple[str, int], list[RunSpec]] = {}
    lr, grid = spec.lr, spec.grid
    if lr.compares:
        for size, genes in product(filter(lr.tunes, grid.sizes), grid.genes):
            pattern = _Pattern(spec, device, "rate", size, genes)
            rate_runs[size, genes] = [
                pattern.run(lr.choose_cells, "all", lr.choose_seed, rate)
                for rate in lr.of(size, spec.shape(size).width)
            ]
    law_runs = []
    for size, genes in product(grid.sizes, grid.genes):
        rates: list[float | None] = [None]
        if lr.compares:
            tuned = lr.tune_size or size
            factor = lr.transferred(spec.shape(size).width, spec.shape(tuned).width)
            candidates = [run.run_id for run in rate_runs[tuned, genes]]
            pattern = _Pattern(spec, device, "law", size, genes, candidates, factor)
        else:
            rates = list(lr.of(size, spec.shape(size).width))
            pattern = _Pattern(spec, device, "law", size, genes)
        law_runs += [
            pattern.run(cells, donors, seed, rate)
            for cells, donors, seed, rate in product(grid.cells, grid.donors, grid.seeds, rates)
        ]
    return [run for runs in rate_runs.values() for run in runs] + law_runs


def execution_of(spec: SweepSpec, size: str, genes: int, device: Device) -> Execution:
    """The execution of runs of a size on a device: what the spec names, and else what was measured to be best."""
    shape, train, resources = spec.shape(size), spec.train, spec.resources
    least, workers = resources.workers_of(size)
    named = train.micro_batch
    return Execution(
        device=device,
        precision=choose_precision(shape, device) if train.precision == "auto" else train.precision,
        micro_batch=(
            named
            if isinstance(named, int)
            else choose_micro_batch(shape, genes, train.cells_per_step, train.dropout, device)
        ),
        cpus=train.threads,
        gpus=1.0 if device == "cuda" else 0.0,
        workers=workers,
        least_workers=least if least < workers else 0,
        engine=resources.engine if workers > 1 else "plain",
        zero_stage=resources.zero_stage if workers > 1 and resources.engine == "deepspeed" else 0,
        offload_optimizer=resources.offload_optimizer and workers > 1,
        compile=resources.compile,
        checkpoint_seconds=train.checkpoint_seconds,
    )


class _Pattern:
    """Runs of one role, size and panel: what they share is made, checked and written out once, a grid has thousands."""

    def __init__(
        self,
        spec: SweepSpec,
        device: Device,
        role: Literal["law", "rate"],
        size: str,
        genes: int,
        candidates: Sequence[str] = (),
        factor: float = 1.0,
    ) -> None:
        shape = spec.shape(size)
        self._unnamed = RunSpec(
            run_id="",
            role=role,
            size=size,
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            feedforward=shape.feedforward,
            genes=genes,
            cells=None,
            donors=None,
            seed=0,
            lr=None,
            lr_candidates=list(candidates),
            lr_factor=factor,
            train=spec.train.rules(size, spec.lr.choose_fraction if role == "rate" else 1.0, branches=role == "law"),
            execution=execution_of(spec, size, genes, device),
        )
        # The name of a size is its user's; the shape behind it is what the run is.
        identity = {name: value for name, value in self._unnamed.identity.items() if name not in ("run_id", "size")}
        shared = identity | {"data": spec.data.rules}
        self._written = {name: canonical_json(value) for name, value in sorted(shared.items())}

    def run(self, cells: int | Literal["all"], donors: int | Literal["all"], seed: int, lr: float | None) -> RunSpec:
        """One run; its id ends in the hash of its identity and the data's rules."""
        own: dict[str, Any] = {
            "cells": None if cells == "all" else cells,
            "donors": None if donors == "all" else donors,
            "seed": seed,
            "lr": lr,
        }
        written = self._written | {name: canonical_json(value) for name, value in own.items()}
        digest = text_hash("{" + ",".join(f'"{name}":{value}' for name, value in written.items()) + "}")[:8]
        like = self._unnamed
        rate = f"lr{lr:g}" if lr is not None else "lrbest"
        from_few = f"-n{donors}" if donors != "all" else ""
        run_id = f"{like.role}-{like.size}-v{like.genes}-d{cells}{from_few}-s{seed}-{rate}-{digest}"
        return like.model_copy(update=own | {"run_id": run_id})
