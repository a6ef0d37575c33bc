"""The selection of cells, their splits and their order: decided from obs alone, before any count is read.

Splits come first, so that genes can be ranked on training cells. Everything is integers: a hundred million cells take
about 50 bytes each.

No person and no cell stands on two sides of a split: spellings of one donor are one group, groups that hold copies of
the same cells are one group, copies of a cell are one cell, and cells whose donor nobody knows train.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from scaling_ray.census.donors import donor_key, is_nobody
from scaling_ray.errors import BadInput
from scaling_ray.shards.format import CODE_COLUMNS, SPLITS
from scaling_ray.shards.order import keyed_hash, keyed_permutation
from scaling_ray.spec import DataSpec

MANY_GROUPS = 1_000
"""Of more groups than this each takes the split of its own hash; fewer groups are placed greedily."""
TRIED_ORDERS = 32
"""Orders tried in the placing of few groups, so that the shares come near the wanted fractions."""
MANY_VALUES = " || "
"""Separates the values of an obs field that holds several, as ``disease`` may."""
_CAP_KEY = 0xCA9

Ints = NDArray[np.int64]
Coded = tuple[NDArray[np.int32], list[str]]
"""An obs column: a code per cell, and the label of each code."""


@dataclass(frozen=True)
class Selection:
    """The chosen cells by rising joinid.

    joinid (N,); split (N,) index into SPLITS; position (N,) within the split's permutation; codes (N,) and labels per
    column of CODE_COLUMNS; groups per split; dropped: cells that each rule took, in the order of the rules.
    """

    joinid: Ints
    split: NDArray[np.int8]
    position: Ints
    codes: dict[str, NDArray[np.int32]]
    labels: dict[str, list[str]]
    groups: dict[str, list[str]]
    dropped: dict[str, int]


def columns_needed(data: DataSpec) -> list[str]:
    """The obs columns that ``select_cells`` reads."""
    caps = [data.cap_by] if data.cap_cells is not None else []
    return list(dict.fromkeys([*CODE_COLUMNS, *data.keep, *caps]))


def split_groups(
    sizes: Mapping[str, int], fractions: Mapping[str, float], salt: int, carried: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Group -> split, never leaving a split empty.

    Groups in ``carried`` keep the split named there. Of the others, many are placed by their hash. Few are placed in
    hash order, each into the split that is least full for its share, and the last groups go to splits that are still
    empty; of TRIED_ORDERS such fillings the one nearest to ``fractions`` is taken.

    Raises:
        BadInput: fewer groups than splits, or all carried and a split empty.
    """
    if len(sizes) < len(fractions):
        raise BadInput(
            "D033",
            "data.split_by",
            sorted(sizes),
            f"gives {len(sizes)} groups for {len(fractions)} splits; split by another column",
        )
    kept = {name: split for name, split in (carried or {}).items() if name in sizes}
    names = sorted(set(sizes) - set(kept))
    hashes = keyed_hash(salt, np.array([_text_key(name) for name in names], dtype=np.uint64))
    if len(names) > MANY_GROUPS:
        edges = np.cumsum(list(fractions.values()))
        where = np.minimum(np.searchsorted(edges, hashes / 2.0**64, side="right"), len(fractions) - 1)
        assigned = kept | {name: list(fractions)[int(index)] for name, index in zip(names, where, strict=True)}
        if set(assigned.values()) == set(fractions):
            return assigned
    fillings = []
    for order in range(TRIED_ORDERS):
        ranked = np.argsort(keyed_hash(order, hashes), kind="stable")
        fillings.append(_fill([names[int(index)] for index in ranked], sizes, fractions, kept))
    best = min(fillings, key=lambda filling: filling[0])[1]
    empty = sorted(set(fractions) - set(best.values()))
    if empty:
        raise BadInput(
            "D034",
            "data.split_from",
            empty,
            "would be left without a group: too few of this Census are new; split anew",
        )
    return best


def _fill(
    names: list[str], sizes: Mapping[str, int], fractions: Mapping[str, float], kept: Mapping[str, str]
) -> tuple[float, dict[str, str]]:
    """Place groups one after the other: (sum over splits of |share - wanted| / wanted, group -> split)."""
    total = sum(sizes.values())
    filled = dict.fromkeys(fractions, 0)
    for name, split in kept.items():
        filled[split] += sizes[name]
    assigned = dict(kept)
    for done, name in enumerate(names):
        empty = [split for split in fractions if not filled[split]]
        candidates = empty if len(empty) >= len(names) - done else list(fractions)
        chosen = min(candidates, key=lambda s: (filled[s] + sizes[name]) / (fractions[s] * total))
        assigned[name] = chosen
        filled[chosen] += sizes[name]
    miss = sum(abs(filled[s] / (fractions[s] * total) - 1) for s in fractions)
    return miss, assigned


