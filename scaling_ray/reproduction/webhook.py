"""Tell a verdict to a web address: one JSON POST, signed with a secret of the environment, tried again for a while.

The signature is ``X-Scaling-Ray-Signature: sha256=HEX``, HMAC-SHA256 over ``TIMESTAMP.BODY`` with the timestamp of the
header ``X-Scaling-Ray-Timestamp`` (seconds since 1970): who checks both knows the sender, and refuses what is old.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from scaling_ray.errors import BadInput

SECRET = "SCALING_RAY_WEBHOOK_SECRET"
"""The environment variable that holds the secret."""
SIGNATURE, TIMESTAMP = "X-Scaling-Ray-Signature", "X-Scaling-Ray-Timestamp"
_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)
_TIMEOUT_SECONDS = 10.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A signed message goes to the address it was meant for, and nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Webhook:
    """An address that is told of verdicts."""

    def __init__(self, url: str) -> None:
        """Check ``url`` and the secret, before any work is done.

        Raises:
            BadInput: neither https:// nor an address of this machine, or no secret. The message shows no path: an
                address may hold a password.
        """
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        local = parts.scheme == "http" and self.host in _LOOPBACK
        if not self.host or not (parts.scheme == "https" or local):
            raise BadInput("R015", "--webhook", f"{parts.scheme}://{self.host}/...", "must begin with https://")
        secret = os.environ.get(SECRET)
        if not secret:
            raise BadInput("R016", SECRET, None, "is not set; the message to --webhook is signed with it")
        self._url, self._secret = url, secret.encode()

    def send(self, message: Mapping[str, Any], sleep: Callable[[float], None] = time.sleep) -> str | None:
        """Deliver ``message``; returns None, or in a line why it could not be (nothing rises: a verdict stands)."""
        body = json.dumps(message, allow_nan=False).encode()
        opener = urllib.request.build_opener(_NoRedirects())
        why = ""
        for wait in (*_WAITS_SECONDS, None):
            try:
                with opener.open(self._request(body), timeout=_TIMEOUT_SECONDS):
                    return None
            except urllib.error.HTTPError as error:
                with error:
                    why = f"status {error.code}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, ValueError) as error:  # URLError, timeouts and cut connections are OSErrors
                why = type(error).__name__
            if wait is not None:
                sleep(wait)
        return f"the webhook at {self.host} was not told ({why})"

    def _request(self, body: bytes) -> urllib.request.Request:
        when = str(int(time.time()))
        headers = {"Content-Type": "application/json", TIMESTAMP: when, SIGNATURE: sign(self._secret, when, body)}
        return urllib.request.Request(self._url, data=body, headers=headers, method="POST")


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of the signature's header."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
