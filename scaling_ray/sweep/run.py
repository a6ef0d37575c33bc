"""A sweep under Ray: what is missing is run by Ray Tune, what is done is skipped, and calling again goes on.

Single-process runs are Tune trials that share the resident shards; runs with several workers get a Ray Train group
each. One driver at a time holds the lease of the directory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scaling_ray.cluster import own_errors, ray, ray_session  # before ray.tune: it sets what ray reads once
from scaling_ray.errors import BadInput, Preempted, RunsFailed
from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import SPLITS, read_manifest, verify
from scaling_ray.shards.order import check_donors, chosen_donors
from scaling_ray.shards.read import Feed
from scaling_ray.shards.stream import open_feed, read_resident
from scaling_ray.spec import RunSpec, SweepSpec, load_spec
from scaling_ray.storage import Lease, Place, open_place, output_directory, partial_directory, write_atomic, write_json
from scaling_ray.sweep.export import keep_genes
from scaling_ray.sweep.failures import guarded, record_failure, recorded_failure, within_memory
from scaling_ray.sweep.plan import as_planned, make_plan, run_cost
from scaling_ray.sweep.references import closed_form_task, floor_path, floor_task, reference_name
from scaling_ray.sweep.results import write_results
from scaling_ray.sweep.stopping import asked_to_stop, stop_file, stop_on_sigterm
from scaling_ray.sweep.trial import Trial
from scaling_ray.tracking.ledger import is_tracked
from scaling_ray.train.checkpoint import prepare_run, publish_winner, read_metrics, read_result

Progress = Callable[[str], None]


def run_sweep(
    spec_path: Path, shards: Path | str | Place, out: Path, progress: Progress = lambda line: None
) -> list[dict[str, Any]]:
    """Run what the spec asks for and ``out`` does not hold yet; the rows of the results table.

    ``shards`` is a directory or an ``s3://`` URI.

    BadInput for a spec that the shards cannot serve; LeaseHeld where another driver works on ``out``; RunsFailed at
    the end where runs have no result (the others do).
    """
    spec = load_spec(spec_path)
    source = open_place(shards, "--shards")
    manifest = read_manifest(source)
    _check_serves(spec, manifest)
    sweep = output_directory(out)
    with Lease(sweep):
        return _Sweep(spec, manifest, source, sweep, progress).complete(Path(spec_path).read_bytes())


def _check_serves(spec: SweepSpec, manifest: ShardManifest) -> None:
    """BadInput naming the first thing the spec asks for that the shards are not."""
    rules = spec.data.model_dump(mode="json")
    for key, wanted in rules.items():
        there = manifest.data[key]
        if there != wanted:
            raise BadInput(f"data.{key}", wanted, f"the shards were made with {there!r}; build shards from this spec")
    for run in spec.runs():
        if run.donors is not None:
            donor_cells = np.array(manifest.splits["train"].donor_cells)
            chosen = chosen_donors(run.donors, np.flatnonzero(donor_cells), run.seed)
            check_donors(run.donors, len(chosen), run.cells, int(donor_cells[chosen].sum()), run.seed)
    train_cells = manifest.splits["train"].cells
    for cells in spec.grid.cells:
        if cells != "all" and cells > train_cells:
            raise BadInput(
                "grid.cells", cells, f"is more than the {train_cells} training cells of the shards; lower it"
            )


class _Sweep:
    """One call's work on a sweep directory, under its lease."""

    def __init__(
        self, spec: SweepSpec, manifest: ShardManifest, shards: Place, sweep: Path, progress: Progress
    ) -> None:
        self.spec, self.manifest, self.shards, self.sweep, self.progress = spec, manifest, shards, sweep, progress
        self.runs = spec.runs()
        self.train_cells = manifest.splits["train"].cells

    def directory(self, run: RunSpec) -> Path:
        return self.sweep / "runs" / run.run_id

    def complete(self, spec_text: bytes) -> list[dict[str, Any]]:
        self._check_same_shards()
        write_atomic(self.sweep / "spec.toml", spec_text)
        keep_genes(self.sweep, self.manifest, self.shards)
        write_atomic(self.sweep / "shards_manifest.json", self.manifest.to_json())
        self._make_plan()
        (self.sweep / "runs").mkdir(exist_ok=True)
        for run in self.runs:
            publish_winner(self.directory(run))
        self.runs = self._with_chosen_rates()
        waiting = self._waiting(self.runs)
        if waiting or self._missing_references():
            self.progress(f"{len(self.runs) - len(waiting)} of {len(self.runs)} runs done, {len(waiting)} to go")
            self._run_waiting()
        rows = write_results(self.sweep, self.runs, self.train_cells)
        self._track_to_the_end(rows)
        rows = write_results(self.sweep, self.runs, self.train_cells)
        # A learning rate that diverged is an answer, not a failure.
        failed = [
            row for row in rows if row["status"] != "done" and (row["role"], row["failure"]) != ("rate", "diverged")
        ]
        if failed:
            first = failed[0]
            raise RunsFailed(
                f"{len(failed)} of {len(rows)} runs have no result; first {first['run_id']} ({first['failure']}): "
                f"see {self.sweep / 'runs' / first['run_id'] / 'failure.json'}"
            )
        return rows

    def _make_plan(self) -> None:
        """Write plan.json, repeating what it said of runs it knew; runs and stacks are those it says."""
        path = self.sweep / "plan.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        plan = make_plan(self.spec, earlier)
        write_json(path, plan)
        self.runs = as_planned(self.runs, plan)
        self.stacks: list[list[str]] = plan["stacks"]

    def _check_same_shards(self) -> None:
        """BadInput where this directory's runs, finished or not, belong to other shards."""
        path = self.sweep / "shards_manifest.json"
        if path.is_file() and ShardManifest.read(path).data_hash != self.manifest.data_hash:
            raise BadInput("--shards", str(self.shards), "differ from those of this sweep; sweep into a new --out")

    def _waiting(self, runs: list[RunSpec]) -> list[RunSpec]:
        """Runs without a result, but for those that diverged: they would diverge again, digit for digit."""
        unfinished = [run for run in runs if not (self.directory(run) / "result.json").is_file()]
        return [run for run in unfinished if recorded_failure(self.directory(run)) != "diverged"]

    def _with_chosen_rates(self) -> list[RunSpec]:
        """The runs, with a rate where one can be chosen: of the candidates that ended, that of lowest validation error.

        A choice is made once all candidates have a result or diverged, and written down: it never changes after.
        """
        path = self.sweep / "chosen_rates.json"
        chosen: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        by_id = {run.run_id: run for run in self.runs}
        for run in self.runs:
            if not run.lr_candidates or run.run_id in chosen:
                continue
            candidates = [by_id[name] for name in run.lr_candidates]
            results = [result for name in candidates if (result := read_result(self.directory(name)))]
            if results and not self._waiting(candidates):
                chosen[run.run_id] = min(results, key=lambda result: result.val_mse).lr
        if chosen:
            write_json(path, chosen)
        return [run.model_copy(update={"lr": chosen[run.run_id]}) if run.run_id in chosen else run for run in self.runs]

    def _missing_references(self) -> bool:
        directory = self.sweep / "references"
        names = {reference_name(run, self.train_cells) for run in self.runs}
        missing = any(not (directory / f"{name}.json").is_file() for name in names)
        floors = {floor_path(directory, run.genes, run.train) for run in self.runs} if self._has_floors() else set()
        return missing or any(not path.is_file() for path in floors)

    def _has_floors(self) -> bool:
        """Floors are exact for cells that were planted, and for a network that sees them whole."""
        return self.manifest.planted and self.spec.train.umi_fraction == 1

    def _run_waiting(self) -> None:
        problems = verify(self.shards)
        if problems:
            raise BadInput("--shards", str(self.shards), f"{problems[0]}; build the shards again")
        follower = self._follower()
        follower.start()
        try:
            with ray_session(self.spec.resources.cpus), own_errors(), stop_on_sigterm(self.sweep):
                most_genes = max(run.genes for run in self.runs)
                self.progress("reading shards into the object store")
                shared = [name for name in SPLITS if name != "train" or self._train_is_resident(most_genes)]
                splits = {name: ray.put(read_resident(self.shards, self.manifest, name, most_genes)) for name in shared}
                self._probe()
                references = self._start_references(splits)
                for role in ("rate", "law"):
                    self.runs = self._with_chosen_rates()
                    self._run_phase([run for run in self.runs if run.role == role], splits)
                    self._check_stop()
                self._finish_references(references)
        finally:
            rows = write_results(self.sweep, self.runs, self.train_cells)
            follower.finish(failed=any(is_failure(row) for row in rows))

    def _probe(self) -> None:
        """Measure micro-batches where the spec asks for it, once for runs alike, and write them into the plan."""
        path = self.sweep / "plan.json"
        plan = json.loads(path.read_text(encoding="utf-8"))
        unknown = [run for run in self.runs if run.run_id not in plan["probed"]]
        if self.spec.train.micro_batch != "probe" or not unknown:
            return
        names = {run.run_id: f"{run.size} of {run.genes} genes" for run in unknown}
        one_of = {names[run.run_id]: run for run in unknown}
        self.progress(f"measuring micro-batches of {', '.join(one_of)}")
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        probe = ray.remote(num_cpus=self.spec.train.threads, num_gpus=gpus)(_probe_task)
        # one after the other: two at a time would measure each other
        found = {name: ray.get(probe.remote(run.model_dump_json())) for name, run in one_of.items()}
        for cell in plan["cells"]:
            if cell["run_id"] in names:
                cell["micro_batch"] = found[names[cell["run_id"]]]
        write_json(path, plan | {"probed": plan["probed"] + list(names)})
        self.runs = as_planned(self.runs, plan)

    def _check_stop(self) -> None:
        if asked_to_stop(self.sweep):
            left = len(self._waiting(self.runs))
            raise Preempted(f"{self.sweep}: stopped with {left} runs to go, all saved; the same command goes on")

    def _finish_references(self, references: list[Any]) -> None:
        while references:
            _, references = ray.wait(references, num_returns=len(references), timeout=1.0)
            self._check_stop()

    def _train_is_resident(self, genes: int) -> bool:
        """Whether all runs share one copy of the training split; else each opens what it needs."""
        return 2 * genes * self.train_cells <= self.spec.resources.resident_gib * 2**30

    def _own_bytes(self) -> float:
        """Bytes of counts that one of the runs that train at the same time may hold for itself."""
        resources = self.spec.resources
        return resources.resident_gib * 2**30 / max(1, resources.cpus // self.spec.train.threads)

    def _start_references(self, splits: dict[str, Any]) -> list[Any]:
        directory = self.sweep / "references"
        directory.mkdir(exist_ok=True)
        closed_form = ray.remote(num_cpus=1)(closed_form_task)
        floor = ray.remote(num_cpus=1)(floor_task)
        one_per_name = {reference_name(run, self.train_cells): run for run in self.runs}
        tasks = [
            closed_form.remote(
                str(directory),
                run.model_dump_json(),
                self.shards,
                self.manifest.to_json(),
                splits.get("train"),
                splits["val"],
                splits["test"],
            )
            for name, run in one_per_name.items()
            if not (directory / f"{name}.json").is_file()
        ]
        if self._has_floors():
            for genes in sorted({run.genes for run in self.runs}):
                arguments = (str(directory), self.shards, self.manifest.to_json(), genes)
                tasks.append(floor.remote(*arguments, splits["test"], self.runs[0].train.model_dump_json()))
        return tasks

    def _run_phase(self, runs: list[RunSpec], splits: dict[str, Any]) -> None:
        from scaling_ray.train.worker import preflight

        waiting = {run.run_id for run in self._waiting(runs)}
        stacked = {run_id for stack in self.stacks for run_id in stack}
        by_id = {run.run_id: run for run in runs}
        groups = [[by_id[name] for name in stack] for stack in self.stacks if by_id.keys() >= set(stack)]
        groups += [[run] for run in runs if run.run_id not in stacked]
        ready = []
        for group in groups:
            if not waiting & {run.run_id for run in group}:
                continue
            if obstacle := self._obstacle(group, lambda run: preflight(run, ray.cluster_resources())):
                for run in group:
                    self.directory(run).mkdir(parents=True, exist_ok=True)
                    record_failure(self.directory(run), run, "bad_input", obstacle)
                continue
            for run in group:
                prepare_run(self.directory(run), run)
            ready.append(group)
        alone = [group for group in ready if group[0].workers == 1]
        if alone:
            cost = {group[0].run_id: sum(float(run_cost(run, 1.0)["flops"]) for run in group) for group in alone}
            self._tune(sorted(alone, key=lambda group: -cost[group[0].run_id]), splits)
        for group in ready:
            if group[0].workers > 1:
                self._check_stop()
                self._worker_group(group[0])

    def _obstacle(self, group: list[RunSpec], preflight: Callable[[RunSpec], str | None]) -> str | None:
        """Why a group cannot train, or None."""
        if any(run.lr is None for run in group):
            return "no learning rate could be chosen: a learning-rate run of this size has no result"
        return next((found for run in group if (found := preflight(run))), None)

    def _tune(self, groups: list[list[RunSpec]], splits: dict[str, Any]) -> None:
        from ray import tune

        threads = max(run.train.threads for group in groups for run in group)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                splits=splits,
                sweep=str(self.sweep.resolve()),
                shards=self.shards,
                manifest=self.manifest.to_json(),
                own_bytes=self._own_bytes(),
            ),
            {"cpu": threads, "gpu": gpus},
        )
        scratch = partial_directory(self.sweep / "tune")
        try:
            tune.Tuner(
                trainable,
                param_space={"runs": tune.grid_search([[run.model_dump_json() for run in group] for group in groups])},
                tune_config=tune.TuneConfig(reuse_actors=True),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(scratch.resolve()),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=self.spec.resources.max_failures),
                    callbacks=[_progress_callback(self)],
                ),
            ).fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if asked_to_stop(self.sweep):
            return
        for run in self._waiting([run for group in groups for run in group]):
            if not (self.directory(run) / "failure.json").is_file():
                attempts = 1 + self.spec.resources.max_failures
                record_failure(self.directory(run), run, "lost", f"its worker process died {attempts} times")

    def _worker_group(self, run: RunSpec) -> None:
        directory = self.directory(run)
        scratch = partial_directory(self.sweep / "workers")
        use_gpu = bool(ray.cluster_resources().get("GPU"))
        began = time.monotonic()
        try:
            guarded(
                {directory: run},
                lambda: within_memory(
                    [run], directory, lambda fitting: self._train_in_group(fitting[0], use_gpu, scratch)
                ),
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        publish_winner(directory)
        self.announce(run, time.monotonic() - began)

    def _train_in_group(self, run: RunSpec, use_gpu: bool, scratch: Path) -> None:
        from scaling_ray.train.worker import train_in_worker_group

        resident_bytes = self.spec.resources.resident_gib * 2**30
        train_in_worker_group(
            run, self.shards, self.directory(run), use_gpu, scratch, resident_bytes, stop_file(self.sweep).resolve()
        )

    def announce(self, run: RunSpec, seconds: float) -> None:
        """A line for a run that ended, and one for each note it left; the results table is brought up to date."""
        left, directory = len(self._waiting(self.runs)), self.directory(run)
        result = read_result(directory)
        failure = recorded_failure(directory)
        if result is None and failure is None and asked_to_stop(self.sweep):
            return
        end = f"val_mse {result.val_mse:.4f}" if result else f"failed ({failure or 'lost'})"
        self.progress(f"[{len(self.runs) - left:>3}/{len(self.runs)}] {run.run_id:55} {end}  {seconds:.0f} s")
        for row in read_metrics(directory / "metrics.jsonl"):
            if row["kind"] == "note":
                self.progress(f"{run.run_id}: {row['note']}")
        if result is not None and result.micro_batch != run.micro_batch:
            self.progress(f"{run.run_id}: memory allowed micro-batches of {result.micro_batch}, not {run.micro_batch}")
        write_results(self.sweep, self.runs, self.train_cells)

    def _follower(self, seconds: float = 5.0) -> Any:
        from scaling_ray.tracking.mlflow import Follower, Tracker

        return Follower(lambda: Tracker(self.sweep, self.spec, self.manifest), self.runs, self.progress, seconds)

    def _track_to_the_end(self, rows: list[dict[str, Any]]) -> None:
        """Make up for what an earlier call could not log."""
        if not is_tracked(self.sweep, [row["run_id"] for row in rows if row["status"] == "done"]):
            self.progress("bringing MLflow up to date")
            follower = self._follower(seconds=0.0)
            follower.start()
            follower.finish(failed=any(is_failure(row) for row in rows))


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a run lacks the result it owes; a learning rate that diverged is an answer, not a failure."""
    return row["status"] != "done" and (row["role"], row["failure"]) != ("rate", "diverged")


def _trial(
    config: dict[str, list[str]], splits: dict[str, Any], sweep: str, shards: Place, manifest: str, own_bytes: float
) -> None:
    """What runs in a Tune trial: one run, or one stack, to committed results or recorded failures."""
    from ray import tune

    began = time.monotonic()
    runs = [RunSpec.model_validate_json(text) for text in config["runs"]]
    place = Path(sweep)
    if not asked_to_stop(place):
        record = ShardManifest.parse(manifest, "the shards' manifest")
        held = {name: ray.get(reference).narrowed(runs[0].genes) for name, reference in splits.items()}

        def feed(run: RunSpec) -> Feed:
            return open_feed(shards, record, run, own_bytes / len(runs), cpus=0.0)

        with contextlib.suppress(Preempted):
            Trial(place, shards, record, held, feed).train(runs)
    tune.report({"seconds": time.monotonic() - began})


def _progress_callback(sweep: _Sweep) -> Any:
    from ray import tune

    class Announce(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            for text in trial.config["runs"]:
                run = RunSpec.model_validate_json(text)
                sweep.announce(run, float((trial.last_result or {}).get("seconds", 0.0)))

    return Announce()


def _probe_task(run: str) -> int:
    from scaling_ray.train.bench import probe_micro_batch

    return probe_micro_batch(RunSpec.model_validate_json(run))
