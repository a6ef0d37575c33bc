"""Who holds a lease: a token, and the process behind it as its own machine knows it."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

BOOT_ID = "/proc/sys/kernel/random/boot_id"
FREE = b'{"token": null}'
"""What a lease on S3 holds once it was given back."""


_KINDS = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Holder:
    """One holder of a lease; ``boot``, ``pid_namespace`` and ``started`` are empty where the system does not tell."""

    token: str
    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str
    seconds: float
    """A lease that was not renewed for so long is free."""

    @classmethod
    def of_this_process(cls, seconds: float) -> Holder:
        """This process, with a token of its own."""
        pid = os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_text(BOOT_ID),
            pid_namespace=_pid_namespace(),
            pid=pid,
            started=_state_and_start(pid)[1],
            seconds=seconds,
        )

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """The holder that ``data`` names, None where it names none that this version knows."""
        try:
            found = json.loads(data)
            return cls(**{field.name: _KINDS[str(field.type)](found[field.name]) for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None

    def body(self, renewals: int) -> bytes:
        """What the lease holds after so many renewals: other bytes each time."""
        return json.dumps(asdict(self) | {"renewals": renewals}).encode()

    def state(self) -> Literal["running", "gone", "unknown"]:
        """What this machine knows of the process: "unknown" for one of another machine, and for one that stands still.

        A process of another pid namespace, or of an earlier boot, is one of another machine.
        """
        if not (self.boot and self.pid_namespace and self.started):
            return "unknown"
        there = (self.host, self.boot, self.pid_namespace)
        if there != (socket.gethostname(), _text(BOOT_ID), _pid_namespace()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "gone"
        except PermissionError:
            pass
        state, started = _state_and_start(self.pid)
        if not started:  # another user's, and hidden
            return "unknown"
        if started != self.started or state in "ZX":  # its number was given away, or nobody has waited for it yet
            return "gone"
        return "unknown" if state in "Tt" else "running"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def seconds_since_boot() -> float:
    """A clock that nobody sets and that goes on while a process, or the machine, is stopped."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().strip().decode()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """The state (one letter) of a process and when it started, both empty where the system does not tell."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc shows another pid namespace than this process's
            return "", ""
        told = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", ""
    return told[0].decode(), told[19].decode()
