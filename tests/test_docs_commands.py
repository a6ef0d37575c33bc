"""Every command on a page: its verb, flags and targets exist, and it is run, by the build, a test here, or elsewhere.

A command that holds a word in capitals (SPEC.toml, DIR, BUCKET) is a form: it is parsed. All others are run, or stand
in ELSEWHERE with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_census_door import cells, write
from test_census_run import SPEC

from scaling_ray.cli import build_parser, main
from scaling_ray.errors import ScalingRayError
from scaling_ray.specs import example_names

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))

ELSEWHERE = {
    "make demo": "three minutes; the same path is tests/test_pipeline.py",
    "make test": "runs this test",
    "make test-slow": "an hour",
    "make check": "runs beside the tests (.ci/run)",
    "make docs": "tests/test_docs.py builds it",
    "make setup": "came before the tests",
    "make errors": "tests/test_refusals.py writes the same list",
    "make bench-gpu": "needs a GPU",
    "make bench-laws": "half an hour",
    "scaling-ray run --cells cells.h5ad --out results": "thirteen minutes; smaller in tests/test_census_run.py",
    "scaling-ray run first-look --cells cells.h5ad --out look": "minutes; smaller in test_the_tutorial, same flags",
    "scaling-ray run my-sweep.toml --census results/census --out my-results": "twenty minutes; tests/test_pipeline.py",
    "scaling-ray run planted --out results": "an hour; the kept report reports/planted is of it",
    "scaling-ray bench train --spec my-sweep.toml --out rates.json": "a minute; tests/test_bench_train.py",
    "scaling-ray plan my-sweep.toml --rates rates.json": "needs those rates; tests/test_cost.py",
    "scaling-ray node-watch": "asks a cloud's metadata service; tests/test_worker_notices.py has one",
    "scaling-ray node-watch --once": "asks a cloud's metadata service",
    "scaling-ray node-watch --drain-now": "drains a node; tests/test_worker_notices.py",
    "scaling-ray init bone-marrow --out bone-marrow.toml": "the tutorial keeps its own file of that name",
    "ray dashboard cluster.yaml": "needs a cluster in a cloud",
}
"""Command -> why it is not run here, and where it is."""

RUN_HERE = (
    "scaling-ray --version",
    "scaling-ray doctor",
    "scaling-ray init --list",
    "scaling-ray init my-sweep --out my-sweep.toml",
    "scaling-ray init cells --out mine.toml",
    "scaling-ray plan mine.toml",
    "scaling-ray plan grid",
    "scaling-ray census check cells.h5ad",
    "scaling-ray audit",
    "scaling-ray explain S035",
    "scaling-ray completion bash",
)
"""Run in this order in a folder that holds cells.h5ad."""

RUN_HERE_SLOWLY = (
    "scaling-ray census plant --out census",
    "scaling-ray census plant --out census-law --law",
    "scaling-ray census limits census-law",
    "scaling-ray bench train --size S --genes 512",
)

OTHER_PROGRAMS = (
    "kubectl ",
    "docker ",
    "mlflow ",
    "pip ",
    "export ",
    "chmod ",
    "ray job logs",
    "ray job stop",
    "ray up",
)
"""What these are called with is not ours; files that they name must exist."""

_FENCE = re.compile(r"^(?P<mark>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=mark)\s*$", re.MULTILINE | re.DOTALL)
_OURS = r"scaling-ray|make|python|ray|kubectl|docker|pip|mlflow|export|chmod"
_SPAN = re.compile(rf"(?<!`)`((?:{_OURS}) [^`]+)`(?!`)")
_PLACEHOLDER = re.compile(r"(?<![\w.-])(?:[A-Z][A-Z_]+|X)\b(?!=)|s3://|\bmy-sweep/|\{\w+\}")
_FILE = re.compile(r"(?:deploy|jobs|benchmarks|reports)/[\w./-]+\.\w+")


@dataclass(frozen=True)
class Command:
    """One command as a page has it; ``built``: the build of the site runs it."""

    page: str
    text: str
    built: bool
    wanted: int = 0

    @property
    def is_form(self) -> bool:
        return _PLACEHOLDER.search(self.text) is not None


def commands_of(page: Path) -> list[Command]:
    """Commands of fenced blocks, and those of spans in the text that say more than a verb's name."""
    text = re.sub(r"^ {2,3}(?=\S)", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\_", "_")
    name, found = page.relative_to(REPOSITORY).as_posix(), []
    for block in _FENCE.finditer(text):
        code = re.search(r"^:exit: (\d)$", block["body"], re.MULTILINE)
        for line in block["body"].replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").partition(" #")[0].strip()
            if re.match(rf"(?:{_OURS})\b ?", line) and " " in line:
                built = block["info"] == "{ran}"
                found.append(Command(name, " ".join(line.split()), built, int(code[1]) if code else 0))
    for span in _SPAN.finditer(_FENCE.sub("", text).replace("\n", " ")):
        found.append(Command(name, " ".join(span[1].split()), False))
    return found


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)}, key=lambda c: (c.page, c.text))


