"""What a cloud's instance metadata says about the end of this machine: AWS (IMDSv2) and GCP. No Ray.

AWS answers 404 for ``spot/instance-action`` until two minutes before it takes a spot instance back. GCP turns
``instance/preempted`` to TRUE thirty seconds before, and ``instance/maintenance-event`` to
TERMINATE_ON_HOST_MAINTENANCE sixty seconds before a machine that cannot be moved is stopped; it gives that warning only
to machines that ask. (Sources: the EC2 user guide on spot interruption notices, the Compute Engine documentation on
preemptible instances and on maintenance events.)
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from scaling_ray.errors import BadInput, ScalingRayError

Provider = Literal["auto", "aws", "gcp"]

AWS_URL, GCP_URL = "http://169.254.169.254", "http://metadata.google.internal"
ANSWER_SECONDS = 2.0
"""How long a metadata service may take: it is on the machine's own link."""
TRIES = 3
"""Attempts at finding a metadata service: its route may come up after this process."""
TOKEN_SECONDS = 21_600
"""Life of an IMDSv2 token, the longest there is."""
GCP_PREEMPTION_SECONDS, GCP_MAINTENANCE_SECONDS = 30.0, 60.0


class MetadataFailure(ScalingRayError):
    """A metadata service did not answer, or not as its documentation says."""


@dataclass(frozen=True)
class Notice:
    """This machine is about to go.

    ``what`` is for people and, with ``deadline_seconds`` (since 1970; None where the cloud names no time), for telling
    one notice from the next. ``key`` identifies the notice: asked again, the same one has the same key.
    """

    key: str
    what: str
    deadline_seconds: float | None


class Metadata(Protocol):
    """The metadata service of one cloud."""

    provider: str

    def is_there(self) -> bool:
        """Whether this cloud's service answers here."""

    def notice(self) -> Notice | None:
        """The notice that stands now, or None; raises MetadataFailure."""


