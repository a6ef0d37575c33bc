"""What ``import scaling_ray`` offers: these names, light until used, typed, and the same answers as the verbs."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import TINY_SWEEP
from test_embed import cells, panel, save  # noqa: F401 - fixtures
from test_layers import REPOSITORY, loaded
from test_network import network_of

import scaling_ray
from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.sizes import Shape

NAMES = ["audit", "embed", "fit_table", "load_spec", "plan", "read_results"]
REPORTS = REPOSITORY / "reports"
LAW = {
    "params": [p for p in (1e3, 1e4, 1e5, 1e6, 1e7) for _ in range(3)],
    "loss": [2.0 * p**-0.3 + 1.0 + 0.001 * s for p in (1e3, 1e4, 1e5, 1e6, 1e7) for s in range(3)],
    "seed": [0, 1, 2] * 5,
}


def test_the_surface_is_these_names() -> None:
    assert scaling_ray.__all__ == NAMES
    assert dir(scaling_ray) == sorted([*NAMES, "__version__"])
    for name in NAMES:
        assert inspect.isfunction(getattr(scaling_ray, name)), name
    with pytest.raises(AttributeError, match="no attribute 'fit_laws'"):
        scaling_ray.fit_laws  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, scaling_ray\ndir(scaling_ray)\nassert not {'numpy', 'pyarrow', 'pydantic'} & set(sys.modules)"
    assert loaded(code) == set()


def test_light_names_load_neither_torch_nor_ray() -> None:
    uses = "\n".join(f"scaling_ray.{name}" for name in NAMES)
    assert loaded(f"import scaling_ray\n{uses}\nscaling_ray.plan('demo')\nscaling_ray.audit()") <= {"pandas"}


def test_a_module_of_the_package_never_hides_a_name() -> None:
    modules = {path.stem for path in (REPOSITORY / "scaling_ray").iterdir()}
    assert not modules & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_typed_and_says_what_it_takes_raises_and_an_example(name: str) -> None:
    function = getattr(scaling_ray, name)
    signature = inspect.signature(function)
    tree = ast.parse(Path(inspect.getfile(function)).read_text())
    declared = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    annotated = [*declared.args.args, *declared.args.kwonlyargs]
    assert declared.returns is not None and all(argument.annotation is not None for argument in annotated)
    text = inspect.getdoc(function)
    assert text is not None and "Raises:" in text and "Example:" in text
    for parameter in signature.parameters:
        assert f"    {parameter}: " in text, f"{name} does not say what {parameter} is"


def test_a_type_checker_sees_what_they_return(tmp_path: Path) -> None:
    snippet = """
        import pyarrow as pa
        import scaling_ray
        from scaling_ray.spec import SweepSpec

        spec: SweepSpec = scaling_ray.load_spec("demo")
        hours: float = scaling_ray.plan(spec, max_cpu_hours=2.0).totals.hours
        table: pa.Table = scaling_ray.read_results("sweep").table
        fit = scaling_ray.fit_table({"params": [1.0], "loss": [1.0]})
        low: float | None = fit.parameters["alpha"].low
        alpha: float = scaling_ray.audit().reported.alpha
        width: int = scaling_ray.embed("model", "cells.h5ad").vectors.shape[1]
        wrong: str = scaling_ray.audit().reported.alpha
        scaling_ray.fit_laws()
    """
    file = tmp_path / "snippet.py"
    file.write_text(textwrap.dedent(snippet))
    configuration = str(REPOSITORY / "pyproject.toml")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", configuration, "--cache-dir", str(tmp_path / "cache"), file],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if "snippet.py" in line and " error: " in line]
    assert ["Incompatible types" in line or "has no attribute" in line for line in errors] == [True, True], done.stdout


def test_a_spec_comes_from_a_name_a_file_or_tables(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    spec = scaling_ray.load_spec(tmp_path / "spec.toml")
    assert scaling_ray.load_spec(spec) is spec
    assert scaling_ray.load_spec(spec.model_dump(exclude_none=True)) == spec
    assert scaling_ray.load_spec("demo").name == "demo"
    with pytest.raises(BadInput, match="colour: .*is no known key"):
        scaling_ray.load_spec(spec.model_dump(exclude_none=True) | {"colour": "red"})


def test_a_plan_is_that_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    plan = scaling_ray.plan(tmp_path / "spec.toml")
    assert main(["plan", str(tmp_path / "spec.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan.document
    assert len(plan) == plan.settings.num_rows == plan.totals.runs == 8
    assert sum(plan.settings["flops"].to_pylist()) == pytest.approx(plan.totals.flops)
    assert "CPU-hours" in repr(plan) and "object at" not in repr(plan)
    with pytest.raises(BadInput, match="max_cost"):
        scaling_ray.plan("demo", max_cost=-1.0)
    assert "the budget (max_cpu_hours = 0.001)" in repr(scaling_ray.plan("demo", max_cpu_hours=0.001))


@pytest.mark.parametrize("kind", ["dict", "pandas", "arrow", "csv"])
def test_a_table_is_fitted_wherever_it_lies(kind: str, tmp_path: Path) -> None:
    table: Any = LAW
    if kind == "pandas":
        table = pd.DataFrame(LAW)
    elif kind == "arrow":
        table = pa.table(LAW)
    elif kind == "csv":
        table = tmp_path / "runs.csv"
        pyarrow.csv.write_csv(pa.table(LAW), table)
    fit = scaling_ray.fit_table(table)
    alpha = fit.parameters["alpha"]
    assert fit.verdict == "supported" and alpha.low is not None and alpha.high is not None
    assert alpha.low < 0.3 < alpha.high and str(alpha) in repr(fit)
    assert [one.verdict for one in fit.predictions] and fit.size.verdict == "supported"


def test_what_is_no_table_is_refused() -> None:
    for table, complaint in (
        ({"params": [1, 2], "loss": [1.0]}, "equal length"),
        ({"params": [1, "two"], "loss": [1.0, 2.0]}, "is no table"),
        ({"params": [], "loss": []}, "has no rows"),
        ({"size": [1.0], "loss": [1.0]}, "params"),
        (3, "is no table"),
    ):
        with pytest.raises(BadInput, match=complaint):
            scaling_ray.fit_table(table)


def test_parts_of_a_table_are_fits_of_their_own() -> None:
    both = {name: values * 2 for name, values in LAW.items()} | {"set": ["a"] * 15 + ["b"] * 15}
    fit = scaling_ray.fit_table(both, by="set")
    assert list(fit.parts) == ["set=a", "set=b"]
    assert fit.parts["set=a"].parameters == fit.parts["set=b"].parameters == fit.parameters
    assert "set=b:" in repr(fit)
    with pytest.raises(BadInput, match="set: .*changes between runs of one setting"):
        scaling_ray.fit_table({**both, "set": ["a", "b"] * 15})


@pytest.mark.parametrize("name", ["planted", "real-bone-marrow", "real-bone-marrow-512", "planted-law"])
def test_kept_results_are_read_and_fitted(name: str) -> None:
    results = scaling_ray.read_results(REPORTS / name / "results.csv")
    kept = pyarrow.csv.read_csv(REPORTS / name / "results.csv")
    assert len(results) == kept.num_rows == results.table.num_rows
    assert [row.test_loss for row in results] == [value for value in kept["test_loss"].to_pylist()]
    assert f"{len(results.finished)} of the grid finished" in repr(results)
    fit = scaling_ray.fit_table(results)
    written = json.loads((REPORTS / name / "fit.json").read_text())["headline"]
    assert fit.verdict == written["verdict"] and fit.data.verdict == written["data"]["verdict"]
    with pytest.raises(BadInput, match="by: .*is for tables"):
        scaling_ray.fit_table(results, by="size")


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("run_id,loss\na,1.0\n")
    (tmp_path / "words.csv").write_text('run_id,params\na,"many"\n')
    (tmp_path / "results.parquet").write_text("no")
    for path, complaint in (
        (tmp_path / "absent.csv", "cannot be read"),
        (tmp_path / "other.csv", "missing from its columns"),
        (tmp_path / "words.csv", "not the table of a sweep"),
        (tmp_path / "results.parquet", "not the table of a sweep"),
        (tmp_path, "sweep"),
    ):
        with pytest.raises(BadInput, match=complaint):
            scaling_ray.read_results(path)


def test_the_audit_is_that_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scaling_ray.audit()
    assert main(["audit", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert repr(found).splitlines()[:2] == said[:2]
    assert json.loads((tmp_path / "audit.json").read_text())["supported"]["alpha"]["low"] == found.alpha.low
    assert found.choices.num_rows == len(found.document["choices"])
    assert found.choices["alpha"].to_pylist()[0] == found.reported.alpha
    with pytest.raises(BadInput):
        scaling_ray.audit(tmp_path / "absent")


def test_cells_are_embedded_from_memory_as_from_a_file(
    tmp_path: Path,
    cells: anndata.AnnData,  # noqa: F811
    panel: list[str],  # noqa: F811
) -> None:
    model, _ = save(tmp_path / "model", network_of(Shape(4, 1, 1, 1)), panel)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    found = scaling_ray.embed(model, tmp_path / "cells.h5ad", tmp_path / "out.h5ad")
    assert found.file == tmp_path / "out.h5ad" and found.genes_matched == found.genes == len(panel)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(cells), 4)
    assert np.array_equal(anndata.read_h5ad(found.file).obsm["X_scaling_ray"], found.vectors)
    again = scaling_ray.embed(model, cells)
    assert again.file is None and np.array_equal(again.vectors, found.vectors)
    assert list(again.cell_ids) == list(cells.obs_names) and "90 cells, 4 values each" in repr(again)
    with pytest.raises(BadInput, match="absent"):
        scaling_ray.embed(tmp_path / "absent", cells)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput, match=r"scaling-ray\[train\]"):
        scaling_ray.embed("model", "cells.h5ad")


def test_what_they_return_is_documented() -> None:
    for name in NAMES:
        returned = get_type_hints(getattr(scaling_ray, name), localns={"anndata": anndata, "pd": pd})
        text = inspect.getdoc(returned["return"])
        assert text and not text.startswith(returned["return"].__name__ + "("), name
