"""The choice among learning rates: between the candidates where they show a lowest point, else the best itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from scaling_ray.errors import BadInput
from scaling_ray.laws.protocol import rate_doubts
from scaling_ray.results.columns import Row
from scaling_ray.results.rates import at_edge, best_rate, check_ratios
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.spec import parse_spec
from scaling_ray.sweep.rates import choose_rates, with_rates


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


SPEC = """
name = "test"
[grid]
sizes = ["TINY", "XS", "S"]
genes = [64]
cells = ["all"]
seeds = [1]
[lr]
rule = "transfer"
rates = [0.005, 0.01, 0.02]
width_exponent = -0.5
reference_width = 16
tune_size = "TINY"
check_size = "S"
"""


def rows_of(runs: list[RunSpec], best: dict[str, float]) -> dict[str, Row]:
    """Rows of trials that ended, each with a loss that is lowest at its size's best rate; law runs wait."""
    rows = {}
    for run in runs:
        ended = run.role == "rate" and run.lr is not None
        loss = 0.3 + math.log(run.lr / best[run.size]) ** 2 if ended and run.lr is not None else None
        rows[run.run_id] = Row(
            run_id=run.run_id, role=run.role, status="done" if ended else "waiting", size=run.size, params=run.params,
            genes=run.genes, seed=run.seed, lr=run.lr, val_loss=loss,
        )  # fmt: skip
    return rows


def test_a_rate_is_chosen_at_one_size_and_taken_over_by_width() -> None:
    runs = runs_of(parse_spec(SPEC))
    assert {run.size for run in runs if run.role == "rate"} == {"TINY", "S"}
    chosen = choose_rates(runs, rows_of(runs, {"TINY": 0.01, "S": 0.003}), {})
    by_size = {run.size: chosen[run.run_id] for run in runs if run.role == "law"}
    assert by_size["TINY"] == pytest.approx(0.01, rel=0.01)
    assert by_size["XS"] == pytest.approx(0.01 / math.sqrt(64 / 16), rel=0.01)
    assert by_size["S"] == pytest.approx(0.01 / math.sqrt(128 / 16), rel=0.01)


@pytest.mark.parametrize(("best_at_s", "ratio"), [(0.0035, 1.0), (0.0045, 1.27), (0.0018, 0.5)])
def test_the_checking_size_says_how_far_its_best_is_from_what_it_took_over(best_at_s: float, ratio: float) -> None:
    runs = runs_of(parse_spec(SPEC))
    rows = rows_of(runs, {"TINY": 0.01, "S": best_at_s})
    assert check_ratios(runs, rows) == {}, "nothing was taken over yet"
    runs = with_rates(runs, choose_rates(runs, rows, {}))
    rows |= {run.run_id: replace(rows[run.run_id], lr=run.lr) for run in runs}
    assert check_ratios(runs, rows)[64] == pytest.approx(ratio, rel=0.03)


def test_a_rate_taken_over_is_at_an_edge_where_the_choice_was() -> None:
    runs = runs_of(parse_spec(SPEC))
    tried = [run.lr for run in runs if run.role == "rate" and run.size == "TINY" and run.lr is not None]
    for best, edge in ((0.01, False), (0.004, True), (0.05, True)):
        chosen = choose_rates(runs, rows_of(runs, {"TINY": best, "S": 0.003}), {})
        for run in (run for run in runs if run.role == "law"):
            assert at_edge(run, chosen[run.run_id], tried) is edge


def test_a_transfer_that_fails_its_check_is_a_doubt_about_the_law() -> None:
    columns = {"lr": np.full(4, 0.01), "lr_at_edge": np.array(["False"] * 4)}
    assert rate_doubts(columns | {"lr_check_ratio": np.array(["1.3"] * 4)}) == []
    assert rate_doubts(columns | {"lr_check_ratio": np.array([""] * 4)}) == []
    (doubt,) = rate_doubts(columns | {"lr_check_ratio": np.array(["0.21", "0.21", "", ""])})
    assert "0.21 times the one taken over" in doubt.reason


@pytest.mark.parametrize(
    ("line", "changed", "field"),
    [
        ('tune_size = "TINY"', "", "lr.tune_size"),
        ('check_size = "S"', 'check_size = "TINY"', "lr.check_size"),
        ('check_size = "S"', 'check_size = "M"', "lr.check_size"),
        ("rates = [0.005, 0.01, 0.02]", "rates = [0.01]", "lr.rates"),
        ("width_exponent = -0.5", "per_size = { XS = [0.01, 0.02] }", "lr.per_size"),
    ],
)
def test_a_transfer_that_cannot_be_is_refused(line: str, changed: str, field: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_spec(SPEC.replace(line, changed))
    assert refused.value.field == field
