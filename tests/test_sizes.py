"""Sizes: the published parameter counts, and FLOPs against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling_ray.errors import BadInput
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.sizes import (
    LADDER,
    Shape,
    forward_flops_per_cell,
    parameters,
    parameters_without_embedding,
    training_bytes,
    training_flops_per_cell,
)

PUBLISHED = {
    512: {
        "XXS": 533,
        "TINY": 9_953,
        "XS": 132_993,
        "S": 859_137,
        "M": 19_178_497,
        "L": 100_510_801,
        "XL": 340_770_817,
    },
    1024: {"XXS": 1_045, "XS": 165_761, "S": 924_673, "M": 19_440_641, "L": 101_033_041, "XL": 341_557_249},
}
EACH = [(name, genes, count) for genes, counts in PUBLISHED.items() for name, count in counts.items()]


@pytest.mark.parametrize(("name", "genes", "count"), EACH)
def test_parameters_are_the_published_ones_and_those_of_the_network(name: str, genes: int, count: int) -> None:
    shape = LADDER[name]
    assert parameters(shape, genes) == count
    with torch.device("meta"):
        network = MaskedGeneTransformer(shape, genes)
    by_name = {key: tensor.numel() for key, tensor in network.named_parameters()}
    assert sum(by_name.values()) == count
    assert parameters_without_embedding(shape) == count - by_name["gene_embedding"]


def test_ladder_holds_seven_sizes_in_rising_order() -> None:
    assert list(LADDER) == ["XXS", "TINY", "XS", "S", "M", "L", "XL"]
    counts = [parameters(shape, 512) for shape in LADDER.values()]
    assert counts == sorted(counts)


# heads of widths that no kernel pads
@pytest.mark.parametrize("shape", [Shape(32, 1, 2, 1), Shape(48, 3, 4, 4), Shape(36, 2, 3, 2)])
def test_flops_agree_with_the_count_of_torch(shape: Shape) -> None:
    """torch counts matrix products. The formula has 3VD of input work, which is done as a product that counts as 4VD.

    Its backward pass is one product and not two: values and masks need no gradient. Attention through the math path is
    counted as plain products, so its score recomputation cannot hide.
    """
    genes, masked, cells = 40, 6, 2
    network = MaskedGeneTransformer(shape, genes)
    network.initialise(0)
    values = torch.rand(cells, genes)
    positions = torch.stack([torch.randperm(genes)[:masked] for _ in range(cells)])
    hidden = torch.zeros(cells, genes, dtype=torch.bool).scatter(1, positions, True)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as forward,
    ):
        predictions = network(values, hidden, positions)
    with FlopCounterMode(display=False) as backward:
        predictions.square().sum().backward()
    tokens = 4 * genes * shape.width
    matrix = forward_flops_per_cell(shape, genes, masked) - 3 * genes * shape.width + tokens
    assert forward.get_total_flops() == cells * matrix
    assert training_flops_per_cell(shape, genes, masked) == 3 * forward_flops_per_cell(shape, genes, masked)
    assert backward.get_total_flops() == pytest.approx(cells * (2 * matrix - tokens), rel=0.02)


@pytest.mark.parametrize(("name", "factor"), [("TINY", 1.8), ("S", 1.5), ("L", 1.07)])
def test_six_times_parameters_times_tokens_understates_the_whole_forward_pass(name: str, factor: float) -> None:
    """Attention over 512 tokens is what 6PD leaves out; factors as measured on the study's full-sequence models."""
    shape = LADDER[name]
    everywhere = training_flops_per_cell(shape, 512, masked_genes=512)
    assert everywhere / (6 * parameters(shape, 512) * 512) == pytest.approx(factor, rel=0.03)


def test_masked_genes_alone_move_the_last_layer() -> None:
    shape = LADDER["TINY"]
    per_masked_gene = forward_flops_per_cell(shape, 512, 78) - forward_flops_per_cell(shape, 512, 77)
    assert per_masked_gene == 4 * 16**2 + 4 * 16**2 + 4 * 512 * 16 + 2 * 16


def test_training_bytes_hold_four_copies_of_the_parameters_and_grow_with_the_micro_batch() -> None:
    shape = LADDER["S"]
    small, large = training_bytes(shape, 512, 1), training_bytes(shape, 512, 2)
    assert small > 16 * parameters(shape, 512)
    assert large - small == small - 16 * parameters(shape, 512)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((10, 1, 3, 1), "heads = 3"),
        ((0, 1, 1, 1), "sizes.width"),
        ((8, 1.0, 1, 1), "sizes.layers"),
        ((8, 1, True, 1), "heads"),
    ],
)
def test_bad_shapes_are_refused(values: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Shape(*values)
