"""The verdict before the number: what is refused, with which sentence, and what is not."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling_ray.errors import BadInput
from scaling_ray.laws import units
from scaling_ray.results.cohorts import fit_columns
from scaling_ray.results.foreign import read_table

PUBLISHED = Path(__file__).parent.parent / "reports" / "published" / "canonical_v512.csv"
LADDER = np.array([9_953.0, 30_000.0, 132_993.0, 400_000.0, 859_137.0, 4_000_000.0, 19_178_497.0])
ALL_RUNS = PUBLISHED.parent / "all_runs.csv"


def power_table(
    alpha: float, floor: float, noise: float, seed: int, *, sizes: np.ndarray = LADDER, runs: int = 3
) -> dict[str, np.ndarray]:
    """A table of ``runs`` seeds per size around a known law whose smallest size stands 0.5 above the floor."""
    params = np.repeat(sizes, runs)
    loss = floor + 0.5 * (params / sizes[0]) ** -alpha
    loss = loss + np.random.default_rng(seed).normal(0.0, noise, params.size)
    return {"params": params, "loss": loss, "seed": np.tile(np.arange(runs), sizes.size)}


def headline(table: Mapping[str, Any]) -> dict[str, Any]:
    return fit_columns(table)["headline"]


def reasons(table: Mapping[str, Any]) -> str:
    head = headline(table)
    assert head["verdict"] == "refused"
    assert "parameters" not in head
    assert head["settles"]
    return " | ".join(head["reasons"])


def test_a_clean_law_is_supported_with_both_intervals() -> None:
    result = fit_columns(power_table(0.4, 1.0, 0.004, 1))
    head = result["headline"]
    assert head["verdict"] == "supported" and head["reasons"] == []
    alpha = head["parameters"]["alpha"]
    assert alpha["profile_low"] < 0.4 < alpha["profile_high"]
    assert alpha["low"] <= alpha["profile_low"] and alpha["high"] >= alpha["profile_high"]
    assert len([r for r in result["leave_one_out"] if r["form"] == "power_floor"]) == LADDER.size
    assert result["held_out_largest"][0]["params"] == LADDER[-1]
    json.dumps(result, allow_nan=False)


def test_pure_noise_is_refused() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        params = np.repeat(LADDER, 3)
        text = reasons({"params": params, "loss": rng.normal(1.5, 0.02, params.size)})
        assert "within the noise" in text


def test_two_or_three_sizes_are_refused() -> None:
    for count in (1, 2, 3):
        text = reasons(power_table(0.4, 1.0, 0.004, 1, sizes=LADDER[:count]))
        noun = "size" if count == 1 else "sizes"
        assert f"only {count} {noun} (anchor sizes left out)" in text


def test_a_plateau_takes_the_exponent_away() -> None:
    table = power_table(0.5, 0.5, 0.003, 4)
    table["loss"] = np.maximum(table["loss"], 0.6)
    assert "describes the settings as well" in reasons(table) or "interval" in reasons(table)


def test_one_seed_per_setting_is_judged_by_residuals_from_four_degrees_of_freedom_on() -> None:
    found = fit_columns(power_table(0.4, 1.0, 0.004, 1, runs=1))
    head = found["headline"]
    assert head["verdict"] != "refused", head["reasons"]
    assert head["parameters"]["alpha"]["low"] < 0.4 < head["parameters"]["alpha"]["high"]
    fit = next(f for f in found["fits"] if f["form"] == "power_floor" and f["estimator"] == "least_squares")
    assert "residuals" in fit["noise"]["kind"]
    assert "two seeds" in reasons(power_table(0.4, 1.0, 0.004, 1, runs=1, sizes=LADDER[:6]))


def test_the_published_law_is_refused_because_declared_choices_disagree() -> None:
    assert "declared choices disagree" in reasons(read_table(PUBLISHED))


def test_pooled_runs_of_other_genes_and_budgets_are_refused() -> None:
    with pytest.raises(BadInput, match="group: .*micro_steps"):
        read_table(ALL_RUNS)
    with ALL_RUNS.open(newline="") as handle:
        runs = list(csv.DictReader(handle))
    table = {name: [run[name] for run in runs] for name in ("params", "genes", "micro_steps")}
    text = reasons(table | {"loss": [run["val_mse"] for run in runs]})
    assert "mixed cohorts" in text and "genes" in text and "micro_steps" in text


def test_a_budget_per_size_is_protocol_and_is_said() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    table["max_cells_seen"] = np.where(table["params"] > 1e6, 4e5, 2e5)
    result = fit_columns(table)
    assert result["headline"]["verdict"] == "supported"
    assert any("budget of cells seen follows the size" in note for note in result["notes"])
    table["max_cells_seen"] = table["max_cells_seen"] + table["seed"]
    assert "max_cells_seen differs" in reasons(table)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("undertrained", True, "undertrained"),
        ("bound_z", -5.0, "better than the planted bound"),
        ("baseline_loss", 1.2, "did not beat the mean of each gene"),
        ("lr_at_edge", True, "lowest or highest of those tried"),
        ("recipe", "published", "mixed cohorts"),
    ],
)
def test_a_fault_of_the_runs_themselves_refuses(column: str, value: Any, sentence: str) -> None:
    table = power_table(0.4, 1.0, 0.004, 1, sizes=LADDER[::2])
    harmless = {"undertrained": False, "bound_z": 2.0, "baseline_loss": 9.0, "lr_at_edge": False, "recipe": "corrected"}
    clean = [harmless[column]] * table["loss"].size
    assert sentence not in " ".join(headline(table | {column: clean})["reasons"])
    assert sentence in reasons(table | {column: [value, value, value, *clean[3:]]})


def test_diverged_and_unfinished_runs_are_no_points_and_a_hole_is_a_sensitivity() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    status = ["done"] * table["loss"].size
    failure: list[str | None] = [None] * len(status)
    loss = list(table["loss"])
    status[4], loss[4] = "waiting", None
    result = fit_columns(table | {"status": status, "failure": failure, "loss": loss})
    assert result["points"]["runs"] == len(status) - 1 and result["headline"]["verdict"] == "supported"
    # One run of a size diverged: without what is left of that size the answer stands, and both values are said.
    status[4], failure[4] = "failed", "diverged"
    result = fit_columns(table | {"status": status, "failure": failure, "loss": loss})
    assert result["headline"]["verdict"] == "approximate"
    (said,) = result["sensitivity"]
    text = " ".join(result["headline"]["reasons"])
    assert said["inside"] and f"without what is left of those settings, {said['with']:.3g} with" in text
    # All seeds of a size diverged: there is nothing to compare with, and no value is made up.
    gone = [
        s if i < status.index("failed") - 1 or i > status.index("failed") + 1 else "failed"
        for i, s in enumerate(status)
    ]
    lost = {"failure": ["diverged" if s == "failed" else None for s in gone]}
    lost |= {"loss": [None if s == "failed" else value for s, value in zip(gone, loss, strict=True)]}
    result = fit_columns(table | {"status": gone} | lost)
    assert result["headline"]["verdict"] == "approximate" and result["sensitivity"] == []
    assert "nothing is left of their settings" in result["headline"]["reasons"][0]
    # With four sizes there are too few without it.
    few = {name: values[:12] for name, values in table.items()} | {"status": status[:12], "failure": failure[:12]}
    assert "diverged" in reasons(few | {"loss": loss[:12]})


def test_a_rate_that_nobody_compared_is_said_as_such() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    count = table["loss"].size
    sweep = table | {"lr": np.full(count, 0.01)}
    compared = fit_columns(sweep | {"lr_at_edge": [False] * count})
    assert compared["headline"]["verdict"] == "supported"
    fixed = fit_columns(sweep | {"lr_at_edge": [None] * count})["headline"]
    assert fixed["verdict"] == "approximate" and "compared with no other" in fixed["reasons"][0]
    assert "lr.rule = 'choose'" in fixed["settles"][0]
    # A table that knows nothing of edges is nobody's sweep.
    assert fit_columns(sweep)["headline"]["verdict"] == "supported"


def test_flagged_runs_refuse_only_where_they_move_the_answer_out_of_its_interval() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    flagged = np.zeros(table["loss"].size, dtype=bool)
    flagged[[2, 7, 19]] = True
    found = fit_columns(table | {"undertrained": flagged})
    assert found["headline"]["verdict"] == "approximate" and "undertrained" in found["headline"]["reasons"][0]
    assert found["sensitivity"][0]["inside"]
    # The largest size, far too high: with it alpha is another.
    flagged = np.zeros(table["loss"].size, dtype=bool)
    flagged[-3:] = True
    loss = table["loss"] + 0.15 * flagged
    text = reasons(table | {"undertrained": flagged, "loss": loss})
    assert "outside its interval" in text and "without them" in text


def test_what_is_true_in_any_case_stands_in_two_sentences() -> None:
    rng = np.random.default_rng(0)
    params = np.repeat(LADDER, 3)
    found = fit_columns({"params": params, "loss": rng.normal(1.5, 0.02, params.size)})
    first, second = found["headline"]["sentences"]
    assert first.startswith("Refused") and "within the noise" in first
    assert "a larger model lowers the loss by at most" in second and "95%" in second
    bound = found["contrasts"]["size"]["settled_from"]
    assert bound["from"] == LADDER[0] and 0 < bound["at_most"] < 0.2
    assert found["headline"]["predictions"]["verdict"] == "refused"


def test_a_bound_on_what_more_buys_holds_for_the_truth() -> None:
    inside = 0
    for seed in range(40):
        table = power_table(0.4, 1.0, 0.01, 100 + seed)
        truth = 1.0 + 0.5 * (LADDER / LADDER[0]) ** -0.4
        found = fit_columns(table)["contrasts"]["size"]
        bounds = {b["from"]: b["at_most"] for b in found["bounds"]}
        steps = {(n["from"], n["to"]): (n["low"], n["high"]) for n in found["neighbours"]}
        inside += all(bounds[p] >= truth[i] - truth[-1] for i, p in enumerate(LADDER[:-1])) and all(
            steps[LADDER[i], LADDER[i + 1]][0] <= truth[i] - truth[i + 1] <= steps[LADDER[i], LADDER[i + 1]][1]
            for i in range(6)
        )
    assert inside >= 34  # all at once, 95%


def test_size_data_and_both_have_verdicts_of_their_own() -> None:
    sizes, cells = (np.repeat(g.ravel(), 3) for g in np.meshgrid(LADDER, np.geomspace(1e3, 1e5, 4)))
    noise = np.random.default_rng(3).normal(0, 0.004, sizes.size)
    by_size = 1 + (sizes / LADDER[0]) ** -0.4
    found = fit_columns({"params": sizes, "cells": cells, "loss": by_size + noise})["headline"]
    assert found["form"] == "power_floor" and found["cells"] is None and found["size"]["verdict"] == "supported"
    assert found["data"]["verdict"] == "refused" and "no difference beyond noise" in found["data"]["reasons"][0]
    by_data = 1 + (cells / 1e3) ** -0.5
    found = fit_columns({"params": sizes, "cells": cells, "loss": by_data + noise})["headline"]
    assert found["form"] == "cells_floor" and found["data"]["verdict"] == "supported", found["reasons"]
    assert found["parameters"]["beta"]["low"] < 0.5 < found["parameters"]["beta"]["high"]
    found = fit_columns({"params": sizes, "cells": cells, "loss": by_size + by_data - 1 + noise})["headline"]
    assert found["form"] == "params_cells"
    assert {found[part]["verdict"] for part in ("size", "data")} <= {"supported", "approximate"}
    alone = sizes == LADDER[3]
    columns = {"params": sizes[alone], "cells": cells[alone], "loss": (by_data + noise)[alone]}
    assert fit_columns(columns)["headline"]["form"] == "cells_floor"


def test_cells_in_proportion_to_size_are_answered_along_the_ray() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    found = fit_columns(table | {"cells": 20 * table["params"]})
    head = found["headline"]
    assert head["form"] == "power_floor" and head["verdict"] == "supported", head["reasons"]
    assert any("in proportion to the size (D = 20 P)" in note for note in found["notes"])
    entry = head["predictions"]["entries"][0]
    truth = 1 + 0.5 * (entry["params"] / LADDER[0]) ** -0.4
    assert entry["low"] <= truth <= entry["high"]


def test_predictions_have_a_verdict_where_no_exponent_has() -> None:
    """Two laws that the runs cannot part agree on the next size."""
    x = np.repeat(np.geomspace(1, 30, 6), 3)
    loss = 2 - 0.1 * np.log(x) + np.random.default_rng(2).normal(0, 0.002, x.size)
    head = fit_columns({"params": 1e6 * x, "loss": loss})["headline"]
    assert head["verdict"] == "refused" and any("as well as a power" in reason for reason in head["reasons"])
    assert head["predictions"]["verdict"] == "approximate", head["predictions"]
    entry = head["predictions"]["entries"][0]
    assert "The next size" in head["sentences"][1]
    for entry in head["predictions"]["entries"]:
        truth = 2 - 0.1 * np.log(entry["params"] / 1e6)
        assert entry["low"] <= truth <= entry["high"], entry["what"]
    assert {e["what"] for e in head["predictions"]["entries"] if e["verdict"] != "refused"} >= {"the next size"}


def test_a_logarithm_goes_on_falling_where_it_is_as_good() -> None:
    """Ten times beyond a logarithm's own runs: what is predicted there holds what a logarithm does."""
    held, given = 0, 0
    for seed in range(12):
        x = np.repeat(np.geomspace(1, 30, 6), 3)
        loss = 2 - 0.1 * np.log(x) + np.random.default_rng([8, seed]).normal(0, 0.006, x.size)
        found = fit_columns({"params": 1e6 * x, "loss": loss})["headline"]["predictions"]
        for entry in found["entries"]:
            if "ten times" in entry["what"] and entry["verdict"] != "refused":
                given += 1
                held += entry["low"] <= 2 - 0.1 * np.log(entry["params"] / 1e6) <= entry["high"]
    assert given >= 8 and held >= given - 1


