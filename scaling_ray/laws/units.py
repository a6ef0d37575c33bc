"""Losses in units that can be compared: bits under one shared Gaussian, and shares of a gap.

Every figure here rests on the recipe that produced the loss: an MSE of log-normalised counts changes with the
normalisation, and so do its bits. Gains over a baseline on the same cells and masks are less fragile.
"""

from __future__ import annotations

import math

ENTROPY_FORMULA = "0.5 * log2(2 * pi * e * MSE)"
ENTROPY_NAME = "bits per masked gene under one Gaussian with a single variance shared by all genes and cells"
GAIN_FORMULA = "0.5 * log2(MSE of the baseline / MSE of the model)"
GAIN_NAME = "bits per masked gene gained over the baseline, under the same shared-variance Gaussian"
SHARE_FORMULA = "(MSE of the baseline - MSE of the model) / (MSE of the baseline - MSE of the floor)"
SHARE_NAME = "share of the gap from the baseline to the floor that the model closes"


def shared_gaussian_bits(mse: float) -> float:
    """Differential entropy, in bits, of a Gaussian with variance ``mse``: may be negative, and depends on the unit."""
    return 0.5 * math.log2(2.0 * math.pi * math.e * mse)


def gain_bits(mse: float, baseline_mse: float) -> float:
    """Bits per masked gene gained over a baseline; independent of the unit of the values."""
    return 0.5 * math.log2(baseline_mse / mse)


def share_of_gap(mse: float, baseline_mse: float, floor_mse: float) -> float | None:
    """Share of the way from baseline to floor; None where the floor is no better than the baseline."""
    gap = baseline_mse - floor_mse
    return (baseline_mse - mse) / gap if gap > 0 else None
