"""What a cluster can become: its kinds of nodes, each at its most, and whether bundles of resources go onto them.

Pure arithmetic: a cluster that scales from zero is judged by its description, never by the nodes that are up. Names of
resources are Ray's: "CPU", "GPU", "memory" (bytes) and a cluster's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput

UNBOUNDED = 1_000_000
"""Count of a kind of node that can be had as often as it is asked for."""
_SLACK = 1e-3
"""Three thirds of a GPU are one: Ray counts resources in units of 1e-4."""


@dataclass(frozen=True)
class NodeType:
    """One kind of node: what a node of it offers, and how many there can be."""

    name: str
    resources: dict[str, float]
    count: int

    def offers(self, name: str) -> float:
        """Amount of a resource on one node."""
        return self.resources[name] if name in self.resources else 0.0


@dataclass(frozen=True)
class Capacity:
    """All nodes that a cluster can have at the same time.

    ``most_nodes`` bounds the number of all kinds together, None where only each kind's own count does.
    """

    nodes: tuple[NodeType, ...]
    most_nodes: int | None = None

    @classmethod
    def local(cls, cpus: float, gpus: float = 0.0) -> Capacity:
        """One machine."""
        return cls((NodeType("this machine", {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}), 1),))

    @classmethod
    def of_file(cls, path: Path | str, known: Mapping[str, Mapping[str, float]] | None = None) -> Capacity:
        """A cluster by its file for ``ray up``: ``available_node_types`` with ``resources`` and ``max_workers``.

        Ray finds out the resources that a file leaves open from the cloud, once a node starts; without a cloud they
        come from ``known`` (kind of node -> resources). The head is one node more than its kind's ``max_workers``.

        Raises:
            BadInput: no such file, not of this form, or a kind of node whose CPUs neither source tells.
        """
        import yaml

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            remedy = "cannot be read as YAML; name a cluster's file for `ray up`"
            raise BadInput("W012", "--cluster", str(path), remedy) from error
        kinds = found.get("available_node_types") if isinstance(found, dict) else None
        if not isinstance(kinds, dict) or not kinds:
            raise BadInput(
                "W013", "--cluster", str(path), "has no available_node_types; name a cluster's file for `ray up`"
            )
        workers = _whole(found, "max_workers", str(path), None)
        head = found.get("head_node_type")
        nodes = []
        for name, kind in kinds.items():
            place = f"available_node_types.{name}"
            if not isinstance(kind, dict):
                raise BadInput("W014", place, kind, "is no table; give resources and max_workers")
            count = _whole(kind, "max_workers", place, workers)
            if count is None:
                remedy = "is missing; say how many nodes of this kind there may be (for a head alone 0)"
                raise BadInput("W015", f"{place}.max_workers", None, remedy)
            nodes.append(NodeType(str(name), _resources(kind, str(name), place, known or {}), count + (name == head)))
        return cls(tuple(nodes), None if workers is None else workers + 1)

    def each_node(self, most: int = 4096) -> list[dict[str, float]]:
        """The resources of every node that there can be; no more than ``most`` of a kind."""
        return [dict(node.resources) for node in self.nodes for _ in range(min(node.count, most))]

    def total(self, name: str) -> float:
        """The most of a resource that there can be at the same time."""
        total, left = 0.0, inf if self.most_nodes is None else self.most_nodes
        for node in sorted(self.nodes, key=lambda node: -node.offers(name)):
            taken = min(node.count, left)
            total, left = total + taken * node.offers(name), left - taken
        return total

    def largest(self, name: str) -> float:
        """The most of a resource on one node."""
        return max((node.offers(name) for node in self.nodes if node.count), default=0.0)

    def fits(self, bundles: Sequence[Mapping[str, float]]) -> bool:
        """Whether all bundles can be placed at once on the nodes at their most, each bundle on one node.

        First-fit decreasing, scarcest first, on nodes that offer least of what a bundle does not ask for: exact where
        all bundles are equal; else it can miss a placement that a full search would find, and never invents one. A
        share of a GPU is of one GPU, and more than one GPU are whole ones, as Ray places them.
        """
        kinds = Counter(tuple(sorted((name, amount) for name, amount in one.items() if amount)) for one in bundles)
        totals = {name: self.total(name) for kind in kinds for name, _ in kind}
        if any(amount > totals[name] for kind in kinds for name, amount in kind):
            return False
        opened: list[_Node] = []
        for kind in sorted(kinds, key=lambda kind: (-max((a / totals[n] for n, a in kind), default=0.0), kind)):
            left, wanted = kinds[kind], dict(kind)
            ranked = sorted(self.nodes, key=lambda node: _spare(node, wanted))
            rank = {node.name: place for place, node in enumerate(ranked)}
            for node in sorted(opened, key=lambda node: rank[node.kind.name]):
                left = _fill(node, wanted, left)
            for fresh in self._closed(ranked, opened):
                if left == 0:
                    break
                after = _fill(fresh, wanted, left)
                if after == left:
                    continue
                opened.append(fresh)
                left = after
            if left:
                return False
        return True

    def described(self) -> str:
        """The nodes in words: "at most 16 cpu_spot (CPU 16), 8 gpu_spot (CPU 8, GPU 1)"."""
        parts = []
        for node in self.nodes:
            offers = ", ".join(f"{name} {amount:g}" for name, amount in sorted(node.resources.items()) if amount)
            count = "any number of" if node.count >= UNBOUNDED else f"{node.count:g}"
            parts.append(f"{count} {node.name} ({offers or 'nothing'})")
        return f"at most {', '.join(parts)}"

    def _closed(self, ranked: Sequence[NodeType], opened: Sequence[_Node]) -> Iterator[_Node]:
        """Nodes that are not opened yet, one after the other; of a kind that is not taken, one alone."""
        for kind in ranked:
            while sum(node.kind is kind for node in opened) < kind.count:
                if self.most_nodes is not None and len(opened) >= self.most_nodes:
                    return
                before = len(opened)
                yield _Node(kind)
                if len(opened) == before:
                    break


@dataclass
class _Node:
    """A node that is being filled: what is free of its resources, and of each of its GPUs."""

    kind: NodeType
    free: dict[str, float] = field(default_factory=dict)
    gpus: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = {name: amount for name, amount in self.kind.resources.items() if name != "GPU"}
        self.gpus = [1.0] * int(self.kind.offers("GPU"))

    def take(self, bundle: Mapping[str, float]) -> bool:
        """Place a bundle; False, and nothing taken, where it does not fit."""
        for name, amount in bundle.items():
            if name != "GPU" and (name not in self.free or self.free[name] + _SLACK < amount):
                return False
        gpus = bundle["GPU"] if "GPU" in bundle else 0.0
        share = min(gpus, 1.0)
        found = [place for place, free in enumerate(self.gpus) if free + _SLACK >= share][: max(1, round(gpus))]
        if gpus and len(found) < max(1, round(gpus)):
            return False
        for place in found if gpus else ():
            self.gpus[place] -= share
        for name, amount in bundle.items():
            if name != "GPU":
                self.free[name] -= amount
        return True


def _fill(node: _Node, bundle: Mapping[str, float], wanted: int) -> int:
    """How many of ``wanted`` equal bundles are left once the node has taken what fits."""
    while wanted and node.take(bundle):
        wanted -= 1
    return wanted


def _spare(node: NodeType, bundle: Mapping[str, float]) -> tuple[int, float]:
    """Order in which kinds of nodes take a bundle: little beside what it asks for, then small ones."""
    return sum(1 for name, amount in node.resources.items() if amount and name not in bundle), node.offers("CPU")


def _whole(table: Mapping[str, Any], name: str, place: str, default: int | None) -> int | None:
    value = table.get(name, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise BadInput("W016", f"{place}.{name}", value, "must be a whole number of at least 0")
    return value


def _resources(
    kind: Mapping[str, Any], name: str, place: str, known: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    written = kind.get("resources") or {}
    odd = not isinstance(written, dict) or any(
        not isinstance(amount, int | float) or isinstance(amount, bool) or amount < 0 for amount in written.values()
    )
    if odd:
        raise BadInput("W017", f"{place}.resources", written, "must be a table of amounts, such as {CPU: 16, GPU: 1}")
    found = dict(known[name] if name in known else {}) | {str(key): float(value) for key, value in written.items()}
    if "CPU" not in found:
        remedy = f"says no CPU; write it there (such as {{CPU: 16}}), or add [prices.nodes.{name}] to the spec"
        raise BadInput("W018", f"{place}.resources", written, remedy)
    return found