def test_a_rise_is_said_as_a_rise() -> None:
    params = np.repeat(LADDER, 3)
    truth = np.repeat([2.0, 1.6, 1.3, 1.15, 1.05, 1.0, 1.4], 3)
    found = fit_columns({"params": params, "loss": truth + np.random.default_rng(4).normal(0, 0.004, params.size)})
    sentence = found["contrasts"]["size"]["sentence"]
    assert "raised" in sentence and "0.4" in sentence and "lowered the loss by -" not in sentence


def test_runs_out_of_place_are_named_and_set_aside() -> None:
    rng = np.random.default_rng(5)
    params, tokens = np.exp(rng.uniform(18, 23, 60)), np.exp(rng.uniform(21, 26, 60))
    loss = 1.8 + 480 * params**-0.35 + 2000 * tokens**-0.37 + rng.normal(0, 0.01, 60)
    low = np.argsort(tokens)[:3]
    loss[low] += 0.6
    found = fit_columns({"params": params, "cells": tokens, "loss": loss})
    assert found["headline"]["verdict"] == "approximate", found["headline"]["reasons"]
    reason = found["headline"]["reasons"][0]
    assert "Huber" in reason and all(str(row + 1) in reason for row in low)
    assert found["headline"]["parameters"]["beta"]["low"] < 0.37 < found["headline"]["parameters"]["beta"]["high"]
    assert {entry["what"] for entry in found["sensitivity"]} == {"outlying"}


