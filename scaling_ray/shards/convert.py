"""From a Census to shards by Ray Data.

Obs decides cells, splits and order. One pass over contiguous joinid ranges counts training cells into histograms that
rank the genes; a second writes raw counts of the ranked genes, which Ray Data sorts into the permutation.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from numpy.typing import NDArray

from scaling_ray.census.select import CountHistogram, GeneRanking, Selection, rank_genes, select_cells
from scaling_ray.census.source import Census
from scaling_ray.cluster import own_errors, ray, ray_session
from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.shards.format import (
    BLOCK_GENES,
    CODE_COLUMNS,
    LARGEST_COUNT,
    ROW_GROUP_CELLS,
    SPLITS,
    block_name,
    block_widths,
    encode_block,
    file_entry,
    read_manifest,
    verify,
    write_split,
    write_table,
)
from scaling_ray.spec import DataSpec, SweepSpec, content_hash
from scaling_ray.storage import output_directory, partial_directory, publish_directory, write_atomic

RANGE_CELLS = 4_096
"""Cells one task reads at a time; all their genes are in memory as a sparse matrix."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Range:
    """The chosen cells of one contiguous joinid range, as a task receives it."""

    census: str
    start: int
    stop: int


def build_shards(spec: SweepSpec, census: str, out: Path, progress: Progress = lambda line: None) -> ShardManifest:
    """Convert the cells that ``spec.data`` asks for into shards at ``out``; returns at once where they are there.

    ``out`` appears whole or not at all. BadInput where it holds other shards or other files.
    """
    rules = spec.data.model_dump(mode="json")
    output_directory(out.parent)
    if out.is_file():
        raise BadInput("--out", str(out), "is a file; name a directory")
    if out.exists() and any(out.iterdir()):
        return _existing(out, rules, census)
    with Census.open(census) as source:
        progress(f"reading cells of {census}")
        obs = source.obs(["soma_joinid", *CODE_COLUMNS], spec.data.value_filter)
        var = source.var()
        datasets, presence = source.presence()
        facts: dict[str, Any] = {
            **_census_identity(census),
            "census_version": source.census_version,
            "schema_version": source.schema_version,
            "cells": source.n_cells,
            "genes": source.n_genes,
        }
    selection = select_cells(obs, spec.data, facts["cells"])
    if spec.data.genes > len(var):
        raise BadInput("data.genes", spec.data.genes, f"is more than the {len(var)} genes of this Census; lower it")
    with ray_session(spec.resources.cpus), own_errors():
        ray.data.DataContext.get_current().enable_progress_bars = False
        ranges = _ranges(census, selection.joinid)
        progress(f"counting genes of {int((selection.split == 0).sum())} training cells in {len(ranges)} ranges")
        ranking = _rank(ranges, selection, len(var), spec.data)
        building = partial_directory(out)
        progress(f"writing {len(selection.joinid)} cells x {spec.data.genes} genes")
        splits = _write_splits(ranges, selection, ranking, building)
    tables = [
        write_table(building / "genes.parquet", _genes_table(var, ranking)),
        write_table(building / "presence.parquet", _presence_table(selection, datasets, presence, ranking)),
    ]
    planted = (Path(census) / "plant.json").is_file()
    if planted:
        write_atomic(building / "plant.json", (Path(census) / "plant.json").read_bytes())
        tables.append(file_entry(building / "plant.json", 0))
    feature_ids = var["feature_id"].astype(str).to_numpy()[ranking.order].tolist()
    manifest = ShardManifest(
        name=spec.name,
        data_hash=content_hash(
            {
                "rules": rules,
                "genes": feature_ids,
                "splits": {name: entry.content_sha256 for name, entry in splits.items()},
            }
        ),
        genes=spec.data.genes,
        block_genes=BLOCK_GENES,
        split_by=spec.data.split_by,
        data=rules,
        census=facts,
        planted=planted,
        dropped=selection.dropped,
        splits=splits,
        tables=tables,
        codes=selection.labels,
        made_with={name: importlib.metadata.version(name) for name in ("scaling-ray", "pyarrow", "tiledbsoma", "ray")},
    )
    write_atomic(building / "manifest.json", manifest.to_json())
    publish_directory(building, out)
    return manifest


