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
        assert f"only {count} sizes (anchor sizes left out)" in text


def test_a_plateau_is_a_lack_of_fit_or_an_unbounded_exponent() -> None:
    table = power_table(0.5, 0.5, 0.003, 4)
    table["loss"] = np.maximum(table["loss"], 0.6)
    assert "form does not fit" in reasons(table) or "search" in reasons(table)


def test_one_seed_per_setting_cannot_show_its_noise() -> None:
    assert "two seeds" in reasons(power_table(0.4, 1.0, 0.004, 1, runs=1))


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


def test_diverged_and_unfinished_runs_are_no_points_and_diverged_ones_refuse() -> None:
    table = power_table(0.4, 1.0, 0.004, 1)
    status = ["done"] * table["loss"].size
    failure: list[str | None] = [None] * len(status)
    loss = list(table["loss"])
    status[4], loss[4] = "waiting", None
    result = fit_columns(table | {"status": status, "failure": failure, "loss": loss})
    assert result["points"]["runs"] == len(status) - 1 and result["headline"]["verdict"] == "supported"
    status[4], failure[4] = "failed", "diverged"
    assert "diverged" in reasons(table | {"status": status, "failure": failure, "loss": loss})


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
