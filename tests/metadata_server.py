"""The metadata services of AWS and GCP as far as their documentation says, on loopback, over real HTTP."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INSTANCE_ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED, MAINTENANCE = "/computeMetadata/v1/instance/preempted", "/computeMetadata/v1/instance/maintenance-event"


class FakeMetadata(ThreadingHTTPServer):
    """``items`` maps paths to texts (404 for others); ``broken`` makes every answer a 503."""

    daemon_threads = True

    def __init__(self, provider: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.provider, self.broken, self.answered = provider, False, 0
        self.tokens: set[str] = set()
        self.items = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"} if provider == "gcp" else {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeMetadata

    def do_PUT(self) -> None:
        lifetime = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        if self.server.broken:
            self._answer(503)
        elif self.server.provider != "aws" or self.path != "/latest/api/token":
            self._answer(405)
        elif lifetime is None or not 1 <= int(lifetime) <= 21_600 or self.headers["X-Forwarded-For"]:
            self._answer(400)
        else:
            token = secrets.token_hex(16)
            self.server.tokens.add(token)
            self._answer(200, token)

    def do_GET(self) -> None:
        if self.server.broken:
            self._answer(503)
        elif self.server.provider == "aws" and self.headers["X-aws-ec2-metadata-token"] not in self.server.tokens:
            self._answer(401)
        elif self.server.provider == "gcp" and self.headers["Metadata-Flavor"] != "Google":
            self._answer(403)
        elif self.path not in self.server.items:
            self._answer(404)
        else:
            self._answer(200, self.server.items[self.path])

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        if self.server.provider == "gcp":
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.server.answered += 1

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def metadata_of(provider: str) -> Iterator[FakeMetadata]:
    """A metadata service until the block ends."""
    with FakeMetadata(provider) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
