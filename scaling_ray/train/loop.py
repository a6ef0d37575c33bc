"""One run from weights drawn by seed to a committed result, over any engine.

A run is a pure function of its spec and its shards: batch k comes from ``shards.order``, masks from a counter hash, so
a position is all there is to resume. Sums cross every boundary; the mean is taken once, at the end.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.errors import BadInput, Diverged, Preempted
from scaling_ray.model.objectives import squared_error_sums, squared_errors
from scaling_ray.records import MetricSums, RunResult, StopReason
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, run_order
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.spec import RunSpec, TrainSpec
from scaling_ray.train.batches import Batch, BatchSource, evaluation_batches
from scaling_ray.train.checkpoint import Attempt, Progress, commit_result
from scaling_ray.train.engine import Engine, model_tensors
from scaling_ray.train.saving import restore, save_last
from scaling_ray.train.sharded import Shard, generator_name

TRAIN_ROWS_PER_RUN = 100
"""Rows of kind "train" in a run's metrics.jsonl, about."""

UNSETTLED_UPDATES = 64
"""Most updates that are given to a device before it is asked how they went."""

ASK_SECONDS = 1.0
"""Between two looks at whether the run should stop."""

RANK_SEED_STRIDE = 1_000_003
"""Between the dropout seeds of neighbouring ranks, which see different cells and must drop different units."""


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
        if not isinstance(self.train, Cells):
            return self.train
        return ResidentFeed(self.train, run_order(run, len(self.train), self.edges, self.train.donor))


