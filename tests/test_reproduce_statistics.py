"""The test of drift on synthetic sweeps: how often it cries wolf, what it catches, and what it says where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from scaling_ray.laws.drift import (
    AGREES,
    BLIND,
    CANNOT_TELL,
    DRIFTED,
    Axes,
    Judgement,
    between_estimates,
    differences,
    holm,
    judge_all,
    overall,
    without_noise,
)

Sd = Callable[[float, float], float]
Losses = dict[str, dict[str, float]]
SIZES, CELLS = [500.0 * 3**i for i in range(5)], [500.0, 8000.0]
AXES = {f"{p:g}/{d:g}": Axes(p, d) for p in SIZES for d in CELLS}
NOISES: dict[str, Sd] = {
    "one": lambda params, cells: 0.02,
    "fifteen times from the smallest size to the largest": lambda params, cells: 0.06 * (500 / params) ** 0.62,
}


def sweep(rng: np.random.Generator, sd: Sd, seeds: list[int], shared: float = 0.0) -> Losses:
    """Losses of a grid whose truth is a power law; ``shared`` of the variance is common to sizes on the same cells."""
    common = {(seed, d): rng.normal() for seed in seeds for d in CELLS}
    found: Losses = {}
    for name, axes in AXES.items():
        for seed in seeds:
            noise = np.sqrt(1 - shared) * rng.normal() + np.sqrt(shared) * common[seed, axes.cells]
            loss = 0.4 + 2 * axes.params**-0.3 + 3 * axes.cells**-0.4 + sd(axes.params, axes.cells) * noise
            found.setdefault(name, {})[str(seed)] = float(loss)
    return found


def drop_of(losses: Losses) -> float:
    means = [np.mean(list(each.values())) for each in losses.values()]
    return float(max(means) - min(means))


def moved(losses: Losses, name: str, by: float) -> Losses:
    return losses | {name: {seed: loss + by for seed, loss in losses[name].items()}}


def judged(reference: Losses, found: Losses, share: float = 0.01) -> dict[str, Judgement]:
    drop = drop_of(reference)
    told = judge_all(differences(reference, found, AXES, share * drop), drop)
    return {each.difference.name: each for each in told}


def verdict_of(told: dict[str, Judgement], missing: list[str] | None = None) -> str:
    losses = [each for name, each in told.items() if name in AXES]
    others = [each for name, each in told.items() if name not in AXES]
    return overall(losses, others, missing or [])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("seeds", "shared"), [(2, 0.3), (3, 0.0)])
def test_faithful_repetitions_with_new_seeds_drift_in_one_of_a_hundred_at_most(
    noise: str, seeds: int, shared: float
) -> None:
    rng = np.random.default_rng(14)
    alarms = 0
    for _ in range(500):
        one = sweep(rng, NOISES[noise], list(range(seeds)), shared)
        two = sweep(rng, NOISES[noise], list(range(10, 10 + seeds)), shared)
        alarms += verdict_of(judged(one, two)) == DRIFTED
    assert alarms <= 5, f"{alarms} of 500"


@pytest.mark.parametrize("noise", NOISES)
def test_the_same_seeds_on_another_machine_differ_by_less_and_still_do_not_drift(noise: str) -> None:
    rng = np.random.default_rng(14)
    alarms = 0
    for _ in range(300):
        one = sweep(rng, NOISES[noise], [1, 2, 3])
        two = {
            name: {s: v + 0.1 * NOISES[noise](AXES[name].params, 0.0) * rng.normal() for s, v in runs.items()}
            for name, runs in one.items()
        }
        told = judged(one, two)
        assert all(each.difference.paired for each in told.values())
        alarms += verdict_of(told) == DRIFTED
    assert alarms <= 3, f"{alarms} of 300"


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seeds", [2, 3])
def test_a_drift_of_two_interval_widths_is_caught(noise: str, seeds: int) -> None:
    rng = np.random.default_rng(14)
    caught = whole = tries = 0
    while tries < 300:
        one = sweep(rng, NOISES[noise], list(range(seeds)))
        two = sweep(rng, NOISES[noise], list(range(10, 10 + seeds)))
        name = list(AXES)[rng.integers(len(AXES))]
        before = judged(one, two)[name]
        assert before.low is not None and before.high is not None
        by = 2 * (before.high - before.low)
        if by < 3 * before.difference.tolerance:
            continue  # so small that it hardly matters: another test's case
        tries += 1
        told = judged(one, moved(two, name, by))
        caught += told[name].verdict == DRIFTED
        whole += verdict_of(told) == DRIFTED
    assert caught >= 0.95 * tries and whole >= caught


def test_drifts_below_the_tolerance_are_called_so() -> None:
    rng = np.random.default_rng(14)
    small = lambda params, cells: 1e-4  # noqa: E731
    reasons = []
    for _ in range(200):
        one, two = sweep(rng, small, [1, 2, 3]), sweep(rng, small, [11, 12, 13])
        name = list(AXES)[rng.integers(len(AXES))]
        told = judged(one, moved(two, name, 0.5 * 0.01 * drop_of(one)))
        assert verdict_of(told) == AGREES
        reasons.append(told[name].reason)
    assert reasons.count("differs, by too little to matter") >= 190
    # The same difference is a drift for whoever says that less of it matters.
    assert judged(one, moved(two, name, 0.5 * 0.01 * drop_of(one)), 0.0005)[name].verdict == DRIFTED


def test_a_difference_around_the_tolerance_cannot_be_told() -> None:
    rng = np.random.default_rng(14)
    told = []
    for _ in range(50):
        one = sweep(rng, lambda params, cells: 0.001, [1, 2, 3])
        two = sweep(rng, lambda params, cells: 0.001, [11, 12, 13])
        told.append(judged(one, moved(two, "500/500", 1.3 * 0.01 * drop_of(one)))["500/500"])
    unsure = [each for each in told if each.verdict == CANNOT_TELL]
    assert len(unsure) > 25 and all("by more than the tolerance" in each.reason for each in unsure)


def test_the_same_digits_are_identical_whatever_the_noise() -> None:
    one = sweep(np.random.default_rng(1), NOISES["one"], [1])
    told = judged(one, one)
    assert {each.reason for each in told.values()} == {"identical"} and verdict_of(told) == AGREES


def test_one_seed_a_setting_cannot_tell() -> None:
    rng = np.random.default_rng(1)
    told = judged(sweep(rng, NOISES["one"], [1]), sweep(rng, NOISES["one"], [2]))
    assert {each.verdict for each in told.values()} == {CANNOT_TELL} and verdict_of(told) == CANNOT_TELL
    assert {each.reason for each in told.values()} == {"too few repeated settings to know the noise"}


def test_noise_beyond_all_that_was_learned_cannot_tell() -> None:
    rng = np.random.default_rng(1)
    loud = lambda params, cells: 2.0  # noqa: E731
    one, two = sweep(rng, loud, [1, 2]), sweep(rng, loud, [11, 12])
    told = judge_all(differences(one, two, AXES, 0.01), 0.5)
    assert {each.reason for each in told} == {BLIND}
    assert overall([each for each in told if each.difference.name in AXES], [], []) == CANNOT_TELL


def test_missing_settings_leave_the_rest_to_be_judged() -> None:
    rng = np.random.default_rng(2)
    one, two = sweep(rng, NOISES["one"], [1, 2]), sweep(rng, NOISES["one"], [11, 12])
    gone = two.pop("500/500")
    assert gone and verdict_of(judged(one, two), ["500/500"]) == CANNOT_TELL
    assert verdict_of(judged(one, moved(two, "4500/500", 1.0)), ["500/500"]) == DRIFTED


def test_a_contrast_is_what_its_step_bought() -> None:
    rng = np.random.default_rng(3)
    one, two = sweep(rng, NOISES["one"], [1, 2]), sweep(rng, NOISES["one"], [11, 12])
    told = judged(one, two)["cells:500:8000"].difference
    of = lambda losses, d: np.mean([list(losses[f"{p:g}/{d:g}"].values()) for p in SIZES])  # noqa: E731
    assert told.reference == pytest.approx(of(one, 500.0) - of(one, 8000.0))
    assert told.found == pytest.approx(of(two, 500.0) - of(two, 8000.0))
    assert sum(name.startswith("params:") for name in judged(one, two)) == len(SIZES) - 1


def test_holm_by_hand() -> None:
    assert holm([0.02, 0.001, 0.004], 0.01) == [False, True, True]
    assert holm([0.004, 0.006], 0.01) == [True, True]
    assert holm([0.006, 0.006], 0.01) == [False, False]
    assert holm([], 0.01) == []


def test_estimates_are_compared_by_the_halves_that_face_each_other() -> None:
    far = between_estimates("alpha", (0.3, 0.29, 0.6), (0.4, 0.1, 0.41), 0.0)
    # 0.3 to 0.6 faces 0.1 to 0.4: each reaches the other by 0.3.
    assert far.error == pytest.approx(np.hypot(0.3, 0.3) / 1.959964)
    assert judge_all([far], 1.0)[0].verdict == AGREES
    near = between_estimates("alpha", (0.4, 0.1, 0.41), (0.6, 0.59, 0.9), 0.0)
    assert judge_all([near], 1.0)[0].verdict == DRIFTED


def test_figures_without_noise_drift_where_they_move_by_more_than_the_tolerance() -> None:
    cases = [(1.0, 1.0 + 1e-12, "identical"), (1.0, 1.005, "differs, by too little to matter")]
    for before, after, reason in cases:
        assert judge_all([without_noise("gene mean", before, after, 0.01)], 1.0)[0].reason == reason
    assert judge_all([without_noise("gene mean", 1.0, 1.02, 0.01)], 1.0)[0].verdict == DRIFTED
