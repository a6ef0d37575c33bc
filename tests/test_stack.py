"""Models trained as one do what each does alone: losses, gradients, results, and whatever befalls one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_at, rows_at, small_run, synthetic_cells

from scaling_ray.errors import BadInput, Preempted
from scaling_ray.model.masking import draw_masks
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.model.objectives import objective_named
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Feed, ResidentFeed, run_order
from scaling_ray.sizes import Shape
from scaling_ray.storage import open_place
from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop, run_to_result
from scaling_ray.train.stack import StackedAdamW, StackedTransformer
from scaling_ray.train.stack_loop import StackedLoop, check_stack, stack_to_results

CPU = torch.device("cpu")
GENES = 64
TRAIN = synthetic_cells(300, unmeasured=9)
VAL, TEST = synthetic_cells(60, unmeasured=9, first_id=10_000), synthetic_cells(70, unmeasured=9, first_id=20_000)
SHAPES = [Shape(1, 1, 1, 1), Shape(16, 1, 1, 1), Shape(8, 2, 2, 2)]


def members(extra: str = "", size: str = "TINY", role: str = "law") -> list[RunSpec]:
    """Four runs alike but for seed, rate and cells.

    At a rate of 3e-2 rounding alone parts two micro-batch sizes of one model by 7e-3 within thirty steps.
    """
    found = []
    for seed, lr, cells in ((1, 1e-3, "all"), (2, 1e-3, "90"), (3, 3e-3, "90"), (4, 3e-4, "200")):
        run = small_run(extra, size=size, lr=lr, cells=cells if cells != "all" else '"all"')
        found.append(run.model_copy(update={"seed": seed, "run_id": f"run-{seed}", "role": role}))
    return found


def feeds(runs: list[RunSpec]) -> list[Feed]:
    return [ResidentFeed(TRAIN, run_order(run, len(TRAIN), donor=TRAIN.donor)) for run in runs]


def alone(run: RunSpec) -> TrainingLoop:
    return TrainingLoop(run, RunData(TRAIN, VAL, TEST, "synthetic"), PlainEngine(run, CPU))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_those_of_the_models_alone(shape: Shape) -> None:
    seeds, cells = [5, 6, 7], 6
    stacked = StackedTransformer(shape, GENES, 0.0, seeds, CPU)
    generator = torch.Generator().manual_seed(0)
    stacked.flat += 0.1 * torch.randn(stacked.flat.shape, generator=generator)
    ids = torch.arange(len(seeds) * cells)
    measured = torch.rand(len(ids), GENES, generator=generator) < 0.8
    values = torch.rand(len(ids), GENES, generator=generator) * 5
    masks = draw_masks("corrected", 0.15, 1, torch.zeros_like(ids), ids, measured)
    targets = values.gather(1, masks.positions)
    shaped = (part.view(len(seeds), cells, -1) for part in (values, masks.hidden, masks.positions))
    objective = objective_named("mse")
    outputs = stacked.forward(*shaped).flatten(0, 1)
    losses = objective.losses(outputs, targets, masks.weights).view(len(seeds), -1).sum(1)
    losses.sum().backward()
    gradients = stacked.gradients()
    for r in range(len(seeds)):
        own = slice(r * cells, (r + 1) * cells)
        model = MaskedGeneTransformer(shape, GENES)
        model.load_state_dict(stacked.named(stacked.flat, r))
        alone = model(values[own], masks.hidden[own], masks.positions[own])
        expected = objective.losses(alone, targets[own], masks.weights[own]).sum()
        expected.backward()
        assert float(losses[r].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        expected_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(expected_gradients) == len(stacked.parts)
        scale = max(float(g.norm()) for g in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            difference = float((stacked.named(gradients, r)[name] - gradient).norm())
            floor = 1e-5 * 0.01 * scale
            if shape.width == 1:
                # In theory zero for all that comes before a LayerNorm: it hands back rounding, magnified by
                # 1/sqrt(its epsilon).
                floor = 1.2e-7 * 1e-5**-0.5 * scale
            assert difference <= max(1e-5 * float(gradient.norm()), floor), name


def test_weights_are_drawn_as_alone() -> None:
    stacked = StackedTransformer(SHAPES[1], GENES, 0.0, [3, 9], CPU)
    for r, seed in enumerate((3, 9)):
        model = MaskedGeneTransformer(SHAPES[1], GENES)
        model.initialise(seed)
        for name, tensor in model.state_dict().items():
            assert torch.equal(stacked.named(stacked.flat, r)[name], tensor)


def test_the_optimizer_is_torchs() -> None:
    run = small_run("weight_decay = 0.1\ngrad_clip = 0.5")
    generator = torch.Generator().manual_seed(1)
    weights, rates = torch.randn(3, 40, generator=generator), torch.tensor([1e-2, 1e-3, 1e-1])
    theirs = [nn_parameter(row) for row in weights]
    optimizers = [
        torch.optim.AdamW([p], lr=float(lr), betas=(0.9, run.train.adam_beta2), weight_decay=0.1)
        for p, lr in zip(theirs, rates, strict=True)
    ]
    ours = StackedAdamW(weights, run.train)
    for step in range(30):
        gradients = torch.randn(3, 40, generator=generator) * (0.02 if step % 3 else 1.0)
        for parameter, optimizer, gradient in zip(theirs, optimizers, gradients, strict=True):
            parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_([parameter], 0.5)
            optimizer.step()
        norms = gradients.norm(dim=1)
        found = ours.step(weights, gradients.clone(), rates, torch.tensor([True, True, True]))
        assert torch.allclose(found, norms)
    for row, parameter in zip(weights, theirs, strict=True):
        assert torch.allclose(row, parameter, rtol=1e-5, atol=1e-6)


def nn_parameter(row: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(row.clone())


@pytest.mark.parametrize("size", ["XXS", "TINY"])
@pytest.mark.parametrize("recipe", ["corrected", "published"])
def test_fifty_steps_are_those_of_the_models_alone(size: str, recipe: str) -> None:
    runs = members(f'max_cells_seen = 6400\nrecipe = "{recipe}"\nmicro_batch = 12', size=size)
    stack = StackedLoop(runs, feeds(runs), VAL, TEST, CPU)
    loops = [alone(run) for run in runs]
    for _ in range(50):
        found = stack.train_one_update()
        for sums, loop in zip(found, loops, strict=True):
            expected, _, _ = loop.train_one_update()
            assert sums.masked_genes == expected.masked_genes
            assert sums.mean == pytest.approx(expected.mean, rel=1e-6)


def test_separate_feeds_give_the_batches_of_a_shared_one() -> None:
    runs = members("max_cells_seen = 640\numi_fraction = 0.5")
    own = [
        ResidentFeed(TRAIN.rows(order.rows.all()), order, own=True)
        for order in (run_order(run, len(TRAIN), donor=TRAIN.donor) for run in runs)
    ]
    shared, apart = StackedLoop(runs, feeds(runs), VAL, TEST, CPU), StackedLoop(runs, list(own), VAL, TEST, CPU)
    for step in (0, 1, 7, 70):
        one, other = shared.source.batch(step), apart.source.batch(step)
        assert torch.equal(one.values, other.values) and torch.equal(one.masks.positions, other.masks.positions)


def run_stack(runs: list[RunSpec], place: Path, stop: list[bool] | None = None) -> dict[str, str]:
    diverged: dict[str, str] = {}
    answers = iter(stop or [])
    stack_to_results(
        runs,
        feeds(runs),
        VAL,
        TEST,
        "synthetic",
        CPU,
        open_place(place / "stack"),
        [files_at(place / run.run_id) for run in runs],
        lambda run, message: diverged.update({run.run_id: message}),
        Signals(asked_to_stop=lambda: next(answers, False), ask_seconds=0.0),
    )
    return diverged


def test_results_are_near_those_of_the_models_alone(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 3200\nevaluations = 5\ncurve_cells = 40\npatience_evaluations = 0")
    assert run_stack(runs, tmp_path) == {}
    for run in runs:
        result = files_at(tmp_path / run.run_id).result()
        data = RunData(TRAIN, VAL, TEST, "synthetic")
        expected = run_to_result(run, data, PlainEngine(run, CPU), files_at(tmp_path / f"alone-{run.run_id}"))
        assert result is not None and expected is not None
        assert (result.stacked, expected.stacked) == (4, 1)
        # float32 chaos parts them after some hundred steps
        for field in ("val_loss", "test_loss", "final_val_loss"):
            assert getattr(result, field) == pytest.approx(getattr(expected, field), rel=1e-3)
        for field in ("cells_seen", "optimizer_steps", "masked_genes_seen", "flops", "cells_resolved", "lr"):
            assert getattr(result, field) == getattr(expected, field)
        rows = rows_at(tmp_path / run.run_id / "attempts" / result.attempt)
        assert [row["optimizer_steps"] for row in rows if row["kind"] == "eval"] == [20, 40, 60, 80, 100]


def test_a_stack_that_was_cut_ends_with_the_same_bits(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 1600\nevaluations = 5\ncurve_cells = 40\ndropout = 0.1")
    run_stack(runs, tmp_path / "whole")
    with pytest.raises(Preempted, match="saved at update 18"):
        run_stack(runs, tmp_path / "cut", [False] * 17 + [True])
    assert files_at(tmp_path / "cut" / runs[0].run_id).result() is None
    with pytest.raises(Preempted, match="saved at update 30"):
        run_stack(runs, tmp_path / "cut", [False] * 11 + [True])
    run_stack(runs, tmp_path / "cut")
    for run in runs:
        whole, cut = (
            files_at(tmp_path / "whole" / run.run_id).result(),
            files_at(tmp_path / "cut" / run.run_id).result(),
        )
        assert whole is not None and cut is not None and (whole.attempts, cut.attempts) == (1, 3)
        for field in ("val_loss", "test_loss", "final_val_loss", "masked_genes_seen", "best_cells_seen"):
            assert getattr(whole, field) == getattr(cut, field)
        rows = rows_at(tmp_path / "cut" / run.run_id / "attempts" / cut.attempt)
        assert [row["optimizer_steps"] for row in rows if row["kind"] == "eval"] == [10, 20, 30, 40, 50]


def test_a_member_that_diverges_is_masked_out_and_moves_no_other(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 1600\nevaluations = 5\ncurve_cells = 40")
    wild = [runs[0], runs[1].model_copy(update={"lr": 1e30}), *runs[2:]]
    diverged = run_stack(wild, tmp_path / "wild")
    assert list(diverged) == [runs[1].run_id]
    assert "update" in diverged[runs[1].run_id] and "lower the rate" in diverged[runs[1].run_id]
    run_stack(runs, tmp_path / "tame")
    assert files_at(tmp_path / "wild" / runs[1].run_id).result() is None
    for run in (runs[0], *runs[2:]):
        one, other = (
            files_at(tmp_path / "wild" / run.run_id).result(),
            files_at(tmp_path / "tame" / run.run_id).result(),
        )
        assert one is not None and other is not None
        assert one.test_loss == other.test_loss


def test_members_stop_early_each_by_itself(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 6400\nevaluations = 40\ncurve_cells = 8\npatience_evaluations = 2")
    assert run_stack(runs, tmp_path) == {}
    ends = {}
    for run in runs:
        result = files_at(tmp_path / run.run_id).result()
        assert result is not None
        ends[run.run_id] = result.optimizer_steps, result.stop_reason
        assert (result.stop_reason == "early_stop") == (result.optimizer_steps < 200)
        assert result.masked_genes_seen < result.cells_seen * 10
    assert any(reason == "early_stop" for _, reason in ends.values())
    assert len({steps for steps, _ in ends.values()}) > 1


def test_runs_that_choose_a_rate_see_no_test_cell(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 640", role="rate")
    run_stack(runs, tmp_path)
    for run in runs:
        result = files_at(tmp_path / run.run_id).result()
        assert result is not None and result.test_loss is None
        assert not list((tmp_path / run.run_id).rglob("test_cells.parquet"))


@pytest.mark.parametrize(
    ("change", "field"),
    [({"width": 8}, "stack.width"), ({"genes": 32}, "stack.genes"), ({"micro_batch": 4}, "stack.execution")],
)
def test_unlike_runs_are_refused(change: dict[str, int], field: str) -> None:
    runs = members()
    other = runs[1].carried_out(**change) if "micro_batch" in change else runs[1].model_copy(update=change)
    with pytest.raises(BadInput, match=field):
        check_stack([runs[0], other])


def test_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    runs = members("max_cells_seen = 640\nevaluations = 2")
    with pytest.raises(Preempted):
        run_stack(runs, tmp_path, [False] * 5 + [True])
    (state,) = (tmp_path / "stack").rglob("state.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    run_stack(runs, tmp_path)
    result = files_at(tmp_path / runs[0].run_id).result()
    assert result is not None and np.isfinite(result.val_loss) and result.optimizer_steps == 20
