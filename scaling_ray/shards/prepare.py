"""The first step of a conversion: it reads obs and var once and writes them down; all later steps work from files.

``building/`` inside the target holds everything unfinished. Its ``plan.json`` is written last here and never changes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from numpy.typing import NDArray

from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.records import Record, ShardManifest
from scaling_ray.shards.format import CODE_COLUMNS, FILE_CELLS, MANIFEST, SPLITS
from scaling_ray.shards.genes import gene_list_order
from scaling_ray.shards.parts import PROCESS_BYTES, Arrays, Layout, Range, bucket_of, pack, plan_ranges
from scaling_ray.shards.select import Selection, columns_needed, select_cells
from scaling_ray.spec import DataSpec, content_hash
from scaling_ray.storage import Place, open_place

PLAN = "plan.json"
PRESENCE = "presence"
RULES_OF_GENES = ("genes", "gene_rule", "gene_list", "min_counts")
"""Rules that act after the Census was read; an unfinished build may go on with others."""


class BuildPlan(Record):
    """The decisions of a conversion before it reads a count.

    ranges: (start, stop, chosen cells) each; batches: names by batch code, with their training cells and the range each
    ends in; nnz: non-zeros to read; file_cells: cells of one shard file, at most.
    """

    rules: dict[str, Any]
    census: dict[str, Any]
    ranges: list[tuple[int, int, int]]
    nnz: int
    split_cells: list[int]
    groups: dict[str, list[str]]
    labels: dict[str, list[str]]
    dropped: dict[str, int]
    batches: list[str]
    batch_cells: list[int]
    batch_ends: list[int]
    feature_ids: list[str]
    feature_names: list[str]
    split_from: str | None
    file_cells: int = FILE_CELLS

    @property
    def parts(self) -> list[Range]:
        """The ranges."""
        return [Range(index, *bounds) for index, bounds in enumerate(self.ranges)]

    @property
    def cells(self) -> int:
        """Chosen cells."""
        return sum(self.split_cells)


def reading_rules(data: DataSpec) -> dict[str, Any]:
    """The rules that choose the cells to read and keep."""
    return {key: value for key, value in data.rules.items() if key not in RULES_OF_GENES}


def census_identity(census: str) -> dict[str, Any]:
    """The identity of a Census: of a local one the record of its making, of any other its URI or version."""
    record = beside(census, "census.json")
    if record is None:
        return {"uri": census, "about_sha256": None}
    return {"uri": Path(_local(census)).name, "about_sha256": content_hash(json.loads(record)["about"])}


def other_census(facts: dict[str, Any], census: str) -> str | None:
    """The name of the Census in ``facts`` where it is not ``census``. A moved or renamed Census stays the same."""
    wanted = census_identity(census)
    key = "uri" if wanted["about_sha256"] is None else "about_sha256"
    return None if facts.get(key) == wanted[key] else str(facts.get("uri"))


def beside(census: str, name: str) -> bytes | None:
    """A file beside a local Census, None where there is none."""
    path = Path(_local(census)) / name
    return path.read_bytes() if path.is_file() else None


def _local(census: str) -> str:
    return unquote(urlparse(census).path) if census.startswith("file://") else census


def check_memory(data: DataSpec, memory_bytes: int, file_cells: int) -> None:
    """BadInput where a task could not hold one shard file within its bound."""
    needed = PROCESS_BYTES + int(1.3 * file_cells * 2 * data.genes)
    if needed > memory_bytes:
        raise BadInput(
            "D020",
            "data.genes",
            data.genes,
            f"needs {needed / 2**30:.2f} GiB in a task that writes a shard file; "
            f"resources.task_memory_gib allows {memory_bytes / 2**30:.2f}: raise that, or lower this",
        )


def carried_groups(data: DataSpec) -> tuple[dict[str, str], str | None]:
    """Group -> split, and the data_hash, of the manifest that ``data.split_from`` names; nothing without one."""
    if data.split_from is None:
        return {}, None
    folder, _, name = str(data.split_from).rpartition("/")
    if name != MANIFEST:
        folder = str(data.split_from)
    source = open_place(folder or ".", "data.split_from")
    try:
        manifest = ShardManifest.parse(source.read(MANIFEST), data.split_from)
    except FileNotFoundError as error:
        raise BadInput(
            "D021", "data.split_from", data.split_from, "holds no manifest.json; name that of older shards"
        ) from error
    if manifest.split_by != data.split_by:
        raise BadInput(
            "D022",
            "data.split_by",
            data.split_by,
            f"the shards of data.split_from were split by {manifest.split_by}; set split_by to that, or split anew",
        )
    return {group: split for split, entry in manifest.splits.items() for group in entry.groups}, manifest.data_hash


def choose(census: Census, data: DataSpec) -> tuple[Selection, NDArray[np.int64], str | None]:
    """The selection, the non-zeros of each chosen cell, and the data_hash of the shards that the split comes from."""
    carried, split_from = carried_groups(data)
    joinid, columns = census.obs_codes(columns_needed(data), data.value_filter)
    twin_of = census.twin_of(data.value_filter)
    selection = select_cells(joinid, columns, data, census.n_cells, carried, twin_of)
    nnz = census.nnz(data.value_filter)[np.searchsorted(joinid, selection.joinid)]
    return selection, nnz, split_from


@dataclass(frozen=True)
class Prepared:
    """A plan and the rows of the selection behind it, not written yet; bucket, batch (N,) as in ``parts``."""

    plan: BuildPlan
    selection: Selection
    bucket: NDArray[np.int32]
    batch: NDArray[np.int32]
    presence: NDArray[np.bool_]

    def write(self, building: Place) -> None:
        """Write each range's rows, the measured genes and, last, the plan."""
        chosen = self.selection
        first = 0
        for part in self.plan.parts:
            own = slice(first, first + part.cells)
            first = own.stop
            rows: Arrays = {"joinid": chosen.joinid[own], "split": chosen.split[own], "bucket": self.bucket[own]}
            rows |= {"place": (chosen.position[own] % self.plan.file_cells).astype(np.uint32), "batch": self.batch[own]}
            building.write(part.slice_name, pack(rows | {name: chosen.codes[name][own] for name in CODE_COLUMNS}))
        building.write(PRESENCE, pack({"measured": np.packbits(self.presence, axis=1)}))
        building.write(PLAN, self.plan.to_json().encode())


