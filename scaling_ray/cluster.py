"""One way to Ray: the cluster this process was started on, or a private one behind a token of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ray reads these once, when it is imported: so every module here takes ``ray`` from this one. A user's settings win.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# By default Ray tries a task that it killed for want of memory again without end and without a word.
os.environ.setdefault("RAY_task_oom_retries", "3")
# What Ray Data asked of an autoscaler stays asked for so long after its last execution: three minutes by default.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "60")
if "ray" not in sys.modules and not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ):
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray's default niceness of 15 starves the workers of a private cluster beside anything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
import ray.data  # noqa: E402

from scaling_ray.errors import BadInput, ClusterUnreachable, MemoryShort, ScalingRayError  # noqa: E402

__all__ = [
    "DRIVERS",
    "Pending",
    "drain_node",
    "draining_nodes",
    "each_node_up",
    "log_tail",
    "node_is_alive",
    "nodes_up",
    "on_node",
    "own_errors",
    "own_node",
    "ray",
    "ray_session",
    "run_on_worker",
]

OBJECT_STORE_BYTES = 1 << 30
"""Most shared memory a private cluster takes."""
DRIVERS = "trial_driver"
"""A resource of the head: the driver of each worker group holds one of it."""
GCS_SECONDS = 10.0
"""How long a cluster's control service (GCS) may take to answer."""
READER_SECONDS = 10.0
"""How long a private cluster waits for threads of Ray Data that still hand over blocks."""


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Re-raise an error of this package that rose in a Ray task as itself, without Ray's wrapping.

    Raises:
        MemoryShort: Ray killed a task since its node ran short of memory, again and again.
    """
    try:
        yield
    except ray.exceptions.OutOfMemoryError as error:
        raise MemoryShort(
            "W053",
            "a node ran short of memory, and Ray killed a task there four times; what was trained is saved: give the "
            "node more memory or its runs fewer CPUs (resources.cpus), and call again to go on",
        ) from error
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
        with _own_process_groups():
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


@contextlib.contextmanager
def _own_process_groups() -> Iterator[None]:
    """Start Ray's processes outside this process's group.

    A terminal (Ctrl-C), ``timeout`` and batch schedulers signal a whole group. Ray 2.60 would lose its control service
    to that while the driver still needs it to save its runs; the driver takes Ray down afterwards, and where it is
    killed itself the kernel does.
    """
    services: Any = importlib.import_module("ray._private.services")
    plain = services.ConsolePopen
    services.ConsolePopen = functools.partial(plain, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = plain


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


def own_node(node_id: str | None = None) -> str:
    """Hexadecimal id of the living Ray node of this machine, or ``node_id`` where that one is alive.

    A node is this machine's where its address is one of this machine's; where none is, by its host name. The cluster
    is the one of RAY_ADDRESS ("auto": the one that runs here); no connection to it is left open.

    Raises:
        BadInput: several nodes run on this machine, and none was named.
        ClusterUnreachable: no cluster answers, or it has no such node (yet).
    """
    alive = _alive_nodes()
    if node_id is not None:
        if node_id not in alive:
            raise ClusterUnreachable("W001", f"Ray has no living node {node_id}")
        return node_id
    here = [name for name, node in alive.items() if _is_own_address(node.node_manager_address)]
    here = here or [name for name, node in alive.items() if node.node_manager_hostname == socket.gethostname()]
    if not here:
        raise ClusterUnreachable("W002", f"Ray has no living node on this machine yet ({len(alive)} elsewhere)")
    if len(here) > 1:
        raise BadInput(
            "W003", "--node-id", None, f"several Ray nodes run on this machine; name one: {', '.join(sorted(here))}"
        )
    return here[0]


def drain_node(node_id: str, message: str, deadline_seconds: float | None) -> bool:
    """Tell Ray that a node is about to be lost, as ``ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION`` does.

    Args:
        node_id: hexadecimal; a dead node is refused here, since Ray accepts any id.
        message: kept by Ray with the node's death.
        deadline_seconds: when the node goes, in seconds since 1970; None: not known.

    Returns:
        Whether it was told: not where the node already drains by this deadline or an earlier one.

    Raises:
        ClusterUnreachable: no cluster answers, or the node is not alive.
    """
    own_node(node_id)
    deadline_ms = 0 if deadline_seconds is None else int(max(deadline_seconds, time.time() + 1.0) * 1000)
    earlier = draining_nodes()
    if node_id in earlier and (not deadline_ms or 0 < earlier[node_id] <= deadline_ms + 1000):
        return False
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]

    with _reachable():
        accepted, reason = _gcs_client().drain_node(
            node_id, DRAIN_NODE_REASON_PREEMPTION, message, deadline_ms, timeout=GCS_SECONDS
        )
    if not accepted:
        raise ClusterUnreachable("W004", f"Ray refuses to drain node {node_id}: {reason}")
    return True


def draining_nodes() -> dict[str, int]:
    """Hexadecimal ids of the nodes that drain, and their deadlines in milliseconds since 1970 (0: none)."""
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

    with _reachable():
        state = GlobalState()
        options = {"allow_cluster_id_nil": True, "fetch_cluster_id_if_nil": False}
        state._initialize_global_state(GcsClientOptions.create(_gcs_address(), None, **options))
        try:
            return dict(state.get_draining_nodes())
        finally:
            state.disconnect()


def node_is_alive(node_id: str) -> bool:
    """Whether the cluster counts a node as alive; ClusterUnreachable where no cluster answers."""
    return node_id in _alive_nodes()


def _alive_nodes() -> dict[str, Any]:
    """The living nodes of the cluster by their hexadecimal ids."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    with _reachable():
        nodes = _gcs_client().get_all_node_info(timeout=GCS_SECONDS)
    return {node_id.hex(): node for node_id, node in nodes.items() if node.state == GcsNodeInfo.ALIVE}


def _gcs_client() -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=_gcs_address())


def _gcs_address() -> str:
    """Address of the cluster's GCS; OSError where nobody listens there, which Ray's own client finds out in 40 s."""
    from ray._private.services import canonicalize_bootstrap_address

    address = str(canonicalize_bootstrap_address("auto"))
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=GCS_SECONDS).close()
    return address


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Turn the ways in which Ray's clients fail into ClusterUnreachable, in one line."""
    try:
        yield
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(
            "W005", f"Ray is not up here, or refuses: {str(error).splitlines()[0][:200]}"
        ) from error


def _is_own_address(address: str) -> bool:
    """Whether an IP address is one of this machine's: only its own can be bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as trial:
            trial.bind((address, 0))
    except OSError:
        return False
    return True
