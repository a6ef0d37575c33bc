"""Where files lie: a directory or an ``s3://`` prefix behind one small interface.

A write is atomic in both: readers see the old object, the new one, or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any


class Place(ABC):
    """A flat or nested set of named files under one URI. Names use "/" and are relative.

    Errors of the medium (disk full, read-only, access denied, store unreachable) rise as BadInput: field, URI, way out.
    """

    def __init__(self, uri: str, field: str) -> None:
        self.uri, self.field = uri, field

    def __str__(self) -> str:
        return self.uri

    @abstractmethod
    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes start..start+length of a file (to its end where None); FileNotFoundError where there is none."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put ``data`` under ``name``, whole or not at all, in place of what was there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """The same for the first writer of ``name``; False, and nothing changed, for every later one."""

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
    def lease(self, name: str) -> AbstractContextManager[Any]:
        """Hold the file ``name`` as the one writer's sign while the block runs; LeaseHeld where another holds it."""
