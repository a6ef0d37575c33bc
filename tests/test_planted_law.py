"""The plant of a law: it comes back from its file, older plants stay, and limited predictors lose what they must."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import betaln, gammaln

from scaling_ray.census.source import Census
from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.planted.draw import draw_range
from scaling_ray.planted.law import LawSpec
from scaling_ray.planted.limits import class_of_component, exponent, limited_excess, state_means
from scaling_ray.planted.oracle import oracle, posteriors
from scaling_ray.planted.plant import plant, plant_law
from scaling_ray.planted.truth import PlantedTruth, PlantSpec, load_truth, parse_truth

SMALL = LawSpec(
    n_genes=26, always_on=2, groups=2, switches=2, depth_levels=4, dataset_share=(0.6, 0.4), counts_per_gene=10.0
)


@pytest.mark.parametrize(
    ("spec", "table", "json_text", "counts"),
    [
        (
            PlantSpec(),
            "413faf46fe8383df486e1c848b56e9eb6525197504933956f0c017522e583372",
            "1666d232cc5b9cf60a9bd8575278a210a6be14aad271cbfba5883b04d466356f",
            "876895bd0ace1e90a900293835558fe95b7229eb8a6234733c0e043599826555",
        ),
        (
            PlantSpec(n_genes=400, seed=7),
            "bb5ea07f7e8c22cb8eeb47c3cd08b29ba2d2969215eb66fc339d517aa5ba046d",
            "bc784bd78efbfec55c02355ce63d98fa10b77694aab3bb1ffb190c2c2e88c3f0",
            "3e6a7e616606413fd0cec97f7214e542ebb3e729f716a1a333dccffba02f95dc",
        ),
    ],
)
def test_plants_of_trees_are_what_they_were(spec: PlantSpec, table: str, json_text: str, counts: str) -> None:
    truth = PlantedTruth(spec, 5)
    drawn = draw_range(truth, 0).counts
    assert truth.table_sha256 == table
    assert hashlib.sha256(truth.to_json().encode()).hexdigest() == json_text
    assert hashlib.sha256(drawn.data.tobytes() + drawn.indices.tobytes()).hexdigest() == counts
    assert parse_truth(truth.to_json(), "here").spec == spec


def test_a_planted_law_comes_back_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "census"
    assert main(["census", "plant", "--law", "--out", str(out), "--cells", "300", "--seed", "4"]) == 0
    truth = load_truth(out)
    assert truth.spec == LawSpec(seed=4) and truth.n_cells == 300
    assert json.loads((out / "plant.json").read_text())["design"] == "switches"
    drawn = draw_range(truth, 0)
    with Census.open(out) as census:
        assert (census.counts(0, 300) != drawn.counts[:300]).nnz == 0
    assert plant_law(out, n_cells=300, seed=4) == out
    with pytest.raises(BadInput, match="holds another Census"):
        plant(out, n_cells=300, seed=4)
    assert main(["census", "plant", "--law", "--out", str(tmp_path / "b"), "--genes", "9"]) == 2
    assert "genes: 9: choose 10 or more: 8 are always on" in capsys.readouterr().err
    for design in ("ring", "programs"):
        unknown = (out / "plant.json").read_text().replace('"switches"', f'"{design}"', 1)
        with pytest.raises(BadInput, match=f"design: '{design}': .*tree or switches; plant the Census again"):
            parse_truth(unknown, "here")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"groups": 0}, "groups"),
        ({"switches": 0}, "switches"),
        ({"switches": 7}, "switches"),
        ({"groups": 3}, "switches"),
        ({"always_on": 0}, "always_on"),
        ({"always_on": 263}, "n_genes"),
        ({"strength": 0.0}, "strength"),
        ({"strength_exponent": -0.1}, "strength_exponent"),
        ({"always_on_share": 0.0}, "always_on_share"),
        ({"concentration_per_gene": math.nan}, "concentration_per_gene"),
        ({"counts_per_gene": math.inf}, "counts_per_gene"),
        ({"base_sd": -1.0}, "base_sd"),
        ({"depth_sd": -1.0}, "depth_sd"),
        ({"depth_levels": 0}, "depth_levels"),
        ({"donors_per_dataset": 0}, "donors_per_dataset"),
    ],
)
def test_a_law_that_cannot_be_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: [^\n]+$"):
        LawSpec(**change)


def test_programs_are_pairwise_uncorrelated_and_move_their_genes_by_a_falling_strength() -> None:
    truth = PlantedTruth(LawSpec(n_genes=408, always_on=8))
    spec = truth.spec
    assert isinstance(spec, LawSpec) and spec.programs == 62 and truth.n_cells == 0
    assert truth.state_prior == pytest.approx(np.full(1024, 1 / 1024), rel=1e-2)
    signs = spec.signs(truth.state_path)
    assert (np.abs(signs) == 1).all() and (signs.T @ signs == 1024 * np.eye(62)).all()
    # the first two follow one switch each, the fifth the first two of its group together
    path = truth.state_path.reshape(1024, 2, 5)
    assert (signs[:, :2] == 1 - 2 * path[:, :, 0]).all()
    assert (signs[:, 4] == 1 - 2 * ((path[:, 0, 0] + path[:, 0, 1]) % 2)).all()
    weight = truth.weights(0)
    assert weight.sum(axis=1) == pytest.approx(truth.concentration)
    assert weight[:, 400:] == pytest.approx(np.full((1024, 8), 0.3 / 8 * truth.concentration), rel=1e-5)
    # what is left of the logarithms without what makes every library one whole is each program's own
    logs = np.log(weight[:, :400])
    moved = signs.T @ (logs - logs.mean(axis=1, keepdims=True)) / 1024
    expected = 0.6 * (np.arange(62) + 1.0) ** -0.9
    assert moved.std(axis=1) == pytest.approx(expected, rel=0.15)
    assert np.polyfit(np.log(np.arange(1, 63)), np.log(moved.std(axis=1)), 1)[0] == pytest.approx(-0.9, abs=0.03)
    cells = draw_range(truth, 0)
    assert np.abs(truth.state_path[cells.state].mean(axis=0) - 0.5).max() < 0.05


def _batch(truth: PlantedTruth, cells: int, genes: int) -> dict[str, Any]:
    drawn = draw_range(truth, 1)
    rows = np.flatnonzero(drawn.copy_of < 0)[:cells]
    counts = drawn.counts[rows].toarray()
    panel = np.arange(genes)
    measured = truth.measured[drawn.dataset[rows]][:, panel]
    masked = measured & (np.random.default_rng(2).random(measured.shape) < 0.2)
    return {
        "counts": counts[:, panel],
        "panel": panel,
        "raw_sum": counts.sum(axis=1),
        "masked": masked,
        "measured": measured,
        "dataset": drawn.dataset[rows],
    }


def test_state_means_are_beta_binomial_sums_over_the_depths() -> None:
    truth = PlantedTruth(SMALL)
    panel = np.array([0, 5, 13, 25])
    sizes, share = truth.depth_grid(1)
    want = np.zeros((16, 4))
    for size, part in zip(np.rint(sizes).astype(int), share, strict=True):
        if size == 0:
            continue
        c = np.arange(size + 1)
        value = np.log1p(c * (1e4 / size))
        a = truth.weights(1)[:, panel][..., None]
        b = truth.concentration - a
        log_choose = gammaln(size + 1) - gammaln(c + 1) - gammaln(size - c + 1)
        want += part * np.exp(log_choose + betaln(a + c, b + size - c) - betaln(a, b)) @ value
    np.testing.assert_allclose(state_means(truth, 1, panel), want, rtol=0, atol=2e-3)


def test_limited_predictors_agree_with_their_definition_written_out() -> None:
    truth = PlantedTruth(SMALL)
    batch = _batch(truth, 60, 24)
    found = limited_excess(truth, **batch, told=[0, 1, 2, 4, 6], rank=[0, 2, 24])
    means = [state_means(truth, t, batch["panel"]) for t in range(2)]
    posterior = posteriors(truth, **batch)
    prior = truth.component_prior
    signs = truth.spec.signs(truth.state_path)  # type: ignore[union-attr]
    for n, got in zip(found.told, found.told_excess, strict=True):
        total = 0.0
        for i, (kept, weight) in enumerate(posterior):
            table = means[batch["dataset"][i]]
            gap = np.zeros(24)
            for c, w in zip(kept, weight, strict=True):
                followed = np.average(table, axis=0, weights=prior)
                for program in range(n):
                    up, down = signs[:, program] > 0, signs[:, program] < 0
                    followed = followed + signs[c, program] * (table[up].mean(axis=0) - table[down].mean(axis=0)) / 2
                gap += w * (table[c] - followed)
            total += float((gap[batch["masked"][i]] ** 2).sum())
        assert got == pytest.approx(total / batch["masked"].sum(), abs=1e-12)
    # no direction at all is the average of all states, and so is one class; all directions are all there is
    assert found.rank_excess[0] == pytest.approx(found.told_excess[0], abs=1e-12)
    assert found.rank_excess[2] == pytest.approx(0, abs=1e-12)


def test_all_states_told_apart_is_the_floor() -> None:
    truth = PlantedTruth(
        PlantSpec(n_genes=60, branching=(3, 4), program_gene_fraction=(0.3, 0.2), program_strength=(2.0, 2.0))
    )
    batch = _batch(truth, 400, 24)
    found = limited_excess(truth, **batch, told=range(13))
    # the last state shares its class with no other
    assert found.told_excess[12] == found.told_excess[11] == 0 < found.told_excess[10]
    assert found.told_excess[0] > 2 * found.told_excess[6]
    assert len(set(class_of_component(truth, 12))) == len(truth.component_prior)


def test_every_further_program_that_is_followed_lowers_the_loss() -> None:
    truth = PlantedTruth(SMALL)
    found = limited_excess(truth, **_batch(truth, 400, 24), told=range(7))
    assert (np.diff(found.told_excess) < 0).all()
    # all six of them leave what they do together, which is little
    assert 0 < found.told_excess[6] < 0.05 * found.told_excess[0] < found.told_excess[4]


def test_with_nothing_told_apart_the_loss_is_the_gene_means() -> None:
    truth = PlantedTruth(LawSpec())
    batch = _batch(truth, 300, 256)
    floor = oracle(truth, **batch).variance_sum.sum() / batch["masked"].sum()
    found = limited_excess(truth, **batch, told=[0, 4, 8], rank=[0, 4, 8, 16, 32, 62])
    x = np.log1p(batch["counts"] * (1e4 / np.maximum(batch["raw_sum"], 1))[:, None])
    gene_mean = np.where(batch["masked"], (x - x.mean(axis=0)) ** 2, 0.0).sum() / batch["masked"].sum()
    assert floor + found.told_excess[0] == pytest.approx(gene_mean, rel=0.05)
    assert (np.diff(found.told_excess) < 0).all() and (np.diff(found.rank_excess) < 0).all()
    # what the first four and eight of sixty-two programs leave is the rest of the sum of their squared strengths
    squares = np.square(truth.spec.strengths())  # type: ignore[union-attr]
    for n, excess in zip((4, 8), found.told_excess[1:], strict=True):
        assert excess / found.told_excess[0] == pytest.approx(squares[n:].sum() / squares.sum(), rel=0.15)
    # directions are chosen best, and as many as programs leave next to nothing
    assert (found.rank_excess[:3] <= found.told_excess * 1.01).all()
    assert found.rank_excess[3] > 0.03 * found.rank_excess[0] > 20 * found.rank_excess[5]


def test_the_exponent_is_that_of_a_power() -> None:
    n = np.array([2, 4, 8, 16])
    assert exponent(n, 3.0 * n**-0.7) == pytest.approx(0.7)
    with pytest.raises(BadInput, match="excess"):
        exponent([1, 2], [0.1, 0.0])


@pytest.mark.parametrize("limit", ["told", "rank"])
def test_a_limit_below_zero_is_refused(limit: str) -> None:
    truth = PlantedTruth(SMALL)
    with pytest.raises(BadInput) as refusal:
        limited_excess(truth, **(_batch(truth, 3, 24) | {limit: [-1]}))
    assert refusal.value.field == limit


def test_the_references_of_a_law_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    census, kept = tmp_path / "census", tmp_path / "limits.json"
    assert main(["census", "plant", "--law", "--out", str(census), "--cells", "50"]) == 0
    capsys.readouterr()
    assert main(["census", "limits", str(census), "--cells", "100", "--out", str(kept)]) == 0
    printed, found = capsys.readouterr().out, json.loads(kept.read_text())
    told = found["told"]
    assert told["n"] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 62]
    assert told["share_of_drop"][0] == 1 and 0 < told["share_of_drop"][-1] < 0.05
    assert told["exponent"] == exponent(told["n"][1:11], told["share_of_drop"][1:11])
    assert f"falls as n^-{told['exponent']:.2f} from 1 to 32" in printed
    # the same figures where the cells are given one by one
    truth = load_truth(census)
    assert found["genes"] == truth.spec.n_genes - 8
    batch = _batch(truth, 100, found["genes"])
    beside = limited_excess(truth, **batch, told=told["n"], rank=[0])
    shares = beside.told_excess / beside.told_excess[0]
    np.testing.assert_allclose(told["share_of_drop"], shares, rtol=0.1, atol=0.01)
    floor = oracle(truth, **batch).variance_sum.sum() / batch["masked"].sum()
    assert found["attainable_floor"] == pytest.approx(floor, rel=0.1)


def test_references_of_a_tree_count_its_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    census = tmp_path / "census"
    assert main(["census", "plant", "--out", str(census), "--cells", "50", "--genes", "60"]) == 0
    capsys.readouterr()
    assert main(["census", "limits", str(census), "--cells", "20", "--genes", "30"]) == 0
    assert "told apart" in capsys.readouterr().out
    for given, field in (
        (["--cells", "0"], "cells"),
        (["--genes", "61"], "genes"),
        (["--cells", "1", "--genes", "1"], "cells"),
        (["--mask-fraction", "1.0"], "mask_fraction"),
    ):
        assert main(["census", "limits", str(census), *given]) == 2
        said = capsys.readouterr().err
        assert f"{field}: {given[1]}: " in said and any(
            way in said for way in ("choose 1 to", "take more of either", "choose a share")
        )
    (census / "plant.json").unlink()
    assert main(["census", "limits", str(census)]) == 2
    assert "only a planted Census has one" in capsys.readouterr().err
