"""How this process talks to S3: one client for each environment, and which errors are worth another try."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from scaling_ray.storage.retry import OUTAGE_SECONDS

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

TRANSIENT_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "NoSuchUpload")
"""Some come with status 400 or 404. NoSuchUpload: the upload has ended, and the answer got lost."""


@dataclass(frozen=True)
class S3Settings:
    """How patient a place on S3 is; times in seconds."""

    outage_seconds: float = OUTAGE_SECONDS
    """A request is tried again for so long, beyond what the SDK does by itself."""
    lease_seconds: float = 60.0
    """A lease that was not renewed for so long is free."""
    connect_seconds: float = 5.0
    answer_seconds: float = 60.0
    attempts: int = 5
    """Tries of one request by the SDK itself."""


class ConditionUnmet(Exception):
    """A conditional request was refused: the object is another than the one it was meant for."""


class RangeBeyondEnd(Exception):
    """The object ends before the bytes that were asked for."""


def client(settings: S3Settings) -> Any:
    """This process's client, by the environment of this moment; one made before a fork must not be shared."""
    environment = {n: v for n, v in os.environ.items() if n.startswith("AWS_") or n.upper() in PROXIES or n == "HOME"}
    timeouts = (settings.connect_seconds, settings.answer_seconds, settings.attempts)
    return _client(os.getpid(), tuple(sorted(environment.items())), *timeouts)


@lru_cache(maxsize=8)
def _client(
    process: int, environment: tuple[tuple[str, str], ...], connect_seconds: float, answer_seconds: float, attempts: int
) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": attempts}
    config = Config(retries=retries, connect_timeout=connect_seconds, read_timeout=answer_seconds)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-west-2"
    return boto3.session.Session().client("s3", region_name=region, config=config)


def code_of(error: Exception) -> str:
    """The code of an error that the store answered with, "" for any other."""
    from botocore.exceptions import ClientError

    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        # 409: another conditional put is under way.
        return status >= 500 or status in (408, 409, 429) or code_of(error) in TRANSIENT_CODES
    lost = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ConnectionError, TimeoutError)
    return isinstance(error, lost)
