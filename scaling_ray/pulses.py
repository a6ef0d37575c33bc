"""Signs of life: every training process says where it is and that it runs; whoever schedules sees who fell silent.

Ray notices a process that died and a node that is gone. It does not notice a process that stands still (SIGSTOP, a
device that hangs), whose place then stays taken for ever. So a thread of each training process tells a board, an actor
beside the driver, every few seconds that it is there. A process that has been silent for long is killed on its node,
which Ray notices.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scaling_ray.cluster import on_node, ray

BEAT_SECONDS = 2.0
SILENT_SECONDS = 60.0
"""Time without a sign of life after which a process is taken for frozen."""


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process: how long ago, of which process, on which node of Ray."""

    seconds_ago: float
    node: str
    pid: int


class _Board:
    """Runs as an actor. Ages are taken by its own clock, so that those of other machines do not matter."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, str, int]] = {}

    def beat(self, name: str, node: str, pid: int) -> None:
        self._last[name] = (time.monotonic(), node, pid)

    def leave(self, name: str) -> None:
        self._last.pop(name, None)

    def read(self) -> dict[str, tuple[float, str, int]]:
        now = time.monotonic()
        return {name: (now - at, node, pid) for name, (at, node, pid) in self._last.items()}


class Board:
    """The board of a sweep, for whoever made it: reads signs, and kills what fell silent."""

    def __init__(self) -> None:
        self.handle: Any = on_node(_node_here(), soft=True, max_restarts=-1)(_Board).remote()
        self._silent: set[tuple[str, int]] = set()

    def read(self, timeout_seconds: float = 10.0) -> dict[str, Sign]:
        """The last sign of each process by name; nothing where the board itself does not answer."""
        try:
            found = ray.get(self.handle.read.remote(), timeout=timeout_seconds)
        except ray.exceptions.RayError:
            return {}
        return {name: Sign(*sign) for name, sign in found.items()}

    def forget(self, name: str) -> None:
        """A process ended and Ray said so."""
        self.handle.leave.remote(name)

    def kill_silent(self, signs: dict[str, Sign], seconds: float = SILENT_SECONDS) -> list[str]:
        """Kill processes that were silent for ``seconds`` at this call and at the one before; returns their names.

        At one call alone it may be the board that stood still.
        """
        silent = {(name, sign.pid) for name, sign in signs.items() if sign.seconds_ago > seconds}
        doomed = [name for name, pid in silent if (name, pid) in self._silent]
        self._silent = silent
        for name in doomed:
            sign = signs[name]
            on_node(sign.node, max_retries=0)(_kill_worker).remote(sign.pid)
            self.forget(name)
        return sorted(doomed)


class Pulse:
    """Tells a board that this process lives, from a thread, while a block runs.

    Args:
        board: the actor; None tells nobody.
        name: of what this process does, one of a kind within the sweep.
    """

    def __init__(self, board: Any, name: str) -> None:
        self._board, self._name = board, name
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._board is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._board is not None:
            self._thread.join()
            self._board.leave.remote(self._name)

    def _tell(self) -> None:
        node, pid = _node_here(), os.getpid()
        while True:
            self._board.beat.remote(self._name, node, pid)
            if self._done.wait(BEAT_SECONDS):
                return


def _node_here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _kill_worker(pid: int) -> None:
    """Kill a worker process of Ray on this node; nothing where the number belongs to something else by now."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if title.startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)
