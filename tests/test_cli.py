"""The command line from outside: one clear line and exit code 2 for bad input, nothing half-written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import TINY_SWEEP

from scaling_ray.cli import build_parser, main


def h5ad(path: Path, counts: np.ndarray) -> Path:
    obs = pd.DataFrame({"donor_id": ["a", "b"] * (len(counts) // 2)}, index=[f"c{i}" for i in range(len(counts))])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(counts.shape[1])])
    anndata.AnnData(counts.astype(np.float32), obs=obs, var=var).write_h5ad(path)
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


SPEC_MISTAKES = {
    "unknown key": ("name =", "nmae = 1\nname =", "nmae: 1: is no known key"),
    "wrong type": ("seeds = [1]", 'seeds = ["one"]', "grid.seeds.0"),
    "width and heads": ("heads = 1", "heads = 3", "sizes.W4.width: 4: must be divisible by heads = 3"),
    "unknown size": ('"W4"]', '"W5"]', "grid.sizes: 'W5': is no known size"),
    "V above the gene list": ("genes = [64]", "genes = [65]", "grid.genes: 65: is more than data.genes = 64"),
    "not TOML": ("[grid]", "[grid", "is not TOML"),
}


@pytest.mark.parametrize("mistake", SPEC_MISTAKES)
def test_a_mistaken_spec_is_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, expected = SPEC_MISTAKES[mistake]
    spec = tmp_path / "spec.toml"
    spec.write_text(TINY_SWEEP.replace(before, after, 1))
    assert main(["plan", str(spec)]) == 2
    assert expected in one_line(capsys)


@pytest.mark.parametrize("values", [[-1.0, 2.0], [0.5, 2.0]], ids=["negative", "fractional"])
def test_what_are_no_counts_is_refused(values: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = h5ad(tmp_path / "cells.h5ad", np.tile(values, (6, 5)))
    assert main(["census", "import", str(file), "--out", str(tmp_path / "census")]) == 2
    assert "raw counts" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "absent.toml"],
        ["shards", "verify", "absent"],
        ["sweep", "SPEC", "--shards", "absent", "--out", "out"],
        ["run", "absent.toml", "--out", "out"],
        ["run", "SPEC", "--shards", "absent", "--out", "out"],
        ["shards", "build", "SPEC", "--census", "no-census-at-all", "--out", "out"],
        ["fit", "absent.csv", "--out", "fit.json"],
        ["report", "absent", "--out", "report"],
        ["status", "absent"],
        ["export", "absent", "some-run", "--out", "model"],
        ["embed", "absent", "absent.h5ad", "--out", "embedded.h5ad"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_is_not_there_is_one_line_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    assert main(["spec.toml" if argument == "SPEC" else argument for argument in arguments]) == 2
    assert one_line(capsys).startswith("scaling-ray: ")
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_a_table_without_a_needed_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("size,loss\nA,1.0\nB,0.9\n")
    assert main(["fit", str(table), "--out", str(tmp_path / "fit.json")]) == 2
    assert "params" in one_line(capsys)
    assert not (tmp_path / "fit.json").exists()


def test_a_table_of_anybody_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{p},{2.0 * p**-0.3 + 1.0 + 0.001 * s},{s}" for p in (1e3, 1e4, 1e5, 1e6, 1e7) for s in (0, 1, 2)]
    table = tmp_path / "table.csv"
    table.write_text("params,loss,seed\n" + "\n".join(rows) + "\n")
    assert main(["fit", str(table), "--out", str(tmp_path / "fit.json")]) == 0
    headline = json.loads((tmp_path / "fit.json").read_text())["headline"]
    assert headline["verdict"] == "supported"
    alpha = headline["parameters"]["alpha"]
    assert alpha["low"] < 0.3 < alpha["high"]


def test_a_plan_counts_runs_parameters_and_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    assert main(["plan", str(tmp_path / "spec.toml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["totals"]["runs"] == len(plan["settings"]) == 8
    assert plan["totals"]["flops"] == pytest.approx(sum(setting["flops"] for setting in plan["settings"]))
    assert {"run_id", "size", "params", "genes", "cells", "seed", "lr", "flops", "bytes", "workers", "hours"} <= set(
        plan["settings"][0]
    )


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every verb's own parser, found from the command line's: a group of verbs has parsers below it."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for below in group.choices.values():
            yield from parsers(below)


VERBS = {parser.prog.removeprefix("scaling-ray "): parser for parser in parsers(build_parser())}


def test_the_verbs_are_these() -> None:
    assert sorted(VERBS) == sorted(
        "init, run, census plant, census import, census check, shards build, shards verify, plan, sweep, fit, audit, "
        "report, reference, reproduce, status, node-watch, track replay, track check, track models, export, embed, "
        "bench stream, bench train, doctor".split(", ")
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"scaling-ray {verb}" in shown
    for action in VERBS[verb]._actions:
        assert action.help, f"{verb} does not say what {action.dest} is"


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).parent / "scaling-ray"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"
