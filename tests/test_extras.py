"""A light installation: what each verb needs is what it says it needs, and one that lacks it says so in one line."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_SWEEP
from test_cli import VERBS, one_line

from scaling_ray.cli import main
from scaling_ray.doctor import LIGHT_PACKAGES, USES
from scaling_ray.errors import BadInput
from scaling_ray.extras import EXTRAS, missing_modules, require_extras

REPOSITORY = Path(__file__).resolve().parents[1]
LIGHT_MODULES = {"numpy", "scipy", "pyarrow", "pydantic", "jinja2", "markupsafe", "resvg_py"} | {
    *("rich", "rich_argparse", "argcomplete")
}
LIGHT_VERBS = (
    *("init", "plan", "fit", "audit", "report", "reference", "status", "shards verify", "doctor"),
    *("explain", "completion"),
)
BLOCKED = sorted({module for modules in EXTRAS.values() for module in modules} | {"deepspeed", "s3fs"})


def imported_at_once(path: Path) -> Iterator[str]:
    """Modules that a file imports when it is loaded: not those in functions or under TYPE_CHECKING."""
    left: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        yield from names_of(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            left += node.body + node.orelse
        elif isinstance(node, ast.Try | ast.With):
            left += node.body


def names_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module: str) -> Path | None:
    """The file of the package that a dotted name leads to."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        below = REPOSITORY.joinpath(*parts[:length])
        for path in (below.with_suffix(".py"), below / "__init__.py"):
            if path.is_file():
                return path
    return None


def modules_behind(start: list[str]) -> set[str]:
    """Top-level names of everything beside the standard library that loading these modules loads."""
    left, seen, found = list(start), set(), set()
    while left:
        module = left.pop()
        top = module.split(".")[0]
        path = file_of(module) if top == "scaling_ray" else None
        if path is None and top != "scaling_ray":
            found.add(top)
        if path is not None and path not in seen:
            seen.add(path)
            left += imported_at_once(path)
    return found - set(sys.stdlib_module_names)


def handler_imports(module: str, name: str) -> list[str]:
    """What the function of a verb imports, in its own body and in those of the command line's that it calls."""
    path = file_of(module)
    assert path is not None
    tree = ast.parse(path.read_text())
    functions = {node.name: (module, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for line in tree.body:
        if isinstance(line, ast.ImportFrom) and str(line.module).startswith("scaling_ray.cli."):
            functions |= {alias.name: (str(line.module), alias.name) for alias in line.names}
    own = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found = [imported for node in ast.walk(own) for imported in names_of(node)]
    for node in ast.walk(own):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            where, called = functions[node.func.id]
            found += handler_imports(where, called) if (where, called) != (module, name) else []
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_loads_nothing_but_the_extras_it_names(verb: str) -> None:
    needs, handler = VERBS[verb].get_default("needs"), VERBS[verb].get_default("handler")
    allowed = LIGHT_MODULES | {module for extra in needs for module in EXTRAS[extra]}
    assert modules_behind(handler_imports(handler.__module__, handler.__name__)) <= allowed
    assert (verb in LIGHT_VERBS) == (needs == ())


def test_the_scan_sees_what_is_heavy() -> None:
    assert {"torch", "ray"} <= modules_behind(["scaling_ray.sweep.run"])
    assert "tiledbsoma" in modules_behind(handler_imports("scaling_ray.cli.shards", "build"))


def test_every_extra_is_declared_and_known_to_the_doctor() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert set(declared) == {*EXTRAS, "all", "dev", "docs", "loom", "browser"}
    assert declared["all"] == [f"scaling-ray[{','.join(EXTRAS)}]"]
    needs = {verb: set(parser.get_default("needs")) for verb, parser in VERBS.items()}
    for extra in set(EXTRAS) - {"s3"}:
        assert set(USES[extra][1].split(", ")) == {verb for verb, needed in needs.items() if extra in needed}
    assert set(USES) == set(EXTRAS)
    assert {*LIGHT_PACKAGES, "markupsafe"} == {name.split(">")[0] for name in project["dependencies"]}


def test_the_page_on_installing_has_each_verb_beside_the_extras_it_needs() -> None:
    page = (REPOSITORY / "docs" / "installation.md").read_text()
    rows = re.findall(r"^\| `(?:pip install scaling-ray|\[([a-z,]+)\])`[^|]* \| ([^|]*) \|$", page, re.MULTILINE)
    told = {frozenset(extras.split(",")) - {""}: re.findall(r"`([a-z -]+)`", verbs) for extras, verbs in rows}
    for verb, parser in VERBS.items():
        assert verb in told[frozenset(parser.get_default("needs"))], verb


@pytest.mark.parametrize("verb", ["run", "reproduce"])
def test_shards_that_are_there_need_no_census(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    given = ["--against", str(tmp_path / "absent.json")] if verb == "reproduce" else []
    line = [verb, "demo", *given, "--out", str(tmp_path / "out")]
    assert main(line) == 2 and "pip install 'scaling-ray[census]'" in capsys.readouterr().err
    assert main([*line, "--shards", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["read_results", "fit_table"])
def test_s3_without_its_extra_is_one_line_from_a_notebook_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import scaling_ray

    monkeypatch.setitem(sys.modules, "botocore", None)
    with pytest.raises(BadInput, match=r"pip install 'scaling-ray\[s3\]'"):
        getattr(scaling_ray, name)("s3://bucket/sweep")


def test_this_environment_has_every_extra() -> None:
    assert {extra: missing_modules(extra) for extra in EXTRAS} == dict.fromkeys(EXTRAS, [])
    require_extras("sweep", *EXTRAS)


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput) as refusal:
        require_extras("sweep", "train", "cluster", "track")
    assert str(refusal.value) == "sweep: 'torch, ray': not installed; pip install 'scaling-ray[train,cluster]' [V001]"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in LIGHT_VERBS])
def test_a_verb_that_lacks_its_extra_says_so_in_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    for module in BLOCKED:
        monkeypatch.setitem(sys.modules, module, None)
    needed = [action for action in VERBS[verb]._actions if action.required]
    arguments = [word for action in needed for word in [*action.option_strings[:1], "spec.toml"]]
    assert main([*verb.split(), *arguments]) == 2
    line = one_line(capsys)
    assert line.startswith(f"scaling-ray: {verb}: '") and "pip install 'scaling-ray[" in line
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_a_place_on_s3_needs_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert main(["shards", "verify", "s3://bucket/shards"]) == 2
    assert "'boto3': not installed; pip install 'scaling-ray[s3]'" in one_line(capsys)


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process in which no module of any extra can be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        f"from scaling_ray.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_light_verbs_run_without_any_extra(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = [f"{p},{2.0 * p**-0.3 + 1.0 + 0.001 * s},{s}" for p in (1e3, 1e4, 1e5, 1e6, 1e7) for s in (0, 1, 2)]
    table.write_text("params,loss,seed\n" + "\n".join(rows) + "\n")
    for arguments in (
        ["plan", "demo"],
        ["init", "mine", "--out", str(tmp_path / "mine.toml")],
        ["fit", str(table), "--out", str(tmp_path / "fit.json")],
        ["reference", str(table), "--out", str(tmp_path / "reference.json")],
        ["audit", "--out", str(tmp_path / "audit")],
        ["doctor", "--write-to", str(tmp_path)],
    ):
        done = without_extras(*arguments)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "fit.json").read_text())["headline"]["verdict"] == "supported"
    assert (tmp_path / "audit" / "audit.html").is_file()
    assert without_extras("sweep", "demo", "--shards", "shards", "--out", str(tmp_path / "out")).returncode == 2
