"""The promises of the verdict rule, counted: a small version of benchmarks/laws.py with seeds of its own.

Limits are those of the benchmark's bars, widened by four standard errors of so few tables where they are shares.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from scaling_ray.laws.fit import Problem, gather
from scaling_ray.laws.forms import PARAMS_CELLS
from scaling_ray.laws.intervals import profiles
from scaling_ray.laws.many import Design
from scaling_ray.laws.simulate import JudgedTables, draw, expected_ratio, judge_tables

Kind = tuple[float, float, JudgedTables]  # noise, alpha, judged tables
LADDER = np.array([9_953.0, 132_993.0, 859_137.0, 19_178_497.0, 100_510_801.0, 340_770_817.0])
X = LADDER / LADDER[0]
TABLES = 20


def four_errors(share: float, tables: int) -> float:
    return 4.0 * math.sqrt(share * (1 - share) / tables)


def judged_of(
    law: np.ndarray,
    noise: float | np.ndarray,
    seed: list[int],
    *,
    sizes: np.ndarray = LADDER,
    tables: int = TABLES,
    seeds: int = 3,
) -> JudgedTables:
    losses = draw(law, noise, tables, seeds, np.random.default_rng(seed))
    return judge_tables({"params": sizes}, losses)


@pytest.fixture(scope="module")
def clean() -> list[Kind]:
    """Judged tables of each kind."""
    kinds: list[Kind] = []
    for noise in (0.006, 0.02):
        for alpha in (0.2, 0.3, 0.5):
            for law in (1 + X**-alpha, 0.5 * (LADDER / LADDER[-1]) ** -alpha):
                if expected_ratio(LADDER, law, noise, 3) < 2:
                    kinds.append((noise, alpha, judged_of(law, noise, [11, len(kinds)])))
    return kinds


@pytest.mark.parametrize(("noise", "limit"), [(0.006, 0.025), (0.02, 0.05)])
def test_alpha_is_recovered(clean: list[Kind], noise: float, limit: float) -> None:
    errors = np.concatenate([np.abs(np.array(j.values["alpha"]) / alpha - 1) for n, alpha, j in clean if n == noise])
    assert np.median(errors) <= limit


def test_clean_tables_are_answered_and_covered(clean: list[Kind]) -> None:
    assert len(clean) >= 8
    count = TABLES * len(clean)
    assert np.concatenate([j.answered for _, _, j in clean]).mean() >= 0.98 - four_errors(0.98, count)
    statistical = np.concatenate([j.covers("alpha", alpha, shown=False) for _, alpha, j in clean])
    shown = np.concatenate([j.covers("alpha", alpha) for _, alpha, j in clean])
    assert 0.93 - four_errors(0.95, count) <= statistical.mean() <= 0.99
    assert shown.mean() >= 0.93 and np.all(shown >= statistical)


@pytest.mark.parametrize("kind", ["smooth", "per size"])
def test_a_misfit_widens_the_answer_instead_of_refusing_it(kind: str) -> None:
    x = np.log(np.append(LADDER, LADDER[-1] * 10))
    law, rng = 1 + np.exp(-0.3 * (x - x[0])), np.random.default_rng([21, len(kind)])
    drop = law[0] - law[-2]
    root = np.eye(x.size)
    if kind == "smooth":
        apart = (x[:, None] - x[None, :]) / ((x[-2] - x[0]) / 3)
        root = np.linalg.cholesky(np.exp(-0.5 * apart**2) + 1e-9 * np.eye(x.size))
    tables = 60
    truth = law + 0.01 * drop * (root @ rng.standard_normal((x.size, tables))).T
    losses = truth[:, :, None] + rng.normal(0, 0.0025 * drop, (tables, x.size, 3))
    judged = judge_tables({"params": LADDER}, losses[:, :-1], place={"params": LADDER[-1] * 10})
    assert judged.answered.mean() >= 0.9 - four_errors(0.9, tables)
    slack = four_errors(0.93, tables)
    assert judged.covers("alpha", 0.3)[judged.answered].mean() >= 0.93 - slack
    assert judged.predicts(losses[:, -1].mean(axis=1)).mean() >= 0.93 - slack
    # The misfit is no noise between runs, whose interval it therefore leaves.
    assert judged.covers("alpha", 0.3, shown=False).mean() < 0.8


@pytest.mark.parametrize("noise", [0.006, 0.02])
@pytest.mark.parametrize("kind", ["noise", "edge-floor", "elbow", "turned", "log-linear"])
def test_what_no_power_law_made_is_not_answered(noise: float, kind: str) -> None:
    turned = 1.45 + 0.16 * X**-0.3
    turned[4:] = turned[3] + 0.015
    laws = {
        "noise": [np.full(6, 1.5)],
        "edge-floor": [1.45 + X**-4.0],
        "elbow": [1.5 * np.minimum(X, X[2]) ** -alpha for alpha in (0.2, 0.4)],
        "turned": [turned],
        "log-linear": [2 - 0.05 * np.log(X)],
    }[kind]
    for i, law in enumerate(laws):
        judged = judged_of(law, noise, [13, i, len(kind)], tables=40)
        assert judged.answered.mean() <= 0.05


def test_a_law_that_stops_late_is_refused_or_covered() -> None:
    for alpha in (0.2, 0.3, 0.4):
        law = 1.5 * np.minimum(X, X[3]) ** -alpha
        judged = judged_of(law, 0.006, [14, int(10 * alpha)], tables=30)
        wrongly = judged.answered & ~judged.covers("alpha", alpha)
        assert wrongly.mean() <= 0.1


def test_noise_that_falls_with_size_hides_neither_an_elbow_nor_a_logarithm() -> None:
    sizes, x = np.geomspace(1e3, 1e6, 7), np.geomspace(1, 1e3, 7)
    sds = np.array([0.035, 0.037, 0.029, 0.003, 0.008, 0.003, 0.002])
    right = 0.044 + 0.197 * x**-0.52
    stops = right.copy()
    stops[3:] = right[3]
    wrong = {
        "elbow": stops,
        "log-linear": right[0] - (right[0] - right[6]) * np.log(x) / np.log(x[6]),
        "exponential": 0.044 + 0.197 * np.exp(-(x - 1) / x[2]),
        "largest raised": right + 0.05 * (np.arange(7) == 6),
    }
    for i, law in enumerate(wrong.values()):
        assert judged_of(law, sds, [15, i], sizes=sizes, seeds=4).answered.mean() <= 0.1
    judged = judged_of(right, sds, [15, 9], sizes=sizes, seeds=4)
    assert judged.covers("alpha", 0.52).mean() >= 0.9


def test_runs_flagged_at_random_do_not_take_the_answer_away() -> None:
    rng = np.random.default_rng(16)
    law = 1 + X**-0.3
    drop = law[0] - law[-1]
    losses = draw(law, 0.0025 * drop, 40, 3, rng)
    flagged = rng.random(losses.shape) < 0.1
    losses = losses + flagged * rng.uniform(0, 0.03, losses.shape) * drop
    judged = judge_tables({"params": LADDER}, losses, keep=~flagged)
    assert judged.answered.mean() >= 0.95 - four_errors(0.95, 40)
    assert judged.covers("alpha", 0.3)[judged.answered].mean() >= 0.93


def test_size_and_data_are_recovered_and_covered() -> None:
    sizes, cells = (g.ravel() for g in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(2e3, 2e5, 5)))
    truth = {"alpha": 0.34, "beta": 0.28, "E": 1.0}
    law = 1 + (sizes / 1e5) ** -0.34 + (cells / 2e3) ** -0.28
    rng = np.random.default_rng(14)
    means = law + rng.normal(0, 0.006, (300, 25)) / np.sqrt(3)
    found = Design(PARAMS_CELLS, {"params": sizes, "cells": cells}, np.full(25, 3.0)).fit(means)
    assert np.median(np.abs(found.exponents[:, 0] / 0.34 - 1)) <= 0.015
    assert np.median(np.abs(found.exponents[:, 1] / 0.28 - 1)) <= 0.025
    hits, draws = dict.fromkeys(truth, 0), 12
    for _ in range(draws):
        losses = np.repeat(law, 3) + rng.normal(0, 0.006, 75)
        points = gather({"params": np.repeat(sizes, 3), "cells": np.repeat(cells, 3)}, losses)
        problem = Problem(PARAMS_CELLS, points)
        for name, interval in profiles(problem, problem.search(), tuple(truth)).items():
            hits[name] += not interval.excludes(truth[name])
    assert all(count / draws >= 0.91 - four_errors(0.95, draws) for count in hits.values())
    losses = law[None, :, None] + rng.normal(0, 0.01, (8, 25, 1)) + rng.normal(0, 0.004, (8, 25, 3))
    judged = judge_tables({"params": sizes, "cells": cells}, losses, form=PARAMS_CELLS)
    assert judged.answered.mean() >= 0.9
    assert all(judged.covers(name, value).mean() >= 0.9 for name, value in truth.items())


def test_two_thousand_refits_of_size_and_data_give_the_law_back() -> None:
    sizes, cells = (g.ravel() for g in np.meshgrid(np.geomspace(1e4, 1e8, 11), np.geomspace(2e3, 2e5, 6)))
    runs = np.full(sizes.size, 3.0)
    runs[:2] = 4.0
    law = 1.2 + 6 * sizes**-0.3 + 8 * cells**-0.4
    losses = law + np.random.default_rng(15).normal(0, 0.006, (2_000, law.size)) / np.sqrt(runs)
    assert runs.sum() == 200
    found = Design(PARAMS_CELLS, {"params": sizes, "cells": cells}, runs).fit(losses)
    assert np.median(found.exponents[:, 0]) == pytest.approx(0.3, rel=0.02)