def learning_rate(train: TrainSpec, peak: float, step: int) -> float:
    """The rate of update number ``step`` (from 0): linear warm-up, then constant, linear or cosine decay."""
    total = train.total_steps
    warmup = round(train.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if train.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    shape = 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (train.final_lr_fraction + (1 - train.final_lr_fraction) * shape)


def autocast(run: RunSpec, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The run's precision as a context for its forward passes."""
    if run.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Evaluation:
    """Errors on N cells under the fixed evaluation masks, over all ranks, float64 on the CPU.

    errors (N,) squared error of each cell, counts (N,) its masked genes; gene_errors and gene_counts (V,) the same by
    gene.
    """

    errors: Tensor
    counts: Tensor
    gene_errors: Tensor
    gene_counts: Tensor

    @property
    def sums(self) -> MetricSums:
        """Over all cells."""
        return MetricSums(float(self.errors.sum()), float(self.counts.sum()))


def evaluate(
    engine: Engine,
    cells: Cells,
    run: RunSpec,
    made: list[Batch] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Error on cells under the fixed evaluation masks. Every rank.

    Args:
        engine: with the weights.
        cells: N of them.
        run: its recipe, micro-batch and precision.
        made: ``evaluation_batches`` of these cells, where they are asked for again and again.
        beat: called after every batch.
    """
    device, width, n_cells = engine.device, run.micro_batch, len(cells)
    of_cells = torch.zeros(2, n_cells, dtype=torch.float64, device=device)
    of_genes = torch.zeros(2, run.genes, dtype=torch.float64, device=device)
    starts = range(0, n_cells, width)
    engine.model.eval()
    with torch.no_grad(), autocast(run, device):
        for first in range(0, len(starts), engine.ranks):
            # A forward pass under ZeRO 3 is collective: a rank with no cells left repeats the last ones and drops them.
            index = first + engine.rank
            number = min(index, len(starts) - 1)
            start = starts[number]
            if made is not None:
                batch = made[number]
            else:
                (batch,) = evaluation_batches(cells.rows(slice(start, start + width)), run.train, width, device)
            predictions = engine.model(batch.values, batch.masks.hidden, batch.masks.positions)
            if index < len(starts):
                errors = squared_errors(predictions, batch.targets, batch.masks.weights)
                of_cells[0, start : start + len(errors)] = errors.sum(1).double()
                of_cells[1, start : start + len(errors)] = batch.masks.weights.sum(1).double()
                add_by_gene(of_genes, errors, batch)
            beat()
    engine.model.train()
    summed = engine.sum_over_ranks(torch.cat([of_cells, of_genes], dim=1)).cpu()
    return Evaluation(*summed[:, :n_cells], *summed[:, n_cells:])


def add_by_gene(of_genes: Tensor, errors_BK: Tensor, batch: Batch) -> None:
    """Add to (2, V) the squared errors of a batch's masked genes, and their number, gene by gene."""
    where = batch.masks.positions.flatten()
    of_genes[0].index_add_(0, where, errors_BK.double().flatten())
    of_genes[1].index_add_(0, where, batch.masks.weights.double().flatten())


@dataclass(frozen=True)
class Update:
    """One optimizer step as the device knows it, (3,) float64: squared error, masked genes, gradient norm.

    The squared error is this rank's; the others are of the whole global batch.
    """

    sums: Tensor
    lr: float


class TrainingLoop:
    """Updates of one run; ``update`` is a whole training step and never waits for the device, ``settle`` does."""

    def __init__(self, run: RunSpec, data: RunData, engine: Engine, beat: Callable[[], None] = lambda: None) -> None:
        if run.lr is None:
            raise BadInput("lr", None, "has not been chosen yet; sweep the learning-rate runs first")
        self.run, self.data, self.engine, self.lr, self.beat = run, data, engine, run.lr, beat
        self.feed = data.feed(run)
        self.source = BatchSource(self.feed, run.train, run.seed, engine.device)
        self.total_steps = run.train.total_steps
        self.progress = Progress()
        self._unsettled: list[Update] = []
        self._curve: tuple[Cells, list[Batch]] | None = None
        torch.manual_seed(run.seed + RANK_SEED_STRIDE * engine.rank)
        engine.model.train()

    def global_batch(self, step: int) -> Batch:
        """The slice of global batch ``step`` that falls to this rank."""
        share = self.run.train.cells_per_step // self.engine.ranks
        return self.source.batch(step, slice(self.engine.rank * share, (self.engine.rank + 1) * share))

    def update(self) -> None:
        """One optimizer step. What it summed stays on the device until ``settle``."""
        run, engine, progress = self.run, self.engine, self.progress
        batch = self.global_batch(progress.optimizer_steps)
        masked = engine.sum_over_ranks(batch.masks.weights.sum().double())
        share = masked.clamp(min=1.0).float()
        squared_error = torch.zeros((), dtype=torch.float64, device=engine.device)
        starts = range(0, len(batch.values), run.micro_batch)
        for start in starts:
            part = batch.rows(start, start + run.micro_batch)
            last = start == starts[-1]
            with autocast(run, engine.device):
                predictions = engine.forward(part.values, part.masks.hidden, part.masks.positions, last)
                loss = squared_error_sums(predictions, part.targets, part.masks.weights).sum()
            engine.accumulate(loss / share, last)
            self.beat()
            squared_error += loss.detach().double()
        rate = learning_rate(run.train, self.lr, progress.optimizer_steps)
        norm = engine.update(rate)
        self._unsettled.append(Update(torch.stack([squared_error, masked, norm.double()]), rate))
        progress.optimizer_steps += 1
        progress.cells_seen += run.train.cells_per_step

    def settle(self) -> list[tuple[MetricSums, float, float]]:
        """Count the updates since the last call: of each the sums of its global batch, its rate, its gradient norm.

        Every rank, equally often. Diverged names the first update whose loss or gradient is not finite; nothing of it
        was saved before.
        """
        waiting, self._unsettled = self._unsettled, []
        if not waiting:
            return []
        table = torch.stack([update.sums for update in waiting]).cpu()
        table[:, 0] = self.engine.sum_over_ranks(table[:, 0].contiguous())
        progress, settled = self.progress, []
        first = progress.optimizer_steps - len(waiting) + 1
        for number, (update, row) in enumerate(zip(waiting, table.tolist(), strict=True), start=first):
            sums, norm = MetricSums(row[0], row[1]), row[2]
            if not math.isfinite(sums.squared_error) or not math.isfinite(norm):
                raise Diverged(f"update {number}: loss {sums.mse}, gradient norm {norm}; lower the rate")
            progress.masked_genes_seen += int(sums.masked_genes)
            progress.row_squared_error += sums.squared_error
            progress.row_masked_genes += sums.masked_genes
            settled.append((sums, update.lr, norm))
        return settled

    def train_one_update(self) -> tuple[MetricSums, float, float]:
        """One optimizer step, waited for: (sums of its global batch, learning rate, gradient norm)."""
        self.update()
        return self.settle()[-1]

    def state(self) -> dict[str, Tensor]:
        """Everything besides ``progress`` that exact resuming needs, on rank 0; every rank calls it."""
        own = torch.get_rng_state()
        states = torch.zeros(self.engine.ranks, len(own), dtype=torch.int64)
        states[self.engine.rank] = own
        states = self.engine.sum_over_ranks(states).to(own.dtype)
        return self.engine.state() | {generator_name(rank): state.clone() for rank, state in enumerate(states)}

    def load(self, progress: Progress, tensors: dict[str, Tensor] | Shard) -> None:
        """Stand where ``state`` and ``progress`` were taken; every rank, with the same tensors or each with its shard.

        A rank that did not exist then goes on with the generator of its own seed.
        """
        self.progress = replace(progress, curve_mse=list(progress.curve_mse))
        if isinstance(tensors, Shard):
            self.engine.load_shard(tensors)
            tensors = tensors.tensors
        else:
            self.engine.load_state(tensors)
        own = generator_name(self.engine.rank)
        if own in tensors:
            torch.set_rng_state(tensors[own])

    def is_evaluation_step(self) -> bool:
        """Whether the update just done ends one of the run's ``evaluations`` equal parts."""
        return ends_part(self.progress.optimizer_steps, self.total_steps, self.run.train.evaluations)

    def evaluate_curve(self) -> tuple[float, float, bool]:
        """Validation on the fixed curve cells: (val_mse, smoothed, whether it is the best smoothed so far)."""
        run = self.run
        if self._curve is None:
            cells = self.data.val.rows(slice(0, run.train.curve_cells))
            self._curve = cells, evaluation_batches(cells, run.train, run.micro_batch, self.engine.device)
        mse = evaluate(self.engine, self._curve[0], run, self._curve[1], self.beat).sums.mse
        if not math.isfinite(mse):
            raise Diverged(f"update {self.progress.optimizer_steps}: validation error {mse}; lower the rate")
        smoothed, best = self.progress.add_evaluation(mse, run.train.smoothing_evaluations)
        return mse, smoothed, best

    def should_stop(self) -> bool:
        """Early stopping: the smoothed validation error has not fallen for ``patience_evaluations`` evaluations."""
        return self.progress.has_stalled(self.run.train.patience_evaluations)


def ends_part(steps: int, total_steps: int, parts: int) -> bool:
    """Whether update number ``steps`` (from 1) ends one of ``parts`` equal parts of ``total_steps``."""
    return steps * parts // total_steps > (steps - 1) * parts // total_steps


def run_to_result(
    run: RunSpec,
    data: RunData,
    engine: Engine,
    run_directory: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    asked_to_save: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
) -> RunResult | None:
    """Train, resume where an earlier attempt stopped, evaluate the chosen checkpoint, commit.

    Runs that choose a learning rate never see a test cell. Only rank 0 reads and writes the run's files; the others
    are sent what they need. Returns the result that this attempt committed, None on other ranks or where another
    attempt committed first. ``report`` is called after every evaluation; where ``asked_to_stop`` (asked about once a
    second, on rank 0) says so, the state is saved and Preempted rises; where ``asked_to_save`` does, on any rank, it is
    only saved. ``asked_to_save`` may be collective: every rank asks it at the same updates, those at which rank 0's
    clock says so. ``beat`` is called whenever something was done, for a watchdog.
    """
    began = time.monotonic()
    writes = engine.rank == 0
    attempt = Attempt(run_directory, run) if writes else None
    loop = TrainingLoop(run, data, engine, beat)
    start, tensors = restore(attempt, engine)
    if start is not None:
        loop.load(start, tensors)
    stop_reason = _train(loop, attempt, report, asked_to_stop, asked_to_save)
    progress = loop.progress
    _, chosen = engine.share(None, attempt.load_best() if attempt is not None else {})
    engine.load_weights(model_tensors(chosen))
    val = evaluate(engine, data.val, run, beat=beat)
    test = evaluate(engine, data.test, run, beat=beat) if run.role == "law" else None
    if attempt is None:
        return None
    if test is not None:
        write_test_errors(attempt.directory, data.test, test)
    result = run_result(
        run,
        progress,
        attempt,
        data_hash=data.data_hash,
        lr=loop.lr,
        cells_resolved=len(loop.feed.order.rows),
        val_mse=val.sums.mse,
        test=test.sums if test is not None else None,
        stop_reason=stop_reason,
        wall_seconds=time.monotonic() - began,
        workers=engine.ranks,
    )
    return result if commit_result(run_directory, result) else None


def run_result(
    run: RunSpec,
    progress: Progress,
    attempt: Attempt,
    *,
    data_hash: str,
    lr: float,
    cells_resolved: int,
    val_mse: float,
    test: MetricSums | None,
    stop_reason: StopReason,
    wall_seconds: float,
    workers: int = 1,
    stacked: int = 1,
) -> RunResult:
    """The record of a run that ended."""
    masked_per_cell = progress.masked_genes_seen / progress.cells_seen
    return RunResult(
        run_id=run.run_id,
        attempt=attempt.token,
        attempts=attempt.number,
        data_hash=data_hash,
        lr=lr,
        cells_resolved=cells_resolved,
        cells_seen=progress.cells_seen,
        masked_genes_seen=progress.masked_genes_seen,
        optimizer_steps=progress.optimizer_steps,
        flops=training_flops_per_cell(run.shape, run.genes, masked_per_cell) * progress.cells_seen,
        val_mse=val_mse,
        final_val_mse=progress.curve_mse[-1],
        best_curve_mse=min(progress.curve_mse),
        best_cells_seen=progress.best_step * run.train.cells_per_step,
        test_mse=test.mse if test else None,
        test_squared_error=test.squared_error if test else None,
        test_masked_genes=int(test.masked_genes) if test else None,
        stop_reason=stop_reason,
        wall_seconds=wall_seconds,
        train_seconds=progress.train_seconds,
        workers=workers,
        engine=run.engine,
        micro_batch=run.micro_batch,
        precision=run.precision,
        stacked=stacked,
        host=socket.gethostname(),
    )


def row_interval(total_steps: int) -> int:
    """Updates between two rows of kind "train"."""
    return max(1, total_steps // TRAIN_ROWS_PER_RUN)


def train_row(progress: Progress, lr: float, norm: float, cells_per_second: float) -> dict[str, Any]:
    """A row of metrics.jsonl over the updates since the one before; the sums in ``progress`` begin anew."""
    mse = MetricSums(progress.row_squared_error, progress.row_masked_genes).mse
    progress.row_squared_error = progress.row_masked_genes = 0.0
    return {
        "kind": "train",
        "optimizer_steps": progress.optimizer_steps,
        "cells_seen": progress.cells_seen,
        "train_mse": mse,
        "lr": lr,
        "grad_norm": norm,
        "cells_per_second": cells_per_second,
    }


def eval_row(progress: Progress, val_mse: float, smoothed: float) -> dict[str, Any]:
    """A row of metrics.jsonl about one evaluation of the curve."""
    return {
        "kind": "eval",
        "optimizer_steps": progress.optimizer_steps,
        "cells_seen": progress.cells_seen,
        "val_mse": val_mse,
        "val_mse_smoothed": smoothed,
    }


def _train(
    loop: TrainingLoop,
    attempt: Attempt | None,
    report: Callable[[Progress], None],
    asked_to_stop: Callable[[], bool],
    asked_to_save: Callable[[], bool],
) -> StopReason:
    train, progress, engine = loop.run.train, loop.progress, loop.engine
    every = row_interval(loop.total_steps)
    clock = since = saved = asked = time.monotonic()
    unsettled = 0
    while progress.optimizer_steps < loop.total_steps and not loop.should_stop():
        loop.update()
        unsettled += 1
        is_row, is_evaluation = progress.optimizer_steps % every == 0, loop.is_evaluation_step()
        now = time.monotonic()
        # Clocks and files differ between ranks: only rank 0 looks at them, and all do what it found.
        due = ask = stop = False
        if attempt is not None:
            due, ask = now - saved >= train.checkpoint_seconds, now - asked >= ASK_SECONDS
            stop = ask and asked_to_stop()
        due, ask, stop = agreed(engine, due, ask, stop)
        if ask:
            asked = now
            (notice,) = agreed(engine, asked_to_save())
            due = due or notice
        if not (is_row or is_evaluation or due or stop or unsettled >= UNSETTLED_UPDATES):
            continue
        _, rate, norm = loop.settle()[-1]
        unsettled = 0
        now = time.monotonic()
        if is_row and attempt is not None:
            speed = every * train.cells_per_step / max(now - since, 1e-9)
            attempt.metrics.write(train_row(progress, rate, norm, speed))
            since = now
        best = False
        if is_evaluation:
            val_mse, smoothed, best = loop.evaluate_curve()
            since = time.monotonic()
        now = time.monotonic()
        progress.train_seconds += now - clock
        clock = now
        if is_evaluation and attempt is not None:
            attempt.metrics.write(eval_row(progress, val_mse, smoothed))
        if best:
            weights = engine.weights()
            if attempt is not None:
                attempt.save_best(progress, {f"model.{k}": v for k, v in weights.items()})
        if due or stop:
            save_last(attempt, engine, progress, loop.state)
            saved = time.monotonic()
        if stop:
            raise Preempted(f"{loop.run.run_id}: saved at update {progress.optimizer_steps}; call again to go on")
        if is_evaluation:
            report(progress)
    return "early_stop" if loop.should_stop() and progress.optimizer_steps < loop.total_steps else "budget"


def agreed(engine: Engine, *flags: bool) -> list[bool]:
    """Of each flag whether any rank has it set. Every rank."""
    if engine.ranks == 1:
        return list(flags)
    return [count > 0 for count in engine.sum_over_ranks(torch.tensor([int(flag) for flag in flags])).tolist()]


def write_test_errors(directory: Path, cells: Cells, found: Evaluation) -> None:
    """The test split's errors cell by cell and gene by gene: what paired comparisons and bits by gene need."""
    by_cell = {"cell": cells.cell, "squared_error": found.errors, "masked_genes": found.counts}
    by_gene = {"gene": np.arange(len(found.gene_errors)), "squared_error": found.gene_errors}
    by_gene |= {"masked_genes": found.gene_counts}
    for name, columns in (("test_cells", by_cell), ("test_genes", by_gene)):
        table = pa.table({key: np.asarray(values) for key, values in columns.items()})
        whole = table.set_column(2, "masked_genes", table["masked_genes"].cast(pa.int32()))
        pq.write_table(whole, directory / f"{name}.parquet", compression="zstd")
