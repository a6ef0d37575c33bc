"""A directory of this machine, or one that it mounts, as a place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.storage.atomic import PARTIAL_PREFIX, create_if_absent, move_file, partial_directory, write_atomic
from scaling_ray.storage.lease import Lease
from scaling_ray.storage.log import AppendedLog, Log, whole_lines
from scaling_ray.storage.place import Claim, Place


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
            raise BadInput("P007", self.field, self.uri, remedy) from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self._allow()
        with self._named():
            yield

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Place."""
        try:
            with self._named(), open(self.path / name, "rb") as stream:
                stream.seek(start)
                return stream.read() if length is None else stream.read(length)
        except IsADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, "is a folder", str(self.path / name)) from error

    def size(self, name: str) -> int | None:
        """See Place."""
        with self._named():
            path = self.path / name
            return path.stat().st_size if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        with self._changing():
            write_atomic(self.path / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See Place."""
        with self._changing():
            return create_if_absent(self.path / name, data)

    def put_file(self, name: str, path: Path) -> None:
        """See Place."""
        with self._changing():
            move_file(path, self.path / name)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """See Place."""
        if self.size(name) is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self.path / name))
        yield self.path / name

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """See Place."""
        with self._changing():
            folder = partial_directory(self.path / name)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, name: str, text: str | None = None, seconds: float = 5.0) -> Log:
        """See Place."""
        path = self.path / name
        if text is not None:
            self.write(name, text.encode())
        else:
            with self._changing():
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab+", buffering=0) as stream:
                    stream.seek(0)
                    stream.truncate(len(whole_lines(stream.read())))

        def append(data: bytes) -> None:
            with self._changing(), open(path, "ab", buffering=0) as stream:
                before = stream.tell()
                try:
                    if stream.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:  # a full disk took a part of a line
                    stream.truncate(before)
                    raise

        def sync() -> None:
            with self._changing(), open(path, "rb") as stream:
                os.fsync(stream.fileno())

        return AppendedLog(append, sync)

    def names(self, below: str = "") -> dict[str, int]:
        """See Place."""
        found = {}
        with self._named():
            for folder, folders, files in os.walk(self.path / below.rpartition("/")[0], onerror=_unless_absent):
                folders[:] = [name for name in folders if not name.startswith(PARTIAL_PREFIX)]
                for file in files:
                    path = Path(folder) / file
                    name = path.relative_to(self.path).as_posix()
                    if name.startswith(below) and not file.startswith(PARTIAL_PREFIX):
                        with suppress(FileNotFoundError):  # removed meanwhile
                            found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def remove(self, below: str) -> None:
        """See Place."""
        with self._changing():
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
        inner = LocalPlace(self.path / name, self.field)
        inner._fence = self._fence
        return inner

    @contextmanager
    def lease(self, name: str, progress: Callable[[str], None] = lambda line: None) -> Iterator[Lease]:
        """See Place."""
        path = self.path / name
        with ExitStack() as stack:
            with self._named():
                held = stack.enter_context(Lease(path.parent, path.name))
            yield held

    def claim(self, name: str, owner: str) -> Claim:
        """See Place."""
        self._allow()
        return Claim(name, owner)

    def commit(self, name: str, claim: Claim, data: bytes) -> bool:
        """See Place."""
        return self.create(name, data) or self.committed(name) == data

    def committed(self, name: str) -> bytes | None:
        """See Place."""
        return self.read_if_there(name)

    def claims(self, below: str = "") -> list[str]:
        """See Place."""
        return []


def _unless_absent(error: OSError) -> None:
    """Pass over a folder that is not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _unless_in_use(function: Callable[..., Any], path: str, info: Any) -> None:
    """Pass over what went, or came, while a folder was being removed: writers outlive a killed driver by seconds."""
    if not isinstance(info[1], OSError) or info[1].errno not in (errno.ENOENT, errno.ENOTEMPTY):
        raise info[1]
