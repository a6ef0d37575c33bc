"""Which rows of a table are repeats of one setting: what differs between them is named, kept apart or chosen from."""

from __future__ import annotations

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scaling_ray.errors import BadInput

_MOST_NAMED = 6
_FEW_VALUES = 12
_STEPS = frozenset("step steps iteration iterations iter iters epoch epochs update updates checkpoint ckpt".split())


@dataclass(frozen=True)
class Repeats:
    """The finished rows of a table, R of them, as far as they say which are repeats.

    ``params``, ``cells`` and ``seeds`` are None for each row where the table does not say; ``losses`` are NaN where a
    row has none. ``conditions`` are the columns that should not differ between repeats, header -> (R,); ``rows`` are
    the numbers of the rows in the table, from 1. ``run`` is the header of the column that names runs, with its values,
    and ``data`` that of the data.
    """

    rows: Sequence[int]
    params: Sequence[Hashable]
    cells: Sequence[Hashable]
    seeds: Sequence[Hashable]
    losses: Sequence[float]
    conditions: Mapping[str, Sequence[Hashable]]
    run: tuple[str, Sequence[Hashable]] | None
    data: str | None

    @property
    def settings(self) -> list[Hashable]:
        """The setting of each row: its size and its data."""
        return list(zip(self.params, self.cells, strict=True))


def last_of_runs(found: Repeats, name: str, along: Sequence[Hashable]) -> list[int]:
    """Positions of the last row with a loss of each run, along a column of numbers (R,).

    Runs are told apart by the column that names them, or else by size, seed and whatever does not follow ``name``.

    Raises:
        BadInput: a value along the column is no number, two rows of a run have the same, or no run has two rows.
    """
    if found.run is not None:
        runs: list[Hashable] = list(found.run[1])
    else:
        steps = list(zip(found.params, along, strict=True))
        columns = [found.cells, *(values for other, values in found.conditions.items() if other != name)]
        apart = [values for values in columns if not _follows(values, steps)]
        runs = list(zip(found.params, found.seeds, *apart, strict=True))
        lengths = Counter(runs).values()
        if apart and min(lengths) == 1 < max(lengths):
            raise BadInput(
                "T044",
                f"--last {name}",
                f"{len(runs)} rows",
                "it is not clear which rows belong to one run; the table needs a column run_id",
            )
    last: dict[Hashable, int] = {}
    for i, (run, value) in enumerate(zip(runs, along, strict=True)):
        if not isinstance(value, int | float):
            raise BadInput(
                "T045",
                f"--last {name}",
                value,
                f"row {found.rows[i]}: is no number, so no row of a run is the last; correct it, or name another",
            )
        if not math.isfinite(found.losses[i]):
            continue
        if run in last and value == along[last[run]]:
            rows = f"rows {found.rows[last[run]]} and {found.rows[i]}"
            raise BadInput(
                "T046", f"--last {name}", value, f"{rows} of one run have the same; the table needs a column run_id"
            )
        if run not in last or value > _number(along[last[run]]):
            last[run] = i
    if len(last) == len(runs):
        raise BadInput(
            "T047", f"--last {name}", f"{len(runs)} rows", "no run has two rows; leave it out, or add a column run_id"
        )
    return sorted(last.values())


