"""Objectives: predictions in, a sum to minimise and the number of masked genes it runs over out."""

from __future__ import annotations

from torch import Tensor


def squared_errors(predictions_BK: Tensor, targets_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """(B, K) of each masked gene (prediction - target)^2, in float32; 0 where a target is padding."""
    return (predictions_BK.float() - targets_BK).square() * weights_BK


def squared_error_sums(predictions_BK: Tensor, targets_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """(B,) sums over each cell's masked genes of (prediction - target)^2, in float32."""
    return squared_errors(predictions_BK, targets_BK, weights_BK).sum(1)
