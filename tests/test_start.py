"""Weights to start from: a network begins as the gene mean and knows gene programs; in a stack it starts the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_run, synthetic_cells

from scaling_ray.errors import Diverged
from scaling_ray.model.masking import EVALUATION_MASK_SEED
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.model.start import EMBEDDING_SCALE, starting_weights
from scaling_ray.runs import RunSpec
from scaling_ray.sizes import Shape
from scaling_ray.train.batches import make_batch
from scaling_ray.train.driver import Signals, train
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.stack_loop import StackedLoop

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (synthetic_cells(n, first_id=1000 * i) for i, n in enumerate((120, 40, 30)))
DATA = RunData(TRAIN, VAL, TEST, "synthetic")


def begun(run: RunSpec) -> TrainingLoop:
    loop = TrainingLoop(run, DATA, PlainEngine(run, CPU))
    loop.begin(fresh=True)
    return loop


def mean_over_train(run: RunSpec) -> np.ndarray:
    """(V,) mean normalised value of each gene where it was measured, by hand."""
    measured = TRAIN.measured[TRAIN.dataset]
    values = np.log1p(TRAIN.counts * (1e4 / TRAIN.raw_sum.clip(1))[:, None])
    return np.array([values[measured[:, g], g].mean() if measured[:, g].any() else 0.0 for g in range(values.shape[1])])


@pytest.mark.parametrize("width", [1, 8, 64])
def test_embedding_and_head_say_the_mean_of_each_gene(width: int) -> None:
    """Where a gene is hidden, over the run's own cells; at width 1, whose blocks see nothing, the network does."""
    run = small_run("", lr=1e-3)
    run = run.model_copy(update={"width": width, "heads": 1})
    loop = begun(run)
    weights = loop.engine.weights()
    said = (weights["gene_embedding"] + weights["mask_token"]) @ weights["head.weight"].T + weights["head.bias"]
    assert np.allclose(said[:, 0], mean_over_train(run), atol=2e-5)
    if width > 1:
        return
    batch = make_batch(VAL, np.zeros(len(VAL), np.int64), run.train, EVALUATION_MASK_SEED, CPU)
    with torch.no_grad():
        outputs = loop.engine.model(batch.values, batch.masks.hidden, batch.masks.positions)[..., 0]
    expected = torch.from_numpy(mean_over_train(run)).float()[batch.masks.positions]
    kept = batch.masks.weights > 0
    assert torch.allclose(outputs[kept], expected[kept], atol=2e-5)