def prepare(census: Census, uri: str, data: DataSpec, memory_bytes: int, layout: Layout) -> Prepared:
    """Read obs, var and the presence matrix, and make the plan.

    Raises:
        BadInput: this Census cannot serve the rules.
    """
    if data.genes > census.n_genes:
        raise BadInput(
            "D023", "data.genes", data.genes, f"is more than the {census.n_genes} genes of this Census; lower it"
        )
    check_memory(data, memory_bytes, layout.file_cells)
    var = census.var()
    feature_ids = var["feature_id"].astype(str).tolist()
    gene_list_order(feature_ids, data.gene_list)
    selection, nnz, split_from = choose(census, data)
    parts = plan_ranges(selection.joinid, nnz, census.tile_cells, memory_bytes, layout.range_tiles)
    split_cells = np.bincount(selection.split, minlength=len(SPLITS)).tolist()
    batch = selection.codes["dataset_id"] if data.batch_key else np.zeros(len(nnz), np.int32)
    names = selection.labels["dataset_id"] if data.batch_key else ["all training cells"]
    train = np.flatnonzero(selection.split == 0)
    # joinids rise, so the last range that is assigned to a batch stays
    last = np.full(len(names), -1)
    last[batch[train]] = np.searchsorted(np.cumsum([part.cells for part in parts]), train, side="right")
    plan = BuildPlan(
        rules=reading_rules(data),
        census={
            **census_identity(uri),
            "census_version": census.census_version,
            "schema_version": census.schema_version,
            "cells": census.n_cells,
            "genes": census.n_genes,
        },
        ranges=[(part.start, part.stop, part.cells) for part in parts],
        nnz=int(nnz.sum()),
        split_cells=split_cells,
        groups=selection.groups,
        labels=selection.labels,
        dropped=selection.dropped,
        batches=names,
        batch_cells=np.bincount(batch[train], minlength=len(names)).tolist(),
        batch_ends=last.tolist(),
        feature_ids=feature_ids,
        feature_names=var["feature_name"].astype(str).tolist(),
        split_from=split_from,
        file_cells=layout.file_cells,
    )
    bucket = bucket_of(selection.split, selection.position, split_cells, layout.file_cells)
    return Prepared(plan, selection, bucket, batch, _presence(census, selection.labels["dataset_id"]))


def _presence(census: Census, dataset_ids: list[str]) -> NDArray[np.bool_]:
    """(data sets of the selection, G) bool: True where the data set measured the gene."""
    known, presence = census.presence()
    row_of = {name: row for row, name in enumerate(known)}
    for name in dataset_ids:
        if name not in row_of:
            raise BadInput(
                "D024", "census.dataset_id", name, "is in obs and not in the presence matrix; this Census is damaged"
            )
    measured: NDArray[np.bool_] = presence[[row_of[name] for name in dataset_ids]].toarray().astype(bool)
    return measured
