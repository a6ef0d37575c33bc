"""Where files lie: a directory or an ``s3://`` prefix behind one small interface.

A write is atomic in both: readers see the old object, the new one, or none.
"""

from __future__ import annotations

import copy
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from scaling_ray.storage.log import Log


class Fence(Protocol):
    """Whatever knows whether its owner may still write."""

    def check(self) -> None:
        """Return where the owner may write; LeaseHeld where another has taken over, or may have."""


class Held(Fence, Protocol):
    """A lease that is held: its token is this holder's alone."""

    @property
    def token(self) -> str:
        """32 hexadecimal digits, other ones for every holder."""


@dataclass(frozen=True)
class Claim:
    """The right to commit ``name``; ``etag`` is the reservation's on S3, empty where there is none."""

    name: str
    owner: str
    etag: str = ""


class Place(ABC):
    """A flat or nested set of named files under one URI. Names use "/" and are relative.

    Errors of the medium (disk full, read-only, access denied, store unreachable) rise as BadInput: field, URI, way out.
    A place pickles, and is the same in another process.
    """

    def __init__(self, uri: str, field: str) -> None:
        self.uri, self.field = uri, field
        self._fence: Fence | None = None

    def __str__(self) -> str:
        return self.uri

    @abstractmethod
    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes start..start+length of a file (to its end where None); FileNotFoundError where there is none."""

    def read_if_there(self, name: str) -> bytes | None:
        """All bytes of a file, None where there is none."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; a folder is none."""
        return self.size(name) is not None

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put ``data`` under ``name``, whole or not at all, in place of what was there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """The same for the first writer of ``name``; False, and nothing changed, for every later one."""

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """Publish a finished local file under ``name``, whole or not at all, in place of what was there.

        The file at ``path`` is consumed: it is gone when this returns, and still there where an error rises.
        FileNotFoundError where ``path`` is no file.
        """

    def copy(self, name: str, target: Place, target_name: str) -> None:
        """Put a file's bytes under a name of another place, whole or not at all; FileNotFoundError without it."""
        with self.local_copy(name) as path, target.scratch(target_name) as folder:
            shutil.copyfile(path, folder / "copy")
            target.put_file(target_name, folder / "copy")

    @abstractmethod
    def local_copy(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the bytes of ``name``, for reading only, while the block runs.

        It is the file itself in a directory, a temporary copy from S3. FileNotFoundError where there is none.
        """

    @abstractmethod
    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """An empty local directory to build files for ``name`` in; whatever is left in it goes with the block.

        In a directory it lies on the same file system, so that ``put_file`` is a rename, and what killed builders of
        the same name left is removed: one builder of a name at a time. Readers and ``names`` never see it.
        """

    @abstractmethod
    def log(self, name: str, text: str | None = None, seconds: float = 5.0) -> Log:
        """A file to append lines to.

        Args:
            name: of the file.
            text: the file begins anew with these lines; None: it goes on after the whole lines that are there.
            seconds: on S3, which cannot append, lines may stay with this process for so long.
        """

    @abstractmethod
    def names(self, below: str = "") -> dict[str, int]:
        """Every file whose name begins with ``below`` and its bytes; unfinished writes are none."""

    @abstractmethod
    def remove(self, below: str) -> None:
        """Remove the file ``below``, or, where it ends in "/", everything under it."""

    @abstractmethod
    def parquet_source(self, name: str) -> Any:
        """What ``pyarrow.parquet`` opens to read parts of a file."""

    @abstractmethod
    def below(self, name: str) -> Place:
        """The place of a folder in this one."""

    @abstractmethod
    def lease(self, name: str, progress: Callable[[str], None] = lambda line: None) -> AbstractContextManager[Held]:
        """Hold the file ``name`` as the one writer's sign while the block runs; LeaseHeld where another holds it.

        A holder that was killed loses it: at once on a disk, and on S3 where it ran on this machine; else once it has
        not been renewed for the lease's seconds, which this call waits for, told to ``progress`` in one line.
        """

    @abstractmethod
    def claim(self, name: str, owner: str) -> Claim:
        """The right to commit ``name`` once, taken from whoever claimed it before.

        On S3 a small reservation stands under ``name`` until the commit, and a later claim voids every earlier one. On
        a disk nothing is written and no claim voids another. A name that is committed stays so.
        """

    @abstractmethod
    def commit(self, name: str, claim: Claim, data: bytes) -> bool:
        """Put ``data`` under ``name`` once and for all; whether ``data`` is what stands there now.

        False where another committed first or, on S3, where another has claimed since. A lost answer is told from
        another's commit by the contents, so these must be the caller's own.
        """

    @abstractmethod
    def committed(self, name: str) -> bytes | None:
        """What was committed under ``name``, None while nothing is; ``read`` and ``names`` also show a reservation."""

    @abstractmethod
    def claims(self, below: str = "") -> list[str]:
        """Names that are reserved and not committed; claim them again to void what their claimers may still do."""

    def _allow(self) -> None:
        """Let a change happen, or raise LeaseHeld."""
        if self._fence is not None:
            self._fence.check()


P = TypeVar("P", bound=Place)


def fenced(place: P, fence: Fence) -> P:
    """The same place for a writer that must hold a lease: ``fence.check()`` comes before every change.

    Reading is free. Where a lease of this process is the fence, a pickled copy follows it (``follow_lease``).
    """
    guarded = copy.copy(place)
    guarded._fence = fence
    return guarded
