"""From a Census to shards under Ray: one pass over the Census, then a gather into the permutation.

Each step is a function of files (``prepare``, ``parts``) and leaves one. A file that exists is never made again, so a
call after a kill goes on where the last one stopped, and ends with the same bytes. The manifest is written last: a
directory or an S3 prefix holds shards once it has one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scaling_ray.census.source import Census
from scaling_ray.cluster import own_errors, ray, ray_session
from scaling_ray.errors import BadInput
from scaling_ray.pace import Pace
from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.shards.format import (
    BLOCK_GENES,
    LARGEST_COUNT,
    MANIFEST,
    ROW_GROUP_CELLS,
    SPLITS,
    encode_block,
    file_entry,
    read_manifest,
    split_content,
    verify,
    write_table,
)
from scaling_ray.shards.genes import Batch, CountHistogram, GeneRanking, HistogramSum, rank_genes
from scaling_ray.shards.parts import (
    DEFAULT_LAYOUT,
    Layout,
    bucket_names,
    histograms_of,
    unpack,
)
from scaling_ray.shards.prepare import (
    PLAN,
    PRESENCE,
    BuildPlan,
    beside,
    check_memory,
    other_census,
    prepare,
    reading_rules,
)
from scaling_ray.shards.tasks import TASK_ENVIRONMENT, GatheredFile, duplicates_task, gather_task, range_task
from scaling_ray.spec import SweepSpec, content_hash
from scaling_ray.storage import (
    LocalPlace,
    Place,
    fenced,
    open_place,
    output_directory,
    sweep_partial_files,
)

BUILDING = "building/"
"""Below the target: the files of an unfinished conversion."""
TASK_RETRIES = 20
"""Losses of its process or node after which one task is tried again within a call."""
WAITING_TASKS = 64
"""Tasks handed to Ray beyond what it can run at once: the demand an autoscaler sees."""
REPORT_SECONDS = 5.0
MADE_WITH = ("scaling-ray", "pyarrow", "tiledbsoma", "cellxgene-census", "numpy", "scikit-misc", "ray")
SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet")

Progress = Callable[[str], None]
Ints = NDArray[np.int64]


def build_shards(
    spec: SweepSpec,
    census: str,
    out: Path | str,
    progress: Progress = lambda line: None,
    layout: Layout = DEFAULT_LAYOUT,
) -> ShardManifest:
    """Convert the cells that ``spec.data`` asks for into shards at ``out``; verify shards that exist already.

    Args:
        spec: its ``data`` and ``resources`` count.
        census: directory, URI or release.
        out: a directory or an ``s3://`` URI.
        progress: called with one line of text now and then.
        layout: of a new conversion; one that goes on keeps the layout that it began with.

    Raises:
        BadInput: the Census cannot serve the rules, ``out`` holds something else or cannot be written.
        LeaseHeld: another conversion writes to ``out``.
    """
    target = open_place(out)
    if isinstance(target, LocalPlace):
        output_directory(target.path.parent)
        if target.path.is_file():
            raise BadInput("D002", "--out", str(out), "is a file; name a directory")
    there = target.names()
    if MANIFEST in there:
        return _existing(target, spec, census, any(name.startswith(BUILDING) for name in there))
    if there and not any(name.startswith(BUILDING) for name in there):
        read_manifest(target)
    return _Build(spec, census, target, progress, layout).complete()


def _existing(target: Place, spec: SweepSpec, census: str, unswept: bool) -> ShardManifest:
    rules = spec.data.rules
    manifest = read_manifest(target)
    if manifest.data != rules:
        differing = sorted(key for key in rules if manifest.data.get(key) != rules[key])
        raise BadInput(
            "D003",
            "--out",
            str(target),
            f"holds shards made by other rules ({', '.join(differing)}); name another place",
        )
    there = other_census(manifest.census, census)
    if there is not None:
        remedy = f"holds shards of another Census ({there}); name another place, or remove it"
        raise BadInput("D004", "--out", str(target), remedy)
    if unswept:
        target.remove(BUILDING)
    problems = verify(target)
    if problems:
        raise BadInput("D005", "--out", str(target), f"{problems[0]}; remove the directory and build again")
    return manifest


@dataclass
class _Facts:
    """The facts of all ranges together: cells in the order of the selection, pieces by shard file."""

    key: NDArray[np.uint64]
    raw_sum: Ints
    beyond: Ints
    pieces: Ints
    """(pieces, 4): bucket, range, first byte, bytes."""


@dataclass
class _Duplicates:
    """Cells left out because another cell has the same counts: places by bucket, histograms by range."""

    cells: int = 0
    places: dict[int, list[Ints]] = field(default_factory=dict)
    histograms: dict[int, list[tuple[int, CountHistogram]]] = field(default_factory=dict)
    of_batch: dict[int, int] = field(default_factory=dict)


class _Build:
    """One call's work on an unfinished target."""

    def __init__(self, spec: SweepSpec, census: str, target: Place, progress: Progress, layout: Layout) -> None:
        self.spec, self.census, self.target, self.progress, self.layout = spec, census, target, progress, layout
        self.building = target.below(BUILDING.rstrip("/"))
        self.memory_bytes = int(spec.resources.task_memory_gib * 2**30)
        self.peak_bytes: dict[str, int] = {}

    def complete(self) -> ShardManifest:
        with ExitStack() as lease:
            plan = self._plan(lease)
            if plan is None:
                return _existing(self.target, self.spec, self.census, False)
            with ray_session(self.spec.resources.cpus), own_errors():
                self._check_cluster()
                self._read_ranges(plan)
                facts = self._facts(plan)
                duplicates = self._duplicates(plan, facts) if self.spec.data.drop_duplicates else _Duplicates()
                ranking = self._rank(plan, duplicates)
                _refuse_large_counts(facts.beyond, ranking.order, plan)
                gathered = self._gather(plan, facts, duplicates, ranking)
            return self._publish(plan, duplicates, ranking, gathered)

    def _plan(self, lease: ExitStack) -> BuildPlan | None:
        """The plan, made now or by an earlier call, with the target's lease taken; None where another made shards."""
        check_memory(self.spec.data, self.memory_bytes, self.layout.file_cells)
        if self.building.size(PLAN) is None:
            with Census.open(self.census) as census:
                self.progress(f"reading cells of {self.census}")
                prepared = prepare(census, self.census, self.spec.data, self.memory_bytes, self.layout)
                self._hold(lease)
                if self.building.size(PLAN) is None:
                    prepared.write(self.building)
        else:
            self._hold(lease)
        if self.target.size(MANIFEST) is not None:
            return None
        plan = BuildPlan.parse(self.building.read(PLAN), f"{self.building}/{PLAN}")
        self._check_same(plan)
        return plan

    def _hold(self, lease: ExitStack) -> None:
        held = lease.enter_context(self.target.lease(f"{BUILDING}.lease", self.progress))
        # From here on nothing is written, here or in a task, once another driver has taken over.
        self.target = fenced(self.target, held)
        self.building = self.target.below(BUILDING.rstrip("/"))
        if isinstance(self.target, LocalPlace):
            sweep_partial_files(self.target.path)

    def _check_same(self, plan: BuildPlan) -> None:
        rules = reading_rules(self.spec.data)
        if plan.rules != rules:
            differing = sorted(key for key in rules if plan.rules.get(key) != rules[key])
            raise BadInput(
                "D006",
                "--out",
                str(self.target),
                f"holds an unfinished build by other rules ({', '.join(differing)}); finish it, or remove it",
            )
        there = other_census(plan.census, self.census)
        if there is not None:
            raise BadInput(
                "D007",
                "--out",
                str(self.target),
                f"holds an unfinished build of another Census ({there}); finish or remove it",
            )

    def _check_cluster(self) -> None:
        largest = max((float(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]), default=0.0)
        if not os.environ.get("RAY_ADDRESS") and largest < self.memory_bytes:
            raise BadInput(
                "D008",
                "resources.task_memory_gib",
                self.spec.resources.task_memory_gib,
                f"is more than the {largest / 2**30:.2f} GiB that Ray may use here; lower it",
            )

    def _tasks(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(number of the call, its result) of ``function`` on each of ``arguments``, in the order they end."""
        name = function.__name__.strip("_").replace("_", " ")
        remote = ray.remote(
            num_cpus=1,
            memory=self.memory_bytes,
            max_retries=TASK_RETRIES,
            runtime_env={"env_vars": TASK_ENVIRONMENT},
        )(function)
        left = iter(enumerate(arguments))
        running: dict[Any, int] = {}
        try:
            while True:
                most = 2 * int(ray.cluster_resources().get("CPU", 1)) + WAITING_TASKS
                while len(running) < most and (following := next(left, None)) is not None:
                    running[remote.remote(*following[1])] = following[0]
                if not running:
                    return
                done, _ = ray.wait(list(running), timeout=REPORT_SECONDS)
                for reference in done:
                    result, peak = ray.get(reference)
                    self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)
                    yield running.pop(reference), result
        finally:
            for reference in running:
                ray.cancel(reference)

    def _read_ranges(self, plan: BuildPlan) -> None:
        done = self.building.names("ranges/")
        waiting = [part for part in plan.parts if part.facts_name not in done]
        if not waiting:
            return
        rate = _pace("read", sum(part.cells for part in waiting), plan.cells, self.progress)
        arguments = [(self.census, self.building, part, self.memory_bytes) for part in waiting]
        for number, _ in self._tasks(range_task, arguments):
            rate.add(waiting[number].cells)

    def _facts(self, plan: BuildPlan) -> _Facts:
        keys, sums, beyond, pieces = [], [], [np.empty((0, 3), np.int64)], []
        for part in plan.parts:
            facts = unpack(self.building.read(part.facts_name), part.facts_name)
            keys.append(facts["key"])
            sums.append(facts["raw_sum"])
            beyond.append(facts["beyond"])
            bucket = facts["piece_bucket"].astype(np.int64)
            own = np.full(len(bucket), part.index)
            pieces.append(np.stack([bucket, own, facts["piece_start"], facts["piece_bytes"]], axis=1))
        return _Facts(np.concatenate(keys), np.concatenate(sums), np.concatenate(beyond), np.concatenate(pieces))

    def _duplicates(self, plan: BuildPlan, facts: _Facts) -> _Duplicates:
        order = np.argsort(facts.key, kind="stable")
        key, raw_sum = facts.key[order], facts.raw_sum[order]
        # cells without a count show no evidence of being copies; min_counts decides on them
        again = np.flatnonzero((key[1:] == key[:-1]) & (raw_sum[1:] == raw_sum[:-1]) & (raw_sum[1:] > 0)) + 1
        repeated = np.sort(order[again])
        found = _Duplicates(cells=len(repeated))
        parts = plan.parts
        ends = np.cumsum([part.cells for part in parts])
        edges = np.searchsorted(facts.pieces[:, 1], np.arange(len(parts) + 1))  # pieces come range by range
        range_of = np.searchsorted(ends, repeated, side="right")
        arguments = []
        for index in np.unique(range_of):
            part = parts[int(index)]
            rows = repeated[range_of == index] - (ends[index] - part.cells)
            cells = unpack(self.building.read(part.slice_name), part.slice_name)
            for bucket in np.unique(cells["bucket"][rows]):
                places = cells["place"][rows][cells["bucket"][rows] == bucket].astype(np.int64)
                found.places.setdefault(int(bucket), []).append(places)
            train = rows[cells["split"][rows] == 0]
            if len(train):
                own = facts.pieces[edges[index] : edges[index + 1]]
                pieces = own[np.isin(own[:, 0], cells["bucket"][train])]
                joinids = cells["joinid"][train].astype(np.int64)
                arguments.append((self.building, part, pieces, joinids, len(plan.feature_ids)))
                for batch, count in zip(*np.unique(cells["batch"][train], return_counts=True), strict=True):
                    found.of_batch[int(batch)] = found.of_batch.get(int(batch), 0) + int(count)
        if arguments:
            self.progress(f"leaving out {found.cells:,} duplicates")
        for number, histograms in self._tasks(duplicates_task, arguments):
            found.histograms[arguments[number][1].index] = histograms
        return found

    def _rank(self, plan: BuildPlan, duplicates: _Duplicates) -> GeneRanking:
        self.progress(f"ranking {len(plan.feature_ids):,} genes on {plan.split_cells[0]:,} training cells")
        return rank_genes(self._batches(plan, duplicates), len(plan.feature_ids), self.spec.data, plan.feature_ids)

    def _batches(self, plan: BuildPlan, duplicates: _Duplicates) -> Iterator[Batch]:
        """The training cells of each batch, yielded as soon as the last range with any of them was added."""
        sums: dict[int, HistogramSum] = {}
        for part in plan.parts:
            arrays = unpack(self.building.read(part.counts_name), part.counts_name)
            for batch, histogram in histograms_of(arrays):
                sums.setdefault(batch, HistogramSum(len(plan.feature_ids))).add(histogram)
            for batch, histogram in duplicates.histograms.get(part.index, []):
                sums[batch].add(histogram, -1)
            for batch in sorted(batch for batch in sums if plan.batch_ends[batch] == part.index):
                cells = plan.batch_cells[batch] - duplicates.of_batch.get(batch, 0)
                yield Batch(plan.batches[batch], sums.pop(batch).result(), cells)

    def _gather(
        self, plan: BuildPlan, facts: _Facts, duplicates: _Duplicates, ranking: GeneRanking
    ) -> list[GatheredFile]:
        names = bucket_names(plan.split_cells, plan.file_cells)
        sizes = _bucket_cells(plan.split_cells, plan.file_cells)
        folder = f"files/{content_hash(self.spec.data.rules)[:16]}/"
        done = self.building.names("files/")
        for other in {name[: name.rindex("/") + 1] for name in done} - {folder}:
            self.building.remove(other)  # made by other rules on genes: their shard files are about to be replaced
        waiting = [bucket for bucket, (_, name) in enumerate(names) if f"{folder}{name}.json" not in done]
        by_bucket = facts.pieces[np.argsort(facts.pieces[:, 0], kind="stable")]
        edges = np.searchsorted(by_bucket[:, 0], np.arange(len(names) + 1))
        donors = len(plan.labels["donor_id"])
        common = ray.put((ranking.order, plan.parts, len(plan.feature_ids), donors, plan.file_cells))
        arguments = [
            (
                self.target,
                self.building,
                f"{folder}{names[bucket][1]}.json",
                names[bucket],
                by_bucket[edges[bucket] : edges[bucket + 1], 1:],
                np.concatenate([np.empty(0, np.int64), *duplicates.places.get(bucket, [])]),
                self.spec.data.min_counts,
                common,
            )
            for bucket in waiting
        ]
        rate = _pace("written", sum(sizes[bucket] for bucket in waiting), plan.cells, self.progress)
        for number, _ in self._tasks(gather_task, arguments):
            rate.add(sizes[waiting[number]])
        records = [f"{folder}{name}.json" for _, name in names]
        return [GatheredFile.parse(self.building.read(record), f"{self.building}/{record}") for record in records]

    def _publish(
        self, plan: BuildPlan, duplicates: _Duplicates, ranking: GeneRanking, gathered: list[GatheredFile]
    ) -> ShardManifest:
        """Write the tables and, last, the manifest; then remove the files of the build."""
        dropped = dict(plan.dropped)
        if self.spec.data.drop_duplicates:
            dropped["drop_duplicates"] = duplicates.cells
        if self.spec.data.min_counts:
            dropped["min_counts"] = sum(file.below_min_counts for file in gathered)
        splits = _splits(plan, gathered, dropped)
        tables = [
            write_table(self.target, "genes.parquet", _genes_table(plan, ranking)),
            write_table(self.target, "presence.parquet", self._presence_table(plan, ranking)),
        ]
        planted = beside(self.census, "plant.json")
        if planted is not None:
            self.target.write("plant.json", planted)
            tables.append(file_entry("plant.json", planted, 0))
        rules = self.spec.data.rules
        manifest = ShardManifest(
            name=self.spec.name,
            data_hash=content_hash(
                {
                    "rules": rules | {"split_from": plan.split_from},
                    "genes": [plan.feature_ids[gene] for gene in ranking.order],
                    "splits": {name: entry.content_sha256 for name, entry in splits.items()},
                }
            ),
            genes=self.spec.data.genes,
            block_genes=BLOCK_GENES,
            row_group_cells=ROW_GROUP_CELLS,
            split_by=self.spec.data.split_by,
            data=rules,
            census=plan.census,
            planted=planted is not None,
            dropped=dropped,
            batches_left_out=ranking.batches_left_out,
            split_from=plan.split_from,
            splits=splits,
            tables=tables,
            codes=plan.labels,
            made_with={name: importlib.metadata.version(name) for name in MADE_WITH}
            | {"spec_sha256": content_hash(self.spec.model_dump(mode="json"))},
        )
        wanted = {entry.path for split in splits.values() for entry in split.files}
        for name in self.target.names():
            if SHARD_FILE.fullmatch(name) and name not in wanted:  # written by an earlier call with other genes
                self.target.remove(name)
        self.target.write(MANIFEST, manifest.to_json().encode())
        self.target.remove(BUILDING)
        for task, peak in self.peak_bytes.items():
            self.progress(f"most memory of a {task}: {peak / 2**20:,.0f} MiB of {self.memory_bytes / 2**20:,.0f}")
        return manifest

    def _presence_table(self, plan: BuildPlan, ranking: GeneRanking) -> pa.Table:
        packed = unpack(self.building.read(PRESENCE), PRESENCE)["measured"]
        measured = np.unpackbits(packed, axis=1, count=len(plan.feature_ids))[:, ranking.order]
        return pa.table({"dataset_id": plan.labels["dataset_id"], "measured": encode_block(measured.astype(np.uint16))})


def _pace(verb: str, left: int, total: int, progress: Progress) -> Pace:
    return Pace(verb, total, progress, before=total - left, every_seconds=REPORT_SECONDS)


def _bucket_cells(split_cells: Sequence[int], file_cells: int) -> list[int]:
    """Cells of each shard file before any is left out, in the order of ``bucket_names``."""
    return [min(file_cells, cells - first) for cells in split_cells for first in range(0, cells, file_cells)]


def _refuse_large_counts(beyond: Ints, order: Ints, plan: BuildPlan) -> None:
    """BadInput where a ranked gene has a count beyond its two bytes; no count is ever wrapped."""
    wrong = beyond[np.isin(beyond[:, 1], order)]
    if len(wrong):
        cell, gene, count = (int(value) for value in wrong[np.argmax(wrong[:, 2])])
        raise BadInput(
            "D009",
            "counts",
            count,
            f"of gene {plan.feature_ids[gene]} in cell {cell} ({len(wrong)} such) is more than {LARGEST_COUNT}; "
            "keep other assays with data.keep, or leave the gene out with data.gene_list",
        )


def _splits(plan: BuildPlan, gathered: list[GatheredFile], dropped: dict[str, int]) -> dict[str, SplitEntry]:
    """The splits of the manifest; BadInput where the rules on counts have left one empty."""
    whole = sum(file.entry.rows for file in gathered if file.entry)
    splits = {}
    for name in SPLITS:
        own = [file for file in gathered if file.split == name]
        files = [file.entry for file in own if file.entry]
        cells = sum(entry.rows for entry in files)
        if not cells:
            taken = {rule: dropped[rule] for rule in ("drop_duplicates", "min_counts") if rule in dropped}
            raise BadInput("D010", "data.min_counts", taken, f"cells dropped leave none in {name}; ask for less")
        splits[name] = SplitEntry(
            cells=cells,
            fraction=cells / whole,
            groups=plan.groups[name],
            donor_cells=np.sum([file.donor_cells for file in own], axis=0).tolist(),
            content_sha256=split_content(files),
            files=files,
        )
    return splits


def _genes_table(plan: BuildPlan, ranking: GeneRanking) -> pa.Table:
    order = ranking.order
    return pa.table(
        {
            "rank": np.arange(len(order)),
            "soma_joinid": order,
            "feature_id": [plan.feature_ids[gene] for gene in order],
            "feature_name": [plan.feature_names[gene] for gene in order],
            "train_mean_count": ranking.mean[order],
            "score": ranking.score[order],
        }
    )