def _census_identity(census: str) -> dict[str, Any]:
    """What tells one Census from another: a local one by the record of its making, any other by its URI or version."""
    record = Path(census) / "census.json"
    if not record.is_file():
        return {"uri": census, "about_sha256": None}
    about = json.loads(record.read_text(encoding="utf-8"))["about"]
    return {"uri": Path(census).name, "about_sha256": content_hash(about)}


def _existing(out: Path, rules: dict[str, Any], census: str) -> ShardManifest:
    manifest = read_manifest(out)
    if manifest.data != rules:
        differing = sorted(key for key in rules if manifest.data.get(key) != rules[key])
        raise BadInput(
            "--out", str(out), f"holds shards made by other rules ({', '.join(differing)}); name another place"
        )
    wanted = _census_identity(census)
    if {key: manifest.census.get(key) for key in wanted} != wanted:
        there = manifest.census.get("uri")
        raise BadInput("--out", str(out), f"holds shards of another Census ({there}); name another place, or remove it")
    problems = verify(out)
    if problems:
        raise BadInput("--out", str(out), f"{problems[0]}; remove the directory and build again")
    return manifest


def _ranges(census: str, joinid: NDArray[np.int64]) -> list[_Range]:
    """Contiguous ranges of RANGE_CELLS joinids that hold at least one chosen cell."""
    return [
        _Range(census, int(index) * RANGE_CELLS, (int(index) + 1) * RANGE_CELLS)
        for index in np.unique(joinid // RANGE_CELLS)
    ]


def _read_range(
    item: dict[str, Any], selection: Selection, split: int | None
) -> tuple[NDArray[np.int64], sp.csr_matrix]:
    """Indices into the selection of a range's chosen cells, and their counts over all genes."""
    first, last = np.searchsorted(selection.joinid, [item["start"], item["stop"]])
    chosen = np.arange(first, last)
    if split is not None:
        chosen = chosen[selection.split[chosen] == split]
    with Census.open(item["census"]) as source:
        counts = source.counts(item["start"], min(item["stop"], source.n_cells))
    return chosen, counts[selection.joinid[chosen] - item["start"]]


def _over_ranges(ranges: list[_Range], task: Callable[[dict[str, Any]], pa.Table], **options: Any) -> ray.data.Dataset:
    """A Ray Data pipeline with one task per range; each gives one Arrow block."""
    items = [vars(item) for item in ranges]
    source = ray.data.from_items(items, override_num_blocks=len(items))

    def per_block(batch: pa.Table) -> pa.Table:
        (item,) = batch.to_pylist()
        return task(item)

    return source.map_batches(per_block, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, **options)


def _rank(ranges: list[_Range], selection: Selection, n_genes: int, data: DataSpec) -> GeneRanking:
    shared = ray.put(selection)

    def histogram(item: dict[str, Any]) -> pa.Table:
        _, counts = _read_range(item, ray.get(shared), split=0)
        entries = counts.tocoo()
        keys, cells = np.unique(
            (entries.col.astype(np.int64) << 32) | entries.data.astype(np.int64), return_counts=True
        )
        return pa.table({"gene": keys >> 32, "count": keys & 0xFFFFFFFF, "cells": cells.astype(np.int64)})

    merged = CountHistogram(*(np.empty(0, dtype=np.int64) for _ in range(3)))
    for batch in _over_ranges(ranges, histogram).iter_batches(batch_format="numpy", batch_size=None):
        merged = CountHistogram.merged([merged, CountHistogram(batch["gene"], batch["count"], batch["cells"])])
    return rank_genes(merged, int((selection.split == 0).sum()), n_genes, data)


def _write_splits(
    ranges: list[_Range], selection: Selection, ranking: GeneRanking, building: Path
) -> dict[str, SplitEntry]:
    shared = ray.put((selection, ranking.order))

    def gather(item: dict[str, Any]) -> pa.Table:
        chosen_cells, order = ray.get(shared)
        return _shard_rows(item, chosen_cells, order)

    rows = _over_ranges(ranges, gather).sort(["split", "position"]).materialize()
    entries = {}
    for index, name in enumerate(SPLITS):
        files, content, cells = write_split(building, name, len(ranking.order), _split_tables(rows, index))
        chosen = int((selection.split == index).sum())
        if cells != chosen:
            raise DamagedFiles([f"{name}: {cells} cells were written, {chosen} were chosen"])
        share = cells / len(selection.joinid)
        entries[name] = SplitEntry(
            cells=cells, fraction=share, groups=selection.groups[name], content_sha256=content, files=files
        )
    return entries


def _shard_rows(item: dict[str, Any], selection: Selection, order: NDArray[np.int64]) -> pa.Table:
    chosen, counts = _read_range(item, selection, split=None)
    raw_sum = np.asarray(counts.sum(axis=1), dtype=np.int64).ravel()
    panel = counts[:, order].toarray()
    if panel.size and panel.max() > LARGEST_COUNT:
        cell, gene = np.unravel_index(int(panel.argmax()), panel.shape)
        where = f"cell {selection.joinid[chosen[cell]]}, gene {order[gene]}"
        raise BadInput("counts", int(panel.max()), f"at {where} is more than {LARGEST_COUNT}; filter that assay out")
    columns: dict[str, Any] = {
        "split": selection.split[chosen],
        "position": selection.position[chosen],
        "cell": selection.joinid[chosen],
        "raw_sum": raw_sum,
    }
    columns |= {name: selection.codes[name][chosen] for name in CODE_COLUMNS}
    start = 0
    for index, width in enumerate(block_widths(len(order))):
        columns[block_name(index)] = encode_block(panel[:, start : start + width].astype(np.uint16))
        start += width
    return pa.table(columns)


def _split_tables(rows: ray.data.Dataset, split: int) -> Iterator[pa.Table]:
    """The sorted rows of one split, in tables of one row group."""
    waiting: list[pa.Table] = []
    blocks: Iterable[Any] = rows.iter_batches(batch_format="pyarrow", batch_size=None)
    for block in blocks:
        part = block.filter(pc.equal(block["split"], split))
        if part.num_rows:
            waiting.append(part)
        while sum(table.num_rows for table in waiting) >= ROW_GROUP_CELLS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, ROW_GROUP_CELLS)
            waiting = [whole.slice(ROW_GROUP_CELLS)]
    if sum(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting)


def _genes_table(var: Any, ranking: GeneRanking) -> pa.Table:
    chosen = var.iloc[ranking.order]
    return pa.table(
        {
            "rank": np.arange(len(ranking.order)),
            "soma_joinid": ranking.order,
            "feature_id": chosen["feature_id"].astype(str).tolist(),
            "feature_name": chosen["feature_name"].astype(str).tolist(),
            "train_mean_count": ranking.mean[ranking.order],
            "score": ranking.score[ranking.order],
        }
    )


def _presence_table(
    selection: Selection, datasets: list[str], presence: sp.csr_matrix, ranking: GeneRanking
) -> pa.Table:
    row_of = {name: row for row, name in enumerate(datasets)}
    rows = []
    for name in selection.labels["dataset_id"]:
        if name not in row_of:
            raise BadInput(
                "census.dataset_id", name, "is in obs and not in the presence matrix; this Census is damaged"
            )
        rows.append(row_of[name])
    measured = presence[rows][:, ranking.order].toarray().astype(np.uint16)
    return pa.table({"dataset_id": selection.labels["dataset_id"], "measured": encode_block(measured)})
