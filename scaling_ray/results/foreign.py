"""Other people's tables of runs, and older ones of this project, as columns under the names of this one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.laws.points import is_finished
from scaling_ray.results.delimited import Fields, read_fields
from scaling_ray.results.doubts import in_proportion, perplexity_like, refuse_bad
from scaling_ray.results.fields import is_unknown, parse
from scaling_ray.results.headers import read_header
from scaling_ray.results.naming import ALL, name_columns, resolve, source_of
from scaling_ray.results.repeats import Repeats, best_of_settings, last_of_runs, refuse_differences
from scaling_ray.results.typed import Typed, several_budgets, state_of, type_columns

_MOST_PARTS = 100
_DIGITS_OF_A_RUN = 5  # two runs of one setting seldom agree in so many digits of their loss


@dataclass(frozen=True)
class Table(Mapping[str, Any]):
    """A table of runs: declared name -> values (R,), and ``columns_used``, declared name -> header in the table.

    ``notes`` say in a line each what was read as what and which rows were left out. Where the table was taken apart
    (``by``), it has no columns of its own and ``parts`` holds a table for each value, "dataset=c4".
    """

    columns: Mapping[str, Any]
    notes: tuple[str, ...]
    parts: Mapping[str, Table] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Choices:
    """What a user says about a table: headers that are ignored, taken apart, or chosen from, and its loss."""

    same: tuple[str, ...]
    last: str | None
    best: tuple[str, ...]


def read_table(
    source: Path | str | Fields,
    *,
    same: Sequence[str] = (),
    by: str | None = None,
    last: str | None = None,
    best: str | Sequence[str] = (),
    loss: str | None = None,
    log_loss: bool = False,
) -> Table:
    """Columns of a CSV or Parquet table of runs, under the names of :class:`~scaling_ray.results.columns.Row`.

    Names are matched without regard to case, spaces and dashes ("Model Size" is ``model_size``), with a unit ("params
    (M)"), below a prefix ("eval/loss") and by the aliases of ``COLUMNS`` and ``FOREIGN``; a table's own column of the
    exact name always comes first. The loss is the first of ``loss``, test, validation and final loss that every
    finished run has. Runs of one size and data are repeats, so whatever else differs between them stops the table.

    Args:
        source: a .parquet file, or text with one line per run, separated by commas, semicolons, tabs, bars or spaces;
            or the fields of a table that was read already.
        same: columns that are ignored, whatever they hold.
        by: a column whose values are read apart, into ``parts``.
        last: a column of numbers: of each run only the row with the highest is read.
        best: columns of which each setting's value of the lowest mean loss is read.
        loss: the column that is the loss, where the names do not say.
        log_loss: read the natural logarithm of the loss (of a perplexity).

    Raises:
        BadInput: no such file, not a table, no or several columns for parameters or loss, a column or row that is not
            what it should be, or a difference between runs that would count as repeats.
    """
    fields = source if isinstance(source, Fields) else read_fields(Path(source))
    asked = [best] if isinstance(best, str) else list(best)
    choices = Choices(
        same=tuple(resolve(name, fields.columns, "--same") for name in same),
        last=None if last is None else resolve(last, fields.columns, "--last"),
        best=tuple(resolve(name, fields.columns, "--best") for name in asked),
    )
    apart = None if by is None else resolve(by, fields.columns, "--by")
    for name in (*choices.same, *((apart,) if apart else ())):
        if name in (choices.last, *choices.best) or (name in choices.same and name == apart):
            raise BadInput(
                "T027",
                "--same",
                name,
                "a column can be ignored, taken apart or chosen from, not two of these; name it once",
            )
    columns = {name: values for name, values in fields.columns.items() if name not in choices.same}
    states = _states(columns)
    finished = [i for i in range(fields.rows) if is_finished(*states[i])]
    named = name_columns({name: v for name, v in columns.items() if name != apart}, finished, loss, log_loss)
    reader = _Reader(fields, type_columns(fields, named, log_loss), choices)
    every = range(fields.rows)
    if apart is None:
        return reader.table(every, set(finished))
    if len(set(columns[apart])) > _MOST_PARTS:
        raise BadInput(
            "T028", "--by", apart, f"has {len(set(columns[apart]))} values; more than {_MOST_PARTS} are no parts"
        )
    parts = {}
    for value in sorted({str(v) for v in columns[apart]}, key=_in_order):
        rows = [i for i in every if str(columns[apart][i]) == value]
        try:
            parts[f"{apart}={value}"] = reader.table(rows, set(finished))
        except BadInput as error:
            raise BadInput(error.code, error.field, error.value, f"{error.remedy} (in {apart}={value})") from error
    return Table({}, (f"{len(parts)} parts by {apart}",), parts)


class _Reader:
    """One file under its names, of which tables of some rows can be made."""

    def __init__(self, fields: Fields, typed: Typed, choices: Choices) -> None:
        self.fields, self.choices = fields, choices
        self.named, self.sign, self.values, self.notes = typed.named, typed.sign, typed.values, typed.notes

    def table(self, rows: Sequence[int], finished: set[int]) -> Table:
        """The table of some rows, checked."""
        notes: list[str] = []
        done, others = [i for i in rows if i in finished], [i for i in rows if i not in finished]
        done = self._without_copies(done, notes)
        found = self._repeats(done)
        if self.choices.last is not None:
            along = self._comparable(self.choices.last)
            kept = last_of_runs(found, self.choices.last, [along[i] for i in done])
            notes.append(f"last {self.choices.last} of each run: {len(kept)} of {len(done)} rows are kept")
            done = [done[i] for i in kept]
            found = self._repeats(done)
        if self.choices.best:
            kept, note = best_of_settings(found, self.choices.best)
            notes.append(note)
            done = [done[i] for i in kept]
            found = self._repeats(done)
        for name in ("params", "cells", "loss"):
            if name in self.values:
                header = self.named.sources[name].header
                refuse_bad(name, header, self.values[name], self.fields.columns.get(header), done)
        refuse_differences(found)
        notes += self._remarks(done)
        kept_rows = sorted((*done, *others))
        columns: dict[str, Any] = {
            name: [values[i] for i in kept_rows]
            for name, values in self.values.items()
            if any(values[i] is not None for i in kept_rows)
        }
        used = {name: source.header for name, source in self.named.sources.items() if name in columns}
        return Table(
            {**columns, "columns_used": used}, tuple(dict.fromkeys((*self.notes, *notes, *self._unread(used))))
        )

    def _names_rows(self, name: str, rows: Sequence[int]) -> bool:
        """Whether a column has a name of its own for each of some rows."""
        values = [self.fields.columns[name][i] for i in rows]
        return self.named.headers[name].may_name_runs and len(set(values)) == len(values)

    def _repeats(self, rows: Sequence[int]) -> Repeats:
        """What says which rows are repeats."""
        params, cells = self.values["params"], self.values.get("cells")
        sources = self.named.sources
        seeds = self.values.get("seed")
        conditions = {
            header: [column[i] for i in rows]
            for header, column in self._conditions().items()
            if header in self.choices.best or not self._names_rows(header, rows)
        }
        run = None
        named = [sources["run_id"].header] if "run_id" in sources else []
        read = {source.header for source in sources.values()}
        others = [header for header in conditions if header not in read]
        named += [header for header in others if self.named.headers[header].may_name_runs]
        for header in named:
            values = [self._key(self.fields.columns[header][i]) for i in rows]
            sizes: dict[Hashable, set[Hashable]] = {}
            for value, i in zip(values, rows, strict=True):
                sizes.setdefault(value, set()).add(params[i])
            # A column that has one value at several sizes numbers repeats, and no run has two sizes.
            if header in named[: "run_id" in sources] or (
                all(len(found) == 1 for found in sizes.values()) and len(sizes) > 1
            ):
                run = (header, values)
                conditions.pop(header, None)
                break
        return Repeats(
            rows=[i + 1 for i in rows],
            params=[params[i] for i in rows],
            cells=[None if cells is None else cells[i] for i in rows],
            seeds=[None if seeds is None else seeds[i] for i in rows],
            losses=[_finite(self.values["loss"][i]) for i in rows],
            conditions=conditions,
            run=run,
            data=sources["cells"].header if "cells" in sources else None,
        )

    def _conditions(self) -> dict[str, list[Hashable]]:
        """The columns that should not differ between repeats, as values that can be compared."""
        sources = self.named.sources
        read = {source.header: name for name, source in reversed(list(sources.items()))}
        found = {}
        for header in self.named.headers.values():
            name = read.get(header.text)
            if name is None:
                kept = not (header.is_outcome or header.is_seed or self._numbers_rows(header.text))
            elif name in ("optimizer_steps", "cells_seen"):
                # Early stopping makes them differ; without a column of data they say how far a run has come.
                kept = "cells" not in sources and several_budgets(self.values["params"], self.values[name])
            else:
                kept = _sets_apart(name)
            if kept:
                found[header.text] = self._comparable(header.text)
        for name in self.choices.best:
            found.setdefault(name, self._comparable(name))
        return found

    def _comparable(self, name: str) -> list[Hashable]:
        return [self._key(value) for value in self.fields.columns[name]]

    def _key(self, value: Any) -> Hashable:
        """A field as something that equals another field of the same meaning."""
        if is_unknown(value):
            return None
        number = parse(value, self.sign)
        return str(value).strip() if number is None else number.value

    def _numbers_rows(self, name: str) -> bool:
        """Whether a column counts the rows of the table, whatever it is called."""
        first, *rest = (parse(value) for value in self.fields.columns[name])
        if first is None or first.value not in (0.0, 1.0):
            return False
        return all(n is not None and n.value == first.value + i for i, n in enumerate(rest, start=1))

    def _without_copies(self, rows: Sequence[int], notes: list[str]) -> list[int]:
        """Rows without those that repeat an earlier one in every column.

        Two runs may end at one rounded loss, so that without a seed or a name only long losses tell a copy.
        """
        seen: set[tuple[Hashable, ...]] = set()
        kept = []
        columns = list(self.fields.columns.values())
        for i in rows:
            key = tuple(str(column[i]) for column in columns)
            told = any(self.values[name][i] is not None for name in ("seed", "run_id") if name in self.values)
            digits = sum(map(str.isdigit, str(self.fields.columns[self.named.sources["loss"].header][i])))
            if key not in seen or not (told or digits >= _DIGITS_OF_A_RUN):
                kept.append(i)
            seen.add(key)
        copies = sorted({i + 1 for i in rows} - {i + 1 for i in kept})
        if copies:
            shown = ", ".join(map(str, copies[:8])) + (", ..." if copies[8:] else "")
            notes.append(f"{len(copies)} rows ({shown}) equal an earlier one in every column and are left out")
        return kept

    def _remarks(self, rows: Sequence[int]) -> list[str]:
        """What a reader of the table would remark."""
        sources = self.named.sources
        notes = []
        if not self.named.log_loss:
            unit = self.values["loss_unit"][0] if "loss_unit" in self.values else None
            header = self.named.headers[sources["loss"].header]
            if "mse" not in (*header.words, unit):
                notes += perplexity_like(header.text, [self.values["loss"][i] for i in rows])
        if "cells" in self.values:
            data, params = self.values["cells"], self.values["params"]
            notes += in_proportion(sources["cells"].header, [data[i] for i in rows], [params[i] for i in rows])
        return notes

    def _unread(self, used: Mapping[str, str]) -> list[str]:
        unread = [text for text in self.named.headers if text not in used.values()]
        notes = [f"columns not read: {', '.join(unread)}"] if unread else []
        if self.choices.same:
            notes.append(f"ignored, as asked: {', '.join(self.choices.same)}")
        return notes


def _states(columns: Mapping[str, Sequence[Any]]) -> list[tuple[Any, Any]]:
    """Role and state of each row, as far as the table says them."""
    headers = {text: read_header(text, ()) for text in columns}
    rows = len(next(iter(columns.values())))
    found: list[list[Any]] = []
    for column in (ALL["role"], ALL["status"]):
        source = source_of(column, columns, headers)
        values = [None] * rows if source is None else columns[source.header]
        found.append([state_of(value) for value in values] if column.name == "status" else list(values))
    return list(zip(*found, strict=True))


def _in_order(value: str) -> tuple[float, str]:
    """Numbers by their size, words by the alphabet."""
    number = parse(value)
    return (0.0 if number is None else number.value, value)


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _sets_apart(name: str) -> bool:
    """Whether a declared column is a rule or an axis that repeats of one setting share."""
    column = ALL[name]
    if name in ("params", "params_without_embedding", "cells", "cells_requested", "seed"):
        return False
    return column.role in ("axis", "protocol") or bool(column.agrees and column.role != "identity")
