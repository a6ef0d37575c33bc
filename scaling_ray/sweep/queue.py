"""Which unit starts next on a cluster that grows and shrinks: a queue with a gate. Pure; no Ray, no clock of its own.

The gate keeps a model of the nodes that the cluster can become. A unit is admitted while its bundles fit there beside
those of all units in flight, so that what waits in Ray can always be placed once nodes have come, and is demand that
an autoscaler sees. Among units that are ready, the one with the most work behind it goes first: its own planned seconds
and those of the longest chain that waits for it. Where the first does not fit, a later one is let past it only if by
plan it ends before the first could start, or fits beside it ("EASY" backfilling, Lifka 1995).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Bundle = tuple[tuple[str, float], ...]
"""Resources that lie on one node: (name, amount) by name."""

MOST_NODES = 4096
"""Nodes that the gate imagines of a cluster without a limit."""

SLACK = 1e-9
"""Fractions of a resource add up to a whole up to this."""


def bundle(resources: Mapping[str, float]) -> Bundle:
    """Resources as a bundle; what is zero is left out."""
    return tuple(sorted((name, float(amount)) for name, amount in resources.items() if amount))


@dataclass(frozen=True)
class Item:
    """A unit as the queue sees it.

    Args:
        name: of the unit.
        bundles: what it holds while it trains.
        seconds: that it is planned to train.
        after: names of items that must have ended before it can start.
    """

    name: str
    bundles: tuple[Bundle, ...]
    seconds: float
    after: frozenset[str] = frozenset()


class Room:
    """What is free on the nodes of a cluster at its most.

    Args:
        nodes: the resources of each.
    """

    def __init__(self, nodes: Iterable[Mapping[str, float]]) -> None:
        self._free = [dict(node) for node in nodes][:MOST_NODES]

    def copy(self) -> Room:
        """The same room, on its own from now on."""
        return Room(self._free)

    def place(self, bundles: Sequence[Bundle]) -> list[int] | None:
        """Take all bundles and return the node of each, or take nothing and return None.

        A bundle goes to the fullest node that has room, and stays off resources that it does not ask for (GPUs).
        """
        at: list[int | None] = [None] * len(bundles)
        for index in sorted(range(len(bundles)), key=lambda index: -sum(amount for _, amount in bundles[index])):
            at[index] = self._best(bundles[index])
            if at[index] is None:
                for placed, node in zip(bundles, at, strict=True):
                    if node is not None:
                        self._add(placed, node, 1.0)
                return None
            self._add(bundles[index], at[index], -1.0)
        return [node for node in at if node is not None]

    def give_back(self, bundles: Sequence[Bundle], nodes: Sequence[int]) -> None:
        """Free what ``place`` took."""
        for one, node in zip(bundles, nodes, strict=True):
            self._add(one, node, 1.0)

    def _add(self, one: Bundle, node: int | None, sign: float) -> None:
        if node is not None:
            for name, amount in one:
                self._free[node][name] += sign * amount

    def _best(self, one: Bundle) -> int | None:
        asked = {name for name, _ in one}
        best, least = None, (math.inf, math.inf)
        for node, free in enumerate(self._free):
            if all(name in free and free[name] + SLACK >= amount for name, amount in one):
                rest = (
                    sum(amount for name, amount in free.items() if name == "GPU" and name not in asked),
                    sum(free[name] for name in asked),
                )
                if rest < least:
                    best, least = node, rest
        return best


@dataclass
class _Flight:
    item: Item
    nodes: list[int] | None
    ends: float
    began: float | None = None


@dataclass
class Queue:
    """Items on their way: waiting for others, ready, in flight, ended.

    Args:
        items: all of them; what ``after`` names must be among them.
        nodes: resources of each node of the cluster at its most.
    """

    items: Sequence[Item]
    nodes: Sequence[Mapping[str, float]]
    in_flight: dict[str, _Flight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name = {item.name: item for item in self.items}
        self._room = Room(self.nodes)
        self._open = {item.name: set(item.after) for item in self.items}
        self._held_back = sum(1 for item in self.items if item.after)
        self._followers: dict[str, list[str]] = {}
        for item in self.items:
            for name in item.after:
                self._followers.setdefault(name, []).append(item.name)
        self._rank: dict[str, float] = {}
        for item in reversed(self._in_order()):
            behind = (self._rank[name] for name in self._followers.get(item.name, ()))
            self._rank[item.name] = item.seconds + max(behind, default=0.0)
        # ready items by shape, each list in order: (-rank, position, name)
        self._ready: dict[tuple[Bundle, ...], list[tuple[float, int, str]]] = {}
        self._position = {item.name: position for position, item in enumerate(self.items)}
        for item in self.items:
            if not self._open[item.name]:
                self._make_ready(item)

    def _in_order(self) -> list[Item]:
        """The items, each behind all that it waits for."""
        left = {item.name: len(item.after) for item in self.items}
        order = [item for item in self.items if not item.after]
        for item in order:
            for name in self._followers.get(item.name, ()):
                left[name] -= 1
                if not left[name]:
                    order.append(self._by_name[name])
        if len(order) < len(self.items):
            raise ValueError("some items wait for one another, or for an item that is not in the queue")
        return order

    def _make_ready(self, item: Item) -> None:
        entry = (-self._rank[item.name], self._position[item.name], item.name)
        bisect.insort(self._ready.setdefault(item.bundles, []), entry)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not self.in_flight and not self._held_back and not any(self._ready.values())

    def waiting(self) -> dict[str, str]:
        """What each item that is not in flight waits for: "room" or the name of an item."""
        found = {name: "room" for ready in self._ready.values() for _, _, name in ready}
        return found | {name: min(after) for name, after in self._open.items() if after}

    def never_fits(self, item: Item) -> bool:
        """Whether an item could not be placed even on an empty cluster at its most."""
        return Room(self.nodes).place(item.bundles) is None

    def admit(self, now: float) -> Item | None:
        """The next item to start, now in flight; None while none may.

        Args:
            now: seconds of any clock that runs on; the same for all calls.
        """
        heads = sorted(ready[0] for ready in self._ready.values() if ready)
        if not heads:
            return None
        first = self._by_name[heads[0][2]]
        nodes = self._room.place(first.bundles)
        if nodes is not None:
            return self._start(first, nodes, now)
        starts, beside = self._when_it_fits(first, now)
        for shape, ready in self._ready.items():
            nodes = self._room.place(shape) if ready and shape != first.bundles else None
            if nodes is None:
                continue
            past = (
                ready
                if beside.place(shape) is not None
                else (entry for entry in ready if now + self._by_name[entry[2]].seconds <= starts)
            )
            entry = next(iter(past), None)
            if entry is not None:
                return self._start(self._by_name[entry[2]], nodes, now)
            self._room.give_back(shape, nodes)
        return None

    def _when_it_fits(self, first: Item, now: float) -> tuple[float, Room]:
        """When by plan there is room for an item, and what is free beside it then."""
        room = self._room.copy()
        for flight in sorted(self.in_flight.values(), key=lambda flight: flight.ends):
            if flight.nodes is not None:
                room.give_back(flight.item.bundles, flight.nodes)
                if room.place(first.bundles) is not None:
                    return max(now, flight.ends), room
        return math.inf, room

    def _start(self, item: Item, nodes: list[int], now: float) -> Item:
        ready = self._ready[item.bundles]
        ready.remove((-self._rank[item.name], self._position[item.name], item.name))
        self.in_flight[item.name] = _Flight(item, nodes, now + item.seconds)
        return item

    def began(self, name: str, now: float) -> None:
        """An item in flight has its resources and trains; a later call changes nothing."""
        flight = self.in_flight.get(name)
        if flight is not None and flight.began is None:
            flight.began, flight.ends = now, now + flight.item.seconds

    def ended(self, name: str) -> list[Item]:
        """An item has ended, well or not; returns those that are ready now since it did."""
        self._leave(name)
        ready = []
        for follower in self._followers.get(name, ()):
            if name not in self._open[follower]:
                continue
            self._open[follower].discard(name)
            if not self._open[follower]:
                self._held_back -= 1
                ready.append(self._by_name[follower])
                self._make_ready(self._by_name[follower])
        return ready

    def drop(self, name: str) -> None:
        """An item that is ready will not be started: it is in flight, and holds nothing, until ``ended`` is called."""
        item = self._by_name[name]
        self._ready[item.bundles].remove((-self._rank[name], self._position[name], name))
        self.in_flight[name] = _Flight(item, None, -math.inf)

    def again(self, name: str) -> None:
        """An item in flight was lost: it is ready once more."""
        self._leave(name)
        self._make_ready(self._by_name[name])

    def _leave(self, name: str) -> None:
        flight = self.in_flight.pop(name, None)
        if flight is not None and flight.nodes is not None:
            self._room.give_back(flight.item.bundles, flight.nodes)

    def set_nodes(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """The cluster can become another one than was thought; what is in flight stays there."""
        self.nodes, self._room = nodes, Room(nodes)
        for flight in self.in_flight.values():
            flight.nodes = self._room.place(flight.item.bundles)