def test_embeddings_span_the_programs_of_the_cells() -> None:
    """Genes of one program lie closer than genes of two, before the first update."""
    rng = np.random.default_rng(0)
    active = rng.random((400, 3)) < 0.5
    program = np.repeat(np.arange(3), 10)
    values = torch.from_numpy(active[:, program] * 2.0 + rng.normal(0, 0.3, (400, 30))).float()
    network = MaskedGeneTransformer(Shape(8, 1, 2, 1), 30)
    network.initialise(1)
    measured = torch.ones_like(values, dtype=torch.bool)
    constants = values.mean(0)[:, None]
    weights = starting_weights(network.state_dict(), values, measured, constants, 1)
    embedding = weights["gene_embedding"]
    unit = embedding - embedding.mean(0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    near = unit @ unit.T
    same = torch.from_numpy(program[:, None] == program[None, :])
    assert near[same].mean() > near[~same].mean() + 0.5
    assert 0.5 * EMBEDDING_SCALE < float(embedding.std()) < 4 * EMBEDDING_SCALE
    # Another seed turns the components, and another order of cells finds the same ones.
    other = starting_weights(network.state_dict(), values, measured, constants, 2)["gene_embedding"]
    again = starting_weights(network.state_dict(), values.flip(0), measured, constants, 1)["gene_embedding"]
    assert not torch.allclose(other, embedding, atol=1e-2)
    assert torch.allclose(again, embedding, atol=1e-4)


def test_cells_without_any_spread_start_from_drawn_embeddings() -> None:
    network = MaskedGeneTransformer(Shape(4, 1, 1, 1), 12)
    network.initialise(1)
    flat = torch.full((5, 12), 0.7)
    weights = starting_weights(network.state_dict(), flat, torch.ones(5, 12, dtype=torch.bool), flat[:1].T, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert float(weights["gene_embedding"].std()) > 0.1


def test_unmeasured_genes_are_no_zeros_of_the_mean() -> None:
    values = torch.tensor([[2.0, 9.0], [4.0, 9.0], [3.0, 1.0]])
    measured = torch.tensor([[True, False], [True, False], [True, True]])
    network = MaskedGeneTransformer(Shape(2, 1, 1, 1), 2)
    network.initialise(1)
    constants = torch.tensor([[3.0], [1.0]])
    weights = starting_weights(network.state_dict(), values, measured, constants, 1)
    said = (weights["gene_embedding"] + weights["mask_token"]) @ weights["head.weight"].T + weights["head.bias"]
    assert torch.allclose(said, constants, atol=1e-5)


def test_a_member_of_a_stack_starts_as_it_does_alone() -> None:
    runs = [small_run("", lr=1e-3).model_copy(update={"seed": seed, "run_id": f"r{seed}"}) for seed in (1, 2)]
    stack = StackedLoop(runs, [DATA.feed(run) for run in runs], VAL, TEST, CPU)
    stack.begin(fresh=True)
    for r, run in enumerate(runs):
        alone = begun(run).engine.weights()
        for name, tensor in stack.model.named(stack.model.flat, r).items():
            assert torch.equal(tensor, alone[name]), name
        assert torch.equal(stack.best[r], stack.model.flat[r])


def test_published_starts_as_drawn_and_so_does_who_asks_for_it() -> None:
    for extra in ('recipe = "published"', 'start = "drawn"'):
        run = small_run(extra, lr=1e-3)
        before = PlainEngine(run, CPU).weights()
        assert all(torch.equal(tensor, before[name]) for name, tensor in begun(run).engine.weights().items())
    asked = small_run('recipe = "published"\nstart = "cells"', lr=1e-3)
    drawn = PlainEngine(asked, CPU).weights()["gene_embedding"]
    assert not torch.equal(begun(asked).engine.weights()["gene_embedding"], drawn)


def test_a_run_above_the_gene_mean_after_half_its_budget_has_diverged() -> None:
    extra = "max_cells_seen = 6400\nevaluations = 4\ncurve_cells = 16\npatience_evaluations = 0"
    wild = begun(small_run(extra, lr=2.0))
    with pytest.raises(Diverged, match="best constants"):
        train(wild, Signals())
    assert wild.total_steps / 2 <= wild.steps < wild.total_steps
    calm = begun(small_run(extra, lr=1e-3))
    train(calm, Signals())
    assert calm.steps == calm.total_steps


def test_a_run_that_patience_ends_above_the_gene_mean_has_diverged_too() -> None:
    extra = "max_cells_seen = 6400\nevaluations = 20\ncurve_cells = 16\npatience_evaluations = 2"
    wild = begun(small_run(extra, lr=0.5))
    with pytest.raises(Diverged, match="best constants"):
        train(wild, Signals())
    published = begun(small_run(f'{extra}\nrecipe = "published"', lr=0.5))
    train(published, Signals())  # the study's own runs are kept as they end


def test_a_member_above_the_gene_mean_is_masked_out_and_the_others_go_on() -> None:
    extra = "max_cells_seen = 6400\nevaluations = 4\ncurve_cells = 16\npatience_evaluations = 0"
    runs = [
        small_run(extra, lr=rate).model_copy(update={"seed": seed, "run_id": f"r{seed}"})
        for seed, rate in ((1, 2.0), (2, 1e-3))
    ]
    stack = StackedLoop(runs, [DATA.feed(run) for run in runs], VAL, TEST, CPU)
    stack.begin(fresh=True)
    train(stack, Signals())
    assert list(stack.failures) == [0] and "best constants" in stack.failures[0]
    assert stack.members[1].optimizer_steps == stack.total_steps


def test_values_of_the_start_are_at_full_depth() -> None:
    thinned, whole = (begun(small_run(extra, lr=1e-3)) for extra in ("umi_fraction = 0.3", ""))
    one, other = (loop.engine.weights()["gene_embedding"] for loop in (thinned, whole))
    assert torch.equal(one, other)
