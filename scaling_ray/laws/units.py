"""Losses in units that can be compared: bits under a named likelihood, and shares of a gap.

Every figure here rests on the recipe that produced the loss: an MSE of log-normalised counts changes with the
normalisation, and so do its bits. Gains over a baseline on the same cells and masks are less fragile, and bits of a
likelihood of the counts themselves depend on no choice of unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_ray.laws.points import Rows

ENTROPY_FORMULA = "0.5 * log2(2 * pi * e * MSE)"
ENTROPY_NAME = "bits per masked gene under one Gaussian with a single variance shared by all genes and cells"
PER_GENE_FORMULA = "mean over genes of 0.5 * log2(2 * pi * e * MSE of the gene)"
PER_GENE_NAME = "bits per masked gene under one Gaussian for each gene; never above the shared one"
DISCRETE_FORMULA = "mean of -log2 p(count)"
DISCRETE_NAME = "bits per masked gene under a likelihood of the raw count, which no choice of unit moves"
GAIN_FORMULA = "0.5 * log2(MSE of the baseline / MSE of the model)"
GAIN_NAME = "bits per masked gene gained over the baseline, under the same shared-variance Gaussian"
SHARE_FORMULA = "(loss of the baseline - loss of the model) / (loss of the baseline - loss of the floor)"
SHARE_NAME = "share of the gap from the baseline to the floor that the model closes"
CONDITIONAL = "Conditional on the held-out donors, genes and masks of this split."

# Columns of a table that hold a discrete likelihood -> its name.
DISCRETE = {"count_bits": "bits of the raw counts, as the table has them"}
DISCRETE |= {"nb_bits": "negative binomial", "multinomial_bits": "multinomial", "beta_binomial_bits": "beta-binomial"}


def shared_gaussian_bits(mse: float) -> float:
    """Differential entropy, in bits, of a Gaussian with variance ``mse``: may be negative, and depends on the unit."""
    return 0.5 * math.log2(2.0 * math.pi * math.e * mse)


def per_gene_gaussian_bits(mse_by_gene: Sequence[float] | NDArray) -> float:
    """Mean over genes (G,) of each gene's Gaussian entropy, in bits; genes without error are not allowed.

    Raises:
        ValueError: a gene's mean squared error is not positive.
    """
    mse = np.asarray(mse_by_gene, dtype=np.float64)
    if not np.all(mse > 0):
        raise ValueError("mse_by_gene: a gene of zero error has no Gaussian; leave such genes out and say how many")
    return float(np.mean(0.5 * np.log2(2.0 * np.pi * np.e * mse)))


def nats_to_bits(nats: float) -> float:
    """A mean negative log likelihood in nats, in bits."""
    return nats / math.log(2.0)


def gain_bits(mse: float | None, baseline_mse: float | None) -> float | None:
    """Bits per masked gene gained over a baseline, whatever the unit of the values; None where one is not known."""
    return 0.5 * math.log2(baseline_mse / mse) if mse and baseline_mse else None


def share_of_gap(loss: float | None, baseline: float | None, floor: float | None) -> float | None:
    """Share of the way from baseline to floor; None where one is unknown, or the floor no better than the baseline."""
    if not (loss and baseline and floor) or baseline <= floor:
        return None
    return (baseline - loss) / (baseline - floor)


def is_mse(loss_unit: str | None) -> bool:
    """Whether bits of a Gaussian may be taken of a loss; a table that names no unit is taken to be one."""
    return loss_unit in (None, "mse")


def size_units(rows: Rows, loss_unit: str | None) -> dict[str, Any]:
    """Losses of each setting in every unit that the table can give, each named.

    Bits of Gaussians need a loss that is an MSE (see :func:`is_mse`), those of per-gene Gaussians also a column
    ``test_per_gene_bits``; discrete likelihoods stand where one of :data:`DISCRETE` has them.
    """
    keys = [rows["params"]] + ([rows["cells"]] if "cells" in rows else [])
    settings, index = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    table = []
    for i, setting in enumerate(settings):
        here = np.asarray(index).reshape(-1) == i
        loss = float(np.mean(rows["loss"][here]))
        mse = loss if is_mse(loss_unit) else None
        entry: dict[str, Any] = {"params": float(setting[0]), "cells": float(setting[1]) if len(setting) > 1 else None}
        entry |= {"runs": int(here.sum()), "loss": loss}
        entry["shared_gaussian_bits"] = None if mse is None else shared_gaussian_bits(mse)
        entry["per_gene_gaussian_bits"] = _mean(rows, "test_per_gene_bits", here) if is_mse(loss_unit) else None
        for name, column in (("gene_mean", "baseline_loss"), ("shrunk_gaussian", "gaussian_loss")):
            entry[f"gain_over_{name}_bits"] = gain_bits(mse, _mean(rows, column, here))
        entry["discrete_bits"] = {
            title: value for column, title in DISCRETE.items() if (value := _mean(rows, column, here)) is not None
        }
        table.append(entry)
    names = {
        "shared_gaussian_bits": {"name": ENTROPY_NAME, "formula": ENTROPY_FORMULA},
        "per_gene_gaussian_bits": {"name": PER_GENE_NAME, "formula": PER_GENE_FORMULA},
        "discrete_bits": {"name": DISCRETE_NAME, "formula": DISCRETE_FORMULA},
        "gain_bits": {"name": GAIN_NAME, "formula": GAIN_FORMULA},
    }
    return {
        "names": {key: name for key, name in names.items() if is_mse(loss_unit) or key == "discrete_bits"},
        "conditional_on": CONDITIONAL,
        "by_setting": table,
    }


def _mean(rows: Rows, name: str, here: NDArray) -> float | None:
    if name not in rows:
        return None
    values = np.asarray(rows[name][here], dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else None
