"""A start that predicts at once: before its first update a network is near the regression of the cells' genes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_run, synthetic_cells

import scaling_ray.model.linear_start as linear_start
from scaling_ray.model.linear_start import has_room, linear_weights
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


def offered(
    shape: Shape,
    values: torch.Tensor,
    seed: int = 1,
    fraction: float = 0.15,
    measured: torch.Tensor | None = None,
    turns: int = 1,
) -> dict[str, torch.Tensor] | None:
    network = MaskedGeneTransformer(shape, values.shape[1])
    network.initialise(seed)
    measured = torch.ones_like(values, dtype=torch.bool) if measured is None else measured
    constants = (torch.where(measured, values, 0.0).sum(0) / measured.sum(0).clamp(min=1))[:, None]
    return linear_weights(
        network.state_dict(),
        values,
        measured,
        constants,
        heads=shape.heads,
        mask_fraction=fraction,
        seed=seed,
        turns=turns,
    )


def started(shape: Shape, values: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    found, network = offered(shape, values, seed), MaskedGeneTransformer(shape, values.shape[1])
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
    monkeypatch.setattr(linear_start, "VALUES_SIZE", 0.03)
    assert (constant - loss_of(started(shape, values), shape, unseen)) / (constant - best) > 5 / 6


@pytest.mark.parametrize(("fraction", "turns"), [(0.15, 1), (1 / 48, 8), (1 / 48, 96)])
def test_few_cells_do_not_make_a_wild_start(fraction: float, turns: int) -> None:
    """The ridge is chosen on other cells: where a start is offered, it is no worse than a fifth above the gene mean."""
    shape, unseen = Shape(32, 1, 8, 1), programs(400, draw=1)
    assert offered(shape, programs(1), fraction=fraction, turns=turns) is None
    for cells in (2, 5, 10, 40, 160):
        values = programs(cells)
        constant = float((unseen - values.mean(0)).square().mean())
        found = offered(shape, values, fraction=fraction, turns=turns)
        assert found is not None or cells <= 10
        assert found is None or loss_of(found, shape, unseen) < 1.2 * constant


@pytest.mark.parametrize("cells", [12, 50, 200, 1000])
@pytest.mark.parametrize(("fraction", "turns"), [(0.15, 1), (1 / 48, 8), (1 / 48, 96)])
def test_where_nothing_is_linear_there_is_no_regression(cells: int, fraction: float, turns: int) -> None:
    rng = np.random.default_rng(cells)
    noise = torch.from_numpy(rng.normal(2, 1, (cells, 48)).clip(0)).float()
    sparse = torch.from_numpy(np.log1p(rng.poisson(0.05, (cells, 48)) * 200.0)).float()
    assert offered(Shape(32, 1, 8, 1), noise, fraction=fraction, turns=turns) is None
    assert offered(Shape(64, 1, 16, 1), sparse, fraction=fraction, turns=turns) is None


@pytest.mark.parametrize(("fraction", "genes"), [(0.97, 48), (0.99, 48), (0.5, 2), (0.5, 3), (0.01, 12)])
def test_too_few_visible_or_hidden_genes_have_no_regression(fraction: float, genes: int) -> None:
    assert offered(Shape(16, 1, 4, 1), programs(200, genes=genes), fraction=fraction) is None


def test_where_few_genes_are_hidden_every_turn_tells_more() -> None:
    """One gene in 48 hidden: a look at each of 600 cells says little, eight looks at each nearly what all genes say."""
    shape, values, unseen = Shape(32, 1, 4, 1), programs(600), programs(400, draw=1)
    constant, best = float((unseen - values.mean(0)).square().mean()), regression_loss(values, unseen)
    shares = []
    for fraction, turns in ((1 / 48, 1), (1 / 48, 8), (1 / 6, 1)):
        found = offered(shape, values, fraction=fraction, turns=turns)
        assert found is not None
        shares.append((constant - loss_of(found, shape, unseen)) / (constant - best))
    assert shares[1] > shares[0] + 0.1
    assert shares[1] > shares[2] - 0.1


def test_few_cells_tell_more_where_each_gene_of_them_was_hidden() -> None:
    """Eighty cells with one gene in 48 hidden: ninety-six looks at each are worth more than eight, as all genes say."""
    shape, values, unseen = Shape(32, 1, 4, 1), programs(80), programs(400, draw=1)
    constant, best = float((unseen - values.mean(0)).square().mean()), regression_loss(values, unseen)
    shares = []
    for turns in (8, 96):
        found = offered(shape, values, fraction=1 / 48, turns=turns)
        assert found is not None
        shares.append((constant - loss_of(found, shape, unseen)) / (constant - best))
    assert shares[1] > shares[0] + 0.1
    assert shares[1] > 0.9


def test_looks_at_one_cell_are_no_cells_of_their_own() -> None:
    """Whether a weak regression is taken does not change where every row is there eight times."""
    taken = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        asking, cells = (torch.from_numpy(rng.normal(0, 1, (n, 3))) for n in (20, 24))
        residuals = 0.3 * cells @ asking.T + torch.from_numpy(rng.normal(0, 1, (24, 20)))
        target = torch.from_numpy((rng.random((24, 20)) < 0.3).astype(float))
        table = (cells, residuals, target, torch.arange(24))
        once = linear_start._ridge(asking, *table)
        often = linear_start._ridge(asking, *(rows.repeat(8, *[1] * (rows.ndim - 1)) for rows in table))
        assert once == often
        taken.append(once is not None)
    assert 5 < sum(taken) < 55


@pytest.mark.parametrize(
    ("genes", "fraction", "turns"), [(512, 0.15, 1), (107, 0.15, 1), (100, 0.15, 2), (256, 0.0125, 6), (40, 0.01, 8)]
)
def test_a_start_looks_again_until_sixteen_genes_of_a_cell_were_hidden(genes: int, fraction: float, turns: int) -> None:
    rules = small_run(f"mask_fraction = {fraction}").train
    assert rules.linear_start_turns(genes, 4096) == rules.linear_start_turns(genes, 30_000) == turns


@pytest.mark.parametrize(
    ("genes", "fraction", "cells", "turns"),
    [(512, 0.15, 300, 1), (256, 0.0125, 2048, 12), (256, 0.0125, 500, 50), (256, 0.0125, 125, 171), (40, 0.01, 9, 80)],
)
def test_few_cells_are_looked_at_more_often(genes: int, fraction: float, cells: int, turns: int) -> None:
    """As many looks as at 4,096 cells, but none hides a gene of a cell more than twice on average."""
    assert small_run(f"mask_fraction = {fraction}").train.linear_start_turns(genes, cells) == turns


def test_unmeasured_genes_are_neither_zeros_nor_targets() -> None:
    """A seventh of the entries is unmeasured and holds nonsense: the start is as good as without that nonsense."""
    values, unseen, shape = programs(1500), programs(400, draw=1), Shape(16, 1, 4, 1)
    measured = torch.from_numpy(np.random.default_rng(3).random((1500, 48)) > 1 / 7)
    wild, calm = values.clone(), values.clone()
    wild[~measured], calm[~measured] = 50.0, 0.0
    one, other = (offered(shape, table, measured=measured) for table in (wild, calm))
    assert one is not None and other is not None
    constant = float((unseen - values.mean(0)).square().mean())
    assert loss_of(one, shape, unseen) == pytest.approx(loss_of(other, shape, unseen), rel=1e-3)
    assert loss_of(one, shape, unseen) < 0.5 * constant


def test_attention_is_the_networks_own() -> None:
    """What gains are fitted to, through the output map, is what the block adds to its token."""
    shape, values = Shape(16, 1, 4, 1), programs(20)
    network = MaskedGeneTransformer(shape, 48)
    network.initialise(5)
    with torch.no_grad():
        network.blocks[0].feedforward_out.weight.zero_()  # type: ignore[union-attr, operator]
    order = torch.arange(20)
    masks = draw_masks("corrected", 0.15, 1, order * 0, order, torch.ones_like(values, dtype=torch.bool))
    weights = network.state_dict()
    mixed = linear_start._attended(weights, 4, values.double(), masks).float()
    token = weights["gene_embedding"][masks.positions] + weights["mask_token"]
    added = token + mixed @ weights["blocks.0.attention_out.weight"].T
    expected = (added @ weights["head.weight"].T)[..., 0]
    with torch.no_grad():
        said = network(values, masks.hidden, masks.positions)[..., 0]
    assert torch.allclose(said, expected, atol=1e-5)


def test_a_start_follows_the_seed_and_not_the_order_of_a_call() -> None:
    values, shape = programs(300), Shape(16, 1, 4, 1)
    one, again, other = (started(shape, values, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.allclose(one["gene_embedding"], other["gene_embedding"], atol=1e-2)


def test_cells_without_spread_have_no_regression() -> None:
    assert offered(Shape(16, 1, 4, 1), torch.full((5, 12), 0.7)) is None


@pytest.mark.parametrize(
    ("width", "heads", "room"),
    [(16, 4, True), (8, 2, True), (6, 2, True), (4, 1, False), (4, 2, False), (16, 1, False), (16, 16, False)],
)
def test_which_shapes_have_room(width: int, heads: int, room: bool) -> None:
    assert has_room(width, heads) is room


@pytest.mark.parametrize(
    ("size", "extra", "same"),
    [
        ("TINY", "", True),
        ("WIDE", "", False),
        ("WIDE", "umi_fraction = 0.5", True),
        ("WIDE", 'recipe = "published"', False),
    ],
)
def test_sizes_without_room_and_thinned_cells_start_from_cells(size: str, extra: str, same: bool) -> None:
    """A regression of values at full depth is wrong where the network sees thinned ones."""
    runs = [small_run(f"{start}\n{extra}", size=size, lr=1e-3) for start in (LINEAR, 'start = "cells"')]
    loops = [TrainingLoop(run, DATA, PlainEngine(run, CPU)) for run in runs]
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
