"""Who may import what. Read from the source without running it, and once more from sys.modules of a real start."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

SOMA = ("tiledbsoma", "cellxgene_census", "tiledb")

OWNERS: dict[str, tuple[str, ...]] = {
    "ray": (
        "cluster.py",
        "shards/convert.py",
        "shards/stream.py",
        "train/worker.py",
        "train/elastic.py",
        "sweep/reservations.py",
        "sweep/scheduler.py",
    ),
    "mlflow": ("tracking/mlflow.py", "tracking/history.py"),
    "deepspeed": ("train/zero.py",),
    **{name: ("census/",) for name in SOMA},
}
"""Module -> the only files (or folders, ending in /) that may import it, anywhere in the file."""

FORBIDDEN: dict[str, tuple[str, ...]] = {
    "spec.py": ("torch", "ray"),
    "resources.py": ("torch", "ray"),
    "rules.py": ("torch", "ray"),
    "records.py": ("torch", "ray"),
    "storage/": ("torch", "ray"),
    "sizes.py": ("torch", "ray"),
    "recipe.py": ("torch", "ray"),
    "execution.py": ("torch", "ray"),
    **{
        f"sweep/{name}.py": ("torch", "ray")
        for name in ("plan", "plan_text", "budget_plan", "capacity", "cost", "makespan", "offers", "speed", "stacks")
    },
    "shards/format.py": ("torch", "ray"),
    "shards/order.py": ("torch", "ray"),
    "shards/read.py": ("ray",),
    "doctor.py": ("torch", "ray"),
    # embedding cells reads files on a machine that need not have a Census
    **{
        f"census/{name}.py": ("torch", *SOMA)
        for name in ("h5ad", "readers", "counts", "matrices", "features", "donors")
    },
    "results/": ("torch", "ray", "mlflow"),
    # a report is made from files, without a GPU and without a cluster
    "report/": ("torch", "ray", "mlflow"),
    # a reference is made, and two records are compared, from files alone
    "reproduction/": ("torch", "ray", "mlflow"),
}
"""File or folder -> modules that it may not import, anywhere in the file."""

ONLY: dict[str, tuple[str, ...]] = {"laws/": ("numpy", "scipy")}
"""Folder -> the only modules beside the standard library and the allowed ones of the package."""

ONLY_WITHIN_PACKAGE: dict[str, tuple[str, ...]] = {"laws/": ("scaling_ray.laws", "scaling_ray.errors")}

NOBODY = ("scaling_ray.cli", "jobs")
"""Entry points: they import the package, and nothing else of it imports them."""

FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli/",),
    ("__init__.py",),
    ("public/",),
    ("reproduce.py",),
    ("pipeline.py", "specs/"),
    ("embedding.py",),
    ("neighbours.py",),
    ("sweep/",),
    ("reproduction/",),
    ("report/", "tracking/"),
    ("train/",),
    ("results/",),
    ("model/",),
    ("shards/",),
    ("planted/",),
    ("census/",),
    ("runs.py",),
    ("spec.py",),
    ("resources.py",),
    ("rules.py",),
    ("pulses.py",),
    ("records.py", "execution.py", "cluster.py", "doctor.py"),
    ("laws/",),
    ("storage/",),
    ("sizes.py", "recipe.py", "extras.py", "refusals/", "console.py", "pace.py"),
    ("errors.py",),
)
"""Top floor first: a file imports from its own room (the folder, or itself) and from the floors below, never above."""

LIGHT = ("scaling_ray.spec", "scaling_ray.records", "scaling_ray.sizes", "scaling_ray.doctor", "scaling_ray.cli")
HEAVY = ("torch", "ray", "mlflow", "tiledbsoma", "pandas", "boto3")


@dataclass(frozen=True, order=True)
class Import:
    """One imported module, by its full dotted name."""

    file: str
    line: int
    module: str

    def within(self, *packages: str) -> bool:
        return any(self.module == package or self.module.startswith(package + ".") for package in packages)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(package: Path) -> Iterator[Import]:
    """Every import of every file, those inside functions and under ``if TYPE_CHECKING`` included."""
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        folder = parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    base = ".".join([*folder[: len(folder) - node.level + 1], *([base] if base else [])])
                # `from a.b import c` may import the module a.b.c: the longer name matches every rule the shorter does
                for alias in node.names:
                    yield Import(file, node.lineno, base if alias.name == "*" else f"{base}.{alias.name}")
            elif isinstance(node, ast.Call) and _is_dynamic(node.func) and node.args:
                if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield Import(file, node.lineno, node.args[0].value)


def _is_dynamic(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def _covers(where: str, file: str) -> bool:
    return file.startswith(where) if where.endswith("/") else file == where


def room_of(file: str) -> tuple[int, str]:
    """(number of the floor, the room on it) of a file of the package; AssertionError for a file without a floor."""
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if _covers(room, file):
                return number, room
    raise AssertionError(f"{file} stands on no floor: name it in FLOORS")


def files_of(package: Path, module: str) -> str | None:
    """The file that a module of the package, or a name in one, is in; None for the package itself and for others."""
    parts = module.split(".")
    if parts[0] != package.name or len(parts) == 1:
        return None
    for length in range(len(parts), 1, -1):
        inner = "/".join(parts[1:length])
        if (package / f"{inner}.py").is_file() or any(f"{inner}.py" in rooms for rooms in FLOORS):
            return f"{inner}.py"
        if (package / inner).is_dir() or any(f"{inner}/" in rooms for rooms in FLOORS):
            return f"{inner}/__init__.py"
    return None


def climbs(package: Path) -> list[str]:
    """One line for each import of a higher floor, or of another room on the same one."""
    found = []
    for each in imports_of(package):
        target = files_of(package, each.module)
        if target is None:
            continue
        (own, room), (other, there) = room_of(each.file), room_of(target)
        if other < own or (other == own and there != room):
            found.append(f"{each}: {there} stands above or beside {room}")
    return sorted(set(found))


def violations(package: Path) -> list[str]:
    """One line for each import that breaks a rule of the tables above."""
    found: list[str] = climbs(package)
    for each in imports_of(package):
        for module, owners in OWNERS.items():
            if each.within(module) and not any(_covers(owner, each.file) for owner in owners):
                found.append(f"{each}: only {', '.join(owners)} may")
        for where, modules in FORBIDDEN.items():
            if _covers(where, each.file) and each.within(*modules):
                found.append(f"{each}: {where} may import none of {', '.join(modules)}")
        for where, modules in ONLY.items():
            outside = not each.within(*modules, *ONLY_WITHIN_PACKAGE[where])
            if _covers(where, each.file) and outside and each.module.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{each}: {where} may import {', '.join(modules)} and {ONLY_WITHIN_PACKAGE[where]} only")
        if each.within(*NOBODY) and not each.file.startswith("cli/"):
            found.append(f"{each}: nothing may import an entry point")
    return sorted(set(found))


def loaded(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds after ``code``."""
    report = f"import sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r}))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.strip().splitlines()[-1]))


