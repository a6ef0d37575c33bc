"""What the next step would buy, the best split of a budget, and units, against laws of known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scaling_ray.laws import units
from scaling_ray.laws.optimum import iso_flop
from scaling_ray.results.cohorts import fit_columns

E, A, ALPHA, B, BETA = 1.0, 1e4**0.4, 0.4, 1e3**0.3, 0.3


def loss_of(params: Any, cells: Any) -> Any:
    return E + A * params**-ALPHA + B * cells**-BETA


def grid_table(noise: float = 0.003) -> dict[str, np.ndarray]:
    sizes, cells = (np.repeat(g.ravel(), 2) for g in np.meshgrid(np.geomspace(1e4, 1e7, 5), np.geomspace(1e3, 1e5, 5)))
    loss = loss_of(sizes, cells) + np.random.default_rng(2).normal(0, noise, sizes.size)
    return {"params": sizes, "cells": cells, "loss": loss, "cells_seen": cells, "flops": 6 * sizes * cells * 512}


def ladder_table() -> dict[str, np.ndarray]:
    params = np.repeat(np.geomspace(1e4, 1e8, 6), 3)
    loss = 1.0 + (params / 1e4) ** -0.4 + np.random.default_rng(2).normal(0, 0.003, params.size)
    return {"params": params, "loss": loss}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return fit_columns(grid_table())


def test_the_next_size_and_twice_the_cells_have_a_price_with_an_interval(result: dict[str, Any]) -> None:
    assert result["headline"]["verdict"] == "supported", result["headline"]["reasons"]
    size, cells = result["next_steps"]
    assert size["to"] / size["from"] == pytest.approx(10**0.75, rel=1e-6) and cells["to"] == 2 * cells["from"]
    truths = (loss_of(1e7, 1e5) - loss_of(size["to"], 1e5), loss_of(1e7, 1e5) - loss_of(1e7, 2e5))
    for step, truth in zip((size, cells), truths, strict=True):
        assert step["low"] <= step["gain"] <= step["high"]
        assert step["low"] <= truth <= step["high"]
        assert "would buy" in step["sentence"] and f"{step['gain']:.4f}" in step["sentence"]


def test_the_best_split_of_a_budget_is_that_of_the_true_law(result: dict[str, Any]) -> None:
    budgets = result["compute_optimal"]["budgets"]
    assert len(budgets) >= 3 and any(budget["inside"] for budget in budgets)
    for budget in (b for b in budgets if b["inside"]):
        params = np.geomspace(1e4, 1e7, 20_001)
        truth = params[np.argmin(loss_of(params, budget["flops"] / (6 * params * 512)))]
        assert budget["params"]["low"] <= truth <= budget["params"]["high"]
        assert budget["loss"]["low"] <= loss_of(truth, budget["flops"] / (6 * truth * 512)) <= budget["loss"]["high"]
        spent = 6 * budget["params"]["value"] * budget["cells_seen"]["value"] * 512
        assert spent == pytest.approx(budget["flops"], rel=1e-6)


def test_a_refused_fit_buys_nothing() -> None:
    table = ladder_table()
    table["loss"] = 1.5 + np.random.default_rng(1).normal(0, 0.02, table["loss"].size)
    result = fit_columns(table)
    assert result["headline"]["verdict"] == "refused" and result["headline"]["settles"]
    assert result["next_steps"] == [] and result["compute_optimal"]["budgets"] == []
    assert result["compute_optimal"]["reason"]


def iso_table(epochs: float = 1.0) -> dict[str, np.ndarray]:
    rows = []
    for budget in (1e13, 1e14, 1e15):
        best = (budget / 1e13) ** 0.45 * 3e4
        for params in best * np.array([0.25, 0.5, 1.0, 2.0, 4.0]):
            cells = budget / (6 * params * 512)
            loss = 1.2 + 0.02 * np.log(params / best) ** 2
            rows += [(params, cells, loss + noise, budget) for noise in (-0.001, 0.001)]
    params, seen, loss, flops = np.array(rows).T
    return {"params": params, "cells": seen / epochs, "cells_seen": seen, "loss": loss, "flops": flops}


def test_iso_flop_minima_are_found_inside_the_sizes_and_grow_as_they_should() -> None:
    found = iso_flop(iso_table())
    assert len(found["budgets"]) == 3
    for budget in found["budgets"]:
        truth = (budget["flops"] / 1e13) ** 0.45 * 3e4
        assert budget["params"]["low"] <= truth <= budget["params"]["high"]
        assert budget["params"]["value"] == pytest.approx(truth, rel=1e-3)
        assert budget["cells_seen"] * 6 * truth * 512 == pytest.approx(budget["flops"], rel=1e-2)
        assert not budget["more_than_one_epoch"]
    assert found["growth"]["value"] == pytest.approx(0.45, abs=1e-3)


def test_iso_flop_flags_epochs_leaves_out_many_and_never_goes_beyond_the_sizes() -> None:
    assert all(b["more_than_one_epoch"] for b in iso_flop(iso_table(3.0))["budgets"])
    many = iso_flop(iso_table(5.0))
    assert many["budgets"] == [] and "four epochs" in many["reason"]
    table = iso_table()
    table["loss"] = 1.2 + 0.02 * np.log(table["params"] / 1e9) ** 2
    for budget in iso_flop(table)["budgets"]:
        assert budget["params"] is None and "outside the sizes" in budget["reason"]


def test_bits_are_named_and_gains_stand_over_both_baselines() -> None:
    table = ladder_table() | {
        "baseline_loss": np.full(18, 9.0),
        "gaussian_loss": np.full(18, 4.0),
        "nb_bits": np.full(18, 1.9),
    }
    found = fit_columns(table)["units"]
    setting = found["by_setting"][0]
    assert setting["gain_over_gene_mean_bits"] == pytest.approx(units.gain_bits(setting["loss"], 9.0))
    assert setting["gain_over_shrunk_gaussian_bits"] == pytest.approx(units.gain_bits(setting["loss"], 4.0))
    assert setting["discrete_bits"] == {"negative binomial": pytest.approx(1.9)}
    assert "one Gaussian with a single variance" in found["names"]["shared_gaussian_bits"]["name"]
    assert "held-out donors" in found["conditional_on"]


def test_per_gene_gaussians_never_need_more_bits_than_a_shared_one() -> None:
    mse = np.array([0.1, 0.5, 2.0])
    assert units.per_gene_gaussian_bits(mse) <= units.shared_gaussian_bits(float(mse.mean()))
    assert units.per_gene_gaussian_bits([0.7, 0.7]) == pytest.approx(units.shared_gaussian_bits(0.7))
    assert units.nats_to_bits(np.log(2.0)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="zero error"):
        units.per_gene_gaussian_bits([0.0, 1.0])


def test_a_planted_floor_above_the_laws_is_said() -> None:
    table = ladder_table()
    below = fit_columns(table | {"attainable_loss": np.full(18, 1.0)})["planted_floor"]
    assert below["covered"] is True and below["above"] is False
    above = fit_columns(table | {"attainable_loss": np.full(18, 1.3)})["planted_floor"]
    assert above["above"] is True and above["covered"] is False