def test_anchor_sizes_are_never_points() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    table["size"] = np.array([f"P{p:.0f}" for p in table["params"]])
    table["width"] = np.full(table["loss"].size, 8)
    extra: dict[str, Any] = {"params": 533.0, "loss": 1.9, "seed": 0, "size": "tiny-mean", "width": 1}
    with_anchor = {name: np.append(values, [extra[name]]) for name, values in table.items()}
    result = fit_columns(with_anchor)
    assert result["headline"]["parameters"] == fit_columns(table)["headline"]["parameters"]
    assert [anchor["size"] for anchor in result["anchors"]] == ["tiny-mean"]


def test_missing_columns_and_values_that_are_no_numbers_are_bad_input() -> None:
    with pytest.raises(BadInput, match="params"):
        fit_columns({"loss": [1.0]})
    with pytest.raises(BadInput, match="loss"):
        fit_columns({"params": [1.0]})
    table = power_table(0.4, 1.0, 0.004, 1)
    table["loss"][[2, 5]] = np.nan
    with pytest.raises(BadInput, match="rows 3, 6"):
        fit_columns(table)
    with pytest.raises(BadInput, match="row 1: not a number"):
        fit_columns({"params": ["small", 2.0], "loss": [1.0, 2.0]})
    with pytest.raises(BadInput, match="more than once"):
        fit_columns({"params": [1.0, 2.0], "loss": [1.0, 2.0], "run_id": ["a", "a"]})


