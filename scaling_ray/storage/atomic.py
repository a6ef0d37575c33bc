"""Files that are either whole or absent: atomic writes, create-if-absent, directory publishing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput

PARTIAL_PREFIX = ".partial-"
"""Names that start so are unfinished: readers never look at them. A directory's next builder removes its own."""


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:  # a full disk would stay full
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never a part, also after a kill -9."""
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
    _flush_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def create_if_absent(path: Path, data: bytes | str) -> bool:
    """Commit ``data`` under ``path`` once: True for the writer that came first, False for every later one."""
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _flush_directory(path.parent)
    return True


def move_file(source: Path, final: Path) -> None:
    """Move a finished file into place, whole or not at all: a rename, or a copy and a rename from another disk."""
    with open(source, "rb") as stream:
        os.fsync(stream.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with published_file(final) as temporary:
            shutil.copyfile(source, temporary)
        source.unlink()
    _flush_directory(final.parent)


def partial_directory(final: Path) -> Path:
    """An empty unfinished sibling of ``final`` to build in; leftovers of earlier attempts are removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    own = re.compile(re.escape(f"{PARTIAL_PREFIX}{final.name}-") + r"(retired-)?[0-9a-f]{8}")
    for leftover in final.parent.iterdir():
        if own.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.parent / f"{PARTIAL_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


@contextmanager
def published_file(final: Path) -> Iterator[Path]:
    """An unfinished sibling of ``final`` to write to; it takes the place of ``final`` when the block ends well.

    For files too large for ``write_atomic``. What killed writers of ``final`` left is removed first.
    """
    own = re.compile(re.escape(f"{PARTIAL_PREFIX}{final.name}-") + "[0-9a-f]{8}")
    for leftover in final.parent.iterdir():
        if own.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    temporary = final.parent / f"{PARTIAL_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
        _flush_directory(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep_partial_files(directory: Path) -> None:
    """Remove what killed writers left below ``directory``; only its one rightful writer may call this."""
    for leftover in list(directory.rglob(f"{PARTIAL_PREFIX}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def publish_directory(temporary: Path, final: Path, kept: Path | None = None) -> None:
    """Move a finished directory into place in one rename.

    An existing ``final`` steps aside first, to ``kept`` where that is given, else to be removed: a kill between the two
    renames leaves both whole beside its place.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    if final.exists():
        retired = final.parent / f"{PARTIAL_PREFIX}{final.name}-retired-{uuid.uuid4().hex[:8]}"
        if kept is not None and kept.exists():
            os.replace(kept, retired)
        os.replace(final, kept or retired)
        os.replace(temporary, final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(temporary, final)
    _flush_directory(final.parent)


def output_directory(path: str | Path, field: str = "--out") -> Path:
    """A directory this process can write to, created if needed; BadInput if it cannot be one."""
    if "://" in str(path):
        raise BadInput("P002", field, str(path), "is no local directory; results go to a disk that every node mounts")
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            "P003", field, str(path), f"cannot be a directory ({error.strerror}); name another place"
        ) from error
    if not os.access(directory, os.W_OK):
        raise BadInput("P004", field, str(path), "is not writable; name another place")
    return directory


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
