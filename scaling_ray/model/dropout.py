"""Dropout with cheap draws on a CPU, and attention with or without it.

torch draws one 64-bit number per unit and walks the whole attention matrix in memory several times. Here one draw
serves four units (16 bits each: the rate is exact to 2^-16, and kept units are scaled by the rounded rate) and the
matrix is made head by head, in the cache. On a GPU, and where nothing is dropped, torch's fused kernels are used.

Shape legend: B cells, H heads, Q asking tokens, G genes, E width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 18
"""Entries of the attention matrices that are made together: a megabyte of float32."""
GPU_HEAD_MULTIPLE = 8
"""Fused attention on a GPU needs head widths that are multiples of this."""
CPU_HEAD_WIDTH = 16
"""Fused attention on a CPU takes 0.6 of the time at this head width as at widths of 2 to 8 (at 1 it is fastest)."""

_STEPS = 1 << 16


def _kept(shape: torch.Size | tuple[int, ...], threshold: int) -> Tensor:
    """Bool of a shape, False with probability ``threshold`` / 2^16, from torch's CPU generator."""
    units = math.prod(shape)
    draws = torch.empty(-(-units // 4), dtype=torch.int64).random_(-(1 << 63), (1 << 63) - 1)
    return (draws.view(torch.int16)[:units] >= threshold - _STEPS // 2).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        threshold = round(rate * _STEPS)
        keep, ctx.scale = _kept(x.shape, threshold), _STEPS / (_STEPS - threshold)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (gradients[0] * keep).mul_(ctx.scale), None


def dropout(x: Tensor, rate: float) -> Tensor:
    """``x`` with each unit dropped at ``rate`` (in [0, 1)), the others scaled up."""
    if rate == 0.0:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, rate)
    dropped: Tensor = _Dropout.apply(x, rate)
    return dropped


class _DroppedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(E)) with entries dropped, times v, in float32, some heads at a time.

    Autocast is off in both directions: it would turn the products into bfloat16, which float32 buffers refuse.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
        heads, asking, width, genes = query.shape[:2], query.shape[2], query.shape[3], key.shape[2]
        threshold = round(rate * _STEPS)
        ctx.scale, ctx.up, ctx.dtype = 1 / math.sqrt(width), _STEPS / (_STEPS - threshold), query.dtype
        q = (query.float() * ctx.scale).flatten(0, 1)
        k, v = key.float().flatten(0, 1), value.float().flatten(0, 1)
        weights = torch.empty(len(q), asking, genes)
        keep = torch.empty(len(q), asking, genes, dtype=torch.bool)
        out = torch.empty(len(q), asking, value.shape[3])
        ctx.chunk = max(1, CHUNK_ELEMENTS // (asking * genes))
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(q), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                torch.softmax(torch.bmm(q[part], k[part].mT), 2, out=weights[part])
                keep[part] = _kept(weights[part].shape, threshold)
                torch.bmm(weights[part] * keep[part], v[part], out=out[part])
        ctx.save_for_backward(q, k, v, weights, keep)
        return out.mul_(ctx.up).unflatten(0, heads).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights, keep = ctx.saved_tensors
        heads = gradients[0].shape[:2]
        upstream = (gradients[0].float() * ctx.up).flatten(0, 1)
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(q), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                dropped = weights[part] * keep[part]
                torch.bmm(dropped.mT, upstream[part], out=of_v[part])
                # of softmax: w (dL/dw - sum over genes of w dL/dw), dL/dw being zero where an entry was dropped
                flow = torch.bmm(upstream[part], v[part].mT).mul_(dropped)
                flow.addcmul_(weights[part], flow.sum(2, keepdim=True), value=-1)
                torch.bmm(flow, k[part], out=of_q[part])
                torch.bmm(flow.mT, q[part], out=of_k[part])
        back = (t.unflatten(0, heads).to(ctx.dtype) for t in (of_q.mul_(ctx.scale), of_k, of_v))
        return next(back), next(back), next(back), None


def attention(query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
    """Scaled dot-product attention, (B, H, Q, E) x (B, H, G, E) x (B, H, G, E) -> (B, H, Q, E), dropped at ``rate``."""
    if rate > 0.0 and query.device.type == "cpu":
        mixed: Tensor = _DroppedAttention.apply(query, key, value, rate)
        return mixed
    if query.device.type == "cuda":
        return padded_attention(query, key, value, rate, GPU_HEAD_MULTIPLE)
    if 1 < query.shape[3] <= CPU_HEAD_WIDTH // 2:
        return padded_attention(query, key, value, rate, CPU_HEAD_WIDTH)
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, rate: float, multiple: int) -> Tensor:
    """The same attention with heads zero-padded to a ``multiple`` of width: zeros add nothing to any product."""
    width = query.shape[3]
    missing = -width % multiple
    if missing:
        query, key, value = (functional.pad(t, (0, missing)) for t in (query, key, value))
    scale = 1 / math.sqrt(width)
    mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, scale=scale)
    return mixed[..., :width]