def plant(root: Path, file: str, code: str) -> Path:
    package = root / "scaling_ray"
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return package


def test_no_module_reaches_over_its_layer() -> None:
    package = REPOSITORY / "scaling_ray"
    assert len(list(imports_of(package))) > 50, "the scan sees no imports: it is looking in the wrong place"
    assert violations(package) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("spec.py", "from scaling_ray.model import masking"),
        ("storage/atomic.py", "def f():\n    from scaling_ray import records\n"),
        ("census/source.py", "from scaling_ray.shards.order import keyed_hash"),
        ("train/loop.py", "from ..sweep.plan import stack_name"),
        ("report/build.py", "from scaling_ray.tracking import ledger"),
        ("laws/table.py", "from scaling_ray.public.fits import fit_table"),
        ("results/read.py", "from scaling_ray.train.checkpoint import Attempt"),
    ],
)
def test_a_planted_climb_is_reported(tmp_path: Path, file: str, code: str) -> None:
    found = climbs(plant(tmp_path, file, code))
    assert found and "stands above or beside" in found[0] and found[0].startswith(file)


def test_the_way_down_is_free(tmp_path: Path) -> None:
    package = plant(tmp_path, "sweep/run.py", "from scaling_ray.train import loop\nfrom scaling_ray.spec import x\n")
    assert climbs(package) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("train/loop.py", "import ray", "imports ray"),
        ("train/loop.py", "def f():\n    from ray import train\n", "imports ray.train"),
        ("train/loop.py", "from importlib import import_module\nimport_module('ray.data')\n", "imports ray.data"),
        ("shards/read.py", "import ray.data as data", "imports ray.data"),
        ("sweep/run.py", "import mlflow", "only tracking/mlflow.py"),
        ("train/loop.py", "if True:\n    import deepspeed\n", "only train/zero.py"),
        ("shards/convert.py", "import tiledbsoma", "only census/"),
        ("report/build.py", "from cellxgene_census import open_soma", "only census/"),
        ("spec.py", "def f():\n    import torch\n", "none of torch"),
        ("sizes.py", "from torch.nn import Module", "none of torch"),
        ("laws/fit.py", "import pandas", "numpy, scipy"),
        ("laws/fit.py", "from scaling_ray.train import loop", "scaling_ray.laws"),
        ("laws/fit.py", "from ..spec import SweepSpec", "imports scaling_ray.spec.SweepSpec"),
        ("laws/deep/inner.py", "from ...model import network", "imports scaling_ray.model.network"),
        ("sweep/run.py", "from scaling_ray import cli", "entry point"),
        ("report/build.py", "from jobs import sweep", "entry point"),
    ],
)
def test_the_scan_reports_a_planted_violation(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    found = violations(plant(tmp_path, file, code))
    assert any(complaint in line for line in found) and all(line.startswith(file) for line in found)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("shards/convert.py", "def f():\n    import ray.data\n"),
        ("tracking/mlflow.py", "import mlflow"),
        ("train/zero.py", "def f():\n    import deepspeed\n"),
        ("census/importer.py", "import tiledbsoma"),
        ("laws/fit.py", "import math\nimport numpy as np\nfrom scipy import optimize\nfrom .forms import law\n"),
        ("cli/sweeps.py", "def f():\n    from scaling_ray.sweep import run\n"),
        ("train/arrays.py", "import rayleigh"),
    ],
)
def test_the_scan_lets_owners_be(tmp_path: Path, file: str, code: str) -> None:
    assert violations(plant(tmp_path, file, code)) == []


def test_the_language_and_the_laws_start_without_heavy_modules() -> None:
    laws = [f"scaling_ray.laws.{path.stem}" for path in (REPOSITORY / "scaling_ray" / "laws").glob("[!_]*.py")]
    assert len(laws) >= 2
    assert loaded("\n".join(f"import {module}" for module in (*LIGHT, *laws))) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_help_starts_without_heavy_modules(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = ["scaling-ray", *{arguments!r}]
try:
    runpy.run_module("scaling_ray.cli", run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
"""
    assert loaded(code) == set()


@pytest.mark.parametrize("module", ["torch"])
def test_the_start_check_sees_a_heavy_module(module: str) -> None:
    assert loaded(f"import scaling_ray.spec\nimport {module}") == {module}
