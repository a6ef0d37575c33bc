"""Anybody's table: names of columns, bad values, and the gates that other people's runs meet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling_ray import cli
from scaling_ray.errors import BadInput
from scaling_ray.results.cohorts import fit_columns, fit_place
from scaling_ray.results.foreign import read_table

REPORTS = Path(__file__).resolve().parents[1] / "reports"


def write_csv(path: Path, columns: Mapping[str, Any]) -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def law(seeds: int = 3, noise: float = 0.004) -> dict[str, np.ndarray]:
    params = np.repeat(np.geomspace(1e4, 1e8, 6), seeds)
    loss = 1.0 + (params / 1e4) ** -0.4 + np.random.default_rng(3).normal(0, noise, params.size)
    return {"params": params, "loss": loss, "seed": np.tile(np.arange(seeds), 6)}


@pytest.mark.parametrize(
    ("params", "loss", "cells"),
    [
        ("N", "val_loss", "D"),
        ("Model Size", "Validation-Loss", "Training Tokens"),
        ("n_params", "MSE", "tokens"),
        ("parameters", "L", "num_tokens"),
    ],
)
def test_other_peoples_names_are_read_and_said(tmp_path: Path, params: str, loss: str, cells: str) -> None:
    table = law()
    columns = {params: table["params"], loss: table["loss"], cells: np.full(18, 5e5), "seed": table["seed"]}
    path = write_csv(tmp_path / "t.csv", columns)
    assert cli.main(["fit", str(path), "--out", str(tmp_path / "fit.json")]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    used = found["columns_used"]
    assert (used["params"], used["loss"], used["cells"]) == (params, loss, cells)
    assert found["headline"]["verdict"] == "supported", found["headline"]["reasons"]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert fit_columns(read_table(tmp_path / "t.parquet"))["headline"] == found["headline"]


def test_an_exact_name_comes_before_a_synonym_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    table = law()
    path = write_csv(tmp_path / "t.csv", table | {"N": np.arange(18), "Loss ": table["loss"] + 9})
    assert read_table(path)["columns_used"]["params"] == "params"
    path = write_csv(tmp_path / "u.csv", {"Model Size": [1], "model-size": [2], "loss": [1.0]})
    with pytest.raises(BadInput, match="two columns of one name"):
        read_table(path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("loss", "nan", "row 5: must be a positive finite number"),
        ("loss", "inf", "row 5: must be a positive finite number"),
        ("loss", "", "row 5: must be a positive finite number"),
        ("loss", "low", "row 5: not a number"),
        ("params", "-3", "row 5: must be a positive finite number"),
        ("params", "1e4 or so", "row 5: not a number"),
        ("run_id", "r0", "more than once"),
    ],
)
def test_bad_values_are_one_line_and_exit_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, value: str, message: str
) -> None:
    table = {name: [str(v) for v in values] for name, values in law().items()}
    table["run_id"] = [f"r{i}" for i in range(18)]
    table[column][4] = value
    path = write_csv(tmp_path / "t.csv", table)
    assert cli.main(["fit", str(path), "--out", str(tmp_path / "fit.json")]) == 2
    text = capsys.readouterr().err.strip()
    assert message in text and column in text and len(text.splitlines()) == 1
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t | {"seed": np.zeros(18, dtype=int)}, "copies and not repeats"),
        (lambda t: t | {"seed": ["", *map(str, t["seed"][1:])]}, "have no seed"),
        (lambda t: {name: values[::3] for name, values in t.items()}, "two seeds"),
        (lambda t: {name: values[:3] for name, values in t.items()}, "only 1 size (anchor sizes left out)"),
    ],
)
def test_what_runs_lack_is_a_gates_sentence(
    change: Callable[[dict[str, np.ndarray]], dict[str, Any]], sentence: str
) -> None:
    head = fit_columns(change(law()))["headline"]
    assert head["verdict"] == "refused" and "parameters" not in head
    assert any(sentence in reason for reason in head["reasons"]), head["reasons"]


def test_a_table_without_repeats_is_judged_by_its_residuals() -> None:
    """As tables of language models are: hundreds of runs, each with a size and a number of tokens of its own."""
    rng = np.random.default_rng(5)
    params, tokens = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), 48)), np.exp(rng.uniform(21, 26, 48))
    loss = 1.8172 + 482.01 * params**-0.3478 + 2085.43 * tokens**-0.3658 + rng.normal(0, 0.01, 48)
    result = fit_columns({"params": params, "cells": tokens, "loss": loss})
    head = result["headline"]
    assert head["verdict"] == "supported", head["reasons"]
    for name, truth in (("alpha", 0.3478), ("beta", 0.3658), ("E", 1.8172)):
        found = head["parameters"][name]
        assert found["low"] <= truth <= found["high"]
    assert 20 <= len(result["leave_one_out"]) <= 24


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("without noise", lambda x, d, noise: 1 + x**-0.4 + d**-0.3),
        ("constant", lambda x, d, noise: 1.5 + 0 * x),
        ("nothing but noise", lambda x, d, noise: 1.5 + noise),
        ("rising", lambda x, d, noise: 1 + 0.1 * np.log(x) + noise),
    ],
)
def test_degenerate_tables_give_a_verdict_and_plain_numbers(
    name: str, loss: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
) -> None:
    params, cells = (np.repeat(g.ravel(), 2) for g in np.meshgrid(np.geomspace(1e4, 1e7, 4), [1e3, 1e4, 1e5]))
    noise = np.random.default_rng(0).normal(0, 0.01, params.size)
    result = fit_columns({"params": params, "cells": cells, "loss": loss(params / 1e4, cells / 1e3, noise)})
    json.dumps(result, allow_nan=False)
    head = result["headline"]
    assert (head["size"]["verdict"] != "refused") == (name == "without noise"), head["reasons"]


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number of a document by its place in it."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}.{i}").items()}
    return {path: value} if isinstance(value, int | float) else {}


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["planted", "real-bone-marrow", "real-bone-marrow-512"])
def test_the_kept_fits_follow_from_the_kept_results(kept: str) -> None:
    folder = REPORTS / kept
    found, there = fit_place(folder / "results.csv"), json.loads((folder / "fit.json").read_text())
    assert found["headline"]["reasons"] == there["headline"]["reasons"]
    assert numbers(found) == pytest.approx(numbers(there), rel=1e-5, abs=1e-12)
