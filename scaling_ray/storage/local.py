"""A directory of this machine, or one that it mounts, as a place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.storage.atomic import PARTIAL_PREFIX, create_if_absent, write_atomic
from scaling_ray.storage.lease import Lease
from scaling_ray.storage.place import Place


class LocalPlace(Place):
    """A directory."""

    def __init__(self, path: Path, field: str = "--out") -> None:
        super().__init__(str(path), field)
        self.path = path

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            raise
        except OSError as error:
            remedy = f"cannot be used ({error.strerror}); mend that or name another place, then call again"
            raise BadInput(self.field, self.uri, remedy) from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Place."""
        with self._named(), open(self.path / name, "rb") as stream:
            stream.seek(start)
            return stream.read() if length is None else stream.read(length)

    def size(self, name: str) -> int | None:
        """See Place."""
        with self._named():
            path = self.path / name
            return path.stat().st_size if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        with self._named():
            write_atomic(self.path / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See Place."""
        with self._named():
            return create_if_absent(self.path / name, data)

    def names(self, below: str = "") -> dict[str, int]:
        """See Place."""
        found = {}
        with self._named():
            for folder, _, files in os.walk(self.path, onerror=_unless_absent):
                for file in files:
                    path = Path(folder) / file
                    name = path.relative_to(self.path).as_posix()
                    if name.startswith(below) and not file.startswith(PARTIAL_PREFIX):
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def remove(self, below: str) -> None:
        """See Place."""
        with self._named():
            target = self.path / below
            if not below.endswith("/"):
                target.unlink(missing_ok=True)
                return
            if target.is_dir():
                shutil.rmtree(target, onerror=_unless_in_use)

    def parquet_source(self, name: str) -> str:
        """See Place."""
        return str(self.path / name)

    def below(self, name: str) -> LocalPlace:
        """See Place."""
        return LocalPlace(self.path / name, self.field)

    @contextmanager
    def lease(self, name: str) -> Iterator[Lease]:
        """See Place."""
        folder = (self.path / name).parent
        with ExitStack() as stack:
            with self._named():
                folder.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(Lease(folder))
            yield held


def _unless_absent(error: OSError) -> None:
    """Pass over a folder that is not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _unless_in_use(function: Callable[..., Any], path: str, info: Any) -> None:
    """Pass over what went, or came, while a folder was being removed: writers outlive a killed driver by seconds."""
    if not isinstance(info[1], OSError) or info[1].errno not in (errno.ENOENT, errno.ENOTEMPTY):
        raise info[1]
