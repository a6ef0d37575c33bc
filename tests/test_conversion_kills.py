"""A conversion killed at random moments, and called again each time, ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_SWEEP

KILLS = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"


@pytest.mark.ray
@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    from scaling_ray.planted.plant import plant

    census = plant(tmp_path / "census", n_cells=70_000, n_genes=200)
    (tmp_path / "spec.toml").write_text(TINY_SWEEP)
    command = [sys.executable, str(KILLS), "--census", str(census), "--spec", str(tmp_path / "spec.toml")]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "--kills", "4"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 4
    assert found["byte_identical"] == found["conversions"] >= 1
