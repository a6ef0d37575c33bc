"""A prefix of an S3 bucket as a place.

Every request is tried again for the settings' ``outage_seconds``, so that a store that is gone for a minute costs a
minute.
"""

from __future__ import annotations

import io
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scaling_ray.errors import BadInput
from scaling_ray.extras import require_extras
from scaling_ray.storage.log import Log, RewrittenLog, whole_lines
from scaling_ray.storage.place import Claim, Place
from scaling_ray.storage.retry import patiently
from scaling_ray.storage.s3_client import ConditionUnmet, RangeBeyondEnd, S3Settings, client, code_of, is_transient
from scaling_ray.storage.s3_lease import S3Lease

COPY_BYTES = 64 << 20
"""Of a file that is copied to this machine, asked for at a time."""
CHANGES = ("put_object", "delete_object", "upload_fileobj")
RESERVATION = b'{"scaling_ray_reservation": 1, '
RESERVATION_BYTES = 512
"""Every reservation has just this size, so that a listing shows what may be one."""
OWNER_LETTERS = 64

T = TypeVar("T")


class S3Place(Place):
    """A prefix of a bucket. Credentials, region and endpoint are those of the environment, as AWS tools read them."""

    def __init__(self, uri: str, field: str = "--out", settings: S3Settings | None = None) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket or not prefix.strip("/"):
            raise BadInput("P008", field, uri, "needs a bucket and a folder in it: s3://BUCKET/FOLDER")
        require_extras(field, "s3")
        super().__init__(f"s3://{bucket}/{prefix.strip('/')}", field)
        self.bucket, self.prefix = bucket, prefix.strip("/") + "/"
        self.settings = settings or S3Settings()

    def ask(self, operation: str, name: str | None = None, **arguments: Any) -> Any:
        """The reply to one request about the object ``name``, or about the bucket.

        Raises:
            FileNotFoundError: there is no such object.
            ConditionUnmet: a condition among ``arguments`` does not hold.
            RangeBeyondEnd: the range among them begins behind the object's end.
            BadInput: the store refuses, or cannot be reached for ``outage_seconds``.
        """
        key = {} if name is None else {"Key": self.prefix + name}

        def answer() -> Any:
            # A fence is asked before each try: the SDK must not try by itself, which it may do for minutes.
            one_try = self._fence is not None and operation in CHANGES
            settings = replace(self.settings, attempts=1) if one_try else self.settings
            reply = getattr(client(settings), operation)(Bucket=self.bucket, **key, **arguments)
            if operation == "get_object":
                # The body is part of the answer: a connection that breaks within it is tried again too.
                reply["Body"] = reply["Body"].read()
            return reply

        return self._patiently(operation, name, answer)

    def _patiently(self, operation: str, name: str | None, answer: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        def allowed() -> T:
            if operation in CHANGES:
                self._allow()
            return answer()

        try:
            return patiently(allowed, is_transient, self.settings.outage_seconds)
        except BadInput:  # the fence's own
            raise
        except ClientError as error:
            code = code_of(error)
            if code in ("NoSuchKey", "404", "NotFound"):
                raise FileNotFoundError(f"{self.uri}/{name}") from error
            if code == "PreconditionFailed":
                raise ConditionUnmet(f"{self.uri}/{name}") from error
            if code == "InvalidRange":
                raise RangeBeyondEnd(f"{self.uri}/{name}") from error
            remedy = f"S3 refuses {operation} ({code}); mend that and call again"
            raise BadInput("P009", self.field, self.uri, remedy) from error
        except (BotoCoreError, OSError, ValueError) as error:  # ValueError: an endpoint that is no URL
            reason = " ".join(str(error).split())[:160]
            remedy = f"cannot be reached ({reason}); nothing is lost: call again when it can"
            raise BadInput("P010", self.field, self.uri, remedy) from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Place."""
        if length == 0:
            return b""
        end = "" if length is None else str(start + length - 1)
        asked = {"Range": f"bytes={start}-{end}"} if start or end else {}
        try:
            data: bytes = self.ask("get_object", name, **asked)["Body"]
        except RangeBeyondEnd:
            return b""
        return data

    def _tagged(self, name: str) -> tuple[bytes, str] | None:
        """The bytes and the ETag of an object, None where there is none."""
        try:
            reply = self.ask("get_object", name)
        except FileNotFoundError:
            return None
        return reply["Body"], reply["ETag"]

    def size(self, name: str) -> int | None:
        """See Place."""
        try:
            return int(self.ask("head_object", name)["ContentLength"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        self.ask("put_object", name, Body=data)

    def put_if(self, name: str, data: bytes, **condition: str) -> str | None:
        """Put ``data`` where a condition holds: the new ETag, None where it does not.

        Where an answer got lost the condition may have held: the contents tell.
        """
        try:
            return str(self.ask("put_object", name, Body=data, **condition)["ETag"])
        except (ConditionUnmet, FileNotFoundError):  # not found: it was to be replaced, and is gone
            return None

    def create(self, name: str, data: bytes) -> bool:
        """See Place. An answer that got lost is told from another's by the contents."""
        while True:
            if self.put_if(name, data, IfNoneMatch="*"):
                return True
            there = self.read_if_there(name)
            if there is not None:
                return there == data

    def put_file(self, name: str, path: Path) -> None:
        """See Place. What a killed upload of a large file leaves is for the bucket's lifecycle rule to remove."""
        from boto3.s3.transfer import TransferConfig

        if not path.is_file():
            raise FileNotFoundError(path)

        def upload() -> None:
            with open(path, "rb") as stream:
                # The fence is asked while the bytes go out, too: that may take longer than a lease.
                client(self.settings).upload_fileobj(
                    stream,
                    self.bucket,
                    self.prefix + name,
                    Callback=lambda _: self._allow(),
                    Config=TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=32 << 20),
                )

        self._patiently("upload_fileobj", name, upload)
        path.unlink()

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """See Place."""
        with _temporary_directory() as folder:
            path = folder / name.rpartition("/")[2]
            while not self._copied(name, path):
                pass
            yield path

    def _copied(self, name: str, path: Path) -> bool:
        """Whether all parts of the copy are of one object: it may be replaced while it is read."""
        head = self.ask("head_object", name)
        size = int(head["ContentLength"])
        try:
            with open(path, "wb") as stream:
                for start in range(0, size, COPY_BYTES):
                    own = {"Range": f"bytes={start}-{min(start + COPY_BYTES, size) - 1}", "IfMatch": head["ETag"]}
                    stream.write(self.ask("get_object", name, **own)["Body"])
        except ConditionUnmet:
            return False
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise _unusable_temporary(error) from error
        return True

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """See Place. It lies where TMPDIR says."""
        self._allow()
        with _temporary_directory() as folder:
            yield folder

    def log(self, name: str, text: str | None = None, seconds: float = 5.0) -> Log:
        """See Place."""
        if text is None:
            there = whole_lines(self.read_if_there(name) or b"")
        else:
            there = text.encode()
            self.write(name, there)
        return RewrittenLog(lambda data: self.write(name, data), there, seconds)

    def names(self, below: str = "") -> dict[str, int]:
        """See Place."""
        return {name: size for name, size in self._keys(below).items() if not name.endswith("/") and name}

    def _keys(self, below: str) -> dict[str, int]:
        """Every object below, also the signs of folders that the console and Arrow leave: keys that end in "/"."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            page = self.ask("list_objects_v2", Prefix=self.prefix + below, **more)
            for entry in page.get("Contents", []):
                found[entry["Key"].removeprefix(self.prefix)] = entry["Size"]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def remove(self, below: str) -> None:
        """See Place."""
        for name in self._keys(below) if below.endswith("/") else [below]:
            self.ask("delete_object", name)

    def parquet_source(self, name: str) -> Any:
        """See Place."""
        import pyarrow as pa

        return pa.PythonFile(_Ranges(self, name), mode="r")

    def below(self, name: str) -> S3Place:
        """See Place."""
        inner = S3Place(f"{self.uri}/{name}", self.field, self.settings)
        inner._fence = self._fence
        return inner

    def lease(self, name: str, progress: Callable[[str], None] = lambda line: None) -> S3Lease:
        """See Place."""
        return S3Lease(S3Place(self.uri, self.field, self.settings), name, self.settings.lease_seconds, progress)

    def claim(self, name: str, owner: str) -> Claim:
        """See Place."""
        data = _reservation(owner)
        while True:
            there = self._tagged(name)
            if there and there[0] == data:  # the answer got lost
                return Claim(name, owner, there[1])
            if there and not _is_reservation(there[0]):
                return Claim(name, owner)
            etag = self.put_if(name, data, **({"IfMatch": there[1]} if there else {"IfNoneMatch": "*"}))
            if etag:
                return Claim(name, owner, etag)

    def commit(self, name: str, claim: Claim, data: bytes) -> bool:
        """See Place."""
        if _is_reservation(data):
            raise ValueError("what is committed must not look like a reservation")
        if claim.etag and self.put_if(name, data, IfMatch=claim.etag):
            return True
        return self.committed(name) == data

    def committed(self, name: str) -> bytes | None:
        """See Place."""
        there = self.read_if_there(name)
        return None if there is None or _is_reservation(there) else there

    def claims(self, below: str = "") -> list[str]:
        """See Place."""
        likely = [name for name, size in self.names(below).items() if size == RESERVATION_BYTES]
        return [name for name in likely if _is_reservation(self.read_if_there(name) or b"")]


def _reservation(owner: str) -> bytes:
    """Unlike any other, so that its ETag is."""
    shown = owner.encode("ascii", "replace").decode()[:OWNER_LETTERS]
    fields = json.dumps({"owner": shown, "claim": uuid.uuid4().hex})
    return (RESERVATION + fields[1:].encode()).ljust(RESERVATION_BYTES)


def _is_reservation(data: bytes) -> bool:
    return len(data) == RESERVATION_BYTES and data.startswith(RESERVATION)


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="scaling-ray-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _unusable_temporary(error) from error
    with folder as path:
        yield Path(path)


def _unusable_temporary(error: OSError) -> BadInput:
    remedy = f"cannot be used ({error.strerror}); mend that, or set TMPDIR to another directory, then call again"
    return BadInput("P011", "TMPDIR", tempfile.gettempdir(), remedy)


class _Ranges(io.RawIOBase):
    """A seekable view of an object; each read is one request for that range."""

    def __init__(self, place: S3Place, name: str) -> None:
        size = place.size(name)
        if size is None:
            raise FileNotFoundError(f"{place.uri}/{name}")
        self._place, self._name, self._size, self._at = place, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._place.read(self._name, self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data
