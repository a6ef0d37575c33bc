"""The audit from outside: the published digits, the choices, the verdict, and what it does not need."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling_ray import cli
from scaling_ray.errors import BadInput
from scaling_ray.laws.audit import audit, published_directory

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return audit()


def test_the_published_estimator_is_repeated_to_the_last_digit(found: dict[str, Any]) -> None:
    published = found["published"]
    assert repr(published["alpha"]) == "0.26642859805500463"
    assert repr(published["a"]) == "2.1527631574716932"
    assert repr(published["c"]) == "1.4437577651696205"
    assert repr(published["r2_log"]) == "0.8579791737782294"
    assert published["c_at_bound"] is True
    rows = {row["name"]: row["value"] for row in found["rows"]}
    more = rows["published estimator, 21 runs"]
    shown = [f"{more[name]:.8f}" for name in ("alpha", "c", "r2_log")]
    assert shown == ["0.23368046", "1.43650270", "0.82292663"]
    pooled = rows["published estimator, pooled V = 1,024"]
    assert [f"{pooled[name]:.8f}" for name in ("alpha", "c")] == ["0.00878544", "0.11261814"]


@pytest.mark.parametrize(
    ("name", "alpha", "c"),
    [
        ("all 18 runs", (0.529, 0.476, 0.593), 1.470),
        ("without XXS", (0.418, 0.298, 0.5858), None),
        ("TINY to M", (0.325, 0.220, 0.456), 1.448),
        ("without L", (0.520, None, None), None),
        ("XXS set to the gene mean", (0.379, None, None), None),
        ("final losses instead", (0.586, None, None), 1.491),
        ("final losses, without XXS", (0.5825, 0.271, "open"), None),
        ("parameters counted without", (0.347, None, None), None),
        ("parameters without the gene embedding, without XXS", (0.259, None, None), None),
    ],
)
def test_declared_choices_have_their_known_answers(
    found: dict[str, Any], name: str, alpha: tuple[float | str | None, ...], c: float | None
) -> None:
    choice = next(c for c in found["choices"] if c["name"].startswith(name))
    for key, expected in zip(("value", "low", "high"), alpha, strict=True):
        if expected == "open":
            assert choice["alpha"][key] is None and not choice["alpha"]["closed"]
        elif expected is not None:
            assert choice["alpha"][key] == pytest.approx(expected, abs=6e-4)
    if c is not None:
        assert choice["c"]["value"] == pytest.approx(c, abs=6e-4)


def test_no_single_value_is_the_answer(found: dict[str, Any]) -> None:
    supported = found["supported"]
    assert supported["verdict"] == "refused"
    assert set(supported["alpha"]) >= {"low", "high"} and "value" not in supported["alpha"]
    assert supported["alpha"]["low"] == pytest.approx(0.259, abs=1e-3)
    assert supported["alpha"]["high"] == pytest.approx(0.586, abs=1e-3)
    assert any("edge of its own search" in reason for reason in supported["reasons"])


def test_what_can_be_said_without_a_law_is_said(found: dict[str, Any]) -> None:
    assert found["supported"]["verdict"] == "refused"
    said = found["supported"]["can_be_said"]
    runs = list(csv.DictReader((published_directory(None) / "canonical_v512.csv").read_text().splitlines()))
    mean = {
        size: np.mean([float(run["best_val_mse"]) for run in runs if run["size"] == size])
        for size in ("TINY", "XS", "S", "M", "L")
    }
    assert "a larger model lowers the loss by at most" in said[0]
    for line, (one, two) in zip(said[1:], itertools.pairwise(mean), strict=True):
        assert line.startswith(f"{one} to {two} changed the loss by {mean[two] - mean[one]:+.3f}")


def test_findings_are_computed_rows(found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in found["rows"]}
    assert {row["finding"] for row in found["rows"]} == {1, 4, 5, 7, 10, 11}
    edges = {0.9: 0.120, 0.95: 0.165, 0.98: 0.225, 0.99: 0.266, 0.995: 0.274}
    for edge, alpha in edges.items():
        value = rows[f"edge of the search at {edge} min(L)"]["value"]
        assert value["alpha"] == pytest.approx(alpha, abs=1e-3) and value["c_at_bound"] is (edge < 0.995)
    assert rows["edge of the search at 0.995 min(L)"]["value"]["c"] == pytest.approx(1.4457, abs=2e-4)
    assert rows["L against M, seed by seed"]["value"]["worse"] == 3
    budget = rows["budget of every run"]["value"]
    assert (budget["cells_seen"], budget["epochs"], budget["optimizer_steps"]) == (240_000, 1.2, 7_500)
    assert budget["tokens"] == pytest.approx(122.88e6)
    gaps = rows["bias of the best of 61"]["value"]
    assert list(gaps.values()) == pytest.approx([0, 0, 0.002, 0.014, 0.024, 0.022], abs=6e-4)
    assert list(rows["50,000 cells alone"]["value"].values()) == pytest.approx([1.161, 1.129, 1.102], abs=6e-4)


def test_the_verb_writes_a_page_that_asks_nobody_without_torch_or_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from scaling_ray.cli import main; code = main(['audit', '--out', sys.argv[1]]); "
        "print([m for m in ('torch', 'ray', 'mlflow', 'pandas') if m in sys.modules]); sys.exit(code)"
    )
    # From another directory: the tables are found from where the package is.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "audit")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "0.26642859805500463" in done.stdout and "refused" in done.stdout
    page = (tmp_path / "audit" / "audit.html").read_text()
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    assert page.index("Refused:") < page.index("<table") and "prefers-color-scheme:dark" in page
    assert written["supported"]["verdict"] == "refused" and len(written["choices"]) >= 9
    assert str(tmp_path) not in page


def test_missing_or_damaged_tables_are_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="canonical_v512.csv"):
        published_directory(tmp_path)
    assert cli.main(["audit", "--out", str(tmp_path / "a"), "--published", str(tmp_path)]) == 2
    assert "published" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    for name in ("canonical_v512.csv", "all_runs.csv"):
        text = (published_directory() / name).read_text()
        (tmp_path / name).write_text(text.replace("533,512", "many,512", 1))
    with pytest.raises(BadInput, match="params"):
        audit(tmp_path)