def names_a_verb(words: list[str]) -> bool:
    """Whether the words are a verb's name and no more: a mention."""
    parser = build_parser()
    for word in words:
        inner = [action for action in parser._actions if action.__class__.__name__ == "_SubParsersAction"]
        if not inner or word not in (inner[0].choices or {}):
            return False
        parser = inner[0].choices[word]  # type: ignore[index]
    return True


def complaint_about(text: str) -> str | None:
    """What is wrong with a command, None where nothing is."""
    words = shlex.split(text)
    for file in _FILE.findall(text):
        if not (REPOSITORY / file).exists():
            return f"no file {file}"
    if words[0] == "scaling-ray":
        return _complaint_about_verb(words[1:])
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
        return None if words[1] in targets else f"no target {words[1]}"
    if words[0] == "python" and words[1].endswith(".py"):
        return None if (REPOSITORY / words[1]).is_file() else f"no file {words[1]}"
    if words[:3] == ["ray", "job", "submit"]:
        if "--" not in words:
            return None if len(words) == 3 else "nothing to submit"
        python, script, *rest = words[words.index("--") + 1 :]
        verb = {"jobs/sweep.py": ["run"], "jobs/shards.py": ["shards", "build"], "jobs/report.py": ["report"]}
        return _complaint_about_verb([*verb[script], *rest]) if python == "python" else f"{python} is no python"
    if text in ELSEWHERE or text.startswith(OTHER_PROGRAMS):
        return None
    return "nobody knows this program"


def _complaint_about_verb(words: list[str]) -> str | None:
    if names_a_verb(words) or words in (["--version"], ["VERB", "--help"]):
        return None
    if words[0] == "fit" and "--out" not in words:  # named in a sentence by what it reads
        words = [*words, "--out", "FILE"]
    try:
        options = build_parser().parse_args(words)
    except (SystemExit, ScalingRayError):
        return "the parser refuses it"
    spec = getattr(options, "spec", None)
    known = (*example_names(), "SPEC.toml", "my-sweep.toml", "mine.toml", "bone-marrow.toml", None)
    return None if spec in known else f"{spec} is no shipped spec"


def test_the_pages_hold_commands() -> None:
    assert len(COMMANDS) > 80
    assert {"README.md", "docs/own-cells.md", "docs/tutorial.md", "docs/tables.md"} <= {c.page for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}")
def test_verbs_flags_targets_and_files_exist(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint_about(command.text) is None, capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "scaling-ray fly",
        "scaling-ray plan demo --jason",
        "scaling-ray plan no-such",
        "scaling-ray census check --json",
        "make coffee",
        "ray job submit --working-dir . -- python jobs/sweep.py SPEC.toml",
        "kubectl apply -f deploy/none.yaml",
        "python -m nothing",
    ],
)
def test_a_wrong_command_is_seen(text: str) -> None:
    assert complaint_about(text) is not None


