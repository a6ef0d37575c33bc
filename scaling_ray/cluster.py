"""One way to Ray: the cluster this process was started on, or a private one behind a token of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ray reads these once, when it is imported: so every module here takes ``ray`` from this one. A user's settings win.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
if "ray" not in sys.modules and not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ):
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray's default niceness of 15 starves the workers of a private cluster beside anything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
import ray.data  # noqa: E402

from scaling_ray.errors import ScalingRayError  # noqa: E402

__all__ = [
    "DRIVERS",
    "Pending",
    "each_node_up",
    "log_tail",
    "nodes_up",
    "on_node",
    "own_errors",
    "ray",
    "ray_session",
    "run_on_worker",
]

OBJECT_STORE_BYTES = 1 << 30
"""Most shared memory a private cluster takes."""
DRIVERS = "trial_driver"
"""A resource of the head: the driver of each worker group holds one of it."""
READER_SECONDS = 10.0
"""How long a private cluster waits for threads of Ray Data that still hand over blocks."""


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Re-raise an error of this package that rose in a Ray task as itself, without Ray's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None)
            if isinstance(cause, ScalingRayError) and not isinstance(cause, ray.exceptions.RayError):
                raise cause from None
            cause = inner if isinstance(inner, BaseException) else cause.__cause__
        raise


@contextlib.contextmanager
def ray_session(cpus: int, at_least: bool = False) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS, or run a private one of ``cpus`` CPUs until the block ends.

    A private cluster counts no more CPUs than this machine has, unless ``at_least`` says so.

    A private cluster answers only who shows its token (drawn anew each time), serves no dashboard, and leaves nothing
    on disk. Ray itself decides on which of the machine's addresses it listens.
    """
    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Unix sockets below this folder must stay under 108 bytes, so it sits at the top of the temporary folder.
    folder = tempfile.mkdtemp(prefix="sr-", dir="/tmp" if len(tempfile.gettempdir()) > 30 else None)
    try:
        memory = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else OBJECT_STORE_BYTES
        ray.init(
            num_cpus=cpus if at_least else min(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            resources={DRIVERS: 64.0},
            object_store_memory=max(80 << 20, min(OBJECT_STORE_BYTES, memory // 3)),
            _temp_dir=folder,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        yield
    finally:
        _end_readers()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _end_readers() -> None:
    """Wait for Ray Data's own threads: they outlive a closed pipeline by a moment, and would ask a lost cluster."""
    for thread in threading.enumerate():
        if thread.name == "iter_threaded":
            thread.join(READER_SECONDS)


def on_node(node: str, soft: bool = False, **options: Any) -> Any:
    """``ray.remote`` for what holds nothing and runs on one node; elsewhere too where ``soft`` and the node is gone."""
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=soft)
    made: Any = ray.remote
    return made(num_cpus=0, scheduling_strategy=there, **options)


def nodes_up() -> dict[str, float]:
    """What the connected cluster's nodes of the moment offer in all."""
    return {str(name): float(amount) for name, amount in ray.cluster_resources().items()}


def each_node_up() -> list[dict[str, float]]:
    """The resources of each node that is up."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def log_tail(node: str, pid: int, lines: int = 20, seconds: float = 10.0) -> str:
    """The last lines that a worker process of a node wrote; nothing where the node does not answer."""
    task = on_node(node, max_retries=0)(_last_lines).remote(pid, lines)
    try:
        return str(ray.get(task, timeout=seconds))
    except ray.exceptions.RayError:
        return ""


def _last_lines(pid: int, lines: int) -> str:
    node: Any = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path())
    found = []
    for path in sorted(folder.glob(f"worker-*-{pid}.*")):
        found += path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(line for line in found if not line.startswith(":"))


def run_on_worker(function: Callable[..., Any], *arguments: Any, cpus: int, gpus: float) -> Any:
    """What a function answers as a task of the connected cluster; its errors rise here."""
    return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus)(function).remote(*arguments))


class Pending:
    """Tasks that were started and not waited for; what one raises rises in ``wait``."""

    def __init__(self) -> None:
        self._tasks: list[Any] = []

    def start(self, function: Callable[..., Any], *arguments: Any, cpus: int = 1) -> None:
        """Run a function as a task; object references among its arguments arrive as what they refer to."""
        self._tasks.append(ray.remote(num_cpus=cpus)(function).remote(*arguments))

    def wait(self, each_second: Callable[[], None]) -> None:
        """Until all have ended."""
        while self._tasks:
            ended, self._tasks = ray.wait(self._tasks, num_returns=len(self._tasks), timeout=1.0)
            ray.get(ended)
            each_second()
