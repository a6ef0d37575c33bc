"""A start that predicts at once: before its first update a network is near the regression of the cells' genes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_run, synthetic_cells

import scaling_ray.model.linear_start as linear_start
from scaling_ray.model.linear_start import fits, linear_weights
from scaling_ray.model.masking import draw_masks
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.sizes import Shape
from scaling_ray.train.driver import Signals, train
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.stack_loop import StackedLoop

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (synthetic_cells(n, first_id=1000 * i) for i, n in enumerate((120, 40, 30)))
DATA = RunData(TRAIN, VAL, TEST, "synthetic")
LINEAR = 'start = "linear"'


def programs(cells: int, genes: int = 48, factors: int = 6, seed: int = 0, draw: int = 0) -> torch.Tensor:
    """(N, G) values that are linear in a few factors of each cell, with some noise."""
    loadings = np.random.default_rng(seed).normal(0, 0.5, (factors, genes))
    rng = np.random.default_rng((seed, draw + 1))
    means = np.linspace(0.5, 3.0, genes)
    values = means + rng.normal(0, 1, (cells, factors)) @ loadings + rng.normal(0, 0.3, (cells, genes))
    return torch.from_numpy(values.clip(0)).float()


def loss_of(weights: dict[str, torch.Tensor], shape: Shape, values: torch.Tensor, seed: int = 9) -> float:
    """Mean squared error of hidden genes."""
    network = MaskedGeneTransformer(shape, values.shape[1])
    network.load_state_dict(weights)
    order = torch.arange(len(values))
    masks = draw_masks("corrected", 0.15, seed, order * 0, order, torch.ones_like(values, dtype=torch.bool))
    with torch.no_grad():
        outputs = network(values, masks.hidden, masks.positions)[..., 0]
    return float((outputs - values.gather(1, masks.positions)).square().mean())


def started(shape: Shape, values: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    network = MaskedGeneTransformer(shape, values.shape[1])
    network.initialise(seed)
    measured = torch.ones_like(values, dtype=torch.bool)
    found = linear_weights(
        network.state_dict(),
        values,
        measured,
        values.mean(0)[:, None],
        heads=shape.heads,
        mask_fraction=0.15,
        seed=seed,
    )
    assert found is not None
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    return found


def regression_loss(train_values: torch.Tensor, test_values: torch.Tensor, seed: int = 9) -> float:
    """What the best linear prediction of hidden genes from the visible ones has: cell by cell, from moments."""
    mean, covariance = train_values.mean(0).double(), torch.cov(train_values.T.double())
    order = torch.arange(len(test_values))
    masks = draw_masks("corrected", 0.15, seed, order * 0, order, torch.ones_like(test_values, dtype=torch.bool))
    total, count = 0.0, 0
    for values, hidden in zip(test_values.double(), masks.hidden, strict=True):
        seen = ~hidden
        weights = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, hidden])
        said = mean[hidden] + (values[seen] - mean[seen]) @ weights
        total, count = total + float((said - values[hidden]).square().sum()), count + int(hidden.sum())
    return total / count


@pytest.mark.parametrize("shape", [Shape(16, 1, 4, 1), Shape(32, 1, 8, 2), Shape(16, 2, 4, 1)])
def test_before_its_first_update_a_network_has_most_of_what_a_regression_has(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On cells that no fit has seen; all but a sixth of it where logits are so small that attention is linear."""
    values, unseen = programs(1500), programs(400, draw=1)
    constant = float((unseen - values.mean(0)).square().mean())
    best = regression_loss(values, unseen)
    share = (constant - loss_of(started(shape, values), shape, unseen)) / (constant - best)
    assert share > 0.5
    monkeypatch.setattr(linear_start, "LOGIT_SCALE", 0.01)
    monkeypatch.setattr(linear_start, "OTHERS_SCALE", 0.0)
    monkeypatch.setattr(linear_start, "VALUE_SCALE", 0.03)
    assert (constant - loss_of(started(shape, values), shape, unseen)) / (constant - best) > 5 / 6


def test_few_cells_do_not_make_a_wild_start() -> None:
    """The ridge is chosen on other cells: forty of them start no worse than a fifth above the gene mean."""
    shape, unseen = Shape(32, 1, 8, 1), programs(400, draw=1)
    for cells in (3, 10, 40):
        values = programs(cells)
        constant = float((unseen - values.mean(0)).square().mean())
        assert loss_of(started(shape, values), shape, unseen) < 1.2 * constant


def test_a_start_follows_the_seed_and_not_the_order_of_a_call() -> None:
    values, shape = programs(300), Shape(16, 1, 4, 1)
    one, again, other = (started(shape, values, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.allclose(one["gene_embedding"], other["gene_embedding"], atol=1e-2)


def test_cells_without_spread_or_hidden_genes_have_no_regression() -> None:
    flat = torch.full((5, 12), 0.7)
    network = MaskedGeneTransformer(Shape(16, 1, 4, 1), 12)
    network.initialise(1)
    measured = torch.ones_like(flat, dtype=torch.bool)
    drawn = network.state_dict()
    assert linear_weights(drawn, flat, measured, flat[:1].T, heads=4, mask_fraction=0.15, seed=1) is None
    spread = programs(5, genes=12)
    assert linear_weights(drawn, spread, measured, flat[:1].T, heads=4, mask_fraction=0.01, seed=1) is None


@pytest.mark.parametrize(
    ("width", "heads", "outputs", "room"),
    [(16, 4, 1, True), (8, 2, 1, True), (4, 1, 1, False), (16, 1, 1, False), (16, 16, 1, False), (16, 4, 2, False)],
)
def test_which_shapes_have_room(width: int, heads: int, outputs: int, room: bool) -> None:
    assert fits(width, heads, outputs) is room


def test_sizes_without_room_start_from_cells() -> None:
    for size, same in (("TINY", True), ("WIDE", False)):
        loops = [
            TrainingLoop(run, DATA, PlainEngine(run, CPU))
            for run in (small_run(extra, size=size, lr=1e-3) for extra in (LINEAR, 'start = "cells"'))
        ]
        for loop in loops:
            loop.begin(fresh=True)
        one, other = (loop.engine.weights() for loop in loops)
        assert all(torch.equal(one[name], other[name]) for name in one) is same


def test_a_member_of_a_stack_starts_as_it_does_alone_and_ends_there() -> None:
    extra = f"{LINEAR}\nmax_cells_seen = 1600\nevaluations = 2\ncurve_cells = 16"
    runs = [
        small_run(extra, size="WIDE", lr=1e-3).model_copy(update={"seed": seed, "run_id": f"r{seed}"})
        for seed in (1, 2)
    ]
    stack = StackedLoop(runs, [DATA.feed(run) for run in runs], VAL, TEST, CPU)
    stack.begin(fresh=True)
    alone = [TrainingLoop(run, DATA, PlainEngine(run, CPU)) for run in runs]
    for r, loop in enumerate(alone):
        loop.begin(fresh=True)
        weights = loop.engine.weights()
        for name, tensor in stack.model.named(stack.model.flat, r).items():
            assert torch.equal(tensor, weights[name]), name
    train(stack, Signals())
    for r, loop in enumerate(alone):
        train(loop, Signals())
        member = stack.model.named(stack.model.flat, r)
        for name, tensor in loop.engine.weights().items():
            # a key's bias changes nothing, since a softmax takes no notice of it: rounding alone moves it
            kept = (
                torch.arange(len(tensor)) if "key_value.bias" not in name else torch.tensor([*range(8), *range(16, 24)])
            )
            assert torch.allclose(member[name][kept], tensor[kept], atol=1e-5), name
