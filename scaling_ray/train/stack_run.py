"""Runs of one shape trained as one, to a committed result each. The stack is what is scheduled, saved and retried.

Its members share the schedule, the budget and the recipe; seed, learning rate and cells are each one's own. Membership
stands in the plan and never changes: a member that diverged is masked out, one that stopped early is no longer looked
at, and one that already has its result trains along, so that the others get the bits they would have got.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaling_ray.errors import BadInput, Diverged, Preempted
from scaling_ray.model.objectives import squared_errors
from scaling_ray.records import MetricSums
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, joined
from scaling_ray.spec import RunSpec
from scaling_ray.storage import PARTIAL_PREFIX, partial_directory, publish_directory, write_atomic
from scaling_ray.train.batches import Batch, DeviceCells, evaluation_batches, make_batch
from scaling_ray.train.checkpoint import Attempt, Progress, commit_result, read_metrics
from scaling_ray.train.loop import (
    ASK_SECONDS,
    UNSETTLED_UPDATES,
    Evaluation,
    add_by_gene,
    autocast,
    ends_part,
    eval_row,
    learning_rate,
    row_interval,
    run_result,
    train_row,
    write_test_errors,
)
from scaling_ray.train.stack import StackedAdamW, StackedTransformer

BLOCK_UPDATES = 64
"""Updates whose cells are looked up at once."""


def check_stack(runs: list[RunSpec]) -> None:
    """BadInput unless the runs may train as one: all alike but for seed, rate and cells, and one process each."""
    own = {"run_id", "cells", "donors", "seed", "lr", "lr_candidates"}
    for run in runs[1:]:
        for name, value in run.model_dump(exclude=own).items():
            if value != (first := runs[0].model_dump()[name]):
                raise BadInput(f"stack.{name}", value, f"differs from {first!r} of {runs[0].run_id}; stack like runs")
    if runs[0].workers != 1:
        raise BadInput("stack.workers", runs[0].workers, "trains in several processes; stack runs of one")


@dataclass
class StackProgress:
    """Where a stack stands: updates done, each member's own progress, what became of those that failed."""

    optimizer_steps: int = 0
    members: list[Progress] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)


class StackSource:
    """Global batch k of every member, one member after the other.

    Args:
        runs: R of them.
        feeds: theirs.
        device: where batches are made; cells that all members share stay on a GPU.
    """

    def __init__(self, runs: list[RunSpec], feeds: list[Feed], device: torch.device) -> None:
        self._train, self._feeds, self._device = runs[0].train, feeds, device
        cells = self._train.cells_per_step
        self._seeds = torch.tensor([run.seed for run in runs], device=device).repeat_interleave(cells)
        self._held: DeviceCells | Cells | None = None
        shared = feeds[0].cells if isinstance(feeds[0], ResidentFeed) else None
        if shared is not None and all(isinstance(feed, ResidentFeed) and feed.cells is shared for feed in feeds):
            self._held = DeviceCells.of(shared, device) if device.type == "cuda" else shared
        self._block = -1
        self._index: NDArray[np.int64] = np.empty(0, np.int64)
        self._there: Tensor = torch.empty(0)

    def batch(self, step: int) -> Batch:
        """Update number ``step``: R x B cells."""
        cells = self._train.cells_per_step
        if self._held is None:
            parts = [feed.batch(step, cells) for feed in self._feeds]
            epochs = np.concatenate([epoch for _, epoch in parts])
            return make_batch(joined([part for part, _ in parts]), epochs, self._train, self._seeds, self._device)
        block, within = divmod(step, BLOCK_UPDATES)
        if block != self._block:
            found = [
                feed.indices(block, BLOCK_UPDATES * cells) for feed in self._feeds if isinstance(feed, ResidentFeed)
            ]
            # (2, R, updates, B): the cell, and its epoch
            self._index = np.stack([np.stack(pair) for pair in found], axis=1).reshape(
                2, len(found), BLOCK_UPDATES, cells
            )
            self._there = torch.from_numpy(self._index).to(self._device)
            self._block = block
        if isinstance(self._held, DeviceCells):
            index, when = self._there[:, :, within].flatten(1)
            return self._held.rows(index).batch(when, self._train, self._seeds)
        rows, epochs = self._index[:, :, within].reshape(2, -1)
        return make_batch(self._held.rows(rows), epochs, self._train, self._seeds, self._device)


