"""Weights to start from that predict at once: a low-rank linear regression of the cells' genes, put into attention.

Most of what can be told of a hidden gene is linear: its mean, and a regression on how far the others are above theirs.
A network that starts from components of the cells alone spends most of a small budget on finding that regression. Here
it is fitted in closed form to the run's own training cells and written into the first block, so that training begins
near where the regression ends. Measured in ``benchmarks/learning.py``.

The room of a token is cut into orthogonal directions: one for the head, one for a gene's value, one for its mean, one
for the mask, and the rest for the loadings of the cells' principal components. What a head of attention does with small
logits is linear in them: an average of what the keys' tokens carry, plus their covariance with the keys. Tokens carry
how far a gene is above its mean, keys and queries its loadings, keys of hidden genes are pushed out of the softmax, and
a last head that looks at all genes alike takes the averages away. What is left is a bilinear form of the asking gene's
loadings and the cell's, of rank (heads - 1)(head width - 1), whose matrix is the solution of a ridge regression of the
hidden genes; the ridge is chosen on the half of the cells that a fit has not seen. Logits are not as small as that
wants, since small ones are slow to learn: what this costs is taken out again by fitting the heads' gains, and each
gene's constant, to what the heads really say. Where few genes of a cell are hidden, each cell is looked at several
times, with others hidden, and the more often the fewer cells there are: a regression has thousands of numbers and needs
more targets than that.

Other weights that write to the residual stream stay as drawn, but smaller: at zero nothing would reach what stands
before them, and Adam makes updates out of rounding.

Shape legend: N cells, G genes, K hidden genes of a cell, D width, H heads, C components, J rank, O outputs per gene.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from scaling_ray.model.masking import Masks, draw_masks
from scaling_ray.model.start import EMBEDDING_SCALE, components, gene_means

CALIBRATION_CELLS = 1024
"""Of a run's cells, most that a head's gain is fitted to, for each turn that they are looked at in."""
VALUES_SIZE = 0.1
"""Root mean square of what the cells' values write to a token's entry: LayerNorm divides by the whole, so that values
which are small beside the embedding stay linear."""
LOGIT_SCALE = 0.3
"""Root mean square of a head's logits over pairs of genes. Smaller ones are closer to linear, and learn more slowly."""
OTHERS_SCALE = 0.1
"""What is left of drawn weights that would write noise to the prediction."""
HIDDEN_LOGIT = -6.0
"""Logit of a key whose gene is hidden."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges tried, each times the mean variance of the cells' loadings."""
FEWEST_VISIBLE_GENES = 4
"""Mean number of visible genes of a cell below which nothing is regressed."""
_OWN_DIRECTIONS = 5
"""The one that LayerNorm takes away, and those of head, value, mean and mask."""
_ROUNDS = 5
"""Rounds in which embeddings and regression come to agree: what the former say changes what LayerNorm divides by."""
_CALIBRATIONS = 2
_SOLVER_STEPS = 10
_GAIN_RIDGE = 1e-3
"""Times the variance of what a head says."""
_PRIOR_CELLS = 5
"""Cells at 0 that a gene's mean of what heads say is shrunk by."""
_CHUNK_CELLS = 64
_SMALL = 1e-9
_NORM_EPSILON = 1e-5
"""Of torch's LayerNorm."""
_BASIS_SEED = 104_729


def has_room(width: int, heads: int) -> bool:
    """Whether a network has room for the regression: a width of six or more, and two heads of two or more."""
    return heads >= 2 and width // heads >= 2 and width > _OWN_DIRECTIONS


@dataclass(frozen=True)
class _Directions:
    """Orthonormal directions of a token's room, orthogonal to the ones that LayerNorm takes away."""

    head: Tensor
    value: Tensor
    hidden: Tensor
    mean: Tensor
    loadings_DC: Tensor


