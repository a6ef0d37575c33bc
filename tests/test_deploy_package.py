"""What ``ray job submit --working-dir .`` takes along: all of the code and none of the data, by Ray's own packaging."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

RESULT_FOLDERS = (
    "results",
    "my cells/2026",
    "jobs/first",
    "scaling_ray/trial",
    "scaling_ray/specs/out",
    "docs",
    "tests",
)
"""Where someone may have said OUT=...; no rule can list them."""


def packed(directory: Path, archive: Path) -> set[str]:
    """Names in the package that Ray makes of a working directory."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(directory), archive, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(archive) as package:
        return set(package.namelist())


def tracked() -> set[str]:
    """The package, the jobs and the specs as git has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "scaling_ray", "jobs", "pyproject.toml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working copy of its own: what git tracks, and the two lists of what stays behind."""
    root = tmp_path / "checkout"
    for name in tracked() | {".gitignore", ".rayignore", "README.md", "cluster.yaml", "constraints.txt"}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, root / name)
    return root


def test_every_file_of_the_code_goes_along_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    names = packed(checkout, tmp_path / "package.zip")
    assert names == tracked()
    assert {"scaling_ray/cli/__main__.py", "jobs/sweep.py", "scaling_ray/specs/demo.toml"} <= names


def test_no_cell_goes_along_whatever_its_folder_is_called(checkout: Path, tmp_path: Path) -> None:
    from scaling_ray.planted.plant import plant

    census = plant(tmp_path / "census", n_cells=120, n_genes=60)
    assert sum(path.is_file() for path in census.rglob("*")) > 50
    for folder in RESULT_FOLDERS:
        out = checkout / folder
        shutil.copytree(census, out / "census")
        for name in ("cells.h5ad", "mlruns.db", "shards/part-0.parquet", "sweep/plan.json", "sweep/spec.toml"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"\0" * 64)
        (out / "sweep" / "runs" / "a" / "checkpoints").mkdir(parents=True)
        (out / "sweep" / "runs" / "a" / "model.safetensors").write_bytes(b"\0" * 64)
        (out / "report").mkdir()
        (out / "report" / "report.html").write_text("<p>a page</p>")
    for name in ("cells.h5ad", "cells.csv", "table.parquet", ".env", "auth_token"):
        (checkout / name).write_bytes(b"\0" * 64)
    assert packed(checkout, tmp_path / "package.zip") == tracked()


def test_a_spec_of_ones_own_goes_along(checkout: Path, tmp_path: Path) -> None:
    own = {"my-sweep.toml", "jobs/my-sweep.toml"}
    for name in own:
        shutil.copyfile(REPOSITORY / "jobs" / "demo.toml", checkout / name)
    assert packed(checkout, tmp_path / "package.zip") == tracked() | own
