"""What happens in a trial: one run, or a stack of them, from the cells of its node to results on disk. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scaling_ray.records import ShardManifest
from scaling_ray.shards.format import row_groups
from scaling_ray.shards.read import Cells, Feed
from scaling_ray.spec import RunSpec
from scaling_ray.storage import Place
from scaling_ray.sweep.failures import guarded, record_failure, within_memory
from scaling_ray.sweep.plan import stack_name
from scaling_ray.sweep.stopping import asked_to_stop
from scaling_ray.train.checkpoint import publish_winner
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result
from scaling_ray.train.stack_run import stack_to_results


@dataclass(frozen=True)
class Trial:
    """What trains in one process: ``splits`` over the genes of the runs, without "train" where each opens its own.

    ``open_feed`` gives a run its batches then.
    """

    sweep: Path
    shards: Place
    manifest: ShardManifest
    splits: dict[str, Cells]
    open_feed: Callable[[RunSpec], Feed]

    def directory(self, run: RunSpec) -> Path:
        """Of one run."""
        return self.sweep / "runs" / run.run_id

    def train(self, runs: list[RunSpec]) -> None:
        """Train runs, as one where they are several; a failure is recorded beside each and rises no further.

        Preempted rises: the runs have neither failed nor ended.
        """
        torch.set_num_threads(runs[0].train.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def work() -> None:
            if len(runs) == 1:
                within_memory(runs, self.directory(runs[0]), lambda fitting: self._alone(fitting[0], device))
            else:
                place = self.sweep / "stacks" / stack_name(runs)
                within_memory(runs, place, lambda fitting: self._stacked(fitting, device, place))

        guarded({self.directory(run): run for run in runs}, work)
        for run in runs:
            publish_winner(self.directory(run))

    def _alone(self, run: RunSpec, device: torch.device) -> None:
        train = self.splits["train"] if "train" in self.splits else self.open_feed(run)
        edges = row_groups(self.manifest, "train")
        data = RunData(train, self.splits["val"], self.splits["test"], self.manifest.data_hash, edges)
        run_to_result(
            run, data, PlainEngine(run, device), self.directory(run), asked_to_stop=lambda: asked_to_stop(self.sweep)
        )

    def _stacked(self, runs: list[RunSpec], device: torch.device, place: Path) -> None:
        val, test = self.splits["val"], self.splits["test"]
        data = [
            RunData(
                self.splits["train"] if "train" in self.splits else self.open_feed(run),
                val,
                test,
                self.manifest.data_hash,
                row_groups(self.manifest, "train"),
            )
            for run in runs
        ]
        stack_to_results(
            runs,
            [one.feed(run) for one, run in zip(data, runs, strict=True)],
            val,
            test,
            self.manifest.data_hash,
            device,
            place,
            [self.directory(run) for run in runs],
            lambda run, message: record_failure(self.directory(run), run, "diverged", message),
            lambda: asked_to_stop(self.sweep),
        )
