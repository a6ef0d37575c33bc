"""Where a unit can run and what that costs: kinds of nodes with their prices, and the cheapest that holds a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_ray.errors import BadInput
from scaling_ray.execution import GPU_CONTEXT_BYTES, GPU_USED_SHARE, choose_gpu_share
from scaling_ray.resources import NodePrice, PricesSpec
from scaling_ray.runs import RunSpec
from scaling_ray.sizes import TrainingMemory, training_memory
from scaling_ray.sweep.capacity import UNBOUNDED, Capacity, NodeType
from scaling_ray.sweep.cost import Speeds, run_seconds
from scaling_ray.sweep.speed import ASSUMED_GPU, GPUS, gpu_named

PROCESS_BYTES = 1 << 30
"""What a training process holds of a machine's memory beside tensors: torch, Ray and its share of the cells."""


@dataclass(frozen=True)
class Offer:
    """A kind of node for a plan: a priced one, or with ``name`` None whatever there is.

    ``gpu`` is the kind of its GPUs, None for a node without.
    """

    name: str | None
    gpu: str | None
    price: NodePrice | None


@dataclass(frozen=True)
class Placed:
    """One run, or one stack of them, on an offer: seconds with their interval, the GPU share, memory and cost of all.

    ``seconds`` are those of the whole unit inside its trial; ``cost`` is None without prices.
    """

    seconds: float
    low: float
    high: float
    source: str
    gpus: float
    memory: TrainingMemory
    offer: Offer
    cost_per_second: float | None


def offers_of(prices: PricesSpec | None, gpu: str | None) -> list[Offer]:
    """The kinds of nodes of a price table; without one a single offer with the GPU that is named, or assumed."""
    if prices is None:
        return [Offer(None, gpu if gpu is not None else ASSUMED_GPU, None)]
    found = []
    for name, node in prices.nodes.items():
        kind = gpu_named(node.gpu, f"prices.nodes.{name}.gpu") if node.gpu is not None else ASSUMED_GPU
        found.append(Offer(name, kind if node.gpus else None, node))
    return found


def priced_capacity(prices: PricesSpec) -> Capacity:
    """What a cluster of the priced nodes can become."""
    return Capacity(
        tuple(
            NodeType(
                name,
                node.resources,
                node.max_nodes if node.max_nodes is not None else UNBOUNDED,
            )
            for name, node in prices.nodes.items()
        )
    )


def memory_of(run: RunSpec, members: int) -> TrainingMemory:
    """Planned memory of one process of a run, or of a stack of them."""
    execution = run.execution
    return training_memory(
        run.shape,
        run.genes,
        execution.micro_batch,
        members=members,
        workers=execution.workers,
        zero_stage=execution.zero_stage,
        offload_optimizer=execution.offload_optimizer,
        deepspeed=execution.engine == "deepspeed",
        dropout=run.train.dropout,
        on_cpu=execution.device != "cuda",
        outputs_per_gene=run.outputs_per_gene,
    )


def place(
    run: RunSpec, members: int, offers: Sequence[Offer], speeds: Speeds, val_cells: int, test_cells: int
) -> Placed:
    """The run, or a stack of ``members`` like it, on the offer that costs least, or the only one.

    Raises:
        BadInput: no priced kind of node holds one worker: its CPUs, GPUs and memory.
    """
    memory, on_gpu = memory_of(run, members), run.execution.device == "cuda"
    found = []
    for offer in offers:
        if on_gpu and offer.gpu is None:
            continue
        gpu = offer.gpu if on_gpu else None
        each, low, high, source = run_seconds(run, members, speeds, gpu, val_cells, test_cells)
        share = _gpu_share(run, members, memory, speeds, gpu)
        seconds, low, high = each * members, low * members, high * members
        if offer.price is None:
            return Placed(seconds, low, high, source, share, memory, offer, None)
        part = _share_of_node(run, share, memory, offer)
        if part is not None:
            per_second = offer.price.lowest_per_hour * part * run.execution.workers / 3600
            found.append(Placed(seconds, low, high, source, share, memory, offer, per_second))
    if not found:
        raise BadInput("W037", f"prices.nodes, for {run.size}", sorted(_names(offers)), _misfit(run, memory))
    return min(found, key=lambda placed: (placed.seconds * (placed.cost_per_second or 0.0), placed.offer.name or ""))


def _gpu_share(run: RunSpec, members: int, memory: TrainingMemory, speeds: Speeds, gpu: str | None) -> float:
    """The share of a GPU that each worker holds: 0 on a CPU, a whole one in a group."""
    if gpu is None:
        return 0.0
    if run.execution.in_group:
        return 1.0
    return choose_gpu_share(memory.device_bytes, speeds.busy(run, members, gpu), GPUS[gpu].gib * 2**30)


def _share_of_node(run: RunSpec, gpus: float, memory: TrainingMemory, offer: Offer) -> float | None:
    """The part of a node that one worker takes: of what it takes most of; None where it does not fit at all."""
    node = offer.price
    assert node is not None
    on_gpu = gpus > 0
    if on_gpu and offer.gpu is not None:
        if memory.device_bytes + GPU_CONTEXT_BYTES > GPU_USED_SHARE * GPUS[offer.gpu].gib * 2**30:
            return None
    host = PROCESS_BYTES + memory.host_bytes + (0 if on_gpu else memory.device_bytes)
    parts = [run.execution.cpus / node.cpus, host / (node.memory_gib * 2**30)]
    parts += [gpus / node.gpus] if on_gpu else []
    return max(parts) if max(parts) <= 1 else None


def _names(offers: Sequence[Offer]) -> list[str]:
    return [offer.name for offer in offers if offer.name is not None]


def _misfit(run: RunSpec, memory: TrainingMemory) -> str:
    where = "a GPU with" if run.execution.device == "cuda" else "memory of"
    needed = f"{where} {(memory.device_bytes + GPU_CONTEXT_BYTES) / 2**30:.1f} GiB, {run.execution.cpus} CPUs"
    return (
        f"no kind of node holds one worker ({needed}); price a larger node, or use a smaller train.micro_batch, fewer "
        "train.threads, or more resources.workers with engine = 'deepspeed'"
    )
