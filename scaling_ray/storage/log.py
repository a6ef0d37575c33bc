"""Files that grow by lines: appended to on a disk, written anew on a store that cannot append."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable


class Log(ABC):
    """Lines that a reader sees soon after they were written; one writer and one thread at a time."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Add one or more whole lines; a kill cuts at most the last one."""

    @abstractmethod
    def flush(self) -> None:
        """Return once every line is where a reader finds it, also after this machine is gone."""


class AppendedLog(Log):
    """Each write is one append at once."""

    def __init__(self, append: Callable[[bytes], None], sync: Callable[[], None]) -> None:
        self._append, self._sync = append, sync

    def write(self, text: str) -> None:
        """See Log."""
        self._append(text.encode())

    def flush(self) -> None:
        """See Log."""
        self._sync()


class RewrittenLog(Log):
    """The whole text is written at a flush, and at a write where the last time is ``seconds`` ago or more."""

    def __init__(self, rewrite: Callable[[bytes], None], text: bytes, seconds: float) -> None:
        self._rewrite, self._text, self._seconds = rewrite, bytearray(text), seconds
        self._written, self._at = len(text), time.monotonic()

    def write(self, text: str) -> None:
        """See Log."""
        self._text += text.encode()
        if time.monotonic() - self._at >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """See Log."""
        if self._written == len(self._text):
            return
        self._rewrite(bytes(self._text))
        self._written, self._at = len(self._text), time.monotonic()


def whole_lines(text: bytes) -> bytes:
    """``text`` up to its last line end: what follows was cut by a kill."""
    return text[: text.rfind(b"\n") + 1]