class StackedLoop:
    """Updates of R runs at once; as TrainingLoop, with everything that is measured kept by member."""

    def __init__(self, runs: list[RunSpec], feeds: list[Feed], device: torch.device) -> None:
        check_stack(runs)
        for run in runs:
            if run.lr is None:
                raise BadInput("lr", None, f"of {run.run_id} has not been chosen yet; sweep the rate runs first")
        self.runs, self.run, self.device, self.feeds = runs, runs[0], device, feeds
        seeds = [run.seed for run in runs]
        self.model = StackedTransformer(self.run.shape, self.run.genes, self.run.train.dropout, seeds, device)
        self.optimizer = StackedAdamW(self.model.flat, self.run.train)
        self.best = self.model.flat.clone()
        self.source = StackSource(runs, feeds, device)
        self.total_steps = self.run.train.total_steps
        self.progress = StackProgress(members=[Progress() for _ in runs])
        self.alive = torch.ones(len(runs), dtype=torch.bool, device=device)
        self._peaks = torch.tensor([run.lr for run in runs], device=device)
        self._unsettled: list[Tensor] = []
        torch.manual_seed(sum(seeds))

    def lr(self, member: int, step: int) -> float:
        """A member's rate at an update."""
        return learning_rate(self.run.train, float(self.runs[member].lr or 0.0), step)

    def running(self) -> list[int]:
        """Members that still train: not failed, not stopped early."""
        patience, members = self.run.train.patience_evaluations, range(len(self.runs))
        return [
            r for r in members if r not in self.progress.failures and not self.progress.members[r].has_stalled(patience)
        ]

    def forward(self, batch: Batch, cells: int) -> Tensor:
        """(R, B, K) squared errors of R x B cells."""
        models = len(self.runs)
        shaped = (part.view(models, cells, -1) for part in (batch.values, batch.masks.hidden, batch.masks.positions))
        with autocast(self.run, self.device):
            predictions = self.model.forward(*shaped)
            found = squared_errors(predictions.flatten(0, 1), batch.targets, batch.masks.weights)
            return found.view(models, cells, -1)

    def update(self) -> None:
        """One optimizer step of every member."""
        run, models, step = self.run, len(self.runs), self.progress.optimizer_steps
        cells = run.train.cells_per_step
        batch = self.source.batch(step)
        masked = batch.masks.weights.view(models, -1).sum(1).double()
        share = masked.clamp(min=1.0).float()
        squared_error = torch.zeros(models, dtype=torch.float64, device=self.device)
        for start in range(0, cells, run.micro_batch):
            stop = min(start + run.micro_batch, cells)
            part = batch if stop - start == cells else _columns(batch, models, start, stop)
            loss = self.forward(part, stop - start).sum((1, 2))
            (loss / share).sum().backward()
            squared_error += loss.detach().double()
        scale = self.lr(0, step) / float(self.runs[0].lr or 1.0)
        norms = self.optimizer.step(self.model.flat, self.model.gradients(), self._peaks * scale, self.alive)
        self._unsettled.append(torch.stack([squared_error, masked, norms.double()]))
        self.progress.optimizer_steps += 1
        for r in self.running():
            member = self.progress.members[r]
            member.optimizer_steps, member.cells_seen = step + 1, member.cells_seen + cells

    def settle(self) -> Tensor:
        """Count the updates since the last call; the gradient norms (R,) of the last one.

        A member whose loss or gradient is not finite is masked out, with the first update at which it was not.
        """
        table = torch.stack(self._unsettled).cpu()  # (updates, 3, R)
        first = self.progress.optimizer_steps - len(self._unsettled) + 1
        self._unsettled = []
        for r in self.running():
            member, rows = self.progress.members[r], table[:, :, r]
            bad = (~rows.isfinite().all(1)).nonzero()
            if len(bad):
                loss, norm = float(rows[bad[0, 0], 0] / rows[bad[0, 0], 1]), float(rows[bad[0, 0], 2])
                self.fail(r, f"update {first + int(bad[0, 0])}: loss {loss}, gradient norm {norm}; lower the rate")
                continue
            member.masked_genes_seen += int(rows[:, 1].sum())
            member.row_squared_error += float(rows[:, 0].sum())
            member.row_masked_genes += float(rows[:, 1].sum())
        return table[-1, 2]

    def fail(self, member: int, message: str) -> None:
        """Mask a member out: it keeps its place, with weights of zero that nothing moves."""
        self.progress.failures[member] = message
        self.alive[member] = False
        self.model.flat[member] = 0.0
        self.optimizer.first[member] = self.optimizer.second[member] = 0.0

    def train_one_update(self) -> list[MetricSums]:
        """One optimizer step, waited for: the sums of each member's global batch."""
        before = [(m.row_squared_error, m.row_masked_genes) for m in self.progress.members]
        self.update()
        self.settle()
        after = [(m.row_squared_error, m.row_masked_genes) for m in self.progress.members]
        return [MetricSums(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]

    def evaluate(self, batches: list[Batch], weights: Tensor | None = None) -> list[Evaluation]:
        """Under the fixed evaluation masks, by member; ``weights`` (R, P) instead of the present ones."""
        models, own = len(self.runs), None
        if weights is not None:
            own = self.model.flat.clone()
            self.model.flat.copy_(weights)
        self.model.training = False
        errors, counts = [], []
        of_genes = torch.zeros(models, 2, self.run.genes, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in batches:
                masks, targets = batch.masks.repeated(models), batch.targets.repeat(models, 1)
                found = self.forward(Batch(batch.values.repeat(models, 1), masks, targets), len(batch.values))
                errors.append(found.sum(2).double())
                counts.append(batch.masks.weights.sum(1).double())
                for r in range(models):
                    add_by_gene(of_genes[r], found[r], batch)
        self.model.training = True
        if own is not None:
            self.model.flat.copy_(own)
        by_member, count = torch.cat(errors, dim=1).cpu(), torch.cat(counts).cpu()
        return [Evaluation(by_member[r], count, *of_genes[r].cpu()) for r in range(models)]

    def evaluate_curve(self, batches: list[Batch]) -> dict[int, tuple[float, float]]:
        """By running member its value on the validation curve, as it is and smoothed; its best weights are kept."""
        values = [found.sums.mse for found in self.evaluate(batches)]
        found = {}
        for r in self.running():
            if not math.isfinite(values[r]):
                self.fail(r, f"update {self.progress.optimizer_steps}: validation error {values[r]}; lower the rate")
                continue
            smoothed, best = self.progress.members[r].add_evaluation(values[r], self.run.train.smoothing_evaluations)
            found[r] = values[r], smoothed
            if best:
                self.best[r] = self.model.flat[r]
        return found

    def state(self) -> dict[str, Tensor]:
        """All that exact resuming needs besides ``progress``."""
        return {
            "weights": self.model.flat,
            "exp_avg": self.optimizer.first,
            "exp_avg_sq": self.optimizer.second,
            "best": self.best,
            "generator": torch.get_rng_state(),
        }

    def load(self, progress: StackProgress, tensors: dict[str, Tensor]) -> None:
        """Stand where ``state`` and ``progress`` were taken."""
        self.progress, self.optimizer.steps = progress, progress.optimizer_steps
        targets = (self.model.flat, self.optimizer.first, self.optimizer.second, self.best)
        with torch.no_grad():
            for target, name in zip(targets, ("weights", "exp_avg", "exp_avg_sq", "best"), strict=True):
                target.copy_(tensors[name])
        for r in progress.failures:
            self.alive[r] = False
        torch.set_rng_state(tensors["generator"])


def _columns(batch: Batch, models: int, start: int, stop: int) -> Batch:
    """Cells start..stop of every model."""

    def cut(part: Tensor) -> Tensor:
        return part.view(models, -1, part.shape[1])[:, start:stop].flatten(0, 1)

    return Batch(cut(batch.values), batch.masks.through(cut), cut(batch.targets))


class StackFiles:
    """A stack's own checkpoints: ``attempts/<token>/last`` below its directory, each whole or absent."""

    def __init__(self, directory: Path) -> None:
        attempts = directory / "attempts"
        self._earlier = sorted(attempts.glob("*"), reverse=True) if attempts.is_dir() else []
        self._own = attempts / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._own.mkdir(parents=True)

    def save(self, progress: StackProgress, tokens: list[str], tensors: dict[str, Tensor]) -> None:
        """Publish the state to resume from; ``tokens`` name the members' attempts, which hold their rows."""
        building = partial_directory(self._own / "last")
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, building / "state.safetensors")
        text = json.dumps({"progress": asdict(progress), "tokens": tokens})
        (building / "progress.json").write_text(text, encoding="utf-8")
        publish_directory(building, self._own / "last")

    def resume(self, members: int) -> tuple[StackProgress, list[str], dict[str, Tensor]] | None:
        """The newest whole state that an earlier attempt left."""
        for attempt in self._earlier:
            for place in (attempt / "last", *sorted(attempt.glob(f"{PARTIAL_PREFIX}last-*"))):
                try:
                    read = json.loads((place / "progress.json").read_text(encoding="utf-8"))
                    tensors = load_file(place / "state.safetensors")
                    told = read["progress"]
                    progress = StackProgress(
                        told["optimizer_steps"],
                        [Progress(**one) for one in told["members"]],
                        {int(r): message for r, message in told["failures"].items()},
                    )
                except (OSError, ValueError, TypeError, KeyError, SafetensorError):
                    continue
                if len(progress.members) == members:
                    return progress, read["tokens"], tensors
        return None


def stack_to_results(
    runs: list[RunSpec],
    feeds: list[Feed],
    val: Cells,
    test: Cells,
    data_hash: str,
    device: torch.device,
    directory: Path,
    run_directories: list[Path],
    diverged: Callable[[RunSpec, str], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train a stack, resume where an earlier attempt stopped, commit a result for each member that did not diverge.

    Args:
        runs: R members.
        feeds: their batches.
        val: validation cells.
        test: test cells; members that choose a rate never see them.
        data_hash: of the shards.
        device: to train on.
        directory: of the stack.
        run_directories: of the members.
        diverged: told of each member whose loss became NaN or infinite.
        asked_to_stop: as ``run_to_result``; Preempted rises once the state is saved.
    """
    began = time.monotonic()
    loop, files = StackedLoop(runs, feeds, device), StackFiles(directory)
    attempts = [Attempt(place) for place in run_directories]
    resumed = files.resume(len(runs))
    if resumed is not None:
        loop.load(resumed[0], resumed[2])
        for attempt, token in zip(attempts, resumed[1], strict=True):
            rows = read_metrics(attempt.run_directory / "attempts" / token / "metrics.jsonl")
            kept = [row for row in rows if row["optimizer_steps"] <= loop.progress.optimizer_steps]
            write_atomic(attempt.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    _train(loop, files, attempts, val, asked_to_stop)
    run, progress = loop.run, loop.progress
    for r, message in progress.failures.items():
        diverged(runs[r], str(Diverged(message)))
    alive = [r for r in range(len(runs)) if r not in progress.failures]
    if not alive:
        return
    val_batches = evaluation_batches(val, run.train, run.micro_batch, device)
    validated, tested = loop.evaluate(val_batches, loop.best), None
    if run.role == "law":
        tested = loop.evaluate(evaluation_batches(test, run.train, run.micro_batch, device), loop.best)
    for r in alive:
        member, attempt = progress.members[r], attempts[r]
        weights = loop.model.named(loop.best, r)
        attempt.save_best(member, {f"model.{name}": tensor for name, tensor in weights.items()})
        if tested is not None:
            write_test_errors(attempt.directory, test, tested[r])
        stopped = member.optimizer_steps < loop.total_steps
        result = run_result(
            runs[r],
            member,
            attempt,
            data_hash=data_hash,
            lr=float(runs[r].lr or 0.0),
            cells_resolved=len(feeds[r].order.rows),
            val_mse=validated[r].sums.mse,
            test=tested[r].sums if tested is not None else None,
            stop_reason="early_stop" if stopped else "budget",
            wall_seconds=time.monotonic() - began,
            stacked=len(runs),
        )
        commit_result(attempt.run_directory, result)


def _train(
    loop: StackedLoop, files: StackFiles, attempts: list[Attempt], val: Cells, asked_to_stop: Callable[[], bool]
) -> None:
    train, progress = loop.run.train, loop.progress
    curve = evaluation_batches(val.rows(slice(0, train.curve_cells)), train, loop.run.micro_batch, loop.device)
    every = row_interval(loop.total_steps)
    clock = since = saved = asked = time.monotonic()
    unsettled = 0
    while progress.optimizer_steps < loop.total_steps and loop.running():
        loop.update()
        unsettled, step = unsettled + 1, progress.optimizer_steps
        is_row, is_evaluation = step % every == 0, ends_part(step, loop.total_steps, train.evaluations)
        now = time.monotonic()
        due = now - saved >= train.checkpoint_seconds
        stop = False
        if now - asked >= ASK_SECONDS:
            asked, stop = now, asked_to_stop()
        if not (is_row or is_evaluation or due or stop or unsettled >= UNSETTLED_UPDATES):
            continue
        norms, unsettled = loop.settle(), 0
        now = time.monotonic()
        running = loop.running()
        if is_row:
            speed = every * train.cells_per_step / max(now - since, 1e-9)
            for r in running:
                row = train_row(progress.members[r], loop.lr(r, step - 1), float(norms[r]), speed)
                attempts[r].metrics.write(row)
            since = now
        found: dict[int, Any] = loop.evaluate_curve(curve) if is_evaluation else {}
        now = time.monotonic()
        for r in running:  # each one's part of the time
            progress.members[r].train_seconds += (now - clock) / len(running)
        clock = now
        if is_evaluation:
            since = now
        for r, (value, smoothed) in found.items():
            attempts[r].metrics.write(eval_row(progress.members[r], value, smoothed))
        if due or stop:
            files.save(progress, [attempt.token for attempt in attempts], loop.state())
            saved = time.monotonic()
        if stop:
            raise Preempted(f"{loop.run.run_id} and its stack: saved at update {step}; call again to go on")
