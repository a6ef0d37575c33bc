"""The network against torch's own encoder layers over the full sequence, and the closed form of width 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import small_run, synthetic_cells
from torch import Tensor, nn

from scaling_ray.model.masking import draw_masks
from scaling_ray.model.network import Block, MaskedGeneTransformer
from scaling_ray.model.objectives import objective_named
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells
from scaling_ray.sizes import LADDER, Shape
from scaling_ray.train.batches import make_batch
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop

GENES, CELLS = 50, 6


class Reference(nn.Module):
    """The same mathematics over every token, from torch's TransformerEncoderLayer; no short cut anywhere."""

    def __init__(self, ours: MaskedGeneTransformer) -> None:
        super().__init__()
        shape = ours.shape
        self.embedding = nn.Embedding.from_pretrained(ours.gene_embedding.detach().clone(), freeze=False)
        self.project = nn.Linear(1, shape.width)
        self.project.load_state_dict(ours.value_projection.state_dict())
        self.mask_token = nn.Parameter(ours.mask_token.detach().clone())
        self.head = nn.Linear(shape.width, 1)
        self.head.load_state_dict(ours.head.state_dict())
        self.layers = nn.ModuleList()
        for block in ours.blocks:
            layer = nn.TransformerEncoderLayer(
                shape.width,
                shape.heads,
                shape.feedforward * shape.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            layer.load_state_dict({theirs: block.state_dict()[name] for name, theirs in NAMES.items()})
            self.layers.append(layer)

    def forward(self, values: Tensor, hidden: Tensor) -> Tensor:
        """(B, G) -> (B, G): a prediction for every gene."""
        shown = self.project(values.unsqueeze(-1))
        x = torch.where(hidden.unsqueeze(-1), self.mask_token.expand_as(shown), shown)
        x = x + self.embedding(torch.arange(values.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x).squeeze(-1)

    def gradients(self) -> dict[str, Tensor]:
        """By our names."""
        found = {
            "gene_embedding": self.embedding.weight.grad,
            "value_projection.weight": self.project.weight.grad,
            "value_projection.bias": self.project.bias.grad,
            "mask_token": self.mask_token.grad,
            "head.weight": self.head.weight.grad,
            "head.bias": self.head.bias.grad,
        }
        for index, layer in enumerate(self.layers):
            theirs = dict(layer.named_parameters())
            found |= {f"blocks.{index}.{ours}": theirs[name].grad for ours, name in NAMES.items()}
        assert all(gradient is not None for gradient in found.values())
        return found


NAMES = {
    f"{ours}.{part}": f"{theirs}{part}"
    for ours, theirs in {
        "norm_attention": "norm1.",
        "query_key_value": "self_attn.in_proj_",
        "attention_out": "self_attn.out_proj.",
        "norm_feedforward": "norm2.",
        "feedforward_in": "linear1.",
        "feedforward_out": "linear2.",
    }.items()
    for part in ("weight", "bias")
}


def network_of(shape: Shape, seed: int = 3) -> MaskedGeneTransformer:
    """Weights from the seed, with biases and norms moved off their zeros and ones."""
    network = MaskedGeneTransformer(shape, GENES)
    network.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(16, 1, 1, 1),
    Shape(8, 1, 2, 2),
    Shape(12, 2, 3, 4),
    Shape(16, 3, 4, 1),
    Shape(24, 4, 8, 2),
]


@pytest.mark.parametrize("recipe", ["corrected", "published"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_are_those_of_the_plain_encoder(shape: Shape, recipe: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    measured = torch.rand(CELLS, GENES, generator=generator) < 0.8
    values = torch.rand(CELLS, GENES, generator=generator).to(dtype) * 5
    cells = torch.arange(CELLS)
    masks = draw_masks(recipe, 0.15, 1, torch.zeros_like(cells), cells, measured)  # type: ignore[arg-type]
    assert (masks.weights == 0).any(), "no padding: the case under test"
    ours = network_of(shape).to(dtype)
    theirs = Reference(ours).to(dtype)

    targets = values.gather(1, masks.positions)
    predictions = ours(values, masks.hidden, masks.positions)[..., 0]
    loss = ((predictions - targets).square() * masks.weights).sum()
    loss.backward()
    is_target = masks.hidden & measured
    everywhere = theirs(values, masks.hidden)
    reference = (everywhere - values)[is_target].square().sum()
    reference.backward()

    loose = 1e-6 if dtype == torch.float32 else 1e-12
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=loose)
    expected = theirs.gradients()
    # Width 1: what LayerNorm hands back is zero but for rounding, which it magnifies by 1/sqrt(its epsilon).
    scale = max(float(gradient.norm()) for gradient in expected.values()) * (1.0 if shape.width == 1 else 0.01)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        error = float((parameter.grad - expected[name]).norm())
        assert error <= 10 * loose * max(float(expected[name].norm()), scale), name


def test_hidden_values_do_not_reach_the_predictions() -> None:
    network = network_of(Shape(16, 2, 2, 2))
    values = torch.rand(CELLS, GENES)
    cells = torch.arange(CELLS)
    measured = torch.rand(CELLS, GENES, generator=torch.Generator().manual_seed(0)) < 0.8
    masks = draw_masks("corrected", 0.15, 1, torch.zeros_like(cells), cells, measured)
    other = torch.where(masks.hidden, torch.full_like(values, 99.0), values)
    first = network(values, masks.hidden, masks.positions)
    assert torch.equal(first, network(other, masks.hidden, masks.positions))
    visible = torch.where(masks.hidden, values, values + 1.0)
    assert not torch.allclose(first, network(visible, masks.hidden, masks.positions))


def test_objective_is_a_sum_over_real_targets() -> None:
    predictions = torch.tensor([[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    targets = torch.tensor([[0.0, 4.0, 1.0], [3.0, 1.0, 9.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    sums = objective_named("mse").losses(predictions[..., None], targets, weights).sum(1)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [5.0, 9.0]


def block_of(network: MaskedGeneTransformer, index: int) -> Block:
    block = network.blocks[index]
    assert isinstance(block, Block)
    return block


def test_weights_come_from_the_seed_alone() -> None:
    shape = Shape(16, 4, 2, 2)
    first, second, third = (MaskedGeneTransformer(shape, GENES) for _ in range(3))
    first.initialise(5)
    torch.manual_seed(99)
    second.initialise(5)
    third.initialise(6)
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, second.state_dict()[name])
    assert not torch.equal(first.gene_embedding, third.gene_embedding)
    wide = MaskedGeneTransformer(Shape(256, 2, 2, 1), 512)
    wide.initialise(0)
    assert float(wide.gene_embedding.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(block_of(wide, 0).query_key_value.weight.detach().std()) == pytest.approx(1 / 16, rel=0.02)
    assert float(block_of(wide, 1).attention_out.weight.detach().std()) == pytest.approx(1 / 16 / 2, rel=0.02)


def test_dropout_is_drawn_in_training_only() -> None:
    network = MaskedGeneTransformer(Shape(16, 2, 2, 2), GENES, dropout=0.3)
    network.initialise(0)
    values, hidden = torch.rand(2, GENES), torch.zeros(2, GENES, dtype=torch.bool)
    positions = torch.arange(5).expand(2, 5)
    network.eval()
    assert torch.equal(network(values, hidden, positions), network(values, hidden, positions))
    network.train()
    torch.manual_seed(0)
    first = network(values, hidden, positions)
    assert not torch.equal(first, network(values, hidden, positions))
    torch.manual_seed(0)
    assert torch.equal(first, network(values, hidden, positions))


def all_positions(cells: int) -> Tensor:
    return torch.arange(GENES).expand(cells, GENES)


@torch.no_grad()
def test_width_one_predicts_one_value_per_gene_whatever_the_cell() -> None:
    """LayerNorm over one feature is its bias, so attention and feed-forward add the same constant everywhere.

    A masked gene's prediction is then w (mask token + embedding + c) + b: one number per gene.
    """
    network = network_of(LADDER["XXS"])
    hidden = torch.ones(2, GENES, dtype=torch.bool)
    predictions = network(torch.rand(2, GENES), hidden, all_positions(2))[..., 0]
    block, head = block_of(network, 0), network.head
    value = block.query_key_value.weight[2] * block.norm_attention.bias + block.query_key_value.bias[2]
    attended = block.attention_out(value)
    inner = block.feedforward_out(nn.functional.gelu(block.feedforward_in(block.norm_feedforward.bias)))
    closed = head.weight[0] * (network.mask_token + network.gene_embedding[:, 0] + attended + inner) + head.bias
    assert torch.allclose(predictions[0], closed, rtol=1e-5, atol=1e-6)
    values = torch.rand(8, GENES) * 9
    some = torch.rand(8, GENES) < 0.5
    varied = network(values, some | (torch.arange(GENES) == 3), all_positions(8))[:, 3, 0]
    assert float((varied - closed[3]).abs().max()) < 1e-5
    assert float(closed.std()) > 0.01


def steady_cells(cells: int, genes: int) -> Cells:
    """Counts with little noise around rates that differ by gene, so that training meets each mean within seconds."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(np.geomspace(20, 5000, genes)[None, :], size=(cells, genes)).astype(np.uint16)
    zeros = np.zeros(cells, dtype=np.int32)
    raw_sum = np.full(cells, 20_000, dtype=np.int64)
    return Cells(counts, raw_sum, np.arange(cells), zeros, zeros, np.ones((1, genes), dtype=bool))


def test_width_one_trained_long_enough_is_the_per_gene_training_mean(make_run: Callable[..., RunSpec]) -> None:
    run = make_run('max_cells_seen = 19200\nschedule = "linear"', size="XXS", genes=32, lr=0.05)
    cells = steady_cells(200, 32)
    loop = TrainingLoop(run, RunData(cells, cells, cells, "hash"), PlainEngine(run, torch.device("cpu")))
    for _ in range(loop.total_steps):
        loop.train_one_update()
    with torch.no_grad():
        everything = torch.ones(1, 32, dtype=torch.bool)
        predicted = loop.engine.model(torch.zeros(1, 32), everything, torch.arange(32)[None])[0, :, 0].double().numpy()
    values = make_batch(cells, np.zeros(200, dtype=np.int64), run.train, 0, torch.device("cpu")).values
    mean = values.double().mean(0).numpy()
    assert mean.max() > 3 * mean.min() > 3
    assert predicted == pytest.approx(mean, rel=0.01)
    assert float(loop.engine.model.gene_embedding.detach().std()) > 1, "the genes have not been told apart"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_compiled_is_the_same_to_rounding() -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32", lr=1e-3)
    cells = synthetic_cells(100)
    data = RunData(cells, cells, cells, "synthetic")
    eager = TrainingLoop(run, data, PlainEngine(run, torch.device("cpu")))
    compiled_run = run.carried_out(compile=True)
    compiled = TrainingLoop(compiled_run, data, PlainEngine(compiled_run, torch.device("cpu")))
    for _ in range(10):
        assert compiled.train_one_update()[0].mean == pytest.approx(eager.train_one_update()[0].mean, rel=1e-5)
    assert sorted(compiled.state()) == sorted(eager.state())


def test_bfloat16_learns_what_float32_does() -> None:
    curves = {}
    for precision in ("fp32", "bf16"):
        run = small_run(f'max_cells_seen = 3200\nprecision = "{precision}"', lr=3e-3)
        cells = synthetic_cells(200)
        loop = TrainingLoop(run, RunData(cells, cells, cells, "synthetic"), PlainEngine(run, torch.device("cpu")))
        curves[precision] = [loop.train_one_update()[0].mean for _ in range(100)]
    assert curves["bf16"] != curves["fp32"]
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.02)
    assert curves["bf16"][-1] < 0.8 * curves["bf16"][0]