def _text_key(text: str) -> int:
    """64-bit FNV-1a of a text: a stable integer for keyed hashing."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def select_cells(
    joinid: Ints,
    columns: Mapping[str, Coded],
    data: DataSpec,
    census_cells: int,
    carried: Mapping[str, str] | None = None,
    twin_of: Ints | None = None,
) -> Selection:
    """Filter, cap, split and permute the cells that passed the value filter.

    Args:
        joinid: (N,), rising.
        columns: the columns of ``columns_needed``.
        data: the rules.
        census_cells: cells of the whole Census.
        carried: group -> split of an older assignment.
        twin_of: (N,) joinid of the copy that counts for each cell; None where no cell has a second copy.

    Raises:
        BadInput: a rule that leaves nothing or asks for a value that no cell has, naming it; too few groups to split.
    """
    if not len(joinid):
        raise BadInput("D035", "data.value_filter", data.value_filter, "matches no cell of this Census; correct it")
    salt = _text_key(data.salt)
    dropped = {"value_filter": census_cells - len(joinid)}
    chosen = np.arange(len(joinid))
    for name, wanted in data.keep.items():
        kept = _has_one_of(name, *columns[name], wanted)[chosen]
        dropped[f"keep.{name}"] = int((~kept).sum())
        chosen = chosen[kept]
        if not len(chosen):
            raise BadInput(
                "D036", f"data.keep.{name}", wanted, "matches no cell that the rules before it left; correct it"
            )
    if data.cap_cells is not None:
        kept = _within_caps(joinid[chosen], columns[data.cap_by], chosen, data, salt)
        dropped["cap_cells"] = int((~kept).sum())
        chosen = chosen[kept]
    joinid = joinid[chosen]
    twins = joinid if twin_of is None else twin_of[chosen]
    coded = {name: _recoded(columns[name][0][chosen], columns[name][1]) for name in CODE_COLUMNS}
    fractions = data.fractions.model_dump()
    if data.split_by == "cell":
        split = _split_cells(twins, fractions, salt)
        groups: dict[str, list[str]] = {name: [] for name in SPLITS}
    else:
        codes, labels = coded[data.split_by]
        assigned = _split_labels(codes, labels, data, salt, carried or {}, twins if twin_of is not None else None)
        split = np.array([SPLITS.index(assigned[label]) for label in labels], dtype=np.int8)[codes]
        groups = {name: sorted(group for group, place in assigned.items() if place == name) for name in SPLITS}
    position = np.empty(len(joinid), dtype=np.int64)
    for index in range(len(SPLITS)):
        members = np.flatnonzero(split == index)
        position[members[keyed_permutation(salt ^ index, joinid[members])]] = np.arange(len(members))
    return Selection(
        joinid,
        split,
        position,
        {name: codes for name, (codes, _) in coded.items()},
        {name: labels for name, (_, labels) in coded.items()},
        groups,
        dropped,
    )


def _split_labels(
    codes: NDArray[np.int32],
    labels: list[str],
    data: DataSpec,
    salt: int,
    carried: Mapping[str, str],
    twins: Ints | None,
) -> dict[str, str]:
    """Label -> split. Labels that must not part are placed as one group, under the first of them."""
    first = _together(codes, labels, data.split_by, twins)
    sizes: dict[str, int] = {}
    for label, cells in zip(labels, np.bincount(codes, minlength=len(labels)).tolist(), strict=True):
        sizes[first[label]] = sizes.get(first[label], 0) + cells
    kept = dict(carried)
    for label in labels:
        if label not in carried:
            continue
        if kept.setdefault(first[label], carried[label]) != carried[label]:
            raise BadInput(
                "D037",
                "data.split_from",
                label,
                f"is the same {'person' if data.split_by == 'donor_id' else 'data set'} as {first[label]!r} and was in "
                "another split there; split anew",
            )
    if data.split_by == "donor_id":
        nobody = [label for label in sizes if is_nobody(label)]
        unknown = sum(sizes[label] for label in nobody)
        people = {label: cells for label, cells in sizes.items() if not is_nobody(label)}
        if nobody and len(people) < 2:
            raise BadInput(
                "D038",
                "data.split_by",
                sorted(sizes),
                f"{unknown:,} cells have no donor ({', '.join(nobody)}) and {len(people)} "
                "donors are left to validate and test on; name the column of donors, or set split_by = 'cell'",
            )
        # somebody's cells in training only: they may be of any donor, but no test is on people whom nobody knows
        kept = {label: "train" for label in nobody} | kept
    assigned = split_groups(sizes, data.fractions.model_dump(), salt, kept)
    return {label: assigned[first[label]] for label in labels}


def _together(codes: NDArray[np.int32], labels: list[str], column: str, twins: Ints | None) -> dict[str, str]:
    """Label -> the first label of its group: spellings of one donor, and labels that hold copies of the same cells."""
    group = np.arange(len(labels))
    if column == "donor_id":
        keys = [label if is_nobody(label) else donor_key(label) for label in labels]
        _, group = np.unique(keys, return_inverse=True)
    if twins is not None:
        nobody = np.array([column == "donor_id" and is_nobody(label) for label in labels], dtype=bool)
        known = ~nobody[codes]
        _, cell = np.unique(twins[known], return_inverse=True)
        of_cell = np.zeros(len(cell), np.int64)
        of_cell[cell[::-1]] = group[codes[known]][::-1]  # the group of each cell's first copy
        links = np.stack([of_cell[cell], group[codes[known]]])
        shape = (len(labels), len(labels))
        graph = sp.coo_matrix((np.ones(links.shape[1], bool), (links[0], links[1])), shape=shape)
        _, joined = connected_components(graph, directed=False)
        group = joined[group]
    _, first = np.unique(group, return_index=True)
    _, inverse = np.unique(group, return_inverse=True)
    return {label: labels[int(first[at])] for label, at in zip(labels, inverse, strict=True)}


def _has_one_of(name: str, codes: NDArray[np.int32], labels: list[str], wanted: list[str]) -> NDArray[np.bool_]:
    """Whether each cell has a wanted value: its whole label, or one of several values in its label."""
    named = set(wanted)
    there = set(labels).union(*(label.split(MANY_VALUES) for label in labels))
    if (absent := [value for value in wanted if value not in there]) and len(absent) < len(wanted):
        near = difflib.get_close_matches(absent[0], sorted(there), n=3) or sorted(there)[:5]
        raise BadInput(
            "D039", f"data.keep.{name}", absent, f"is no value of this column; did you mean {', '.join(near)}?"
        )
    good = [label in named or bool(named & set(label.split(MANY_VALUES))) for label in labels]
    return np.array(good, dtype=bool)[codes]


def _within_caps(joinid: Ints, column: Coded, chosen: Ints, data: DataSpec, salt: int) -> NDArray[np.bool_]:
    """Whether each cell is within the cap of its value, cells being taken in the order of a keyed hash."""
    codes, labels = column[0][chosen], column[1]
    if isinstance(data.cap_cells, dict):
        unknown = sorted(set(data.cap_cells) - set(labels) - {"default"})
        if unknown:
            raise BadInput(
                "D040",
                f"data.cap_cells.{unknown[0]}",
                data.cap_cells[unknown[0]],
                f"is no {data.cap_by} here; correct it",
            )
        most = [data.cap_cells.get(label, data.cap_cells.get("default", len(joinid))) for label in labels]
    else:
        most = [data.cap_cells or len(joinid)] * len(labels)
    order = np.lexsort((keyed_hash(salt ^ _CAP_KEY, joinid), codes))
    rank = np.arange(len(order)) - np.searchsorted(codes[order], codes[order])
    kept = np.empty(len(order), dtype=bool)
    kept[order] = rank < np.array(most)[codes[order]]
    return kept


def _recoded(codes: NDArray[np.int32], labels: list[str]) -> Coded:
    """The same column with only the labels that occur; sorted labels stay sorted."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(labels)))
    place = np.zeros(len(labels), np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    return place[codes], [labels[int(index)] for index in used]


def _split_cells(twins: Ints, fractions: dict[str, float], salt: int) -> NDArray[np.int8]:
    """Splits of cells; copies of a cell, which have one number in ``twins`` (N,), take one split."""
    cells, inverse = np.unique(twins, return_inverse=True)
    if len(cells) < len(fractions):
        raise BadInput(
            "D041", "data.split_by", "cell", f"gives {len(cells)} cells for {len(fractions)} splits; use more cells"
        )
    order = keyed_permutation(salt, cells)
    held_out = [max(1, round(fractions[name] * len(cells))) for name in SPLITS[1:]]
    split = np.zeros(len(cells), dtype=np.int8)
    split[order[: held_out[0]]] = 1
    split[order[held_out[0] : sum(held_out)]] = 2
    found: NDArray[np.int8] = split[inverse]
    return found
