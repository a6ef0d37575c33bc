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
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_ray.errors import BadInput, Diverged
from scaling_ray.model.masking import EVALUATION_MASK_SEED, Masks, draw_masks, log_normalise
from scaling_ray.model.objectives import squared_error_sums
from scaling_ray.model.sizes import training_flops_per_cell
from scaling_ray.model.thinning import thin
from scaling_ray.records import MetricSums, RunResult
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, run_order
from scaling_ray.spec import RunSpec, TrainSpec
from scaling_ray.train.checkpoint import Attempt, Progress, commit_result
from scaling_ray.train.engine import Engine, model_tensors
from scaling_ray.train.saving import restore, save_last
from scaling_ray.train.sharded import Shard, generator_name

TRAIN_ROWS_PER_RUN = 100
"""Rows of kind "train" in a run's metrics.jsonl, about."""

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


@dataclass(frozen=True)
class Batch:
    """values (B, V) normalised, at the depth the network sees; masks; targets (B, K) at full depth."""

    values: Tensor
    masks: Masks
    targets: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """Cells start..stop."""
        return Batch(self.values[start:stop], self.masks.rows(start, stop), self.targets[start:stop])


def make_batch(
    cells: Cells, epochs: NDArray[np.int64], train: TrainSpec, mask_seed: int, device: torch.device
) -> Batch:
    """Normalise, mask and, where the spec says so, thin cells on the device."""
    measured = torch.from_numpy(cells.measured[cells.dataset]).to(device)
    counts = torch.from_numpy(cells.counts.astype(np.int32)).to(device)
    raw_sum = torch.from_numpy(cells.raw_sum.copy()).to(device)
    values = log_normalise(counts, raw_sum, train.recipe)
    ids, when = torch.from_numpy(cells.cell.copy()).to(device), torch.from_numpy(epochs).to(device)
    masks = draw_masks(train.recipe, train.mask_fraction, mask_seed, when, ids, measured)
    targets = values.gather(1, masks.positions)
    if train.umi_fraction < 1:
        most = int(cells.counts.max(initial=0)), int(cells.raw_sum.max(initial=0))
        seen = thin(counts.to(torch.int64), raw_sum, train.umi_fraction, mask_seed, when, ids, most)
        values = log_normalise(*seen, train.recipe)
    return Batch(values, masks, targets)


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


