"""One run, over any engine: its updates, state, evaluation. Sums cross every boundary; the mean is taken once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.errors import BadInput, Diverged
from scaling_ray.model.objectives import objective_named
from scaling_ray.records import LossSums, RunResult
from scaling_ray.results.sweep_files import RunFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, run_order, with_held_out
from scaling_ray.train.attempt import Attempt
from scaling_ray.train.batches import Batch, BatchSource, evaluation_batches
from scaling_ray.train.checkpoint import Progress, copied
from scaling_ray.train.driver import Signals, finish, train
from scaling_ray.train.engine import Engine, model_tensors
from scaling_ray.train.evaluation import Evaluation, autocast, evaluate
from scaling_ray.train.first_cells import constant_loss, first_cells, is_judged, worse_than_constants
from scaling_ray.train.saving import restore, save_last
from scaling_ray.train.schedule import learning_rate
from scaling_ray.train.sharded import Shard, generator_name

RANK_SEED_STRIDE = 1_000_003
"""Distance between the dropout seeds of neighbouring ranks, which see different cells and must drop other units."""


@dataclass(frozen=True)
class RunData:
    """The three splits over the run's genes, and the hash of what they came from.

    ``train`` is the whole training split, with its row groups' ``edges`` where it comes from shards, or a feed.
    """

    train: Cells | Feed
    val: Cells
    test: Cells
    data_hash: str
    edges: NDArray[np.int64] | None = None

    def feed(self, run: RunSpec) -> Feed:
        """The batches of ``run``."""
        feed = self.train
        if isinstance(feed, Cells):
            feed = ResidentFeed(feed, run_order(run, len(feed), self.edges, feed.donor))
        return with_held_out(feed, [self.val, self.test], run.seed) if run.train.held_out_in_training else feed


@dataclass(frozen=True)
class Update:
    """One optimizer step whose sums are still on the device, (3,) float64: loss, masked genes, gradient norm.

    The loss is this rank's sum; the others are of the whole global batch.
    """

    sums: Tensor
    lr: float


class TrainingLoop:
    """The Trainee of one run; ``update`` is a whole training step and never waits for the device, ``settle`` does."""

    def __init__(
        self,
        run: RunSpec,
        data: RunData,
        engine: Engine,
        attempt: Attempt | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        if run.lr is None:
            raise BadInput("M039", "lr", None, "has not been chosen yet; sweep the learning-rate runs first")
        self.run, self.data, self.engine, self.beat = run, data, engine, beat
        self.runs, self.total_steps, self._peak = [run], run.train.total_steps, run.lr
        self.attempt = attempt
        self.feed = data.feed(run)
        self.source = BatchSource(self.feed, run.train, run.seed, engine.device)
        self.objective = objective_named(run.train.objective)
        self.progress = Progress()
        self._unsettled: list[Update] = []
        self._curve: tuple[Cells, list[Batch]] | None = None
        self._constants: Tensor | None = None
        torch.manual_seed(run.seed + RANK_SEED_STRIDE * engine.rank)
        engine.model.train()

    @property
    def members(self) -> list[Progress]:
        """See Trainee."""
        return [self.progress]

    @property
    def attempts(self) -> list[Attempt] | None:
        """See Trainee."""
        return [self.attempt] if self.attempt is not None else None

    @property
    def steps(self) -> int:
        """See Trainee."""
        return self.progress.optimizer_steps

    def running(self) -> list[int]:
        """See Trainee."""
        return [0] if self.progress.is_running(self.run.train) else []

    def agreed(self, *flags: bool) -> list[bool]:
        """See Trainee."""
        if self.engine.ranks == 1:
            return list(flags)
        counts = self.engine.sum_over_ranks(torch.tensor([int(flag) for flag in flags])).tolist()
        return [count > 0 for count in counts]

    def global_batch(self, step: int) -> Batch:
        """The slice of global batch ``step`` that falls to this rank."""
        share = self.run.train.cells_per_step // self.engine.ranks
        return self.source.batch(step, slice(self.engine.rank * share, (self.engine.rank + 1) * share))

    def lr(self, member: int, step: int) -> float:
        """See Trainee."""
        return learning_rate(self.run.train, self._peak, step, self.progress.decay_from)

    def update(self) -> None:
        """See Trainee. The sums of the step stay on the device until ``settle``."""
        run, engine, progress = self.run, self.engine, self.progress
        micro_batch = run.execution.micro_batch
        batch = self.global_batch(progress.optimizer_steps)
        masked = engine.sum_over_ranks(batch.masks.weights.sum().double())
        share = masked.clamp(min=1.0).float()
        summed = torch.zeros((), dtype=torch.float64, device=engine.device)
        starts = range(0, len(batch.values), micro_batch)
        for start in starts:
            part = batch.rows(start, start + micro_batch)
            last = start == starts[-1]
            with autocast(run.execution, engine.device):
                outputs = engine.forward(part.values, part.masks.hidden, part.masks.positions, last)
                # cell by cell first, as sums of evaluations are
                loss = self.objective.losses(outputs, part.targets, part.masks.weights).sum(1).sum()
            engine.accumulate(loss / share, last)
            self.beat()
            summed += loss.detach().double()
        rate = self.lr(0, progress.optimizer_steps)
        norm = engine.update(rate)
        self._unsettled.append(Update(torch.stack([summed, masked, norm.double()]), rate))
        progress.optimizer_steps += 1
        progress.cells_seen += run.train.cells_per_step

    def settle_each(self) -> list[tuple[LossSums, float, float]]:
        """Count the updates since the last call; returns each one's sums over the global batch, rate, gradient norm.

        Every rank, equally often. Raises Diverged naming the first update whose loss or gradient is not finite; no
        state has been saved since that update.
        """
        waiting, self._unsettled = self._unsettled, []
        if not waiting:
            return []
        table = torch.stack([update.sums for update in waiting]).cpu()
        table[:, 0] = self.engine.sum_over_ranks(table[:, 0].contiguous())
        progress, settled = self.progress, []
        first = progress.optimizer_steps - len(waiting) + 1
        for number, (update, row) in enumerate(zip(waiting, table.tolist(), strict=True), start=first):
            sums, norm = LossSums(row[0], row[1]), row[2]
            if not math.isfinite(sums.loss) or not math.isfinite(norm):
                raise Diverged("M040", f"update {number}: loss {sums.mean}, gradient norm {norm}; lower the rate")
            progress.masked_genes_seen += int(sums.masked_genes)
            progress.row_loss += sums.loss
            progress.row_masked_genes += sums.masked_genes
            settled.append((sums, update.lr, norm))
        return settled

    def settle(self) -> list[float]:
        """See Trainee."""
        return [self.settle_each()[-1][2]]

    def train_one_update(self) -> tuple[LossSums, float, float]:
        """One optimizer step, waited for: (sums of its global batch, learning rate, gradient norm)."""
        self.update()
        return self.settle_each()[-1]

    def begin(self, fresh: bool) -> None:
        """Look at the run's first cells: what the best constants are and, for a ``fresh`` run, where to start.

        Every rank; rank 0 looks, and all ranks take what it found.
        """
        found: dict[str, Tensor] = {}
        weights = self.engine.weights() if fresh and self.run.train.starts_from_cells else None
        if self.engine.rank == 0:
            look = first_cells(self.feed, self.run)
            found["constants"] = look.constants
            if weights is not None:
                started = look.starting_weights(weights, self.run)
                found |= {f"model.{name}": tensor for name, tensor in started.items()}
        _, found = self.engine.share(None, found)
        self._constants = found.pop("constants").to(self.engine.device)
        if found:
            self.engine.load_state(found)

    def note_ranks(self) -> None:
        """Write down how many ranks train from here, where that is news."""
        counts = self.progress.worker_counts
        if self.run.execution.engine != "plain" and counts[-1:] != [self.engine.ranks]:
            counts.append(self.engine.ranks)

    def state(self) -> dict[str, Tensor]:
        """Everything besides ``progress`` that exact resuming needs, on rank 0; every rank calls it."""
        own = torch.get_rng_state()
        states = torch.zeros(self.engine.ranks, len(own), dtype=torch.int64)
        states[self.engine.rank] = own
        states = self.engine.sum_over_ranks(states).to(own.dtype)
        return self.engine.state() | {generator_name(rank): state.clone() for rank, state in enumerate(states)}

    def load(self, progress: Progress, tensors: dict[str, Tensor] | Shard) -> None:
        """Go back to where ``state`` and ``progress`` were taken. Every rank, with the same tensors or its own shard.

        A rank that did not exist then keeps the generator of its own seed.
        """
        self.progress = copied(progress)
        if isinstance(tensors, Shard):
            self.engine.load_shard(tensors)
            tensors = tensors.tensors
        else:
            self.engine.load_state(tensors)
        own = generator_name(self.engine.rank)
        if own in tensors:
            torch.set_rng_state(tensors[own])

    def save_trunk(self, members: list[int]) -> None:
        """See Trainee."""
        tensors = self.state()
        if self.attempt is not None:
            best = self.attempt.load_best(self.progress) if self.progress.best_step else {}
            self.attempt.save_trunk(self.progress, tensors, best)

    def keep(self) -> tuple[Progress, dict[str, Tensor] | Shard]:
        """See Trainee."""
        shard = self.engine.shard()
        if shard is None:
            return copied(self.progress), {name: tensor.clone() for name, tensor in self.state().items()}
        generator = {generator_name(self.engine.rank): torch.get_rng_state()}
        return copied(self.progress), Shard(
            shard.layout, {name: tensor.clone() for name, tensor in shard.tensors.items()} | generator
        )

    def go_back(self, kept: tuple[Progress, dict[str, Tensor] | Shard]) -> None:
        """See Trainee."""
        progress, tensors = kept
        self._unsettled = []
        self.load(progress, tensors if isinstance(tensors, Shard) else self.engine.share(None, tensors)[1])

    def save(self) -> None:
        """See Trainee."""
        save_last(self.attempt, self.engine, self.progress, self.state)

    def curve_loss(self) -> float:
        """Validation loss on the fixed curve cells. Every rank."""
        if self._curve is None:
            cells = self.data.val.rows(slice(0, self.run.train.curve_cells))
            width, device = self.run.execution.micro_batch, self.engine.device
            self._curve = cells, evaluation_batches(cells, self.run.train, width, device)
        return evaluate(self.engine, self._curve[0], self.run, self._curve[1], self.beat).sums.mean

    def evaluate_curve(self, members: list[int]) -> dict[int, tuple[float, float, bool]]:
        """See Trainee."""
        if not members:
            return {}
        loss = self.curve_loss()
        if not math.isfinite(loss):
            raise Diverged("M041", f"update {self.progress.optimizer_steps}: validation loss {loss}; lower the rate")
        smoothed, best = self.progress.add_evaluation(loss, self.run.train.smoothing_evaluations)
        self.progress.follow(self.run.train)
        if (said := self._worse_than_nothing(smoothed)) is not None:
            raise Diverged("M042", said)
        return {0: (loss, smoothed, best)}

    def _worse_than_nothing(self, loss: float) -> str | None:
        over = not self.running() and self.steps < self.total_steps
        if self._constants is None or self._curve is None or not is_judged(self.run, self.steps, over):
            return None
        return worse_than_constants(loss, constant_loss(self._curve[1], self._constants, self.objective), self.steps)

    def keep_best(self, members: list[int]) -> None:
        """See Trainee."""
        if members:
            weights = self.engine.weights()
            if self.attempt is not None:
                self.attempt.save_best(self.progress, {f"model.{name}": tensor for name, tensor in weights.items()})

    def evaluate_chosen(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """See Trainee."""
        best = self.attempt.load_best(self.progress) if self.attempt is not None else {}
        _, chosen = self.engine.share(None, best)
        self.engine.load_weights(model_tensors(chosen))
        return self.evaluate_present()

    def evaluate_present(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """See Trainee."""
        val = evaluate(self.engine, self.data.val, self.run, beat=self.beat)
        if self.run.role != "law":
            return {0: (val, None)}
        return {0: (val, evaluate(self.engine, self.data.test, self.run, beat=self.beat))}


def run_to_result(
    run: RunSpec, data: RunData, engine: Engine, files: RunFiles, signals: Signals | None = None
) -> RunResult | None:
    """Train, resume where an earlier attempt stopped, evaluate the chosen checkpoint, commit. Every rank.

    Runs that choose a learning rate never see a test cell. Only rank 0 reads and writes the run's files; the others are
    sent what they need. Returns the result that this attempt committed, None on other ranks or where another attempt
    committed first. Preempted rises where ``signals`` ask to stop.
    """
    began, signals = time.monotonic(), signals or Signals()
    attempt = Attempt(files, run) if engine.rank == 0 else None
    loop = TrainingLoop(run, data, engine, attempt, signals.beat)
    start, tensors = restore(attempt, engine)
    loop.begin(fresh=start is None)
    if start is not None:
        loop.load(start, tensors)
    loop.note_ranks()
    train(loop, signals)
    committed = finish(loop, data.data_hash, data.test, [len(loop.feed.order.rows)], began)
    return files.result() if any(committed) else None