def test_every_command_is_run_or_says_where_it_is() -> None:
    tutorial = {c.text for c in COMMANDS if c.page == "docs/tutorial.md"}
    settled = {*RUN_HERE, *RUN_HERE_SLOWLY, *ELSEWHERE, *tutorial}
    loose = [
        f"{command.page}: {command.text}"
        for command in COMMANDS
        if not (command.built or command.is_form or command.text in settled)
        and not command.text.startswith((*OTHER_PROGRAMS, "ray job submit"))
        and not (command.text.startswith("scaling-ray ") and names_a_verb(shlex.split(command.text)[1:]))
    ]
    assert loose == []
    texts = {command.text for command in COMMANDS}
    assert [text for text in (*RUN_HERE, *RUN_HERE_SLOWLY, *ELSEWHERE) if text not in texts] == [], "on no page"


def run(text: str, folder: Path) -> str:
    """What a command prints that ends well."""
    words = shlex.split(text)[1:]
    words += ["--out", "audit"] if words == ["audit"] else []
    done = subprocess.run(
        [sys.executable, "-m", "scaling_ray.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{text}: {done.stderr}"
    return done.stdout


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cells.h5ad in it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    write(cells(n=120), tmp_path / "cells.h5ad")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_of_seconds_end_well(desk: Path) -> None:
    for text in RUN_HERE:
        run(text, desk)
    assert " runs, " in run("scaling-ray plan my-sweep.toml", desk)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_of_a_minute_end_well(desk: Path) -> None:
    for text in RUN_HERE_SLOWLY:
        run(text, desk)


def test_the_python_of_the_pages_runs() -> None:
    blocks = [
        block["body"]
        for page in PAGES
        for block in _FENCE.finditer(page.read_text(encoding="utf-8"))
        if block["info"] == "python"
    ]
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", textwrap.dedent(block)], cwd=REPOSITORY, check=True, timeout=120)


def test_kept_outputs_are_of_the_runs_that_the_tutorials_spec_asks_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run ids move with the numerics and the spec; then ``docs/tutorial/rerun.py`` has to be run again."""
    assert main(["plan", str(DOCS / "tutorial" / "bone-marrow.toml"), "--json"]) == 0
    planned = {setting["run_id"] for setting in json.loads(capsys.readouterr().out)["settings"]}
    kept = "".join(path.read_text() for path in sorted((DOCS / "tutorial").glob("*.txt")))
    named = set(re.findall(r"\blaw-\w+-v128-[\w.-]+-[0-9a-f]{8}\b", kept + (DOCS / "tutorial.md").read_text()))
    assert named == planned


def test_runs_that_pages_and_help_name_are_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--json"]) == 0
    planned = {setting["run_id"] for setting in json.loads(capsys.readouterr().out)["settings"]}
    root = DOCS.parent
    pages = [root / "README.md", root / "scaling_ray" / "cli" / "models.py", *DOCS.glob("*.md")]
    told = "".join(path.read_text() for path in pages if path.name != "tutorial.md")
    named = set(re.findall(r"\blaw-\w+-v256-[\w.-]+-[0-9a-f]{8}\b", told))
    assert len(named) >= 3 and named <= planned


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands, in their order, on a small file and a small spec under the same names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(cells(n=400, donors=8), tmp_path / "bone-marrow.h5ad")
    (tmp_path / "bone-marrow.toml").write_text(SPEC)
    steps = re.findall(r"```sh\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    assert len(steps) >= 8
    for step in steps:
        words = shlex.split(step)[1:]
        if words[0] == "export":
            results = json.loads((tmp_path / "results" / "sweep" / "plan.json").read_text())
            words[2] = next(s["run_id"] for s in results["settings"] if s["size"] == "TINY")
        assert main(words) == 0, (step, capsys.readouterr().err)
    assert (tmp_path / "results" / "report" / "report.html").is_file()
    assert (tmp_path / "embedded.h5ad").is_file()
