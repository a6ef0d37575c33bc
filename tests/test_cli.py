"""The command line from outside: one clear line and exit code 2 for bad input, nothing half-written."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
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
from scaling_ray.cli.declare import place, positive
from scaling_ray.errors import EXIT_CODES

REPOSITORY = Path(__file__).resolve().parents[1]


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
        "init, run, census plant, census limits, census import, census check, shards build, shards verify, plan, "
        "sweep, fit, audit, report, reference, reproduce, status, node-watch, track replay, track check, track models, "
        "export, embed, bench stream, bench train, doctor, explain, completion".split(", ")
    )


PATHS = [
    (verb, action.option_strings[0])
    for verb, parser in VERBS.items()
    for action in parser._actions
    if "--out" in action.option_strings and action.type not in (place, None)
]


@pytest.mark.parametrize(("verb", "option"), PATHS, ids=lambda value: value)
def test_a_uri_never_becomes_a_folder_of_that_name(verb: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where results may lie on S3 the option is a ``place``; everywhere else a URI is refused before any work."""
    assert main([*verb.split(), option, "s3://bucket/folder"]) == 2
    assert "'s3://bucket/folder' is no local path" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("reproduce demo --against r.json --out o --tick 2026-01-01 --every 0", "--every: '0' is no number above 0"),
        ("reproduce demo --against r.json --out o --max-age nan", "--max-age: 'nan' is no number above 0"),
        ("status absent --watch nan", "--watch: 'nan' is no number above 0"),
        ("node-watch --every inf", "--every: 'inf' is no number above 0"),
        ("bench train --seconds nan", "--seconds: 'nan' is no number above 0"),
        ("bench train --out rates.json", "--out: 'rates.json': holds the rates of a spec"),
        ("bench train --spec demo --out r.json --micro-batch 0", "--micro-batch: 0: is what the spec says"),
        ("shards build demo --census absent --out o --json", "--json: True: goes with --dry-run"),
        ("init my.toml", "NAME: 'my.toml': is a file"),
    ],
)
def test_what_would_be_ignored_or_never_end_is_refused(
    arguments: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    assert complaint in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_who_reads_no_further_is_told_nothing_more() -> None:
    """``scaling-ray explain S035 | head -0``: no second complaint when Python ends."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    told = subprocess.run(
        [sys.executable, "-m", "scaling_ray.cli", "explain", "S035"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(write)
    assert (told.returncode, told.stderr) == (1, b"")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"scaling-ray {verb}" in shown
    for action in VERBS[verb]._actions:
        assert action.help, f"{verb} does not say what {action.dest} is"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_sentence_and_examples_that_its_parser_takes(verb: str) -> None:
    parser = VERBS[verb]
    about = str(parser.description)
    assert about[0].islower() and not about.endswith(".") and "\n" not in about
    examples = [line.strip() for line in str(parser.epilog).splitlines() if line.startswith("  ")]
    assert examples
    for example in examples:
        program, *words = shlex.split(example)
        options = build_parser().parse_args(words)
        assert program == "scaling-ray" and options.handler is parser.get_default("handler"), example


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_its_unit_and_its_default(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = VERBS[verb].format_help()
    for action in VERBS[verb]._actions:
        if action.type in (int, float, positive):
            assert action.metavar, f"{verb} {action.option_strings}: in what unit?"
        nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if action.option_strings and not nothing:
            assert f"(default: {action.default})" in shown, f"{verb} {action.option_strings}"


def test_help_lists_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^ +{verb.split()[0]}( |$)", shown, re.MULTILINE), verb
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}$", shown, re.MULTILINE), code
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: VERB"),
        (["plan"], "plan: the following arguments are required: SPEC.toml"),
        (["plan", "demo", "--max-cost", "much"], "plan: argument --max-cost: invalid float value: 'much'"),
        (["census", "plnt", "--out", "x"], "census: argument VERB: invalid choice: 'plnt'"),
        (["plan", "demo", "--colour"], "plan: unrecognized arguments: --colour"),
    ],
)
def test_a_line_that_no_verb_takes_is_refused_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = one_line(capsys)
    assert line.startswith(f"scaling-ray: {complaint}") and "--help` shows an example [V029]" in line


def test_explain_says_cause_and_way_out_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "absent.toml"]) == 2
    code = one_line(capsys)[-6:]
    assert main(["explain", code]) == 0
    shown = capsys.readouterr().out
    assert "is no file and no example" in shown and "name a TOML file" in shown and "exit code 2" in shown
    assert main(["explain", "S9999"]) == 2
    assert "is no code of this version" in one_line(capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_code_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "scaling-ray" in code and "_ARGCOMPLETE" in code


@pytest.mark.parametrize(
    ("typed", "offered", "withheld"),
    [
        ("scaling-ray st", {"status"}, {"sweep"}),
        ("scaling-ray census ", {"plant", "import", "check"}, {"plan"}),
        ("scaling-ray plan de", {"demo"}, {"demo.txt"}),
        ("scaling-ray plan ./", {"./my.toml"}, {"./cells.h5ad"}),
        ("scaling-ray plan demo --max-c", {"--max-cost", "--max-cpu-hours"}, {"--max-gpu-hours"}),
        ("scaling-ray census check ce", {"cells.h5ad"}, set()),
        ("scaling-ray export sweep law-", {"law-a", "law-b"}, {"rate-c"}),
        ("scaling-ray bench train --precision ", {"fp32", "bf16"}, set()),
        ("scaling-ray completion ", {"bash", "zsh", "fish"}, set()),
    ],
)
def test_a_shell_is_offered_what_can_follow(typed: str, offered: set[str], withheld: set[str], tmp_path: Path) -> None:
    for file in ("my.toml", "cells.h5ad", "demo.txt"):
        (tmp_path / file).touch()
    for run in ("law-a", "law-b", "rate-c"):
        (tmp_path / "sweep" / "runs" / run).mkdir(parents=True)
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "COMP_TYPE": "9",
    }
    code = "import sys; from scaling_ray.cli import main; sys.exit(main())"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        check=True,
    )
    found = {line.strip() for line in answer.read_text().splitlines()}
    assert offered <= found and not withheld & found, found


def test_a_shell_completes_a_line_itself(tmp_path: Path) -> None:
    """As a user sets it up: the code is read by a real shell, which then answers Tab."""
    command = Path(sys.executable).parent
    script = f"""
        export PATH="{command}:$PATH" PYTHONPATH="{REPOSITORY}"
        source <(scaling-ray completion bash)
        COMP_LINE="scaling-ray track re" COMP_POINT=20 COMP_TYPE=9 COMP_WORDS=(scaling-ray track re) COMP_CWORD=2
        _python_argcomplete scaling-ray re track
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["replay"], done.stderr


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).parent / "scaling-ray"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("check cells.h5ad", "did you mean census check or track check?"),
        ("census chek cells.h5ad", "did you mean census check?"),
        ("swep spec.toml", "did you mean sweep?"),
        ("cencus check cells.h5ad", "did you mean census?"),
        (
            "census check cells.h5ad --doner P",
            "did you mean --donor?; `scaling-ray census check --help` shows an example",
        ),
        ("run --cell cells.h5ad --out out", "did you mean --cells?"),
        ("run cells.h5ad --out out", "'cells.h5ad': holds cells; put --cells before it"),
        ("run cells.h5ad.gz --out out", "holds cells; put --cells before it"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed.split()) == 2
    assert meant in one_line(capsys)


def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.toml").write_text(TINY_SWEEP.replace("[train]", "[train]\ngenes = 5", 1))
    assert main(["plan", str(tmp_path / "spec.toml")]) == 2
    assert "train.genes: 5: is no known key; did you mean data.genes or grid.genes?" in one_line(capsys)
    for wrong, right in (("max_cells_seen", "max_cell_seen"), ("rates", "rate"), ("[grid]", "[gird]")):
        (tmp_path / "spec.toml").write_text(TINY_SWEEP.replace(wrong, right, 1))
        assert main(["plan", str(tmp_path / "spec.toml")]) == 2
        assert f"did you mean {wrong.strip('[]')}?" in one_line(capsys)
