"""The wheel in an environment of its own: a light installation works without torch and Ray, and says what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY_SWEEP

from scaling_ray.extras import EXTRAS
from scaling_ray.specs import example_names

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "scaling_ray", "reports/published")
INSTALL_SECONDS = 600

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installation:
    """A bare environment with the wheel and what the wheel itself asks for."""

    wheel: Path
    bin: Path
    folder: Path

    def call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A program of this environment, run from an empty folder with none of the repository in sight."""
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def verb(self, *arguments: str) -> str:
        """What a verb that ends well prints."""
        done = self.call("scaling-ray", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel, built from a copy of the sources and installed from the package index by the pins."""
    folder = tmp_path_factory.mktemp("installation")
    source, wheels, bare, empty = (folder / name for name in ("source", "wheels", "bare", "empty"))
    for name in PACKAGED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source / name)
    empty.mkdir()
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        sys.executable,
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(source),
    ]
    subprocess.run(build, check=True, timeout=INSTALL_SECONDS)
    (wheel,) = wheels.glob("scaling_ray-*.whl")
    venv.create(bare, with_pip=True)
    pins = str(REPOSITORY / "constraints.txt")
    install = [str(bare / "bin" / "python"), *pip, "install", "--constraint", pins, str(wheel)]
    subprocess.run(install, check=True, timeout=INSTALL_SECONDS)
    return Installation(wheel, bare / "bin", empty)


def test_nothing_heavy_comes_along(installed: Installation) -> None:
    modules = sorted({module for modules in EXTRAS.values() for module in modules})
    code = f"from importlib.util import find_spec; print([m for m in {modules!r} if find_spec(m)])"
    assert installed.call("python", "-c", code).stdout.strip() == "[]"
    assert "No broken requirements" in installed.call("python", "-m", "pip", "check").stdout


def test_types_and_specs_are_in_the_wheel(installed: Installation) -> None:
    code = "import scaling_ray, pathlib; print(pathlib.Path(scaling_ray.__file__).parent)"
    package = Path(installed.call("python", "-c", code).stdout.strip())
    assert package.is_relative_to(installed.bin.parent)
    assert (package / "py.typed").is_file()
    assert sorted(path.stem for path in (package / "specs").glob("*.toml")) == example_names()


def test_the_light_verbs_work(installed: Installation, tmp_path: Path) -> None:
    assert installed.verb("--version").strip() == "0.1.0"
    assert "VERB" in installed.verb("--help")
    assert "_ARGCOMPLETE" in installed.verb("completion", "bash")
    assert "not installed" in installed.verb("explain", "V001")
    assert installed.call("python", "-c", "import scaling_ray; print(scaling_ray.plan('demo'))").returncode == 0
    for name in example_names():
        assert name in installed.verb("init", "--list")
        assert " runs, " in installed.verb("plan", name)
    mine = tmp_path / "mine.toml"
    installed.verb("init", "mine", "--out", str(mine))
    assert json.loads(installed.verb("plan", str(mine), "--json"))["totals"]["runs"] > 0
    table = tmp_path / "table.csv"
    rows = [f"{p},{2.0 * p**-0.3 + 1.0 + 0.001 * s},{s}" for p in (1e3, 1e4, 1e5, 1e6, 1e7) for s in (0, 1, 2)]
    table.write_text("params,loss,seed\n" + "\n".join(rows) + "\n")
    assert installed.verb("fit", str(table), "--out", str(tmp_path / "fit.json")).startswith("supported")
    installed.verb("audit", "--out", str(tmp_path / "audit"))
    published = json.loads((tmp_path / "audit" / "audit.json").read_text())["published"]
    assert published["alpha"] == pytest.approx(0.266, abs=5e-4)
    assert "pip install 'scaling-ray[train]'" in installed.verb("doctor", "--write-to", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        (["sweep", "demo", "--shards", "shards", "--out", "out"], "train,cluster"),
        (["run", "demo", "--out", "out"], "train,cluster,census"),
        (["census", "plant", "--out", "census"], "census"),
        (["shards", "verify", "s3://bucket/shards"], "s3"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_a_verb_says_which_extra_is_missing(installed: Installation, arguments: list[str], extras: str) -> None:
    done = installed.call("scaling-ray", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("scaling-ray: ") and line.endswith(
        f"not installed; pip install 'scaling-ray[{extras}]' [V001]"
    )
    assert list(installed.folder.iterdir()) == []


@pytest.mark.ray
def test_a_sweep_from_elsewhere_is_read_fitted_and_reported(
    installed: Installation, tiny_shards: Path, ray_cluster: None, tmp_path: Path
) -> None:
    from scaling_ray.sweep.run import run_sweep

    spec, sweep = tmp_path / "spec.toml", tmp_path / "sweep"
    spec.write_text(TINY_SWEEP)
    run_sweep(spec, tiny_shards, sweep)
    assert "8 done" in installed.verb("status", str(sweep))
    assert installed.verb("fit", str(sweep), "--out", str(tmp_path / "fit.json")).startswith("refused")
    page = Path(installed.verb("report", str(sweep), "--out", str(tmp_path / "report")).strip())
    assert page.is_file() and len(list((tmp_path / "report" / "figures").glob("*.png"))) > 3
    assert installed.verb("shards", "verify", str(tiny_shards)).strip().endswith("whole")
