"""Cheap dropout keeps its rate and its mean, drops what it should in both directions, and changes nothing at rate 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scaling_ray.model.dropout import CHUNK_ELEMENTS, attention, dropout, padded_attention
from scaling_ray.model.network import MaskedGeneTransformer
from scaling_ray.sizes import Shape

RATES = [0.1, 0.25, 0.5]


@pytest.mark.parametrize("rate", RATES)
def test_units_drop_at_the_rate_and_keep_their_mean(rate: float) -> None:
    torch.manual_seed(0)
    units = 4_000_001
    kept = dropout(torch.ones(units), rate)
    dropped = int((kept == 0).sum())
    assert abs(dropped - rate * units) < 5 * math.sqrt(rate * (1 - rate) * units)
    values = kept[kept != 0]
    assert (values == values[0]).all() and float(values[0]) == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_neighbouring_units_drop_independently() -> None:
    torch.manual_seed(1)
    dropped = (dropout(torch.ones(4_000_000), 0.25) == 0).double() - 0.25
    for lag in (1, 2, 3, 4, 8):
        correlation = float((dropped[lag:] * dropped[:-lag]).mean() / (0.25 * 0.75))
        assert abs(correlation) < 5 / math.sqrt(4_000_000)


def test_gradients_flow_where_units_were_kept() -> None:
    torch.manual_seed(2)
    x = torch.randn(50, 60, requires_grad=True)
    out = dropout(x, 0.3)
    upstream = torch.randn(50, 60)
    out.backward(upstream)
    assert x.grad is not None
    kept = out.detach() != 0
    assert (x.grad[~kept] == 0).all()
    assert torch.allclose(x.grad[kept] / upstream[kept], (out.detach() / x.detach())[kept])


def test_rate_zero_is_the_tensor_itself() -> None:
    x = torch.randn(3)
    assert dropout(x, 0.0) is x


def test_draws_repeat_from_the_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = dropout(torch.ones(1000), 0.4)
    torch.set_rng_state(state)
    assert torch.equal(first, dropout(torch.ones(1000), 0.4))
    assert not torch.equal(first, dropout(torch.ones(1000), 0.4))


def projections(heads: int, asking: int, genes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, heads, n, width) for n in (asking, genes, genes)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


# the second takes several chunks of heads, the last not a whole number of them
@pytest.mark.parametrize("shape", [(2, 7, 30, 4), (3, 250, 512, 8), (1, 5, 9, 1)], ids=str)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("under_autocast", [False, True])
def test_attention_and_its_gradients_follow_from_the_entries_it_kept(
    shape: tuple[int, int, int, int], rate: float, under_autocast: bool
) -> None:
    """Against the plain formula in float64; an autocast around it, in either direction, changes nothing."""
    query, key, value = projections(*shape, dtype=torch.float32)
    genes = key.shape[2]
    # With one-hot values the output is the dropped matrix itself.
    torch.manual_seed(5)
    one_hot = torch.eye(genes).expand(2, key.shape[1], genes, genes)
    weights = functional.softmax(query.detach() @ key.detach().mT / math.sqrt(query.shape[3]), -1)
    with torch.no_grad():
        dropped = attention(query, key, one_hot, rate)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], (weights / (1 - rate))[kept], rtol=1e-3, atol=1e-7)
    units = kept.numel()
    tiny = int(((weights > 0) & (weights < 1e-30)).sum())
    assert abs(int((~kept).sum()) - rate * units) < 5 * math.sqrt(rate * (1 - rate) * units) + tiny
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
        out = attention(query, key, value, rate)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
        found = torch.autograd.grad(out, (query, key, value), upstream)
    assert out.dtype == torch.float32
    scale = float(dropped[kept][0] / weights[kept][0])
    exact = [projection.detach().double().requires_grad_() for projection in (query, key, value)]
    matrix = functional.softmax(exact[0] @ exact[1].mT / math.sqrt(query.shape[3]), -1) * kept * scale
    plain = matrix @ exact[2]
    expected = torch.autograd.grad(plain, exact, upstream.double())
    assert torch.allclose(out.double(), plain, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-3)


@pytest.mark.parametrize("under_autocast", [False, True])
def test_attention_takes_bfloat16_and_answers_in_it(under_autocast: bool) -> None:
    """As in float32 on the same rounded numbers, rounded once."""
    rounded = projections(2, 7, 30, 4, torch.bfloat16)
    query, key, value = (projection.detach().float().requires_grad_() for projection in rounded)
    upstream = torch.randn(2, 2, 7, 4, generator=torch.Generator().manual_seed(6)).bfloat16()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
        out = attention(*rounded, 0.1)
        found = torch.autograd.grad(out, rounded, upstream)
    torch.manual_seed(7)
    plain = attention(query, key, value, 0.1)
    expected = torch.autograd.grad(plain, (query, key, value), upstream.float())
    assert torch.equal(out, plain.bfloat16())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.bfloat16())


def test_a_network_under_autocast_is_near_the_same_in_float32() -> None:
    """The same units are dropped; loss and gradients differ by the rounding of bfloat16, 2^-8 an operation."""
    model = MaskedGeneTransformer(Shape(width=32, layers=2, heads=4, feedforward=2), 40, dropout=0.1)
    model.initialise(9)
    generator = torch.Generator().manual_seed(10)
    values, targets = torch.rand(6, 40, generator=generator), torch.rand(6, 8, generator=generator)
    positions = torch.stack([torch.randperm(40, generator=generator)[:8] for _ in range(6)])
    hidden = torch.zeros(6, 40, dtype=torch.bool).scatter_(1, positions, True)

    def loss_and_gradients(under_autocast: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
            loss = (model(values, hidden, positions)[..., 0].float() - targets).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    rounded, exact = loss_and_gradients(True), loss_and_gradients(False)
    for one, other in zip(rounded, exact, strict=True):
        difference = float((one - other).norm() / other.norm())
        assert 0 < difference < 0.02


@pytest.mark.parametrize("width", [1, 5, 8, 85])
def test_padded_heads_change_nothing(width: int) -> None:
    query, key, value = projections(3, 7, 30, width, torch.float32)
    plain = functional.scaled_dot_product_attention(query, key, value)
    padded = padded_attention(query, key, value, 0.0, 8)
    assert torch.allclose(plain, padded, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(8))
    for one, other in zip(
        torch.autograd.grad(plain, (query, key, value), upstream),
        torch.autograd.grad(padded, (query, key, value), upstream),
        strict=True,
    ):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-6


def test_the_chunked_case_is_chunked() -> None:
    assert 250 * 512 * 3 * 2 > 2 * CHUNK_ELEMENTS
