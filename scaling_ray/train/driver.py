"""The driver of training, from weights drawn by seed to committed results, for a run alone and for a stack of runs.

A run is a pure function of its spec and its shards: batch k comes from ``shards.order`` and masks from a counter hash,
so resuming needs a position and no more. The driver trains a ``Trainee`` of one or more members: it decides when rows
are written, states saved and curves evaluated, and commits each member's result.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from scaling_ray.errors import Preempted
from scaling_ray.records import Branch, LossSums, RunResult, StopReason
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.train.attempt import Attempt
from scaling_ray.train.checkpoint import Progress
from scaling_ray.train.evaluation import Evaluation, write_test_losses
from scaling_ray.train.schedule import branch_starts, decay_start, end_of, is_evaluated, row_interval

UNSETTLED_UPDATES = 64
"""Most updates that a device is given before the driver waits for their sums."""


def _never() -> bool:
    return False


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Signals:
    """The questions that the driver asks its surroundings, and what it tells them.

    ``asked_to_stop`` is called every ``ask_seconds``, on rank 0; where it is true, the state is saved and Preempted
    rises. ``asked_to_save`` may be collective: every rank calls it at the same updates, those at which rank 0's clock
    says so; where it is true on any rank, the state is saved and training goes on. ``report`` is called after every
    evaluation, and ``beat`` whenever something was done, for a watchdog. ``sample`` gives a row of what the process
    takes of its machine, at an update and its cells seen, or None where there is nothing new.
    """

    asked_to_stop: Callable[[], bool] = _never
    asked_to_save: Callable[[], bool] = _never
    report: Callable[[Progress], None] = _nothing
    beat: Callable[[], None] = _nothing
    sample: Callable[[int, int], dict[str, Any] | None] = _nothing
    ask_seconds: float = 1.0


class Trainee(Protocol):
    """One or more members that train together. All methods are called on every rank, in the same order."""

    @property
    def runs(self) -> list[RunSpec]:
        """The spec of each member."""

    @property
    def members(self) -> list[Progress]:
        """The progress of each member."""

    @property
    def total_steps(self) -> int:
        """Updates of the whole budget."""

    @property
    def steps(self) -> int:
        """Updates done."""

    @property
    def attempts(self) -> list[Attempt] | None:
        """Where each member's rows, weights and result go; None on ranks that write nothing."""

    def running(self) -> list[int]:
        """Members that still train: not failed, not stopped early, their decay not ended."""

    def agreed(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank has set it."""

    def update(self) -> None:
        """Start one optimizer step of every member, without waiting for the device."""

    def settle(self) -> list[float]:
        """Wait for the updates since the last call and count them; returns each member's last gradient norm."""

    def lr(self, member: int, step: int) -> float:
        """A member's rate at an update (from 0)."""

    def evaluate_curve(self, members: list[int]) -> dict[int, tuple[float, float, bool]]:
        """Validate some members on the fixed curve cells: by member (loss, smoothed, whether it is the best so far)."""

    def keep_best(self, members: list[int]) -> None:
        """Keep the present weights of members as the chosen ones."""

    def save(self) -> None:
        """Publish all that exact resuming needs."""

    def evaluate_chosen(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """Evaluate the chosen weights of members that did not fail: on validation cells and, for a law, test cells."""

    def evaluate_present(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """The same for the weights as they are."""

    def save_trunk(self, members: list[int]) -> None:
        """Leave what larger budgets of these members go on from."""

    def keep(self) -> Any:
        """All that ``go_back`` needs, in memory."""

    def go_back(self, kept: Any) -> None:
        """Be again what the trainee was at ``keep``, whatever it did since."""


def agreed_flags(trainee: Trainee, now: float, saved: float, asked: float, signals: Signals) -> tuple[bool, bool, bool]:
    """(a checkpoint is due, signals were asked, a stop was requested), the same on every rank.

    Clocks and files differ between ranks, so only rank 0 looks at them, and all ranks follow what it found.
    """
    due = ask = stop = False
    if trainee.attempts is not None:
        execution = trainee.runs[0].execution
        due, ask = now - saved >= execution.checkpoint_seconds, now - asked >= signals.ask_seconds
        stop = ask and signals.asked_to_stop()
    due, ask, stop = trainee.agreed(due, ask, stop)
    if ask:
        (notice,) = trainee.agreed(signals.asked_to_save())
        due = due or notice
    return due, ask, stop


def train(trainee: Trainee, signals: Signals) -> None:
    """Train until the budget ends or no member is running; raise Preempted once the state is saved for a stop."""
    run = trainee.runs[0]
    rules, attempts = run.train, trainee.attempts
    every = row_interval(trainee.total_steps)
    clock = since = saved = asked = time.monotonic()
    counted, unsettled = trainee.steps, 0
    branches = branch_starts(rules)
    end_of_trunk = decay_start(rules) if rules.wsd is not None else -1
    while trainee.steps < trainee.total_steps and trainee.running():
        if trainee.steps in branches and (members := _without_branch(trainee, branches[trainee.steps])):
            if unsettled:
                trainee.settle()
                unsettled = 0
            trainee.save()  # a branch keeps its trunk in memory only: whatever ends it costs no more than itself
            measure_branch(trainee, members, branches[trainee.steps], signals)
            since = saved = time.monotonic()
            counted = trainee.steps
        if trainee.steps == end_of_trunk and run.role == "law" and (members := _on_trunk(trainee)):
            if unsettled:
                trainee.settle()
                unsettled = 0
            trainee.save_trunk(members)
        trainee.update()
        unsettled += 1
        is_row = trainee.steps % every == 0
        judged = _evaluated(trainee)
        is_evaluation = bool(judged)
        now = time.monotonic()
        due, ask, stop = agreed_flags(trainee, now, saved, asked, signals)
        asked = now if ask else asked
        if not (is_row or is_evaluation or due or stop or unsettled >= UNSETTLED_UPDATES):
            continue
        norms, unsettled = trainee.settle(), 0
        running, now = trainee.running(), time.monotonic()
        if is_row and attempts is not None:
            speed = (trainee.steps - counted) * rules.cells_per_step / max(now - since, 1e-9)
            for r in running:
                rate = trainee.lr(r, trainee.steps - 1)
                attempts[r].metrics.write(train_row(trainee.members[r], rate, norms[r], speed))
            taken = signals.sample(trainee.steps, trainee.steps * rules.cells_per_step)
            if taken is not None:
                for r in running:
                    attempts[r].metrics.write(taken)
            since, counted = now, trainee.steps
        found = trainee.evaluate_curve([r for r in judged if r in running]) if is_evaluation else {}
        now = time.monotonic()
        for r in running:  # members share the time equally
            trainee.members[r].train_seconds += (now - clock) / len(running)
        clock = now
        if is_evaluation:  # the speed of a row is that of training alone
            since, counted = now, trainee.steps
        if attempts is not None:
            for r, (loss, smoothed, _) in found.items():
                attempts[r].metrics.write(eval_row(trainee.members[r], loss, smoothed))
        trainee.keep_best([r for r, (_, _, best) in found.items() if best])
        if due or stop:
            trainee.save()
            saved = time.monotonic()
        if stop:
            raise Preempted("M036", f"{run.run_id}: saved at update {trainee.steps}; call again to go on")
        for r in found:
            signals.report(trainee.members[r])


def _evaluated(trainee: Trainee) -> list[int]:
    """Running members whose last update is followed by an evaluation."""
    train, steps = trainee.runs[0].train, trainee.steps
    return [r for r in trainee.running() if is_evaluated(train, steps, trainee.members[r].decay_from)]


def _on_trunk(trainee: Trainee) -> list[int]:
    """Running members that stand on their trunk."""
    train = trainee.runs[0].train
    return [r for r in trainee.running() if trainee.members[r].is_trunk(train)]


def _without_branch(trainee: Trainee, share: float) -> list[int]:
    """Members on their trunk that have not branched at this share of their budget."""
    return [r for r in _on_trunk(trainee) if all(one["share"] != share for one in trainee.members[r].branches)]


def measure_branch(trainee: Trainee, members: list[int], share: float, signals: Signals) -> None:
    """Decay from here as a run of ``share`` of the budget would, write down what it reaches, and be back at the trunk.

    Nothing of the branch is saved: a stop goes back first, and an attempt that resumes measures it again.
    """
    trunk, asked = trainee.keep(), time.monotonic()
    start = trainee.steps
    for r in members:
        trainee.members[r].decay_from = start
    end = end_of(trainee.runs[0].train, start)
    unsettled = 0
    while trainee.steps < end:
        trainee.update()
        unsettled += 1
        now = time.monotonic()
        _, ask, stop = agreed_flags(trainee, now, now, asked, signals)
        asked = now if ask else asked
        if unsettled >= UNSETTLED_UPDATES or stop or trainee.steps == end:
            trainee.settle()
            unsettled = 0
        if stop:
            trainee.go_back(trunk)
            trainee.save()
            raise Preempted("M037", f"{trainee.runs[0].run_id}: saved at update {trainee.steps}; call again to go on")
    found = trainee.evaluate_present()
    reached = {r: trainee.members[r].cells_seen for r in members}
    trainee.go_back(trunk)
    for r in members:
        if r not in found:
            continue
        val, test = found[r]
        branch = Branch(
            share=share,
            optimizer_steps=end,
            cells_seen=reached[r],
            val_loss=val.sums.mean,
            test_loss=test.sums.mean if test is not None else None,
        )
        trainee.members[r].branches.append(branch.model_dump())
        if trainee.attempts is not None:
            row = {"kind": "branch", "optimizer_steps": start, "branch": branch.model_dump()}
            trainee.attempts[r].metrics.write(row)


def finish(trainee: Trainee, data_hash: str, test_cells: Cells, cells_resolved: list[int], began: float) -> list[bool]:
    """Evaluate the chosen weights and commit; returns for each result whether this attempt committed it. Every rank.

    Args:
        trainee: whose training has ended.
        data_hash: of the shards.
        test_cells: the test split; members that choose a rate never see it.
        cells_resolved: unique training cells of each member.
        began: when this attempt began, by time.monotonic.
    """
    found = trainee.evaluate_chosen()
    attempts, committed = trainee.attempts, []
    if attempts is None:
        return []
    for r, (val, test) in found.items():
        if test is not None:
            write_test_losses(attempts[r].place, test_cells, test)
        run, progress = trainee.runs[r], trainee.members[r]
        result = run_result(
            run,
            progress,
            attempts[r],
            data_hash=data_hash,
            cells_resolved=cells_resolved[r],
            val_loss=val.sums.mean,
            test=test.sums if test is not None else None,
            stop_reason="early_stop" if progress.optimizer_steps < trainee.total_steps else "budget",
            wall_seconds=time.monotonic() - began,
            stacked=len(trainee.runs),
        )
        committed.append(attempts[r].commit(result))
    return committed


def run_result(
    run: RunSpec,
    progress: Progress,
    attempt: Attempt,
    *,
    data_hash: str,
    cells_resolved: int,
    val_loss: float,
    test: LossSums | None,
    stop_reason: StopReason,
    wall_seconds: float,
    stacked: int,
) -> RunResult:
    """The record of a run that ended."""
    masked_per_cell = progress.masked_genes_seen / progress.cells_seen
    assert run.lr is not None
    return RunResult(
        run_id=run.run_id,
        attempt=attempt.token,
        attempts=attempt.number,
        data_hash=data_hash,
        lr=run.lr,
        cells_resolved=cells_resolved,
        cells_seen=progress.cells_seen,
        masked_genes_seen=progress.masked_genes_seen,
        optimizer_steps=progress.optimizer_steps,
        flops=training_flops_per_cell(run.shape, run.genes, masked_per_cell) * progress.cells_seen,
        loss_unit=run.train.loss_unit,
        val_loss=val_loss,
        final_val_loss=progress.curve_loss[-1],
        best_curve_loss=min(progress.curve_loss),
        best_cells_seen=progress.best_step * run.train.cells_per_step,
        test_loss=test.mean if test else None,
        test_loss_sum=test.loss if test else None,
        test_masked_genes=int(test.masked_genes) if test else None,
        stop_reason=stop_reason,
        wall_seconds=wall_seconds,
        train_seconds=progress.train_seconds,
        workers=run.execution.workers,
        worker_counts=progress.worker_counts,
        engine=run.execution.engine,
        micro_batch=run.execution.micro_batch,
        precision=run.execution.precision,
        stacked=stacked,
        host=socket.gethostname(),
        ended_ms=time.time_ns() // 1_000_000,
        branches=[Branch(**one) for one in progress.branches],
    )


def train_row(progress: Progress, lr: float, norm: float, cells_per_second: float) -> dict[str, Any]:
    """A row of metrics.jsonl about the updates since the previous row; the sums in ``progress`` are reset."""
    loss = LossSums(progress.row_loss, progress.row_masked_genes).mean
    progress.row_loss = progress.row_masked_genes = 0.0
    return {
        "kind": "train",
        "optimizer_steps": progress.optimizer_steps,
        "cells_seen": progress.cells_seen,
        "train_loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "cells_per_second": cells_per_second,
    }


def eval_row(progress: Progress, val_loss: float, smoothed: float) -> dict[str, Any]:
    """A row of metrics.jsonl about one evaluation of the curve."""
    return {
        "kind": "eval",
        "optimizer_steps": progress.optimizer_steps,
        "cells_seen": progress.cells_seen,
        "val_loss": val_loss,
        "val_loss_smoothed": smoothed,
    }
