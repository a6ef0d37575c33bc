"""Fit a table of runs, or each of its parts, and say the result in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.laws import nothing_to_fit
from scaling_ray.laws.points import is_finished
from scaling_ray.results.cohorts import AGREEMENT, fit_columns
from scaling_ray.results.foreign import Table

_MOST_SIZES = 12


def fit_read_table(table: Table, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The content of ``fit.json`` for a table that was read.

    Of a table taken apart it is the fit of the part with the most runs, and all parts stand under ``cohorts`` by their
    names ("dataset=c4"). A part with nothing to fit is refused there, with the reason.

    Raises:
        BadInput: the table is in one piece, and there is nothing in it that a law could be fitted to.
    """
    if not table.parts:
        _refuse_unfinished(table)
        return fit_columns(table, progress=progress)
    fits = {name: _fit_part(part, progress) for name, part in table.parts.items()}
    largest = max(fits, key=lambda name: len(table.parts[name]["loss"]))
    return {**fits[largest], "cohorts": fits}


def _refuse_unfinished(table: Table) -> None:
    """Say which words mean that a run is finished, where none of a table's does."""
    states = table["status"] if "status" in table else [None]
    if not any(is_finished(None, state) for state in states):
        found = ", ".join(sorted({str(state) for state in states}))
        header = table["columns_used"]["status"]
        raise BadInput(
            "T051", header, found, "no run is finished; the words for that are done, finished, completed, success"
        )


def _fit_part(part: Table, progress: Callable[[str], None] | None) -> dict[str, Any]:
    try:
        return fit_columns(part, progress=progress)
    except BadInput as error:
        return nothing_to_fit(error.said, part, AGREEMENT)


def said(found: Mapping[str, Any]) -> Iterator[str]:
    """A fit in lines of plain text: the verdict first, then the numbers; each part of a table below its name."""
    if "cohorts" not in found:
        yield from _said_once(found)
        return
    for name, fit in found["cohorts"].items():
        yield f"{name}:"
        yield from (f"  {line}" for line in _said_once(fit))


def _said_once(found: Mapping[str, Any]) -> Iterator[str]:
    head = found["headline"]
    first, second = head["sentences"]
    yield f"{first[0].lower()}{first[1:]}"
    yield f"  {second}"
    if "parameters" in head:
        yield f"  {head['formula']}"
        for name, parameter in head["parameters"].items():
            yield f"  {name} = {_with_interval(parameter)}"
    for part in ("size", "data", "predictions"):
        yield f"  {part}: {head[part]['verdict']}{_because(head, part, found['notes'])}"
        if "parameters" not in head and head[part].get("parameter"):
            yield f"    {head[part]['exponent']} = {_with_interval(head[part]['parameter'])}"
    for entry in head["predictions"]["entries"]:
        if entry["sentence"] and entry["verdict"] != "refused" and entry["sentence"] not in second:
            yield f"    {entry['sentence']}"
    for reason in head["reasons"]:
        yield f"  {'why' if head['verdict'] == 'refused' else 'doubt'}: {reason}"
    for way_out in head["settles"]:
        yield f"  would settle it: {way_out}"
    for note in found["notes"][2:]:
        yield f"  note: {note}"
    yield from (f"  {line}" for line in _sizes(found["points"]["sizes"]))


def _because(head: Mapping[str, Any], part: str, notes: Sequence[str]) -> str:
    """The first reason of a part's verdict, where the headline's own reasons do not say it."""
    said = {*head["reasons"], *notes}
    reasons = [reason for reason in head[part]["reasons"] if reason not in said]
    return f" ({reasons[0]})" if reasons and head[part]["verdict"] == "refused" else ""


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each size by its own name with its mean loss; of many only the range."""
    names = [size["size"] or f"{size['params']:,.0f} parameters" for size in sizes]
    if len(sizes) > _MOST_SIZES:
        yield f"{len(sizes)} sizes, {names[0]} to {names[-1]}"
        return
    for name, size in zip(names, sizes, strict=True):
        runs = "1 run" if size["runs"] == 1 else f"{size['runs']} runs"
        yield f"{name}: mean loss {size['mean_loss']:.4g} ({runs})"


def _with_interval(parameter: Mapping[str, Any]) -> str:
    """A value with its shown interval: "0.348 (0.331 to 0.366)"; an open end is said."""
    low, high = parameter["low"], parameter["high"]
    ends = ["open" if end is None else f"{end:.4g}" for end in (low, high)]
    return f"{parameter['value']:.4g} ({ends[0]} to {ends[1]}, 95%)"
