"""One driver at a time in a directory, and other processes that stop once their driver's time is over."""

from __future__ import annotations

import fcntl
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from scaling_ray.errors import LeaseHeld
from scaling_ray.storage.holder import FREE, Holder, seconds_since_boot
from scaling_ray.storage.place import Place


class Lease:
    """One driver at a time: an flock on ``directory/name`` that the kernel frees when the holder dies.

    The file says who holds it, so that the holder's workers can tell when another does.
    """

    def __init__(self, directory: Path, name: str = ".lease") -> None:
        self._directory, self._name = directory, name
        self._holder = Holder.of_this_process(0.0)
        self._handle: int | None = None

    @property
    def token(self) -> str:
        """This holder's alone."""
        return self._holder.token

    def check(self) -> None:
        """Nothing can take the lock from a living holder."""

    def __enter__(self) -> Lease:
        path = self._directory / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = Holder.parse(path.read_bytes())
            self._close()
            raise LeaseHeld("P005", held_by_another(path.parent, holder)) from error
        try:
            body = self._holder.body(0)
            os.pwrite(self._handle, body, 0)
            os.ftruncate(self._handle, len(body))
        except OSError:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            # Closing alone would leave the lock to a child that was forked and has not yet started its program.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process the lease is followed, not held.
        from scaling_ray.storage.local import LocalPlace

        return follow_lease, (LocalPlace(self._directory), self._name, self.token)


class FollowedLease:
    """A lease that another process holds, looked at now and then."""

    def __init__(self, place: Place, name: str, token: str, every_seconds: float) -> None:
        self._place, self._name, self._every_seconds = place, name, every_seconds
        self.token = token
        self._looked = -math.inf
        self._lost = False

    def check(self) -> None:
        """Return while the lease is not another's; LeaseHeld, from then on, once it is.

        A lease that was given back, or is not there, is nobody's.
        """
        if not self._lost and seconds_since_boot() - self._looked >= self._every_seconds:
            began = seconds_since_boot()
            data = self._place.read_if_there(self._name)
            if data and data != FREE:
                holder = Holder.parse(data)
                self._lost = holder is None or holder.token != self.token
            self._looked = began
        if self._lost:
            raise LeaseHeld("P006", f"{self._place}: another driver took over here; this process stops")

    def __reduce__(self) -> tuple[Any, ...]:
        # When it was looked at last means nothing on another machine.
        return follow_lease, (self._place, self._name, self.token, self._every_seconds)


def follow_lease(place: Place, name: str, token: str, every_seconds: float = 5.0) -> FollowedLease:
    """A fence for processes that work for the holder of a lease, on this machine or another.

    Args:
        place: where the lease lies.
        name: of the lease.
        token: the holder's.
        every_seconds: the lease is read at most so often; between two readings ``check`` costs nothing.
    """
    return FollowedLease(place, name, token, every_seconds)


def held_by_another(where: object, holder: Holder | None) -> str:
    """The sentence for who finds a lease held."""
    who = f" ({holder})" if holder else ""
    return f"{where}: another driver works here{who}; wait for it, or stop it"
