"""Which column of a table is read as what: parameters, data, loss, seed, names of runs and sizes, and the rest."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.results.columns import COLUMNS, FOREIGN, LOSSES, Column
from scaling_ray.results.fields import is_unknown, parse
from scaling_ray.results.headers import Header, counts_of, matching, read_header

ALL = {column.name: column for column in (*COLUMNS, *FOREIGN)}
_COUNTS = counts_of((column.name, column.aliases) for column in ALL.values())
# Where "loss" is no column of its own, the names of the others come before those that it goes by elsewhere.
_LOSS_NAMES: tuple[tuple[str, str], ...] = (
    ("loss", "loss"),
    *((own, name) for own in LOSSES[1:] for name in (own, *ALL[own].aliases)),
    *(("loss", name) for name in ALL["loss"].aliases),
)
_TRAINING_LOSSES = ("train_loss", "training_loss", "train_nll", "loss_train")


@dataclass(frozen=True)
class Source:
    """The column that something is read from, and what its numbers are multiplied by."""

    header: str
    scale: float = 1.0


@dataclass(frozen=True)
class Named:
    """What each column of a table is: declared name -> its source; the others stand in ``headers`` alone.

    ``log_loss``: the loss is the logarithm of its column. ``comparable``: references measured on test cells are in the
    unit of the loss and on the same cells.
    """

    headers: Mapping[str, Header]
    sources: Mapping[str, Source]
    log_loss: bool
    comparable: bool
    notes: tuple[str, ...] = field(default=())

    def but(self, *names: str) -> Named:
        """Without some declared names."""
        return replace(self, sources={name: source for name, source in self.sources.items() if name not in names})


def name_columns(
    columns: Mapping[str, Sequence[Any]], finished: Sequence[int], loss: str | None, log_loss: bool
) -> Named:
    """Name the columns of a table.

    Args:
        columns: header -> fields (R,), None where empty.
        finished: positions of the rows that a law can be fitted to.
        loss: header of the loss, where the user said it.
        log_loss: whether the loss is the logarithm of its column.

    Raises:
        BadInput: no column for parameters or loss, or several that may be meant.
    """
    headers = {text: read_header(text, _COUNTS) for text in columns}
    notes: list[str] = []
    name, source, is_log = _loss(columns, headers, finished, loss, notes)
    # References were measured on test cells, and are comparable with a loss on test cells only.
    comparable = (name == "test_loss" or headers[source.header].plain == "loss") and not (log_loss or is_log)
    sources = {"loss": source}
    for column in ALL.values():
        if column.name == "loss" or (not comparable and (column.role, column.unit) == ("reference", "loss_unit")):
            continue
        found = source_of(column, columns, headers)
        if found is not None:
            sources[column.name] = found
    if loss is not None or log_loss or is_log:
        # Other losses are no choice beside one that was asked for, or that is in another unit.
        for other in LOSSES[1:]:
            sources.pop(other, None)
    _name_params(columns, headers, sources, notes)
    _name_runs_and_sizes(columns, headers, sources, finished)
    return Named(headers, sources, log_loss or is_log, comparable, tuple(notes))


def source_of(column: Column, columns: Mapping[str, Sequence[Any]], headers: Mapping[str, Header]) -> Source | None:
    """The column that a declared one is read from; None where it is not there, or without a single value.

    Raises:
        BadInput: two columns mean parameters, data or a loss, and neither has its exact name.
    """
    needed = column.name in ("params", "cells")
    for name in (column.name, *column.aliases):
        found = _of_one_name(name, columns, headers, measured=column.role == "loss", needed=needed)
        if found is not None:
            return found
    return None


def resolve(asked: str, columns: Mapping[str, Sequence[Any]], option: str) -> str:
    """The header that a user names, by itself or without regard to case, spaces and dashes.

    Raises:
        BadInput: the table has no such column.
    """
    headers = {text: read_header(text, _COUNTS) for text in columns}
    if asked in columns:
        return asked
    found = matching(read_header(asked, _COUNTS).whole, list(headers.values()))
    if len(found) == 1:
        return found[0].text
    near = difflib.get_close_matches(asked, list(columns), n=3, cutoff=0.4) or list(columns)[:8]
    raise BadInput("T029", option, asked, f"the table has no such column; it has {', '.join(near)}")


def _of_one_name(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    headers: Mapping[str, Header],
    *,
    measured: bool = False,
    needed: bool = False,
) -> Source | None:
    """The column of one name; of several with different values none, unless the fit needs to know which is meant."""
    found = [
        header
        for header in matching(name, list(headers.values()), measured=measured)
        if any(value is not None for value in columns[header.text])
    ]
    if not found:
        return None
    if any(columns[each.text] != columns[found[0].text] for each in found):
        names = [each.text for each in found]
        if measured:
            ways = ", ".join(f"--loss {shlex.quote(each)} takes {each}" for each in names[:3])
            raise BadInput("T030", "loss", ", ".join(names), f"several losses; {ways}")
        if needed:
            raise BadInput("T031", name, ", ".join(names), "two columns of one name; rename or remove one")
        return None
    return Source(found[0].text, found[0].scale)


def _loss(
    columns: Mapping[str, Sequence[Any]],
    headers: Mapping[str, Header],
    finished: Sequence[int],
    asked: str | None,
    notes: list[str],
) -> tuple[str, Source, bool]:
    """The declared name of the loss, its source, and whether its logarithm is meant."""
    if asked is not None:
        header = headers[resolve(asked, columns, "--loss")]
        named = next((own for own, name in _LOSS_NAMES if name == header.whole), "loss")
        return named, Source(header.text, header.scale), _said_perplexity(header, notes)
    found: dict[str, Source] = {}
    for own, name in _LOSS_NAMES:
        source = None if own in found else _of_one_name(name, columns, headers, measured=True)
        if source is not None:
            found[own] = source
    training = next((s for n in _TRAINING_LOSSES if (s := _of_one_name(n, columns, headers))), None)
    if training is not None and "loss" in found and _equal(columns, finished, found["loss"], training):
        held_out = {own: source for own, source in found.items() if own != "loss"}
        if not held_out:
            raise BadInput(
                "T032",
                "loss",
                training.header,
                f"the only loss is that of training; --loss {training.header} takes it, and a held-out loss is better",
            )
        notes.append(f"{found['loss'].header} is the loss of training (equal to {training.header}) and is not read")
        found = held_out
    if "loss" in found:
        other = next((s for own, s in found.items() if own != "loss" and s.header != found["loss"].header), None)
        own_name = headers[found["loss"].header].plain == "loss"
        if other is not None and own_name and not _equal(columns, finished, found["loss"], other):
            both = (found["loss"].header, other.header)
            ways = ", ".join(f"--loss {each} takes {each}" for each in both)
            raise BadInput(
                "T033", "loss", ", ".join(both), f"two losses that differ, and which is meant is not said; {ways}"
            )
    if found:
        whole = [own for own, source in found.items() if all(columns[source.header][i] is not None for i in finished)]
        name = (whole or list(found))[0]
        if training is not None:
            notes.append(f"{found[name].header} is read as the loss, beside {training.header}")
        passed = [found[own].header for own in list(found)[: list(found).index(name)]]
        if passed:
            notes.append(f"{', '.join(passed)}: missing in finished runs, so {found[name].header} is read as the loss")
        return name, found[name], False
    return _loss_by_its_words(columns, headers, training, notes)


def _loss_by_its_words(
    columns: Mapping[str, Sequence[Any]],
    headers: Mapping[str, Header],
    training: Source | None,
    notes: list[str],
) -> tuple[str, Source, bool]:
    """A column whose name has loss or perplexity in it, where it is the only one."""
    near = [header for header in headers.values() if header.is_loss and not header.of_training]
    plain = [header for header in near if not header.is_perplexity] or near
    if len(plain) == 1:
        if not plain[0].is_perplexity:
            notes.append(f"{plain[0].text} is read as the loss")
        return "loss", Source(plain[0].text, plain[0].scale), _said_perplexity(plain[0], notes)
    if training is not None and not plain:
        raise BadInput(
            "T034",
            "loss",
            training.header,
            f"the only loss is that of training; --loss {training.header} takes it, and a held-out loss is better",
        )
    if plain:
        names = [header.text for header in plain]
        raise BadInput("T035", "loss", ", ".join(names), f"several losses; name one, as in --loss {names[0]}")
    raise BadInput(
        "T036",
        "loss",
        sorted(columns),
        f"the table has no loss; it needs one of the columns {', '.join(name for _, name in _LOSS_NAMES[:4])}, "
        f"or its name: --loss COLUMN",
    )


def _said_perplexity(header: Header, notes: list[str]) -> bool:
    if header.is_perplexity:
        notes.append(f"the loss is the natural logarithm of {header.text}, in nats")
    return header.is_perplexity


def _equal(columns: Mapping[str, Sequence[Any]], rows: Sequence[int], one: Source, other: Source) -> bool:
    """Whether two columns hold the same numbers, to rounding, where both have one."""
    pairs = [(parse(columns[one.header][i]), parse(columns[other.header][i])) for i in rows]
    known = [(a.value, b.value) for a, b in pairs if a is not None and b is not None]
    return bool(known) and all(math.isclose(a, b, rel_tol=1e-6) for a, b in known)


def _name_params(
    columns: Mapping[str, Sequence[Any]], headers: Mapping[str, Header], sources: dict[str, Source], notes: list[str]
) -> None:
    """Parameters by a second way where no column has their name."""
    if "params" in sources:
        return
    if "params_without_embedding" in sources:
        sources["params"] = sources.pop("params_without_embedding")
        notes.append(f"params are those of {sources['params'].header}: without the embedding")
        return
    if "size" in sources:
        read = [parse(value) for value in columns[sources["size"].header]]
        if all(number is not None and number.mark != "%" and number.value >= 1000 for number in read):
            sources["params"] = Source(sources["size"].header)
            return
    near = [header.text for header in headers.values() if any("param" in word for word in header.words)]
    hint = f" (near: {', '.join(near[:4])})" if near else ""
    raise BadInput(
        "T037",
        "params",
        sorted(columns),
        f"the table needs a column params (or N); add it: trainable parameters of each run{hint}",
    )


def _name_runs_and_sizes(
    columns: Mapping[str, Sequence[Any]],
    headers: Mapping[str, Header],
    sources: dict[str, Source],
    finished: Sequence[int],
) -> None:
    """A column with a word for each run names runs; one with a word for each size names sizes."""
    taken = {source.header for source in sources.values()}
    params = [columns[sources["params"].header][i] for i in finished]
    for header in headers.values():
        values = [columns[header.text][i] for i in finished]
        if header.text in taken or not values or any(is_unknown(value) for value in values):
            continue
        words = len(set(values))
        if (
            header.may_name_sizes
            and "size" not in sources
            and words == len(set(params)) == len(set(zip(values, params, strict=True)))
        ):
            sources["size"] = Source(header.text)
        elif header.may_name_runs and "run_id" not in sources and words == len(values):
            sources["run_id"] = Source(header.text)
