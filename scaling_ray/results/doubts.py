"""Numbers that cannot be what their column says: refused with the way out, or remarked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.results.fields import Sign

_FEWEST_SMALL = 1000.0  # fewer parameters than this, and a fraction of one, are millions or billions
_LARGEST = {"params": 1e13, "cells": 1e16}
_LARGEST_LOSS_NATS = 13.0  # the logarithm of a vocabulary of 440,000 words
_MOST_ROWS_NAMED = 8
_WITH_COMMA, _WITH_POINT = re.compile(r"\s*[1-9]\d{0,2},\d{3}\s*"), re.compile(r"\s*[1-9]\d{0,2}\.\d{3}\s*")


def refuse_bad(
    name: str, header: str, values: Sequence[Any], fields: Sequence[Any] | None, rows: Sequence[int]
) -> None:
    """Stop at a row whose parameters, data or loss are no positive number, or are counted in another unit.

    Args:
        name: declared name.
        header: the column it was read from.
        values: as read, (R,).
        fields: as they stand in the table, (R,); None for values that were computed.
        rows: positions of the rows that matter.

    Raises:
        BadInput: names the rows, from 1, and the way out.
    """
    for i in rows:
        if isinstance(values[i], str):
            raise BadInput("T018", name, values[i], f"row {i + 1}: not a number; correct it")
    bad = [i for i in rows if values[i] is None or not (math.isfinite(values[i]) and values[i] > 0)]
    if bad:
        numbers = ", ".join(str(i + 1) for i in bad[:_MOST_ROWS_NAMED]) + (", ..." if bad[_MOST_ROWS_NAMED:] else "")
        way_out = "correct it, or leave the row out"
        if name == "loss":
            way_out += " (a run that diverged: status failed, failure diverged)"
        what = f"row {numbers}" if len(bad) == 1 else f"rows {numbers}"
        shown = (values if fields is None else fields)[bad[0]]
        raise BadInput("T019", name, str(shown), f"{what}: must be a positive finite number; {way_out}")
    if name != "loss" and rows:
        _refuse_unit(name, header, [values[i] for i in rows])


def _refuse_unit(name: str, header: str, values: Sequence[float]) -> None:
    """Counts that are no counts: in millions or billions without saying so, or multiplied twice."""
    low, high = min(values), max(values)
    way_out = f"if they are millions or billions, name the column '{header} (M)' or '{header} (B)', or write 125M, 1.3B"
    if low < 1:
        raise BadInput("T020", header, f"{low:g}", f"below one, and {name} are counted in ones; {way_out}")
    if high < _FEWEST_SMALL and any(value != int(value) for value in values):
        raise BadInput("T021", header, f"{low:g} to {high:g}", f"fractions, and {name} are counted in ones; {way_out}")
    if high > _LARGEST[name]:
        raise BadInput(
            "T022", header, f"{high:g}", f"more {name} than any run has; a unit is said twice, or is wrong: correct it"
        )


def refuse_doubtful(header: str, fields: Sequence[Any], sign: Sign, *, whole: bool) -> None:
    """Stop at a number that may have a fraction or thousands apart, where it would be read as the unlikely one.

    A count of 100,000 is not one hundred where the comma is decimal, nor 100.000 where the point is; a loss of 2,001 is
    not two thousand.

    Args:
        header: of the column.
        fields: as they stand in the table.
        sign: the table's decimal sign.
        whole: whether the column counts.

    Raises:
        BadInput: names the first such number.
    """
    doubtful = _WITH_COMMA if whole == (sign == ",") else _WITH_POINT
    for field in fields:
        if isinstance(field, str) and doubtful.fullmatch(field):
            raise BadInput(
                "T023", header, field, "may have a decimal sign or thousands apart; write all numbers as 1234.5"
            )


def perplexity_like(header: str, losses: Sequence[float]) -> list[str]:
    """A remark where losses are too large for nats, and may be their exponential."""
    if not losses or min(losses) <= 1 or max(losses) <= _LARGEST_LOSS_NATS:
        return []
    return [
        f"{header} reaches {max(losses):,.0f}, more than a loss in nats can: it looks like a perplexity, and its "
        f"logarithm is the loss then (--log-loss)"
    ]


def in_proportion(header: str, data: Sequence[float], params: Sequence[float]) -> list[str]:
    """A remark where data grow in proportion to the size, so that no run can tell one from the other."""
    ratios = [each / size for each, size in zip(data, params, strict=True)]
    if len(set(params)) < 2 or max(ratios) > 1.02 * min(ratios):
        return []
    return [f"{header} is {ratios[0]:.3g} x params in every run: size and data grow together"]