def best_of_settings(found: Repeats, names: Sequence[str]) -> tuple[list[int], str]:
    """Positions of the rows at the values of ``names`` with the lowest mean loss of each setting, and a note on it."""
    chosen_by: list[tuple[Hashable, ...]] = list(zip(*(found.conditions[name] for name in names), strict=True))
    settings = found.settings
    given = list(zip(settings, chosen_by, strict=True))
    others = [values for name, values in found.conditions.items() if name not in names]
    apart = list(zip(settings, *(v for v in others if not _follows(v, given)), strict=True))
    losses: dict[Hashable, dict[tuple[Hashable, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, value, loss in zip(apart, chosen_by, found.losses, strict=True):
        if math.isfinite(loss):
            losses[key][value].append(loss)
    best = {key: min(tried, key=lambda value: _mean(tried[value])) for key, tried in losses.items()}
    kept = [i for i, key in enumerate(apart) if math.isfinite(found.losses[i]) and best[key] == chosen_by[i]]
    tried = sorted({len(values) for values in losses.values()})
    shown = str(tried[0]) if len(tried) == 1 else f"{tried[0]} to {tried[-1]}"
    note = (
        f"best {' and '.join(names)} of {shown} tried in each of {len(best)} settings: chosen on the same losses that "
        f"are fitted, which therefore lie a little too low ({len(kept)} of {len(apart)} rows are kept)"
    )
    for place, name in enumerate(names):
        edges = sum(_at_edge(best[key][place], [value[place] for value in losses[key]]) for key in best)
        if edges:
            note += f"; {name} is the lowest or highest tried in {edges} of them"
    return kept, note


def refuse_differences(found: Repeats) -> None:
    """Stop where rows that would count as repeats differ in more than their seed.

    Raises:
        BadInput: names the columns that do, and the ways out.
    """
    _refuse_rows_of_one_run(found)
    settings = found.settings
    changing = {}
    for name, values in found.conditions.items():
        mixed = _several(settings, values)
        if mixed:
            changing[name] = (mixed, "setting", len(set(settings)))
        elif mixed := _pooled(found.params, values):
            changing[name] = (mixed, "size", len(set(found.params)))
    if not changing:
        return
    name, (mixed, what, all_of_them) = next(iter(changing.items()))
    values = found.conditions[name]
    keys = settings if what == "setting" else found.params
    shown = list(dict.fromkeys(value for key, value in zip(keys, values, strict=True) if key in mixed))
    others = [other for other in changing if other != name]
    also = f" (so do {', '.join(others[:_MOST_NAMED])}{', ...' if others[_MOST_NAMED:] else ''})" if others else ""
    raise BadInput(
        "T048",
        name,
        ", ".join(map(_shown, shown[:_MOST_NAMED])) + (f", ... ({len(shown)} values)" if shown[_MOST_NAMED:] else ""),
        f"changes between runs of one {what} in {len(mixed)} of {all_of_them}, which are no repeats then{also}; "
        f"{_ways_out(name, values)}",
    )


def _refuse_rows_of_one_run(found: Repeats) -> None:
    """Several rows of one run depend on each other."""
    if found.run is None:
        return
    name, runs = found.run
    rows: dict[Hashable, int] = defaultdict(int)
    for run in runs:
        rows[run] += run is not None
    doubled = [run for run, count in rows.items() if count > 1]
    if not doubled:
        return
    along = [other for other in found.conditions if _is_step(other)]
    if found.data is not None and not _follows(found.cells, runs):
        along.append(found.data)
    raise BadInput(
        "T049",
        name,
        _shown(doubled[0]),
        f"stands in the table more than once ({len(runs)} rows of {len(rows)} runs), and rows of one run depend on "
        f"each other; keep one row per run, --last {_option(along[0] if along else 'COLUMN')} keeps the last of each, "
        f"--same {_option(name)} takes all rows as runs",
    )


def _ways_out(name: str, values: Sequence[Hashable]) -> str:
    shown = _option(name)
    ways = {
        "best": f"--best {shown} takes the lowest loss of each setting",
        "by": f"--by {shown} fits each value apart",
        "same": f"--same {shown} ignores it",
        "last": f"--last {shown} keeps the last row of a run",
    }
    if _is_step(name):
        order: tuple[str, ...] = ("last", "by", "same")
    elif all(isinstance(value, int | float) for value in values):
        order = ("best", "by", "same", "last")
    else:
        order = ("by", "best", "same")
    return ", ".join(ways[way] for way in order)


def _option(name: str) -> str:
    """A header as it is written on a command line."""
    return shlex.quote(name)


def _shown(value: Hashable) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_step(name: str) -> bool:
    """Whether a column counts how far a run has come."""
    return bool(_STEPS & set(name.lower().replace("/", "_").replace(".", "_").split("_")))


def _several(keys: Sequence[Hashable], values: Sequence[Hashable]) -> set[Hashable]:
    """The keys under which there is more than one value."""
    seen: dict[Hashable, Hashable] = {}
    return {key for key, value in zip(keys, values, strict=True) if seen.setdefault(key, value) != value}


def _pooled(params: Sequence[Hashable], values: Sequence[Hashable]) -> set[Hashable]:
    """The sizes under which a column of few words has several: corpora or architectures in one table.

    Numbers may follow the data, as rates and batch sizes do; so may a word that each run has for itself.
    """
    words = {value for value in values if isinstance(value, str)}
    if len(words) < 2 or len(words) > _FEW_VALUES or 2 * len(words) > len(values):
        return set()
    return _several(params, values)


def _follows(values: Sequence[Hashable], keys: Sequence[Hashable]) -> bool:
    """Whether a column is a function of what ``keys`` hold."""
    return not _several(keys, values)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _number(value: Hashable) -> float:
    assert isinstance(value, int | float)
    return value


def _at_edge(value: Hashable, tried: Sequence[Hashable]) -> bool:
    numbers = {each for each in tried if isinstance(each, int | float)}
    return len(numbers) > 1 and value in (min(numbers), max(numbers))
