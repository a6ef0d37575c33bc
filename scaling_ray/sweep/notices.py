"""``scaling-ray node-watch``: at a cloud's notice that this machine is about to go, Ray drains its node.

Nothing in Ray does that by itself. A drained node gets no new work; a worker group on it is told, saves its state and
goes on elsewhere, and the loss is charged to no run. Ray is asked in processes of their own: the watcher stays small
(it runs for as long as the machine), and Ray's native client can neither end it nor hold it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from scaling_ray.errors import BadInput, ClusterUnreachable, ScalingRayError
from scaling_ray.sweep.metadata import Metadata, MetadataFailure, Notice, Provider, find_metadata

Progress = Callable[[str], None]
T = TypeVar("T")

RAY_SECONDS = 45.0
"""How long one question to Ray may take, its import included."""
LONGEST_PAUSE_SECONDS = 15.0
"""Most time between attempts at something that fails: GCP gives thirty seconds of notice."""
LEAVE_SECONDS = 10.0
"""How long ``--drain-now`` tries to reach Ray: a container that is about to end waits for it."""


def watch_node(
    provider: Provider,
    metadata_url: str | None,
    every_seconds: float,
    once: bool,
    node_id: str | None,
    rebalance: bool,
    progress: Progress,
) -> None:
    """Watch this machine's metadata until it goes; each notice drains its Ray node once.

    Returns where "auto" finds no metadata service, and with ``once`` after one look at metadata and Ray.

    Args:
        provider: whose metadata to ask.
        metadata_url: of the service, in place of the cloud's own.
        every_seconds: between two questions.
        once: look once and return.
        node_id: hexadecimal id of the Ray node; None: the one that runs on this machine.
        rebalance: whether AWS's rebalance recommendations are notices.
        progress: called with a line for each event.

    Raises:
        BadInput: of an option, or where several Ray nodes run on this machine and none was named.
        MetadataFailure, ClusterUnreachable: with ``once`` only; else both are tried again.
    """
    if every_seconds <= 0:
        raise BadInput("W033", "--every", every_seconds, "must be more than 0 seconds")
    metadata = find_metadata(provider, metadata_url, rebalance)
    if metadata is None:
        progress(
            "no metadata service of AWS or GCP answers here, so there is nothing to watch "
            "(in a container on EC2 the instance's HttpPutResponseHopLimit must be 2)"
        )
        return
    watch = _Watch(metadata, node_id, progress)
    if once:
        watch.look()
        return
    while True:
        time.sleep(watch.step(every_seconds))


def drain_now(deadline_seconds: float, node_id: str | None, progress: Progress) -> None:
    """Drain the Ray node of this machine, and return once it has left or after ``deadline_seconds``.

    The node leaves by itself as soon as nothing runs on it.

    Raises:
        BadInput: as ``watch_node``.
        ClusterUnreachable: no Ray answers here.
    """
    if deadline_seconds <= 0:
        raise BadInput("W034", "--deadline", deadline_seconds, "must be more than 0 seconds")
    deadline = time.time() + deadline_seconds
    give_up = time.monotonic() + min(LEAVE_SECONDS, deadline_seconds)
    while True:
        try:
            node = _from_ray(_find, node_id)
            break
        except ClusterUnreachable:
            if time.monotonic() > give_up:
                raise
            time.sleep(1.0)
    _drain(node, Notice("asked", "asked to drain", deadline), progress)
    left = _from_ray(_wait_until_gone, node, deadline, seconds=deadline_seconds + RAY_SECONDS)
    progress(f"node {node} has left" if left else f"node {node} still has work after {deadline_seconds:g} s")


@dataclass
class _Trouble:
    """Something that fails: said once, tried again at growing intervals, and said again once it works."""

    progress: Progress
    failures: int = 0

    def again(self, error: ScalingRayError, pause_seconds: float) -> float:
        """Seconds until the next attempt."""
        if not self.failures:
            self.progress(f"{error}; trying again")
        self.failures += 1
        return float(min(pause_seconds * 2 ** min(self.failures, 10), max(pause_seconds, LONGEST_PAUSE_SECONDS)))

    def over(self, what: str) -> None:
        """It works."""
        if self.failures:
            self.progress(what)
        self.failures = 0


@dataclass
class _Watch:
    """What is known between two looks at the metadata: the node, notices that were heard, one that is not acted on."""

    metadata: Metadata
    asked_node: str | None
    progress: Progress
    node: str | None = None
    heard: set[str] = field(default_factory=set)
    open: Notice | None = None
    next_ray: float = 0.0

    def __post_init__(self) -> None:
        self._metadata_trouble, self._ray_trouble = _Trouble(self.progress), _Trouble(self.progress)

    def look(self) -> None:
        """Look at the metadata and at Ray once; every failure rises."""
        self._hear(self.metadata.notice())
        self._act()
        if not self.heard:
            self.progress(f"{self.metadata.provider} has given no notice")

    def step(self, every_seconds: float) -> float:
        """The same for ever: failures are said once. Returns the seconds until the next step."""
        pause = every_seconds
        try:
            notice = self.metadata.notice()
            self._metadata_trouble.over(f"the metadata service of {self.metadata.provider} answers again")
            self._hear(notice)
        except MetadataFailure as error:
            pause = self._metadata_trouble.again(error, every_seconds)
        if (self.node is None or self.open is not None) and time.monotonic() >= self.next_ray:
            try:
                self._act()
                self._ray_trouble.over("Ray answers")
            except ClusterUnreachable as error:
                self.node = None  # Ray may have been started again here, as another node
                self.next_ray = time.monotonic() + self._ray_trouble.again(error, every_seconds)
        return pause

    def _hear(self, notice: Notice | None) -> None:
        if notice is not None and notice.key not in self.heard:
            self.heard.add(notice.key)
            self.open = notice
            self.progress(f"notice of {self.metadata.provider}: {notice.what}{_in_seconds(notice)}")

    def _act(self) -> None:
        """Find the node where it is not known yet, and drain it where a notice waits for that."""
        if self.node is None:
            self.node = _from_ray(_find, self.asked_node)
            self.progress(f"watching the metadata of {self.metadata.provider} for node {self.node}")
        if self.open is not None:
            _drain(self.node, self.open, self.progress)
            self.open = None


def _drain(node: str, notice: Notice, progress: Progress) -> None:
    """Drain a node, unless it drains already by an earlier or the same deadline."""
    if _from_ray(_drain_in_ray, node, notice):
        progress(f"node {node} drains ({notice.what})")
    else:
        progress(f"node {node} drains already")


def _in_seconds(notice: Notice) -> str:
    return "" if notice.deadline_seconds is None else f", in {max(0.0, notice.deadline_seconds - time.time()):.0f} s"


def _find(node_id: str | None) -> str:
    from scaling_ray.cluster import own_node

    return own_node(node_id)


def _drain_in_ray(node: str, notice: Notice) -> bool:
    from scaling_ray.cluster import drain_node

    return drain_node(node, f"notice: {notice.what}", notice.deadline_seconds)


def _wait_until_gone(node: str, deadline_seconds: float) -> bool:
    from scaling_ray.cluster import node_is_alive

    while node_is_alive(node):
        if time.time() >= deadline_seconds:
            return False
        time.sleep(min(1.0, max(0.0, deadline_seconds - time.time())))
    return True


def _from_ray(function: Callable[..., T], *arguments: Any, seconds: float = RAY_SECONDS) -> T:
    """What ``function`` returns in a process of its own; its errors of this package rise here.

    Raises:
        ClusterUnreachable: also where the process ended or took longer than ``seconds``.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="node-watch-") as noise:
        process = context.Process(target=_answer, args=(sending, noise.name, function, *arguments), daemon=True)
        process.start()
        sending.close()
        try:
            if not receiving.poll(seconds):
                raise ClusterUnreachable("W035", f"Ray does not answer within {seconds:.0f} s")
            answer = receiving.recv()
        except EOFError as error:
            said = noise.read().decode("utf-8", "replace").strip().splitlines()
            reason = said[-1][:200] if said else "it was killed"
            raise ClusterUnreachable("W036", f"the process that asks Ray ended without an answer: {reason}") from error
        finally:
            receiving.close()
            process.join(1.0)
            process.kill()
            process.join()
    if isinstance(answer, ScalingRayError):
        raise answer
    return answer


def _answer(sending: Connection, noise: str, function: Callable[..., Any], *arguments: Any) -> None:
    """The body of such a process. What Ray's native client says on standard error goes into the file ``noise``."""
    os.dup2(os.open(noise, os.O_WRONLY), 2)
    # cluster.py draws a token for a private cluster where no cluster is named; here one is always meant
    os.environ.setdefault("RAY_ADDRESS", "auto")
    try:
        sending.send(function(*arguments))
    except ScalingRayError as error:
        sending.send(error)
