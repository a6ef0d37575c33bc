"""A prefix of an S3 bucket as a place.

Every request is tried again for ``OUTAGE_SECONDS``, beyond what the SDK does by itself, so that a store that is gone
for a minute costs a minute.
"""

from __future__ import annotations

import io
import os
import threading
import time
import uuid
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.storage.place import Place
from scaling_ray.storage.retry import patiently

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 60.0
LEASE_SECONDS = 60.0


class S3Place(Place):
    """A prefix of a bucket. Credentials, region and endpoint are those of the environment, as AWS tools read them."""

    def __init__(self, uri: str, field: str = "--out") -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket or not prefix.strip("/"):
            raise BadInput(field, uri, "needs a bucket and a folder in it: s3://BUCKET/FOLDER")
        super().__init__(f"s3://{bucket}/{prefix.strip('/')}", field)
        self.bucket, self.prefix = bucket, prefix.strip("/") + "/"

    def _call(self, operation: str, name: str | None = None, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        key = {} if name is None else {"Key": self.prefix + name}

        def answer() -> Any:
            reply = getattr(_client(), operation)(Bucket=self.bucket, **key, **arguments)
            # The body is part of the answer: a connection that breaks within it is tried again too.
            return reply["Body"].read() if operation == "get_object" else reply

        try:
            return patiently(answer, _is_transient)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404", "NotFound"):
                raise FileNotFoundError(f"{self.uri}/{name}") from error
            if code in ("PreconditionFailed", "InvalidRange"):
                raise
            raise BadInput(
                self.field, self.uri, f"S3 refuses {operation} ({code}); mend that and call again"
            ) from error
        except (BotoCoreError, OSError, ValueError) as error:  # ValueError: an endpoint that is no URL
            reason = " ".join(str(error).split())[:160]
            remedy = f"cannot be reached ({reason}); nothing is lost: call again when it can"
            raise BadInput(self.field, self.uri, remedy) from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Place."""
        from botocore.exceptions import ClientError

        if length == 0:
            return b""
        end = "" if length is None else str(start + length - 1)
        try:
            data: bytes = self._call("get_object", name, **({"Range": f"bytes={start}-{end}"} if start or end else {}))
        except ClientError as error:
            if error.response["Error"]["Code"] != "InvalidRange":
                raise
            return b""
        return data

    def size(self, name: str) -> int | None:
        """See Place."""
        try:
            return int(self._call("head_object", name)["ContentLength"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        self._call("put_object", name, Body=data)

    def create(self, name: str, data: bytes) -> bool:
        """See Place. An answer that got lost is told from another's by the contents."""
        from botocore.exceptions import ClientError

        try:
            self._call("put_object", name, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
            return self.read(name) == data
        return True

    def names(self, below: str = "") -> dict[str, int]:
        """See Place."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self.prefix + below, **more)
            for entry in page.get("Contents", []):
                if entry["Key"].endswith("/"):  # the sign of a folder that the console leaves
                    continue
                found[entry["Key"].removeprefix(self.prefix)] = entry["Size"]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def remove(self, below: str) -> None:
        """See Place."""
        for name in self.names(below) if below.endswith("/") else [below]:
            self._call("delete_object", name)

    def parquet_source(self, name: str) -> Any:
        """See Place."""
        import pyarrow as pa

        return pa.PythonFile(_Ranges(self, name), mode="r")

    def below(self, name: str) -> S3Place:
        """See Place."""
        return S3Place(f"{self.uri}/{name}", self.field)

    def lease(self, name: str) -> S3Lease:
        """See Place."""
        return S3Lease(self, name)


class S3Lease:
    """One writer at a time on S3: an object that its holder renews, taken over once it has not been for LEASE_SECONDS.

    Conditional puts decide who holds it. A holder that was cut off for longer may go on beside its successor: what they
    write must then be the same, as the files of a conversion are.
    """

    def __init__(self, where: S3Place, name: str) -> None:
        self._place, self._name, self._token = where, name, uuid.uuid4().hex
        self._done = threading.Event()
        self._etag = ""

    def __enter__(self) -> S3Lease:
        if not self._take():
            raise LeaseHeld(f"{self._place}: another driver works here; wait for it, or stop it")
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._renewer.join(timeout=ANSWER_SECONDS)
        if self._held_by_me():
            self._place.remove(self._name)

    def _put(self, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        body = f"{self._token} {time.time_ns()}".encode()
        try:
            self._etag = self._place._call("put_object", self._name, Body=body, **condition)["ETag"]
        except ClientError:
            return self._held_by_me()
        except FileNotFoundError:  # a conditional put on an object that is gone
            return False
        return True

    def _held_by_me(self) -> bool:
        """Whether the object is this holder's: an answer that got lost is told from another's by the contents."""
        try:
            head = self._place._call("head_object", self._name)
            mine = self._place.read(self._name).decode().split()[0] == self._token
        except FileNotFoundError:
            return False
        self._etag = head["ETag"] if mine else self._etag
        return mine

    def _take(self) -> bool:
        if self._put(IfNoneMatch="*"):
            return True
        try:
            head = self._place._call("head_object", self._name)
        except FileNotFoundError:
            return self._put(IfNoneMatch="*")
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        if (now - head["LastModified"]).total_seconds() < LEASE_SECONDS:
            return False
        return self._put(IfMatch=head["ETag"])

    def _renew(self) -> None:
        while not self._done.wait(LEASE_SECONDS / 4):
            try:
                if not self._put(IfMatch=self._etag):
                    return
            except BadInput:  # the store is away for longer than patience lasts: the work itself will say so
                return


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


@cache
def _client_of(process: int) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "max_attempts": 4}
    config = Config(retries=retries, connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-west-2"
    return boto3.session.Session().client("s3", region_name=region, config=config)


def _client() -> Any:
    """This process's client; one made before a fork must not be shared."""
    return _client_of(os.getpid())


def _is_transient(error: Exception) -> bool:
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 409, 429)  # 409: another conditional put is under way
    lost = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ConnectionError, TimeoutError)
    return isinstance(error, lost)
