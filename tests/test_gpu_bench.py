"""The driver of the GPU's evidence, on a CPU: one stage that fails or runs out of time leaves the others' results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))

from gpu import PARTS  # noqa: E402
from gpu_grid import update_seconds  # noqa: E402
from gpu_stages import STAGES  # noqa: E402


def drive(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and gpu.json of a small run on the CPU."""
    line = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), str(out), "--cpu", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=out.parent, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads((out / "gpu.json").read_text())


def test_a_failed_stage_leaves_what_the_others_measured(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    status, found = drive(tmp_path / "out", "--only", "grid", "matmul", "--spec", str(missing), "--commit", "abc1234")
    assert status == 1
    stages, machine = found["stages"], found["machine"]
    assert stages["grid"]["status"] == "failed" and stages["grid"]["found"] == {}
    assert "the stage cells, which left none" in stages["grid"]["last_line"]
    assert stages["matmul"]["status"] == "done"
    rates = stages["matmul"]["found"]
    assert sorted(rates) == ["bf16_gflops_per_second", "fp32_gflops_per_second"] and min(rates.values()) > 0
    assert (machine["device"], machine["commit"]) == ("cpu", "abc1234")
    assert {"cpu", "cores", "python", "torch", "numpy", "date", "sources_sha256"} <= set(machine)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.log"]


def test_a_stage_ends_at_its_time_limit(tmp_path: Path) -> None:
    status, found = drive(tmp_path / "out", "--only", "reference", "--budget", "0.5")
    assert status == 1 and found["stages"]["reference"]["status"] == "out of time"


def test_every_stage_has_its_part_of_the_time() -> None:
    assert list(PARTS) == list(STAGES)


def test_seconds_of_an_update_go_by_its_flops() -> None:
    measured = [(100.0, 0.4), (1.0, 0.1), (10.0, 0.1)]
    assert update_seconds(measured, 0.01) == pytest.approx(0.1)
    assert update_seconds(measured, 10**1.5) == pytest.approx(0.2)
    assert update_seconds(measured, 1000.0) == pytest.approx(4.0)
