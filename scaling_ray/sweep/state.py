"""The state of a sweep: its runs, the rows of their results, the work that is left, and progress lines. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

from scaling_ray.pace import span
from scaling_ray.records import ShardManifest
from scaling_ray.results.columns import Row
from scaling_ray.results.references import floor_name, reference_name
from scaling_ray.results.sweep_files import ATTEMPTS, RESULT, SweepFiles
from scaling_ray.results.write import ResultsTable, is_failure
from scaling_ray.runs import RunSpec
from scaling_ray.spec import SweepSpec
from scaling_ray.storage import Place
from scaling_ray.sweep.rates import choose_rates, with_rates
from scaling_ray.sweep.stopping import Stopping
from scaling_ray.sweep.units import Unit, units_of
from scaling_ray.train.attempt import publish_winner

Progress = Callable[[str], None]


class SweepState:
    """One call's view of a sweep, under its lease.

    Args:
        spec: the sweep's.
        manifest: of its shards.
        shards: where they lie.
        files: the sweep's.
        runs: all of them, in the table's order.
        progress: called with a line for each thing that happens.
    """

    def __init__(
        self,
        spec: SweepSpec,
        manifest: ShardManifest,
        shards: Place,
        files: SweepFiles,
        runs: list[RunSpec],
        progress: Progress,
    ) -> None:
        self.spec, self.manifest, self.shards, self.files, self.progress = spec, manifest, shards, files, progress
        self.runs, self.stacks = runs, list[list[str]]()
        self.stopping = Stopping()
        self.by_id = {run.run_id: run for run in runs}
        self.train_cells = manifest.splits["train"].cells
        publish_winners(files)
        self.table = ResultsTable(files, runs, self.train_cells)
        self.choose_rates()
        waiting = {run.run_id for run in self.waiting()}
        self._ended = {run.run_id for run in runs} - waiting
        self._before, self._began = frozenset(self._ended), time.monotonic()
        self._hours: dict[str, float] = {}
        self._planned_hours = 0.0

    def row(self, run: RunSpec) -> Row:
        """What is known of a run."""
        return self.table.row(run.run_id)

    def stop_requested(self) -> bool:
        """Whether this process, or the sweep's marker file, was told to stop."""
        return self.stopping.requested or self.files.stop_requested()

    def waiting(self, runs: list[RunSpec] | None = None) -> list[RunSpec]:
        """Runs without a result, except those that diverged: they would diverge again, digit for digit."""
        rows = ((run, self.row(run)) for run in (self.runs if runs is None else runs))
        return [run for run, row in rows if row.status != "done" and row.failure != "diverged"]

    def choose_rates(self) -> None:
        """Give runs their rates where all candidates have ended; a choice is written down and never changes after."""
        earlier = self.files.chosen_rates()
        chosen = choose_rates(self.runs, {run.run_id: self.row(run) for run in self.runs}, earlier)
        if chosen != earlier:
            self.files.write_chosen_rates(chosen)
        self.replace_runs(with_rates(self.runs, chosen))

    def replace_runs(self, runs: list[RunSpec]) -> None:
        """Replace the runs by the same ones with later decisions (rates, execution)."""
        self.runs, self.by_id = runs, {run.run_id: run for run in runs}
        self.table.replace_runs(runs)

    def units(self) -> list[Unit]:
        """The units that still need training, those that choose rates first."""
        return units_of(self.runs, self.stacks, {run.run_id for run in self.waiting()})

    def has_floors(self) -> bool:
        """Whether floors exist: they are exact for cells that were planted, and for a network that sees them whole."""
        return self.manifest.planted and self.spec.train.umi_fraction == 1

    def missing_references(self) -> list[str]:
        """Files of baselines and floors that are not there yet."""
        names = {f"{reference_name(run, self.train_cells)}.json" for run in self.runs}
        if self.has_floors():
            names |= {floor_name(run.genes, run.train) for run in self.runs}
        return sorted(names - self.files.references.names().keys())

    def ended(self, run: RunSpec) -> None:
        """Read the files of a run again."""
        self.table.refresh([run.run_id])

    def announce(self, run: RunSpec, seconds: float) -> None:
        """A line for a run that ended, and one for each note it left; the results table is brought up to date."""
        self.ended(run)
        row = self.row(run)
        if row.status not in ("done", "failed") and self.stop_requested():
            return
        self._ended.add(run.run_id)
        unit = row.loss_unit or "loss"
        end = f"val_loss {row.val_loss:.4f} {unit}" if row.status == "done" else f"failed ({row.failure or 'lost'})"
        self.progress(f"[{len(self._ended):>3}/{len(self.runs)}] {run.run_id:55} {end}  {seconds:.0f} s{self._left()}")
        files = self.files.run(run.run_id)
        for note in (one for one in files.rows() if one["kind"] == "note"):
            self.progress(f"{run.run_id}: {note['note']}")
        result = files.result()
        if result is not None and result.micro_batch != run.execution.micro_batch:
            planned = run.execution.micro_batch
            self.progress(f"{run.run_id}: memory allowed micro-batches of {result.micro_batch}, not {planned}")
        self.table.write()

    def _left(self) -> str:
        """Such as ", about 12 min left": planned hours ahead, at the speed of those that this call has behind it.

        What the first runs took holds the start of everything, and of what trains beside them nothing is known yet;
        so the plan counts beside them until a tenth of its hours is done.
        """
        if not self._hours:
            plan = self.files.plan()
            self._hours = {} if plan is None else {one["run_id"]: one["hours"] for one in plan["settings"]}
            self._planned_hours = 0.0 if plan is None else plan["totals"]["hours"]
        behind = sum(hours for run_id, hours in self._hours.items() if run_id in self._ended - self._before)
        ahead = sum(hours for run_id, hours in self._hours.items() if run_id not in self._ended)
        if not behind or not ahead:
            return ""
        measured = (time.monotonic() - self._began) * ahead / behind
        total = sum(self._hours.values())
        planned = 3600 * self._planned_hours * ahead / total
        weight = min(1.0, behind / (0.1 * total))
        return f", about {span(weight * measured + (1 - weight) * planned)} left"

    def failed(self) -> list[Row]:
        """Rows of the runs that are missing a required result."""
        return [row for row in self.table.rows if is_failure(row)]


def publish_winners(files: SweepFiles) -> None:
    """Move up the files of committed attempts where an earlier call ended before it could."""
    found: dict[str, set[str]] = {}
    for name in files.place.names("runs/"):
        _, run_id, rest = name.split("/", 2)
        found.setdefault(run_id, set()).add(rest.split("/")[0])
    for run_id, there in found.items():
        if {RESULT, ATTEMPTS} <= there:
            publish_winner(files.run(run_id))
