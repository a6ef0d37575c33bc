"""Ticks of a schedule: the time a reproduction was due, as the name of its files, and whether it is too old."""

from __future__ import annotations

from datetime import UTC, datetime

from scaling_ray.errors import BadInput


def parse_tick(text: str) -> datetime:
    """A due time in UTC: a date ("2026-11-28", its midnight UTC) or a time with its zone ("2026-11-28T03:17Z").

    Raises:
        BadInput: neither, or a time without a zone.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInput("R013", "--tick", text, "is no time; write 2026-11-28 or 2026-11-28T03:17Z") from error
    if len(text) == len("2026-11-28"):
        return found.replace(tzinfo=UTC)
    if found.tzinfo is None:
        raise BadInput("R014", "--tick", text, "has no zone; end it in Z (UTC) or in an offset such as +01:00")
    return found.astimezone(UTC)


def stamp(tick: datetime) -> str:
    """A tick as part of a file's name: 20261128T031700Z."""
    return f"{tick:%Y%m%dT%H%M%SZ}"


def milliseconds(time: datetime) -> int:
    """Milliseconds since 1970."""
    return int(time.timestamp() * 1000)


def missed(due_ms: list[int], every_ms: int) -> list[int]:
    """Ticks between the first and the last of ``due_ms`` that nothing was heard of, at one every ``every_ms``."""
    gone = []
    for one, two in zip(sorted(due_ms), sorted(due_ms)[1:], strict=False):
        gone += [one + k * every_ms for k in range(1, round((two - one) / every_ms))]
    return gone
