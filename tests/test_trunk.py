"""The schedule "wsd": one trunk gives what runs of several budgets would, and a branch leaves no trace on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_at, rows_at, small_run, synthetic_cells

from scaling_ray.errors import BadInput, Preempted
from scaling_ray.records import RunResult
from scaling_ray.results.sweep_files import RunFiles, SweepFiles, read_rows
from scaling_ray.results.write import ResultsTable, is_undertrained
from scaling_ray.runs import RunSpec, runs_of, trunk_name
from scaling_ray.shards.read import Feed
from scaling_ray.spec import parse_spec
from scaling_ray.storage import open_place
from scaling_ray.train.attempt import Attempt, publish_winner
from scaling_ray.train.driver import Signals, train
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop, run_to_result
from scaling_ray.train.schedule import branch_starts, end_of, learning_rate
from scaling_ray.train.stack_loop import StackedLoop, stack_to_results

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (
    synthetic_cells(n, unmeasured=9, first_id=first) for n, first in ((300, 0), (60, 10**4), (70, 2 * 10**4))
)
DATA = RunData(TRAIN, VAL, TEST, "synthetic")


def run_of(
    updates: int = 80, branches: str = "[0.25, 0.5]", extra: str = "", lr: float = 1e-2, patience: int = 0, **of: Any
) -> RunSpec:
    """A trunk with a warm-up of 4 updates, an evaluation after every fifth, and a decay of a fifth of the budget.

    It starts from weights that know nothing of the cells, so that there is much to learn.
    """
    return small_run(
        f'max_cells_seen = {32 * updates}\nschedule = "wsd"\nsmoothing_evaluations = 1\ncurve_cells = 20\n'
        f'start = "drawn"\npatience_evaluations = {patience}\n{extra}\n'
        f"[train.trunk]\nwarmup_cells = 128\nevaluation_cells = 160\ndecay_share = 0.2\nbranches = {branches}",
        lr=lr,
        **of,
    )


def begun(run: RunSpec) -> TrainingLoop:
    loop = TrainingLoop(run, DATA, PlainEngine(run, CPU))
    loop.begin(fresh=True)
    return loop


def result_of(run: RunSpec, directory: Path, signals: Signals | None = None) -> RunResult:
    result = run_to_result(run, DATA, PlainEngine(run, CPU), files_at(directory), signals)
    assert result is not None
    return result


def losses(result: RunResult) -> tuple[float, float | None]:
    return result.val_loss, result.test_loss


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_the_rate_rises_stays_and_falls() -> None:
    rules = run_of().train
    rates = [learning_rate(rules, 1.0, step) for step in range(80)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:65] == [1.0] * 61
    assert rates[64:] == pytest.approx([1 - done / 16 for done in range(16)])
    # a decay that validation begins after update 40 takes ten more: a fifth of the fifty
    early = [learning_rate(rules, 1.0, step, 40) for step in range(50)]
    assert early[:41] == rates[:41]
    assert early[40:] == pytest.approx([1 - done / 10 for done in range(10)])


def test_a_larger_budget_has_the_same_trunk() -> None:
    small, large = (begun(run_of(updates, branches="[]")) for updates in (80, 400))
    for loop in (small, large):
        for _ in range(64):
            loop.train_one_update()
    assert_same(small.state(), large.state())


def test_a_branch_reaches_what_a_run_of_its_budget_does(tmp_path: Path) -> None:
    whole = result_of(run_of(80), tmp_path / "whole")
    assert [branch.share for branch in whole.branches] == [0.25, 0.5]
    for branch in whole.branches:
        updates = round(80 * branch.share)
        alone = result_of(run_of(updates, "[]"), tmp_path / f"alone-{updates}")
        assert (branch.optimizer_steps, branch.cells_seen) == (updates, 32 * updates)
        assert alone.best_cells_seen == alone.cells_seen, "the chosen weights are the last ones"
        assert losses(alone) == (branch.val_loss, branch.test_loss)
        assert alone.branches == []


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_branch_leaves_no_trace_on_the_trunk(dropout: float) -> None:
    extra = f"dropout = {dropout}"
    with_branches, without = begun(run_of(extra=extra)), begun(run_of(branches="[]", extra=extra))
    for loop in (with_branches, without):
        torch.manual_seed(5)
        train(loop, Signals())
    assert_same(with_branches.state(), without.state())
    assert with_branches.progress.curve_loss == without.progress.curve_loss
    assert len(with_branches.progress.branches) == 2 and not without.progress.branches


def test_validation_ends_a_trunk_with_a_decay(tmp_path: Path) -> None:
    result = result_of(run_of(2000, "[0.9]", lr=0.05, patience=3), tmp_path)
    publish_winner(files_at(tmp_path))
    rows = rows_at(tmp_path)
    trained = [row for row in rows if row["kind"] == "train"]
    curve = [row for row in rows if row["kind"] == "eval"]
    assert result.stop_reason == "early_stop" and result.optimizer_steps < 2000
    rules = run_of(2000, "[0.9]").train
    (start,) = (at for row in curve if end_of(rules, at := row["optimizer_steps"]) == result.optimizer_steps)
    assert all(row["lr"] == learning_rate(rules, 0.05, row["optimizer_steps"] - 1, start) for row in trained)
    before = [row["val_loss"] for row in curve if row["optimizer_steps"] <= start]
    assert min(before) == before[-4], "three evaluations in a row brought nothing"
    assert curve[-1]["optimizer_steps"] == result.optimizer_steps, "the end of the decay is evaluated"
    assert result.branches == [], "a trunk that has ended has no branch"


@pytest.mark.parametrize("where", ["trunk", "branch"])
def test_a_stop_anywhere_ends_in_the_same_result(tmp_path: Path, where: str) -> None:
    run = run_of(extra="dropout = 0.2")
    torch.manual_seed(run.seed)
    whole = result_of(run, tmp_path / "whole")
    starts = sorted(branch_starts(run.train))
    asked: list[int] = []
    attempts = files_at(tmp_path / "cut")

    def stop() -> bool:  # asked once after every update, those of branches too
        asked.append(1)
        in_first_branch = starts[0] + 3  # updates before it, and three of its own
        return len(asked) == (in_first_branch if where == "branch" else starts[1] + 1)

    with pytest.raises(Preempted, match=r"saved at update"):
        result_of(run, tmp_path / "cut", Signals(asked_to_stop=stop, ask_seconds=0.0))
    found = Attempt(attempts).find()
    assert found is not None
    if where == "branch":
        assert found[0].optimizer_steps == starts[0] and found[0].branches == []
    else:
        assert len(found[0].branches) == 1
    again = result_of(run, tmp_path / "cut")
    assert losses(again) == losses(whole) and again.branches == whole.branches
    for name in ("whole", "cut"):
        publish_winner(files_at(tmp_path / name))
    told = [[row["branch"] for row in rows_at(tmp_path / name) if row["kind"] == "branch"] for name in ("whole", "cut")]
    assert told[0] == told[1] and len(told[0]) == 2


def feeds(runs: list[RunSpec]) -> list[Feed]:
    return [DATA.feed(run) for run in runs]


def stacked(runs: list[RunSpec], directory: Path) -> list[RunResult]:
    files = [files_at(directory / run.run_id) for run in runs]
    place = open_place(directory / "stack")
    stack_to_results(runs, feeds(runs), VAL, TEST, "synthetic", CPU, place, files, lambda run, line: pytest.fail(line))
    found = [one.result() for one in files]
    return [one for one in found if one is not None]


def members(run: RunSpec, rates: tuple[float, ...]) -> list[RunSpec]:
    return [
        run.model_copy(update={"seed": seed, "run_id": f"r{seed}", "lr": rate}) for seed, rate in enumerate(rates, 1)
    ]


def test_members_of_a_stack_branch_as_they_do_alone(tmp_path: Path) -> None:
    runs = members(run_of(40), (1e-3, 3e-3))
    for run, found in zip(runs, stacked(runs, tmp_path), strict=True):
        alone = result_of(run, tmp_path / f"alone-{run.run_id}")
        assert [branch.share for branch in found.branches] == [0.25, 0.5]
        assert losses(found) == pytest.approx(losses(alone), rel=1e-4)
        for one, other in zip(found.branches, alone.branches, strict=True):
            assert (one.val_loss, one.test_loss) == pytest.approx((other.val_loss, other.test_loss), rel=1e-4)


def test_a_branch_leaves_no_trace_on_a_stack() -> None:
    states = []
    for branches in ("[0.25, 0.5]", "[]"):
        runs = members(run_of(branches=branches), (1e-3, 1e-2))
        stack = StackedLoop(runs, feeds(runs), VAL, TEST, CPU)
        stack.begin(fresh=True)
        torch.manual_seed(7)
        train(stack, Signals())
        states.append(stack.state())
    assert_same(*states)


def test_members_whose_trunks_end_apart_decay_apart(tmp_path: Path) -> None:
    runs = members(run_of(80, "[0.75]", patience=3), (0.05, 1e-3))
    wild, calm = stacked(runs, tmp_path)
    assert wild.stop_reason == "early_stop" and wild.optimizer_steps < calm.optimizer_steps
    alone = result_of(runs[0], tmp_path / "alone")
    assert wild.optimizer_steps == alone.optimizer_steps
    assert wild.test_loss == pytest.approx(alone.test_loss, rel=0.02)
    assert calm.stop_reason == "budget" and [branch.share for branch in calm.branches] == [0.75]
    for run, result in zip(runs, (wild, calm), strict=True):
        place = files_at(tmp_path / run.run_id).place.below(f"attempts/{result.attempt}")
        last = [row for row in read_rows(place) if row["kind"] == "eval"][-1]
        assert last["optimizer_steps"] == result.optimizer_steps, "the end of each decay is evaluated"


def in_sweep(sweep: Path, run: RunSpec) -> RunFiles:
    return SweepFiles.at(sweep).run(run.run_id)


def notes(files: RunFiles) -> list[str]:
    return [row["note"] for row in files.rows() if row["kind"] == "note"]


def test_a_larger_budget_goes_on_from_the_trunk_of_a_smaller_one(tmp_path: Path) -> None:
    small, large = run_of(40, "[]"), run_of(80, "[0.25, 0.5, 0.75]")
    assert trunk_name(small) == trunk_name(large) and small.run_id != large.run_id
    run_to_result(small, DATA, PlainEngine(small, CPU), in_sweep(tmp_path, small))
    files = in_sweep(tmp_path, large)
    found = run_to_result(large, DATA, PlainEngine(large, CPU), files)
    publish_winner(files)
    fresh = result_of(large, tmp_path / "fresh")
    publish_winner(files_at(tmp_path / "fresh"))
    assert found is not None and losses(found) == losses(fresh)
    assert found.branches == fresh.branches[1:], "the first one left the trunk before the smaller run ended its own"
    assert notes(files) == ["goes on from the trunk of a smaller budget"]
    rows = {
        name: [row for row in place.rows() if row["kind"] == "eval"]
        for name, place in (("found", files), ("fresh", files_at(tmp_path / "fresh")))
    }
    assert [row["val_loss"] for row in rows["found"]] == [row["val_loss"] for row in rows["fresh"]]


def test_what_belongs_to_a_trunk_decides_who_goes_on_from_it(tmp_path: Path) -> None:
    small = run_of(40, "[]")
    others = {
        "seed": small.model_copy(update={"seed": 2}),
        "rate": small.model_copy(update={"lr": 0.02}),
        "cells": small.model_copy(update={"cells": 90}),
        "patience": run_of(40, "[]", patience=2),
        "weight decay": run_of(40, "[]", "weight_decay = 0.1"),
    }
    assert trunk_name(small) not in {trunk_name(run) for run in others.values()}
    assert trunk_name(small) == trunk_name(run_of(80, "[0.5]", "final_lr_fraction = 0.1"))
    # a smaller budget than the trunk's starts anew
    run_to_result(small, DATA, PlainEngine(small, CPU), in_sweep(tmp_path, small))
    tiny = run_of(20, "[]")
    run_to_result(tiny, DATA, PlainEngine(tiny, CPU), in_sweep(tmp_path, tiny))
    assert notes(in_sweep(tmp_path, tiny)) == []


def test_a_damaged_trunk_is_not_gone_on_from(tmp_path: Path) -> None:
    small, large = run_of(40, "[]"), run_of(80, "[]")
    run_to_result(small, DATA, PlainEngine(small, CPU), in_sweep(tmp_path, small))
    (file,) = (tmp_path / "trunks").rglob("trunk-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    found = run_to_result(large, DATA, PlainEngine(large, CPU), in_sweep(tmp_path, large))
    assert found is not None and losses(found) == losses(result_of(large, tmp_path / "fresh"))
    assert notes(in_sweep(tmp_path, large)) == []


def test_a_stack_leaves_trunks_that_members_go_on_from_alone_and_together(tmp_path: Path) -> None:
    small, large = (members(run_of(updates, "[]"), (1e-3, 3e-3)) for updates in (40, 80))
    small = [run.model_copy(update={"run_id": f"small-{run.run_id}"}) for run in small]

    def stack(runs: list[RunSpec], directory: Path, name: str) -> list[RunResult]:
        files = [in_sweep(directory, run) for run in runs]
        place = open_place(directory / "stacks" / name)
        stack_to_results(
            runs, feeds(runs), VAL, TEST, "synthetic", CPU, place, files, lambda _, line: pytest.fail(line)
        )
        return [one for one in (each.result() for each in files) if one is not None]

    stack(small, tmp_path / "sweep", "small")
    together = stack(large, tmp_path / "sweep", "large")
    fresh = stack(large, tmp_path / "fresh", "large")
    for run, one, other in zip(large, together, fresh, strict=True):
        assert losses(one) == losses(other)
        assert notes(in_sweep(tmp_path / "sweep", run)) == ["goes on from the trunk of a smaller budget"]
    mixed = [run.model_copy(update={"run_id": f"mixed-{run.run_id}"}) for run in large]
    mixed[1] = mixed[1].model_copy(update={"lr": 2e-3})  # nobody left a trunk at that rate
    stack(mixed, tmp_path / "sweep", "mixed")
    assert [notes(in_sweep(tmp_path / "sweep", run)) for run in mixed] == [[], []]
    alone = large[0].model_copy(update={"run_id": "alone"})
    files = in_sweep(tmp_path / "sweep", alone)
    found = run_to_result(alone, DATA, PlainEngine(alone, CPU), files)
    assert found is not None and losses(found) == pytest.approx(losses(fresh[0]), rel=1e-4)
    assert notes(files) == ["goes on from the trunk of a smaller budget"]


def test_the_table_of_budgets_has_a_row_for_each_branch_and_for_the_end(tmp_path: Path) -> None:
    run = run_of(40, "[0.5]")
    files = in_sweep(tmp_path, run)
    found = run_to_result(run, DATA, PlainEngine(run, CPU), files)
    assert found is not None
    publish_winner(files)
    ResultsTable(SweepFiles.at(tmp_path), [run], len(TRAIN)).write()
    with (tmp_path / "budgets.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [int(row["cells_seen"]) for row in rows] == [32 * 20, 32 * 40]
    assert [float(row["test_loss"]) for row in rows] == [found.branches[0].test_loss, found.test_loss]
    assert {row["run_id"] for row in rows} == {run.run_id}


SPEC = """
name = "test"
[grid]
sizes = ["TINY"]
genes = [64]
cells = ["all"]
seeds = [1]
[lr]
rule = "choose"
rates = [0.01, 0.02]
[train]
max_cells_seen = 6400
"""


def test_only_runs_of_the_law_branch_and_every_field_of_a_trunk_is_part_of_them() -> None:
    text = f'{SPEC}schedule = "wsd"\n'
    roles = {run.role: run for run in runs_of(parse_spec(text))}
    assert roles["rate"].train.trunk is not None and roles["rate"].train.trunk.branches == []
    assert roles["law"].train.trunk is not None and roles["law"].train.trunk.branches == [0.5]
    base = {run.run_id for run in runs_of(parse_spec(text))}
    assert not base & {run.run_id for run in runs_of(parse_spec(SPEC))}
    plain = {run.run_id for run in runs_of(parse_spec(SPEC))}
    assert plain == {run.run_id for run in runs_of(parse_spec(f"{SPEC}[train.trunk]\nwarmup_cells = 640"))}
    for line in ("warmup_cells = 640", "evaluation_cells = 640", "decay_share = 0.1"):
        assert not base & {run.run_id for run in runs_of(parse_spec(f"{text}[train.trunk]\n{line}"))}, line
    branched = {run.run_id for run in runs_of(parse_spec(f"{text}[train.trunk]\nbranches = [0.25]"))}
    assert {name.split("-")[0] for name in base & branched} == {"rate"}
    assert {name.split("-")[0] for name in base ^ branched} == {"law"}


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        ('schedule = "wsd"\n[train.trunk]\nbranches = [0.5, 0.5]', "train.trunk.branches"),
        ('schedule = "wsd"\n[train.trunk]\nbranches = [1.0]', "train.trunk.branches.0"),
        ('schedule = "wsd"\n[train.trunk]\ndecay_share = 0', "train.trunk.decay_share"),
        ('schedule = "wsd"\n[train.trunk]\nwarmup_steps = 5', "train.trunk.warmup_steps"),
    ],
)
def test_a_trunk_that_cannot_be_is_refused(lines: str, field: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_spec(f"{SPEC}{lines}")
    assert refused.value.field == field


def test_a_run_is_undertrained_where_its_second_half_brought_a_part_of_the_whole() -> None:
    assert is_undertrained(half_loss=1.10, loss=1.0, gene_mean_loss=2.0)
    assert not is_undertrained(half_loss=1.001, loss=1.0, gene_mean_loss=2.0)
    assert not is_undertrained(half_loss=0.9, loss=1.0, gene_mean_loss=2.0), "twice the cells were worse"
    assert is_undertrained(half_loss=2.2, loss=2.1, gene_mean_loss=2.0), "above the gene mean and falling"
