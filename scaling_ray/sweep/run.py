"""A sweep under Ray: runs without a result are trained, finished ones are skipped, and a repeated call goes on.

One driver at a time holds the lease of the sweep's directory; every write of it and its workers checks that lease.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scaling_ray.cluster import (
    Pending,
    nodes_up,
    own_errors,
    ray,
    ray_session,
)  # before ray.tune: it sets what ray reads once
from scaling_ray.errors import BadInput, Interrupted, Preempted, RunsFailed
from scaling_ray.extras import missing_modules
from scaling_ray.records import ShardManifest
from scaling_ray.results.columns import Row
from scaling_ray.results.references import reference_name
from scaling_ray.results.sweep_files import LEASE, MANIFEST, SPEC, SweepFiles
from scaling_ray.runs import runs_of
from scaling_ray.shards.format import SPLITS, read_manifest, verify
from scaling_ray.shards.order import check_donors, chosen_donors
from scaling_ray.shards.stream import read_resident
from scaling_ray.spec import SweepSpec, load_spec
from scaling_ray.storage import Place, fenced, open_place, output_place
from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.export import keep_genes, keep_test_labels
from scaling_ray.sweep.failures import storage_errors
from scaling_ray.sweep.plan import SplitCells, as_planned, check_disk, make_plan
from scaling_ray.sweep.probing import capacity_here, choose_device, probe_micro_batches, probe_name
from scaling_ray.sweep.references import closed_form_task, floor_task
from scaling_ray.sweep.reservations import freed
from scaling_ray.sweep.scheduler import Scheduler
from scaling_ray.sweep.state import Progress, SweepState
from scaling_ray.sweep.stopping import stop_on_signals
from scaling_ray.tracking.ledger import is_tracked, tracking_uri


def run_sweep(
    spec_path: Path | str,
    shards: Path | str | Place,
    out: Path | str | Place,
    progress: Progress = lambda line: None,
    cluster: Path | None = None,
) -> list[Row]:
    """Train what the spec asks for and ``out`` does not hold yet; returns the rows of the results table.

    ``shards`` and ``out`` are directories or ``s3://`` URIs. ``cluster`` is the file that the cluster was started from
    (``ray up``): what it can become decides which sizes have room; else the head's own copy, or the nodes that are up.

    Raises:
        BadInput: the shards cannot serve the spec.
        LeaseHeld: another driver works on ``out``.
        Preempted: a stop was requested; the state of every run has been saved.
        BudgetSpent: the sweep has used what ``[budget]`` gives it; the same.
        StorageFailed: nothing could be written below ``out`` for ten minutes; the same.
        RunsFailed: at the end, where some runs have no result (all others do).
    """
    spec, text = load_spec(spec_path), Path(spec_path).read_bytes()
    source = open_place(shards, "--shards")
    manifest = read_manifest(source)
    check_serves(spec, manifest)
    place = output_place(out)
    with place.lease(LEASE, progress) as lease:
        files = SweepFiles(fenced(place, lease))
        for name in files.place.claims("runs/"):  # runs of an earlier driver may still be about to commit
            files.place.claim(name, lease.token)
        _check_same_shards(files, manifest, source)
        check_disk(spec, runs_of(spec))
        files.place.write(SPEC, text)
        keep_genes(files.place, manifest, source)
        keep_test_labels(files.place, manifest, source)
        files.place.write(MANIFEST, manifest.to_json().encode())
        state = SweepState(spec, manifest, source, files, as_planned(runs_of(spec), files.plan()), progress)
        with storage_errors(files):
            return _complete(state, cluster)


def check_serves(spec: SweepSpec, manifest: ShardManifest) -> None:
    """Raise BadInput naming the first thing that the spec asks for and the shards do not offer."""
    rules = spec.data.rules
    for key, wanted in rules.items():
        there = manifest.data[key]
        if there != wanted:
            raise BadInput(
                "W043", f"data.{key}", wanted, f"the shards were made with {there!r}; build shards from this spec"
            )
    for run in runs_of(spec):
        if run.donors is not None:
            donor_cells = np.array(manifest.splits["train"].donor_cells)
            chosen = chosen_donors(run.donors, np.flatnonzero(donor_cells), run.seed)
            check_donors(run.donors, len(chosen), run.cells, int(donor_cells[chosen].sum()), run.seed)
    train_cells = manifest.splits["train"].cells
    for cells in spec.grid.cells:
        if cells != "all" and cells > train_cells:
            raise BadInput(
                "W044", "grid.cells", cells, f"is more than the {train_cells} training cells of the shards; lower it"
            )


def _check_same_shards(files: SweepFiles, manifest: ShardManifest, shards: Place) -> None:
    """Raise BadInput where the sweep's runs, finished or not, belong to other shards."""
    there = files.manifest()
    if there is not None and there.data_hash != manifest.data_hash:
        raise BadInput("W045", "--shards", str(shards), "differ from those of this sweep; sweep into a new --out")


def _complete(state: SweepState, cluster: Path | None) -> list[Row]:
    waiting = state.waiting()
    if waiting or state.missing_references() or state.files.plan() is None:
        done = len(state.runs) - len(waiting)
        state.progress(f"{done} of {len(state.runs)} runs done, {len(waiting)} to go")
        _train(state, cluster)
    state.table.refresh()
    rows = state.table.write()
    _track_to_the_end(state)
    state.table.refresh()
    rows = state.table.write()
    failed = state.failed()
    if failed:
        first = failed[0]
        raise RunsFailed(
            "W046",
            f"{len(failed)} of {len(rows)} runs have no result; first {first.run_id} ({first.failure}): "
            f"see {state.files.run(first.run_id).place}/failure.json",
        )
    return rows


