"""One driver at a time on S3: an object that its holder renews by conditional puts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.storage.holder import FREE, Holder, seconds_since_boot
from scaling_ray.storage.lease import follow_lease, held_by_another

if TYPE_CHECKING:
    from scaling_ray.storage.s3 import S3Place

LONGEST_PAUSE_SECONDS = 1.0
"""Between two looks at a lease that may be abandoned."""


class S3Lease:
    """A lease that is renewed every sixth of ``seconds`` and free once it was not renewed for ``seconds``.

    Who finds it held watches it: a renewal shows that its holder lives. It is taken over when the store's clock and one
    of this machine that nobody sets both say that it stood still for ``seconds``; at once where it was given back, or
    where its holder ran on this machine and is gone. Conditional puts let one of several takers win.

    A holder may have been paused, or cut off, and taken over since: ``check`` says so before a change.
    """

    def __init__(self, where: S3Place, name: str, seconds: float, progress: Callable[[str], None]) -> None:
        settings, beat = where.settings, seconds / 6
        # A request that hangs must not outlast the lease.
        quick = replace(
            settings,
            connect_seconds=min(settings.connect_seconds, beat),
            answer_seconds=min(settings.answer_seconds, beat),
            attempts=1,
        )
        self._place = type(where)(where.uri, where.field, quick)
        hasty = replace(quick, outage_seconds=min(settings.outage_seconds, beat))
        self._hasty_place = type(where)(where.uri, where.field, hasty)
        self._followed, self._name, self._seconds, self._progress = where, name, seconds, progress
        self._holder = Holder.of_this_process(seconds)
        self._renewals = 0
        self._etag = ""
        self._renewed_at = -math.inf
        self._over = ""
        self._one_at_a_time = threading.Lock()
        self._done = threading.Event()

    @property
    def token(self) -> str:
        """This holder's alone."""
        return self._holder.token

    def check(self) -> None:
        """Return where the lease is surely ours; LeaseHeld, from then on, where another took it over.

        Free for half of ``seconds`` after a renewal was sent; then the lease is renewed first.
        """
        if not self._over and not self._is_fresh():
            with self._one_at_a_time:
                while not self._over and not self._is_fresh():
                    self._renew(self._place)
        if self._over:
            raise LeaseHeld("P012", f"{self._place}: {self._over}")

    def __enter__(self) -> S3Lease:
        self._take()
        self._renewer = threading.Thread(target=self._renew_now_and_then, daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._renewer.join()
        # Put, not deleted: a delete has no condition, and could hit a successor's lease.
        if not self._over:
            with suppress(BadInput):  # the store is away: the lease runs out by itself
                self._hasty_place.put_if(self._name, FREE, IfMatch=self._etag)
            self._over = "this driver gave its lease back, and may write no more"

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process the lease is followed, not held.
        return follow_lease, (self._followed, self._name, self.token)

    def _is_fresh(self) -> bool:
        return seconds_since_boot() - self._renewed_at < self._seconds / 2

    def _put(self, place: S3Place, **condition: str) -> bool:
        """Put this holder's body where the condition holds; False where it does not or an answer got lost."""
        self._renewals += 1
        body, began = self._holder.body(self._renewals), seconds_since_boot()
        etag = place.put_if(self._name, body, **condition)
        if etag:
            self._etag, self._renewed_at = etag, began
        return bool(etag)

    def _look(self, place: S3Place) -> dict[str, Any] | None:
        """The reply of the store for the lease's object, None where there is none."""
        try:
            reply: dict[str, Any] = place.ask("get_object", self._name)
        except FileNotFoundError:
            return None
        return reply

    def _renew(self, place: S3Place) -> None:
        """Renew the lease, or find out that it is another's."""
        if self._put(place, IfMatch=self._etag):
            return
        found = self._look(place)
        holder = Holder.parse(found["Body"]) if found else None
        if found and holder and holder.token == self.token:  # an answer got lost
            self._etag = found["ETag"]
        else:
            self._over = "another driver took over while this one was paused or cut off; this one stops"

    def _renew_now_and_then(self) -> None:
        while not self._over and not self._done.wait(self._seconds / 6):
            with self._one_at_a_time, suppress(BadInput):  # the store is away: the work itself will say so
                self._renew(self._hasty_place)

    def _take(self) -> None:
        seen, seen_at = "", 0.0
        while True:
            found = self._look(self._place)
            if found is None:
                if self._put(self._place, IfNoneMatch="*"):
                    return
                continue
            etag, holder = found["ETag"], Holder.parse(found["Body"])
            if holder and holder.token == self.token:  # an answer got lost
                if self._put(self._place, IfMatch=etag):
                    return
                continue
            state = holder.state() if holder else "unknown"
            stood_still = _age_seconds(found)
            needed = max(self._seconds, holder.seconds) if holder else self._seconds
            abandoned = found["Body"] == FREE or state == "gone"
            if seen == etag and seconds_since_boot() - seen_at >= needed and stood_still >= needed:
                abandoned = True
            if abandoned:
                if self._put(self._place, IfMatch=etag):
                    return
                continue
            if seen not in ("", etag) or (state == "running" and stood_still < needed / 2):
                raise LeaseHeld("P013", held_by_another(self._place, holder))
            if not seen:
                seen, seen_at = etag, seconds_since_boot()
                who = holder or "another driver"
                self._progress(f"{self._place}: {who} held this last; waiting up to {needed:.0f} s for a sign of life")
            time.sleep(min(LONGEST_PAUSE_SECONDS, self._seconds / 12))


def _age_seconds(reply: dict[str, Any]) -> float:
    """Seconds since an object was put, both times told by the store, in whole seconds."""
    now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - reply["LastModified"]).total_seconds())
