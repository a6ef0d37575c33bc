"""The work of a trial: one run or one stack, from the cells held by its node to committed results. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scaling_ray.records import ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import row_groups
from scaling_ray.shards.read import Cells, Feed
from scaling_ray.storage import Place
from scaling_ray.sweep.failures import guarded, within_memory
from scaling_ray.sweep.units import stack_name
from scaling_ray.train.attempt import publish_winner
from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result
from scaling_ray.train.stack_loop import stack_to_results


@dataclass(frozen=True)
class Trial:
    """All that training in one process needs.

    ``splits`` are over the genes of the runs. Where "train" is not one of them, ``open_feed`` gives a run its batches.
    """

    sweep: SweepFiles
    shards: Place
    manifest: ShardManifest
    splits: dict[str, Cells]
    open_feed: Callable[[RunSpec], Feed]
    signals: Signals

    def train(self, runs: Sequence[RunSpec]) -> None:
        """Train a run, or several as a stack; an error is recorded for each run without a result and rises no further.

        Preempted and LeaseHeld rise: the runs have neither failed nor ended.
        """
        torch.set_num_threads(runs[0].execution.cpus)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def work() -> None:
            if len(runs) == 1:
                place = self.sweep.run(runs[0].run_id).place
                within_memory(runs, place, lambda fitting: self._alone(fitting[0], device))
            else:
                place = self.sweep.stack(stack_name(list(runs)))
                within_memory(runs, place, lambda fitting: self._stacked(fitting, device, place))

        guarded(self.sweep, runs, work)
        for run in runs:
            publish_winner(self.sweep.run(run.run_id))

    def _data(self, run: RunSpec) -> RunData:
        train = self.splits["train"] if "train" in self.splits else self.open_feed(run)
        edges = row_groups(self.manifest, "train")
        return RunData(train, self.splits["val"], self.splits["test"], self.manifest.data_hash, edges)

    def _alone(self, run: RunSpec, device: torch.device) -> None:
        files = self.sweep.run(run.run_id)
        run_to_result(run, self._data(run), PlainEngine(run, device), files, self.signals)

    def _stacked(self, runs: list[RunSpec], device: torch.device, place: Place) -> None:
        stack_to_results(
            runs,
            [self._data(run).feed(run) for run in runs],
            self.splits["val"],
            self.splits["test"],
            self.manifest.data_hash,
            device,
            place,
            [self.sweep.run(run.run_id) for run in runs],
            lambda run, message: self.sweep.run(run.run_id).record_failure(run, "diverged", message),
            self.signals,
        )