def _train(state: SweepState, cluster: Path | None) -> None:
    problems = verify(state.shards)
    if problems:
        raise BadInput("W047", "--shards", str(state.shards), f"{problems[0]}; build the shards again")
    cpus, files = state.spec.resources.cpus, state.files
    with ray_session(cpus), own_errors(), stop_on_signals(files, state.stopping), _followed(state), freed(files.place):
        capacity = capacity_here(cluster)
        _plan(state, capacity, joined=bool(os.environ.get("RAY_ADDRESS")))
        most_genes = max(run.genes for run in state.runs)
        state.progress("reading shards into the object store")
        shared = [name for name in SPLITS if name != "train" or _train_is_resident(state, most_genes)]
        splits = {name: ray.put(read_resident(state.shards, state.manifest, name, most_genes)) for name in shared}
        references = _start_references(state, splits)
        Scheduler(state, splits, _own_bytes(state.spec), capacity).train(state.units())
        _check_stop(state)
        references.wait(lambda: _check_stop(state))


def _plan(state: SweepState, capacity: Capacity, joined: bool) -> None:
    """Write plan.json, keeping what it said of runs it knew, and give every run the execution that it names.

    A private cluster is the machine that the spec describes; of one that was ``joined``, ``capacity`` says what it is.
    """
    earlier = state.files.plan()
    known = {setting["run_id"] for setting in earlier["settings"]} if earlier is not None else set()
    new = [run for run in state.runs if run.run_id not in known]
    there, target = state.manifest.splits, capacity if joined else None
    cells = SplitCells(there["train"].cells, there["val"].cells, there["test"].cells)
    if new and not nodes_up().get("CPU"):
        state.progress("no node with CPUs is up: the sweep waits for nodes, and looks what they are before it plans")
    device = choose_device(state.spec, capacity) if new else None
    plan, runs = make_plan(state.spec, device, earlier, capacity=target, cells=cells)
    state.files.write_plan(plan)
    if state.spec.train.micro_batch == "probe":
        unknown = sorted({probe_name(run) for run in runs if run.run_id not in plan["probed"]})
        if unknown:
            state.progress(f"measuring micro-batches of {', '.join(unknown)}")
        # A measured micro-batch changes the bytes that are planned.
        probed = probe_micro_batches(state.files, runs, plan)
        plan, runs = make_plan(state.spec, None, probed, capacity=target, cells=cells)
        state.files.write_plan(plan)
    rates = {run.run_id: run.lr for run in state.runs}
    planned = as_planned(runs, plan)
    state.stacks = [list(stack) for stack in plan["stacks"]]
    state.replace_runs([run.model_copy(update={"lr": rates[run.run_id]}) for run in planned])


def _check_stop(state: SweepState) -> None:
    if state.stop_requested():
        left = len(state.waiting())
        if state.stopping.from_keyboard:
            raise Interrupted(
                "W054", f"{state.files}: stopped with {left} runs to go, all saved; the same command goes on"
            )
        raise Preempted("W048", f"{state.files}: stopped with {left} runs to go, all saved; the same command goes on")


def _train_is_resident(state: SweepState, genes: int) -> bool:
    """Whether all runs share one copy of the training split; else each run opens the cells it needs."""
    return 2 * genes * state.train_cells <= state.spec.resources.resident_gib * 2**30


def _own_bytes(spec: SweepSpec) -> float:
    """Bytes of counts that each of the runs training at the same time may hold for itself."""
    resources = spec.resources
    return resources.resident_gib * 2**30 / max(1, resources.cpus // spec.train.threads)


def _start_references(state: SweepState, splits: dict[str, Any]) -> Pending:
    """Start the tasks that compute missing baselines and floors."""
    missing, tasks = set(state.missing_references()), Pending()
    manifest, references = state.manifest.to_json(), state.files.references
    one_per_name = {f"{reference_name(run, state.train_cells)}.json": run for run in state.runs}
    for name, run in one_per_name.items():
        if name in missing:
            train = splits["train"] if "train" in splits else None
            arguments = (references, run.model_dump_json(), state.shards, manifest, train)
            tasks.start(closed_form_task, *arguments, splits["val"], splits["test"])
    if state.has_floors():
        for genes in sorted({run.genes for run in state.runs}):
            rules = state.runs[0].train.model_dump_json()
            tasks.start(floor_task, references, state.shards, manifest, genes, splits["test"], rules)
    return tasks


@contextmanager
def _followed(state: SweepState, seconds: float = 5.0) -> Iterator[None]:
    """Keep the tracking server in step until the block ends; then bring the results table up to date."""
    follower = _follower(state, seconds)
    if follower is None:
        reason = "set MLFLOW_TRACKING_URI for a sweep on S3" if _can_track() else "MLflow is not installed"
        state.progress(f"not tracked ({reason}); `scaling-ray track replay` logs it all later")
    else:
        follower.start()
    try:
        yield
    finally:
        state.table.refresh()
        state.table.write()
        if follower is not None:
            follower.finish(failed=bool(state.failed()))


def _can_track() -> bool:
    return not missing_modules("track")


def _follower(state: SweepState, seconds: float) -> Any:
    if tracking_uri(state.files) is None or not _can_track():
        return None
    from scaling_ray.tracking.follower import Follower
    from scaling_ray.tracking.tracker import Tracker

    tracker = lambda: Tracker(state.files, state.spec, state.manifest)  # noqa: E731
    return Follower(tracker, lambda: state.runs, state.progress, seconds)


def _track_to_the_end(state: SweepState) -> None:
    """Log what an earlier call could not."""
    follower = _follower(state, 0.0)
    if follower is None or is_tracked(state.files, [row.run_id for row in state.table.rows if row.status == "done"]):
        return
    state.progress("bringing MLflow up to date")
    follower.start()
    follower.finish(failed=bool(state.failed()))
