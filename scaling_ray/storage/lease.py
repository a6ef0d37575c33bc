"""One driver at a time in a directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from scaling_ray.errors import LeaseHeld


class Lease:
    """One driver at a time: an flock on ``directory/.lease`` that the kernel frees when the holder dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lease"
        self._handle: int | None = None

    def __enter__(self) -> Lease:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise LeaseHeld(f"{self._path.parent}: another driver works here; wait for it, or stop it") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            # Closing alone would leave the lock to a child that was forked and has not yet started its program.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = None