def test_tables_read_the_same_from_csv_and_parquet(tmp_path: Path) -> None:
    rows = [
        {"run_id": f"r{i}", "role": "law", "status": "done", "params": p, "test_mse": 1.0 + 1 / p, "val_mse": 1.1}
        for i, p in enumerate((10, 10, 20))
    ]
    rows.append(rows[0] | {"run_id": "x", "role": "rate", "test_mse": None})
    rows.append(rows[0] | {"run_id": "y", "status": "waiting", "test_mse": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with (tmp_path / "t.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    results = [fit_columns(read_table(path)) for path in (tmp_path / "t.parquet", tmp_path / "t.csv")]
    assert results[0] == results[1]
    assert results[0]["columns_used"]["loss"] == "test_mse"
    assert results[0]["points"]["runs"] == 3
    rows[1]["test_mse"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet")["columns_used"]["loss"] == "val_mse"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no rows"), ("params,loss\n1\n", "line 2"), ("size,loss\nS,1\n", "params"), ("params\n1\n", "loss")],
)
def test_a_table_that_is_none_is_bad_input(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(BadInput, match=message):
        read_table(tmp_path / "t.csv")
    with pytest.raises(BadInput, match="no such file"):
        read_table(tmp_path / "none.csv")


def test_bits_follow_their_formulas() -> None:
    assert units.shared_gaussian_bits(1 / (2 * math.pi * math.e)) == pytest.approx(0.0)
    assert units.shared_gaussian_bits(1.4437577651696205) == pytest.approx(2.31, abs=5e-3)
    assert units.gain_bits(0.5, 2.0) == pytest.approx(1.0)
    assert units.share_of_gap(1.5, 2.0, 1.0) == pytest.approx(0.5)
    assert units.share_of_gap(1.5, 1.0, 1.0) is None


def test_runs_that_trained_on_held_out_cells_have_no_law() -> None:
    table: dict[str, Any] = power_table(0.4, 1.0, 0.004, 1)
    count = len(table["loss"])
    assert headline(table | {"held_out_in_training": [False] * count})["verdict"] == "supported"
    text = reasons(table | {"held_out_in_training": [True] * count})
    assert "trained on the validation and test cells too" in text