def linear_weights(
    drawn: Mapping[str, Tensor],
    values_NG: Tensor,
    measured_NG: Tensor,
    constants_GO: Tensor,
    *,
    heads: int,
    mask_fraction: float,
    seed: int,
    turns: int = 1,
) -> dict[str, Tensor] | None:
    """The weights of a ``MaskedGeneTransformer`` to start from, on the CPU; None where cells tell nothing linear.

    Args:
        drawn: its weights by name as ``initialise`` drew them.
        values_NG: normalised values of training cells.
        measured_NG: which of them were measured, bool.
        constants_GO: (G, 1) best constant of each gene.
        heads: of a block.
        mask_fraction: of a cell's genes, in training.
        seed: of the run.
        turns: in which each cell is looked at, with other genes hidden.
    """
    weights = {name: tensor.detach().cpu().clone() for name, tensor in drawn.items()}
    genes, width = weights["gene_embedding"].shape
    values, measured = values_NG.double().cpu(), measured_NG.cpu()
    cells, turn = torch.arange(len(values)).repeat(turns), torch.arange(turns).repeat_interleave(len(values))
    masks = draw_masks("corrected", mask_fraction, seed, turn, cells, measured[cells])
    if float((~masks.hidden).sum(1).double().mean()) < FEWEST_VISIBLE_GENES:
        return None
    loadings_CG = components(values, measured)[: width - _OWN_DIRECTIONS]
    if not len(loadings_CG):
        return None
    directions = _directions(width, len(loadings_CG), seed)
    constants = constants_GO.double().cpu()[:, 0]
    bias, head_size = float(constants.mean()), float(weights["head.weight"].double().norm())
    unit = math.sqrt(width)
    embedded_GC = loadings_CG.T * (EMBEDDING_SCALE * unit * math.sqrt(genes) / loadings_CG.norm())
    slope = VALUES_SIZE * unit / float(values[measured].square().mean().sqrt())
    hidden = EMBEDDING_SCALE * unit
    means = gene_means(values, measured)
    first = _Table(values, measured, masks.rows(0, len(values)), cells[: len(values)], means, constants - bias)
    table = first
    if turns > 1:
        table = _Table(values[cells], measured[cells], masks, cells, means, constants - bias)
    found = _agreed(first, table, embedded_GC, width, slope, hidden, head_size, (heads - 1) * (width // heads - 1))
    if found is None:
        return None

    weights["gene_embedding"] = (
        embedded_GC @ directions.loadings_DC.T
        + found.said[:, None] * directions.head
        + slope * means[:, None] * directions.mean
    ).float()
    weights["mask_token"] = (hidden * directions.hidden).float()
    weights["value_projection.weight"] = (slope * directions.value)[:, None].float()
    weights["value_projection.bias"].zero_()
    weights["head.weight"] = (head_size * directions.head)[None].float()
    weights["head.bias"] = torch.full_like(weights["head.bias"], bias)
    for name in weights:
        if name.endswith(("attention_out.weight", "feedforward_out.weight")):
            weights[name] *= OTHERS_SCALE
    scales = _Scales(
        told=found.told, hidden=hidden / float(_deviation(found.fixed + hidden**2, width).mean()), head=head_size
    )
    _write_heads(weights, directions, heads, found, scales)
    few = cells < CALIBRATION_CELLS * turns
    fitted, hidden_there = table.values[few], masks.through(lambda part: part[few])
    for _ in range(_CALIBRATIONS):
        _calibrate(weights, directions, heads, fitted, hidden_there, constants, scales)
    return weights


@dataclass(frozen=True)
class _Table:
    """What to fit to, a row for each look at a cell.

    values (N, G), measured and masks; cells (N,) that rows are of; genes' means (G,), constants less the bias (G,).
    """

    values: Tensor
    measured: Tensor
    masks: Masks
    cells: Tensor
    means: Tensor
    constants: Tensor


@dataclass(frozen=True)
class _Found:
    """A regression and the token that it was fitted with, which depends on it.

    Attributes:
        said: (G,) what an embedding writes along the head's direction.
        fixed: (G,) sum of squares of a token's entries, but for those of its value or mask.
        asks: (G, J) what hidden genes show of the forms.
        tells: (G, J) what visible ones show of them at their mean value.
        asking_form: (C, J).
        cells_form: (J, C).
        told: what makes how far visible genes are above their means 1 in the root mean square.
    """

    said: Tensor
    fixed: Tensor
    asks: Tensor
    tells: Tensor
    asking_form: Tensor
    cells_form: Tensor
    told: float


def _agreed(
    first: _Table,
    table: _Table,
    embedded_GC: Tensor,
    width: int,
    slope: float,
    hidden: float,
    head_size: float,
    rank: int,
) -> _Found | None:
    """Fit, and let embeddings say what is left for them, in rounds; None where other cells are not predicted.

    Only the last round looks at the whole table; the others, at each cell once.
    """
    said = table.constants / head_size
    for number in range(_ROUNDS):
        is_last = number == _ROUNDS - 1
        table_now = table if is_last else first
        residuals = torch.where(table_now.measured, table_now.values - table.means, 0.0)
        visible = (~table_now.masks.hidden).double()
        target = (table_now.masks.hidden & table_now.measured).double()
        if not bool(target.any()):
            return None
        seen = visible.sum(1, keepdim=True).clamp(min=1)
        fixed = embedded_GC.square().sum(1) + said.square() + (slope * table.means).square()
        asking_GC = embedded_GC / _deviation(fixed + hidden**2, width)[:, None]
        deviation_NG = _deviation(fixed + (slope * table_now.values).square(), width)
        above_NG = slope * (table_now.values - table.means) / deviation_NG * visible
        shown_NG = visible / deviation_NG
        cells = (above_NG / deviation_NG) @ embedded_GC / seen
        cells = cells - (shown_NG @ embedded_GC / seen) * (above_NG.sum(1, keepdim=True) / seen)
        mean = cells.mean(0)
        cells = cells - mean
        ridge = _ridge(asking_GC, cells, residuals, target, table.cells) if is_last else RIDGES[1]
        if ridge is None:
            return None
        form = _solved(asking_GC, cells, residuals, target, ridge)
        asking_form, cells_form = _halves(asking_GC, cells, form, rank)
        offset = (asking_GC @ asking_form) @ (cells_form @ mean)
        said = (table.constants - offset) / head_size
    usual_GC = embedded_GC / _deviation(fixed + (slope * table.means).square(), width)[:, None]
    told = 1 / float((above_NG.square().sum() / visible.sum().clamp(min=1)).sqrt().clamp(min=_SMALL))
    return _Found(said, fixed, asking_GC @ asking_form, usual_GC @ cells_form.T, asking_form, cells_form, told)


@dataclass(frozen=True)
class _Scales:
    """Sizes that a token does not have.

    Attributes:
        told: as in ``_Found``.
        hidden: what a hidden token shows of being hidden.
        head: length of the head's weights.
    """

    told: float
    hidden: float
    head: float


def _deviation(squares: Tensor, width: int) -> Tensor:
    """Standard deviation over a token's entries, as LayerNorm takes it, from the sum of their squares."""
    return torch.sqrt(squares / width + _NORM_EPSILON)


def _directions(width: int, count: int, seed: int) -> _Directions:
    generator = torch.Generator().manual_seed(seed + _BASIS_SEED)
    basis = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1.0
    basis, upper = torch.linalg.qr(basis)
    basis = basis * upper.diagonal().sign()
    return _Directions(basis[:, 1], basis[:, 2], basis[:, 3], basis[:, 4], basis[:, 5 : 5 + count])


def _ridge(
    asking_GC: Tensor, cells_NC: Tensor, residuals_NG: Tensor, target_NG: Tensor, cells_N: Tensor
) -> float | None:
    """The ridge that predicts every second cell best from the others. ``cells_N``: which cell a row is of.

    None where it is not better than the gene mean by more than two standard errors over those cells; looks at one cell
    are no cells of their own.
    """
    fitted, other = cells_N % 2 == 0, cells_N % 2 == 1
    if not (float(target_NG[fitted].sum()) > 0 and float(target_NG[other].sum()) > 0):
        return None
    nothing = (residuals_NG[other].square() * target_NG[other]).sum(1)
    losses = []
    for ridge in RIDGES:
        form = _solved(asking_GC, cells_NC[fitted], residuals_NG[fitted], target_NG[fitted], ridge)
        missed = (residuals_NG[other] - (cells_NC[other] @ form.T) @ asking_GC.T).square() * target_NG[other]
        losses.append(missed.sum(1))
    best = min(range(len(RIDGES)), key=lambda tried: float(losses[tried].sum()))
    _, cell = cells_N[other].unique(return_inverse=True)
    gained = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell, nothing - losses[best])
    error = float(gained.std()) / math.sqrt(len(gained)) if len(gained) > 1 else math.inf
    return RIDGES[best] if float(gained.mean()) > 2 * error else None


def _solved(asking_GC: Tensor, cells_NC: Tensor, residuals_NG: Tensor, target_NG: Tensor, ridge: float) -> Tensor:
    """(C, C) form M of least sum over hidden genes of (residual - asking M cell)^2, by conjugate gradients.

    Masks fall alike on all genes, so the solution for a full table is a good first guess and preconditioner.
    """
    square = cells_NC.T @ cells_NC
    penalty = ridge * float(square.trace()) / len(square)
    share = float(target_NG.mean())
    identity = torch.eye(len(square), dtype=torch.float64)
    asking_square = asking_GC.T @ asking_GC
    small = _SMALL * float(asking_square.trace())
    by_asking = torch.linalg.inv(asking_square + small * identity)
    by_cells = torch.linalg.inv(square + (penalty + _SMALL * float(square.trace())) * identity)

    def product(form: Tensor) -> Tensor:
        said = (cells_NC @ form.T) @ asking_GC.T * target_NG
        return asking_GC.T @ (said.T @ cells_NC) + share * penalty * asking_square @ form

    wanted = asking_GC.T @ ((residuals_NG * target_NG).T @ cells_NC)
    form = by_asking @ wanted @ by_cells / share
    left = wanted - product(form)
    turned = by_asking @ left @ by_cells / share
    along, size = turned.clone(), float((left * turned).sum())
    for _ in range(_SOLVER_STEPS):
        if not size > 0:
            break
        moved = product(along)
        step = size / float((along * moved).sum())
        form, left = form + step * along, left - step * moved
        turned = by_asking @ left @ by_cells / share
        before, size = size, float((left * turned).sum())
        along = turned + size / before * along
    return form


def _halves(asking_GC: Tensor, cells_NC: Tensor, form_CC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(C, J), (J, C): the best form of a rank on these genes and cells, as a product; strongest first."""
    sides = []
    for table in (asking_GC, cells_NC):
        square = table.T @ table
        small = _SMALL * float(square.trace()) * torch.eye(len(square), dtype=torch.float64)
        sides.append(torch.linalg.cholesky(square + small))
    asking, cells = sides
    left, strength, right = torch.linalg.svd(asking.T @ form_CC @ cells)
    kept = min(rank, len(strength))
    largest = left.abs().argmax(dim=0, keepdim=True)
    sign = left.gather(0, largest).sign()
    left, right, root = left * sign, right * sign.T, strength[:kept].sqrt()
    return (
        torch.linalg.solve_triangular(asking.T, left[:, :kept] * root, upper=True),
        torch.linalg.solve_triangular(cells.T, (root[:, None] * right[:kept]).T, upper=True).T,
    )


def _write_heads(
    weights: dict[str, Tensor], directions: _Directions, heads: int, found: _Found, scales: _Scales
) -> None:
    """Put the product of the two forms into the first block: some of its rank in each head but the last."""
    width = len(directions.head)
    each = width // heads
    name = "blocks.0.query_key_value"
    query, key, value = (part.double() for part in weights[f"{name}.weight"].split(width))
    out = weights["blocks.0.attention_out.weight"].double()
    query, key = torch.zeros_like(query), key * OTHERS_SCALE
    query_bias = torch.zeros(width, dtype=torch.float64)
    gains = 0.0
    for head in range(heads):
        first, last = head * each, head * each + each - 1
        value[first] = scales.told * (directions.value - directions.mean)
        query[last], key[last] = 0.0, HIDDEN_LOGIT / scales.hidden * directions.hidden
        query_bias[last] = math.sqrt(each)
        part = slice(head * (each - 1), (head + 1) * (each - 1))
        asks, tells = found.asks[:, part], found.tells[:, part]
        size = float((asks @ tells.T).square().mean().sqrt()) if head < heads - 1 else 0.0
        gain = size / LOGIT_SCALE
        gains += gain
        out[:, first] = (gain if head < heads - 1 else -gains) / (scales.told * scales.head) * directions.head
        if not size > 0:
            continue
        for row, (asked, told) in enumerate(zip(asks.norm(dim=0), tells.norm(dim=0), strict=True)):
            balance = math.sqrt(float(told / asked)) if asked > 0 and told > 0 else 1.0
            strength = math.sqrt(math.sqrt(each) / gain)
            index = part.start + row
            query[first + row] = strength * balance * (directions.loadings_DC @ found.asking_form[:, index])
            key[first + row] = strength / balance * (directions.loadings_DC @ found.cells_form[index])
    weights[f"{name}.weight"] = torch.cat([query, key, value]).float()
    weights[f"{name}.bias"] = torch.cat([query_bias, torch.zeros(2 * width, dtype=torch.float64)]).float()
    weights["blocks.0.attention_out.weight"] = out.float()


def _calibrate(
    weights: dict[str, Tensor],
    directions: _Directions,
    heads: int,
    values_NG: Tensor,
    masks: Masks,
    constants: Tensor,
    scales: _Scales,
) -> None:
    """Fit the heads' gains, and what each gene's embedding says, to what the first block's attention really says."""
    each = len(directions.head) // heads
    mixed_NKD = _attended(weights, heads, values_NG, masks)
    out = weights["blocks.0.attention_out.weight"].double()
    says = (directions.head @ out) * scales.head
    gained_NKH, gains = mixed_NKD[..., ::each], says[::each].clone()
    says[::each] = 0.0
    rest_NK1 = (mixed_NKD @ says)[..., None]
    above_NK1 = (values_NG.gather(1, masks.positions) - constants[masks.positions])[..., None]
    kept, gene = masks.weights.double().flatten()[:, None], masks.positions.flatten()
    count = torch.zeros(len(constants), 1, dtype=torch.float64).index_add_(0, gene, kept) + _PRIOR_CELLS

    def by_gene(table: Tensor) -> tuple[Tensor, Tensor]:
        """(rows without their gene's mean, the means)."""
        flat = table.flatten(0, 1)
        total = torch.zeros(len(constants), flat.shape[1], dtype=torch.float64).index_add_(0, gene, flat * kept)
        return (flat - (total / count)[gene]) * kept, total / count

    gained, gained_means = by_gene(gained_NKH)
    wanted, _ = by_gene(above_NK1 - rest_NK1)
    _, rest_means = by_gene(rest_NK1)
    square = gained.T @ gained
    ridge = torch.diag(_GAIN_RIDGE * square.diagonal() + _SMALL)
    gains = gains + torch.linalg.solve(square + ridge, gained.T @ (wanted[:, 0] - gained @ gains))
    says[::each] = gains
    along = torch.outer(directions.head, says / scales.head - directions.head @ out)
    weights["blocks.0.attention_out.weight"] = (out + along).float()
    embedding = weights["gene_embedding"].double()
    said = (constants - float(weights["head.bias"]) - gained_means @ gains - rest_means[:, 0]) / scales.head
    embedding = embedding + torch.outer(said - embedding @ directions.head, directions.head)
    weights["gene_embedding"] = embedding.float()


def _attended(weights: Mapping[str, Tensor], heads: int, values_NG: Tensor, masks: Masks) -> Tensor:
    """(N, K, D) float64: what the heads of the first block average at hidden genes, before its output map.

    Attention itself is computed at the network's own precision: at twice that it would take most of a start's time.
    """
    name = "blocks.0.query_key_value"
    matrix, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    width = matrix.shape[1]
    value, hidden = weights["value_projection.weight"][:, 0], weights["mask_token"]
    values_NG = values_NG.float()
    found = []
    for start in range(0, len(values_NG), _CHUNK_CELLS):
        part = slice(start, start + _CHUNK_CELLS)
        told = torch.where(masks.hidden[part, :, None], hidden, values_NG[part, :, None] * value)
        normed = layer_norm(weights["gene_embedding"] + told, (width,), eps=_NORM_EPSILON)
        asking = normed.gather(1, masks.positions[part, :, None].expand(-1, -1, width))
        query = linear(asking, matrix[:width], bias[:width])
        key, carried = linear(normed, matrix[width:], bias[width:]).split(width, dim=2)
        query, key, carried = (table.unflatten(2, (heads, -1)).transpose(1, 2) for table in (query, key, carried))
        mixed = scaled_dot_product_attention(query, key, carried)
        found.append(mixed.transpose(1, 2).flatten(2).double())
    return torch.cat(found)
