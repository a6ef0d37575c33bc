"""The published scaling law re-read: what was reported, and what the same runs support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from scaling_ray.laws.audit import audit as audited

_CHOICES = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "estimator")),
        *((name, pa.int64()) for name in ("runs", "sizes")),
        *((f"{name}{end}", pa.float64()) for name in ("alpha", "c") for end in ("", "_low", "_high")),
    ]
)


@dataclass(frozen=True)
class ReportedLaw:
    """L = a P^-alpha + c as the study's own estimator finds it, P in parameters, L and c a mean squared error.

    ``r2_log`` is that of log(L - c) on log P; ``c_at_bound``: the floor is the edge of its own search.
    """

    alpha: float
    a: float
    c: float
    r2_log: float
    c_at_bound: bool


@dataclass(frozen=True)
class Range:
    """From the lowest to the highest value that the declared choices give."""

    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Audit:
    """What a published law's own runs say.

    ``alpha`` and ``c`` are ranges over the declared choices by least squares. ``choices`` is an Arrow table with a row
    for each choice: its number of runs and sizes, and alpha and c with their 95% intervals (null: an open end).
    ``document`` is all that ``scaling-ray audit`` writes to ``audit.json``.
    """

    reported: ReportedLaw
    verdict: Literal["refused"]
    reasons: tuple[str, ...]
    settles: tuple[str, ...]
    can_be_said: tuple[str, ...]
    alpha: Range
    c: Range
    choices: pa.Table = field(repr=False)
    document: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from summary(self.document)
        yield from (f"  why: {reason}" for reason in self.reasons)
        yield from (f"  can be said: {sentence}" for sentence in self.can_be_said)
        yield from (f"  would settle it: {way_out}" for way_out in self.settles)


def audit(published: str | Path | None = None) -> Audit:
    """Re-read the published law by the rules that this package's own fits pass.

    Args:
        published: directory of the published run tables; those that come with the package if left out.

    Raises:
        BadInput: the tables are not there, or lack a column.

    Example:
        >>> found = scaling_ray.audit()
        >>> round(found.reported.alpha, 3), found.verdict
        (0.266, 'refused')
    """
    document = audited(None if published is None else Path(published))
    reported, supported = document["published"], document["supported"]
    rows = [
        {name: choice[name] for name in ("name", "estimator", "runs", "sizes")}
        | {
            f"{name}{end}": choice[name][end.removeprefix("_") or "value"]
            for name in ("alpha", "c")
            for end in ("", "_low", "_high")
        }
        for choice in document["choices"]
    ]
    return Audit(
        reported=ReportedLaw(**{name: reported[name] for name in ReportedLaw.__dataclass_fields__}),
        verdict=supported["verdict"],
        reasons=tuple(supported["reasons"]),
        settles=tuple(supported["settles"]),
        can_be_said=tuple(supported["can_be_said"]),
        alpha=Range(supported["alpha"]["low"], supported["alpha"]["high"]),
        c=Range(supported["c"]["low"], supported["c"]["high"]),
        choices=pa.Table.from_pylist(rows, schema=_CHOICES),
        document=document,
    )


def summary(document: Mapping[str, Any]) -> list[str]:
    """An ``audit.json`` in two lines: what was reported, and what is supported."""
    reported, supported = document["published"], document["supported"]
    low, high = supported["alpha"]["low"], supported["alpha"]["high"]
    return [
        f"reported: alpha {reported['alpha']!r}, a {reported['a']!r}, c {reported['c']!r}, R2 {reported['r2_log']!r}",
        f"supported: {supported['verdict']}; alpha {low:.2f} to {high:.2f} over declared choices of the same runs",
    ]