class _Answer(NamedTuple):
    status: int
    text: str
    headers: Message


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> _Answer:
    """One answer, whatever its status, without proxies and redirects; raises MetadataFailure where there is none."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        try:
            with _DIRECT.open(request, timeout=ANSWER_SECONDS) as answer:
                return _Answer(answer.status, answer.read(65_536).decode("utf-8", "replace"), answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return _Answer(error.code, "", error.headers)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MetadataFailure("W025", f"{url} does not answer ({str(reason) or type(reason).__name__})") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())


class Aws:
    """EC2: every question shows a session token (IMDSv2)."""

    provider = "aws"

    def __init__(self, url: str = AWS_URL, rebalance: bool = False) -> None:
        """``rebalance``: a rebalance recommendation is a notice too, without a deadline."""
        self._url, self._rebalance, self._token = url, rebalance, ""

    def is_there(self) -> bool:
        """See Metadata."""
        try:
            self._renew_token()
        except MetadataFailure:
            return False
        return True

    def notice(self) -> Notice | None:
        """See Metadata."""
        text = self._read("spot/instance-action")
        if text is not None:
            action, at = _fields(text, "action", "time", source="spot/instance-action")
            if at is None:  # hibernation begins at once, and has no time
                return Notice(f"aws {action}", f"spot instance-action {action}, at once", time.time())
            return Notice(f"aws {action} {at}", f"spot instance-action {action} at {at}", _seconds(at))
        text = self._read("events/recommendations/rebalance") if self._rebalance else None
        if text is not None:
            (at,) = _fields(text, "noticeTime", source="events/recommendations/rebalance")
            return Notice(f"aws rebalance {at}", f"rebalance recommendation of {at}", None)
        return None

    def _read(self, name: str) -> str | None:
        """An item of the metadata; None where there is none (404)."""
        if not self._token:
            self._renew_token()
        url = f"{self._url}/latest/meta-data/{name}"
        answer = _ask(url, {"X-aws-ec2-metadata-token": self._token})
        if answer.status == 401:  # the token has expired
            self._renew_token()
            answer = _ask(url, {"X-aws-ec2-metadata-token": self._token})
        if answer.status == 404:
            return None
        return _expect_200(url, answer)

    def _renew_token(self) -> None:
        url = f"{self._url}/latest/api/token"
        answer = _ask(url, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}, "PUT")
        self._token = _expect_200(url, answer).strip()
        if not self._token:
            raise MetadataFailure("W026", f"{url} gave an empty token")


class Gcp:
    """Compute Engine: every question and every answer has the header ``Metadata-Flavor: Google``."""

    provider = "gcp"

    def __init__(self, url: str = GCP_URL) -> None:
        self._url, self._last_clear = url, 0.0

    def is_there(self) -> bool:
        """See Metadata."""
        try:
            return self._read("preempted") is not None
        except MetadataFailure:
            return False

    def notice(self) -> Notice | None:
        """See Metadata. Deadlines count from the last answer without a notice: it may have come right after."""
        asked = time.time()
        since = self._last_clear or asked
        preempted = self._read("preempted")
        if preempted == "TRUE":
            return Notice("gcp preempted", "preempted", since + GCP_PREEMPTION_SECONDS)
        event = self._read("maintenance-event")
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice("gcp maintenance", f"maintenance-event {event}", since + GCP_MAINTENANCE_SECONDS)
        if preempted not in (None, "FALSE"):
            raise MetadataFailure(
                "W027", f"{self._url}: instance/preempted is {preempted[:60]!r}, neither TRUE nor FALSE"
            )
        self._last_clear = asked
        return None

    def _read(self, name: str) -> str | None:
        """A key of the instance's metadata; None where there is none (404)."""
        url = f"{self._url}/computeMetadata/v1/instance/{name}"
        answer = _ask(url, {"Metadata-Flavor": "Google"})
        if answer.status == 404:
            return None
        text = _expect_200(url, answer).strip()
        if answer.headers["Metadata-Flavor"] != "Google":
            raise MetadataFailure("W028", f"{url} answers without the header Metadata-Flavor: Google")
        return text


def find_metadata(provider: Provider, url: str | None, rebalance: bool = False) -> Metadata | None:
    """The metadata service of this machine.

    Args:
        provider: the cloud; "auto": the first whose service answers within ``TRIES`` attempts, None where none does.
        url: ``http://HOST[:PORT]`` of the service, in place of the cloud's own; BadInput for anything else.
        rebalance: whether AWS's rebalance recommendations are notices.
    """
    if url is not None:
        url = url.rstrip("/")
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path or parts.query:
            raise BadInput(
                "W029", "--metadata-url", url, "is no address of a metadata service; give http://HOST[:PORT]"
            )
    both: tuple[Metadata, ...] = (Aws(url or AWS_URL, rebalance), Gcp(url or GCP_URL))
    if provider != "auto":
        return next(metadata for metadata in both if metadata.provider == provider)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(1.0)
        for metadata in both:
            if metadata.is_there():
                return metadata
    return None


def _expect_200(url: str, answer: _Answer) -> str:
    if answer.status != 200:
        raise MetadataFailure("W030", f"{url} answers {answer.status}")
    return answer.text


def _fields(text: str, first: str, *others: str, source: str) -> tuple[Any, ...]:
    """Strings of a JSON object: ``first`` must be there, ``others`` are None where they are not."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get(first), str):
        raise MetadataFailure("W031", f"{source} is {text[:60]!r}, not a JSON object with {first!r}")
    return tuple(found.get(name) for name in (first, *others))


def _seconds(at: str) -> float:
    """Seconds since 1970 of a UTC time such as 2026-11-28T08:22:00Z."""
    try:
        parsed = datetime.fromisoformat(at)
    except (TypeError, ValueError) as error:
        raise MetadataFailure("W032", f"spot/instance-action: its time {at!r} is none") from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
