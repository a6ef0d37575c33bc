"""The choice among learning rates: between the candidates where they show a lowest point, else the best itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scaling_ray.results.rates import best_rate


@pytest.mark.parametrize("optimum", [0.012, 0.02, 0.031])
@pytest.mark.parametrize("rates", [(0.005, 0.01, 0.02, 0.04, 0.08), (0.003, 0.01, 0.03, 0.1)])
def test_the_lowest_point_of_a_parabola_is_found(optimum: float, rates: tuple[float, ...]) -> None:
    tried = [(0.3 + 0.1 * math.log(rate / optimum) ** 2, rate) for rate in rates]
    assert best_rate(tried) == pytest.approx(optimum, rel=0.01)
    assert best_rate(tried[::-1]) == best_rate(tried)


def test_it_agrees_with_a_least_squares_parabola_through_three() -> None:
    tried = [(0.52, 0.01), (0.47, 0.03), (0.60, 0.2)]
    logs, losses = np.log([rate for _, rate in tried]), np.array([loss for loss, _ in tried])
    bend, slope, _ = np.polyfit(logs, losses, 2)
    assert best_rate(tried) == pytest.approx(math.exp(-slope / (2 * bend)), rel=0.005)


def test_a_rate_at_an_edge_is_taken_itself_and_never_gone_beyond() -> None:
    assert best_rate([(0.5, 0.01), (0.4, 0.02), (0.35, 0.04)]) == 0.04
    assert best_rate([(0.3, 0.01), (0.4, 0.02), (0.9, 0.04)]) == 0.01
    assert best_rate([(0.3, 0.01)]) == 0.01
    # Nearly flat on one side: the lowest point stays between the neighbours.
    assert 0.01 <= best_rate([(0.3 + 1e-9, 0.01), (0.3, 0.02), (5.0, 0.04)]) <= 0.02
    assert best_rate([(0.3, 0.01), (0.3, 0.02), (0.3, 0.04)]) == 0.01