def _autocast(train: TrainSpec, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def evaluate(engine: Engine, cells: Cells, train: TrainSpec) -> tuple[MetricSums, Tensor, Tensor]:
    """Error on cells under the fixed evaluation masks.

    Returns the sums over all ranks, and per cell (N,) its squared error and its number of masked genes.
    """
    errors = torch.zeros(len(cells), dtype=torch.float64)
    counts = torch.zeros(len(cells), dtype=torch.float64)
    starts = range(0, len(cells), train.micro_batch)
    engine.model.eval()
    with torch.no_grad(), _autocast(train, engine.device):
        for first in range(0, len(starts), engine.ranks):
            # A forward pass under ZeRO 3 is collective: a rank with no cells left repeats the last ones and drops them.
            index = first + engine.rank
            start = starts[min(index, len(starts) - 1)]
            part = cells.rows(slice(start, start + train.micro_batch))
            batch = make_batch(part, np.zeros(len(part), dtype=np.int64), train, EVALUATION_MASK_SEED, engine.device)
            predictions = engine.model(batch.values, batch.masks.hidden, batch.masks.positions)
            if index >= len(starts):
                continue
            sums = squared_error_sums(predictions, batch.targets, batch.masks.weights)
            errors[start : start + len(part)] = sums.double().cpu()
            counts[start : start + len(part)] = batch.masks.weights.sum(1).double().cpu()
    engine.model.train()
    errors, counts = engine.sum_over_ranks(errors), engine.sum_over_ranks(counts)
    return MetricSums(float(errors.sum()), float(counts.sum())), errors, counts


class TrainingLoop:
    """Updates of one run, one at a time; ``train_one_update`` is the whole of a training step."""

    def __init__(self, run: RunSpec, data: RunData, engine: Engine) -> None:
        if run.lr is None:
            raise BadInput("lr", None, "has not been chosen yet; sweep the learning-rate runs first")
        self.run, self.data, self.engine, self.lr = run, data, engine, run.lr
        self.feed = data.feed(run)
        self.total_steps = run.train.total_steps
        self.progress = Progress()
        torch.manual_seed(run.seed + RANK_SEED_STRIDE * engine.rank)
        engine.model.train()

    def global_batch(self, step: int) -> Batch:
        """The slice of global batch ``step`` that falls to this rank."""
        train = self.run.train
        share = train.cells_per_step // self.engine.ranks
        own = slice(self.engine.rank * share, (self.engine.rank + 1) * share)
        cells, epochs = self.feed.batch(step, train.cells_per_step, own)
        return make_batch(cells, epochs, train, self.run.seed, self.engine.device)

    def train_one_update(self) -> tuple[MetricSums, float, float]:
        """One optimizer step: (sums of its global batch, learning rate, gradient norm)."""
        train, engine, progress = self.run.train, self.engine, self.progress
        batch = self.global_batch(progress.optimizer_steps)
        masked = float(engine.sum_over_ranks(batch.masks.weights.sum().double()))
        squared_error = torch.zeros((), dtype=torch.float64)
        starts = range(0, len(batch.values), train.micro_batch)
        for start in starts:
            part = batch.rows(start, start + train.micro_batch)
            last = start == starts[-1]
            with _autocast(train, engine.device):
                predictions = engine.forward(part.values, part.masks.hidden, part.masks.positions, last)
                loss = squared_error_sums(predictions, part.targets, part.masks.weights).sum()
            engine.accumulate(loss / max(masked, 1.0), last)
            squared_error += loss.detach().double().cpu()
        sums = MetricSums(float(engine.sum_over_ranks(squared_error)), masked)
        rate = learning_rate(train, self.lr, progress.optimizer_steps)
        norm = engine.update(rate)
        progress.optimizer_steps += 1
        progress.cells_seen += train.cells_per_step
        progress.masked_genes_seen += int(masked)
        if not math.isfinite(sums.squared_error) or not math.isfinite(norm):
            raise Diverged(f"update {progress.optimizer_steps}: loss {sums.mse}, gradient norm {norm}; lower the rate")
        return sums, rate, norm

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
        done, parts = self.progress.optimizer_steps, self.run.train.evaluations
        return done * parts // self.total_steps > (done - 1) * parts // self.total_steps

    def evaluate_curve(self) -> tuple[float, float, bool]:
        """Validation on the fixed curve cells: (val_mse, smoothed, whether it is the best smoothed so far)."""
        train, progress = self.run.train, self.progress
        sums, _, _ = evaluate(self.engine, self.data.val.rows(slice(0, train.curve_cells)), train)
        if not math.isfinite(sums.mse):
            raise Diverged(f"update {progress.optimizer_steps}: validation error {sums.mse}; lower the rate")
        progress.curve_mse.append(sums.mse)
        recent = progress.curve_mse[-train.smoothing_evaluations :]
        smoothed = sum(recent) / len(recent)
        best = progress.best_smoothed_mse is None or smoothed < progress.best_smoothed_mse
        if best:
            progress.best_smoothed_mse, progress.best_step = smoothed, progress.optimizer_steps
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        return sums.mse, smoothed, best

    def should_stop(self) -> bool:
        """Early stopping: the smoothed validation error has not fallen for ``patience_evaluations`` evaluations."""
        patience = self.run.train.patience_evaluations
        return patience > 0 and self.progress.evaluations_without_gain >= patience


def _any_rank(engine: Engine, flag: bool) -> bool:
    """Whether it is so on any rank: clocks differ, and what is collective must be begun by all."""
    return flag if engine.ranks == 1 else bool(engine.sum_over_ranks(torch.tensor(int(flag))))


def run_to_result(
    run: RunSpec,
    data: RunData,
    engine: Engine,
    run_directory: Path,
    report: Callable[[Progress], None] = lambda progress: None,
) -> RunResult | None:
    """Train, resume where an earlier attempt stopped, evaluate the chosen checkpoint, commit.

    Runs that choose a learning rate never see a test cell. Only rank 0 reads and writes the run's files; the others
    are sent what they need. Returns the result that this attempt committed, None on other ranks or where another
    attempt committed first. ``report`` is called after every evaluation.
    """
    began = time.monotonic()
    writes = engine.rank == 0
    attempt = Attempt(run_directory, run) if writes else None
    loop = TrainingLoop(run, data, engine)
    start, tensors = restore(attempt, engine)
    if start is not None:
        loop.load(start, tensors)
    stop_reason = _train(loop, attempt, report)
    progress, train = loop.progress, run.train
    _, chosen = engine.share(None, attempt.load_best() if attempt is not None else {})
    engine.load_weights(model_tensors(chosen))
    val, _, _ = evaluate(engine, data.val, train)
    test = None
    if run.role == "law":
        test, errors, counts = evaluate(engine, data.test, train)
        if attempt is not None:
            _write_test_cells(attempt.directory / "test_cells.parquet", data.test, errors, counts)
    if attempt is None:
        return None
    masked_per_cell = progress.masked_genes_seen / progress.cells_seen
    result = RunResult(
        run_id=run.run_id,
        attempt=attempt.token,
        attempts=attempt.number,
        data_hash=data.data_hash,
        lr=loop.lr,
        cells_resolved=len(loop.feed.order.rows),
        cells_seen=progress.cells_seen,
        masked_genes_seen=progress.masked_genes_seen,
        optimizer_steps=progress.optimizer_steps,
        flops=training_flops_per_cell(run.shape, run.genes, masked_per_cell) * progress.cells_seen,
        val_mse=val.mse,
        final_val_mse=progress.curve_mse[-1],
        best_curve_mse=min(progress.curve_mse),
        best_cells_seen=progress.best_step * train.cells_per_step,
        test_mse=test.mse if test else None,
        test_squared_error=test.squared_error if test else None,
        test_masked_genes=int(test.masked_genes) if test else None,
        stop_reason=stop_reason,
        wall_seconds=time.monotonic() - began,
        train_seconds=progress.train_seconds,
        workers=engine.ranks,
        engine=run.engine,
        host=socket.gethostname(),
    )
    return result if commit_result(run_directory, result) else None


def _train(
    loop: TrainingLoop, attempt: Attempt | None, report: Callable[[Progress], None]
) -> Literal["budget", "early_stop"]:
    train, progress = loop.run.train, loop.progress
    every = max(1, loop.total_steps // TRAIN_ROWS_PER_RUN)
    since = time.monotonic()
    saved = clock = since
    while progress.optimizer_steps < loop.total_steps and not loop.should_stop():
        step_sums, rate, norm = loop.train_one_update()
        progress.row_squared_error += step_sums.squared_error
        progress.row_masked_genes += step_sums.masked_genes
        if attempt is not None and progress.optimizer_steps % every == 0:
            now = time.monotonic()
            attempt.metrics.write(
                {
                    "kind": "train",
                    "optimizer_steps": progress.optimizer_steps,
                    "cells_seen": progress.cells_seen,
                    "train_mse": MetricSums(progress.row_squared_error, progress.row_masked_genes).mse,
                    "lr": rate,
                    "grad_norm": norm,
                    "cells_per_second": every * train.cells_per_step / max(now - since, 1e-9),
                }
            )
            progress.row_squared_error, progress.row_masked_genes, since = 0.0, 0.0, now
        best = evaluated = False
        if loop.is_evaluation_step():
            val_mse, smoothed, best = loop.evaluate_curve()
            evaluated = True
        now = time.monotonic()
        progress.train_seconds += now - clock
        clock = now
        if attempt is not None and evaluated:
            since = now
            attempt.metrics.write(
                {
                    "kind": "eval",
                    "optimizer_steps": progress.optimizer_steps,
                    "cells_seen": progress.cells_seen,
                    "val_mse": val_mse,
                    "val_mse_smoothed": smoothed,
                }
            )
        if best:
            weights = loop.engine.weights()
            if attempt is not None:
                attempt.save_best(progress, {f"model.{k}": v for k, v in weights.items()})
        if _any_rank(loop.engine, attempt is not None and now - saved >= train.checkpoint_seconds):
            save_last(attempt, loop.engine, progress, loop.state)
            saved = time.monotonic()
        if evaluated:
            report(progress)
    return "early_stop" if loop.should_stop() and progress.optimizer_steps < loop.total_steps else "budget"


def _write_test_cells(path: Path, cells: Cells, errors: Tensor, counts: Tensor) -> None:
    table = pa.table(
        {"cell": cells.cell, "squared_error": errors.numpy(), "masked_genes": counts.numpy().astype(np.int32)}
    )
    pq.write_table(table, path, compression="zstd")
