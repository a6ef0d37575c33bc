"""What a machine trains at: measured, printed, and used by a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_SWEEP, small_run

from scaling_ray.cli import main
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.train import bench


def test_json_holds_what_trusting_a_plan_needs(capsys: pytest.CaptureFixture[str]) -> None:
    line = "bench train --size TINY --genes 64 --micro-batch 4 --dropout 0.1 --threads 1 --seconds 0.2 --json"
    assert main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cells_per_second"] > 0 and 0 < found["share_of_matmul"] < 1
    assert (found["size"], found["genes"], found["micro_batch"], found["dropout"]) == ("TINY", 64, 4, 0.1)
    run = small_run(genes=64)
    flops = training_flops_per_cell(run.shape, 64, 10) * found["cells_per_second"]
    assert found["gflops_per_second"] == pytest.approx(flops / 1e9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench train --size HUGE", "grid.sizes: 'HUGE': is no known size"),
        ("bench train --micro-batch 64", "train.micro_batch: 64: is larger than cells_per_step = 32"),
        ("bench train --seconds 0", "--seconds: 0.0: must be more than 0"),
        ("bench train --dropout 1", "train.dropout: 1.0"),
        ("bench train --spec SPEC", "--out: None: name the JSON file"),
        ("plan SPEC --rates SPEC", "--rates: 'SPEC': holds no measured rates"),
    ],
)
def test_bad_input_is_one_line(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(TINY_SWEEP)
    assert main([part.replace("SPEC", str(path)) for part in line.split()]) == 2
    error = capsys.readouterr().err
    assert said.replace("SPEC", str(path)) in error and error.count("\n") == 1


def test_a_plan_takes_its_hours_from_measured_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, rates = tmp_path / "spec.toml", tmp_path / "rates.json"
    spec.write_text(TINY_SWEEP)
    assert main(["bench", "train", "--spec", str(spec), "--out", str(rates), "--seconds", "0.1"]) == 0
    measured = json.loads(rates.read_text())["cells_per_second"]
    assert len(measured) == 2, "two sizes, and no run of them is in a stack"
    capsys.readouterr()
    assert main(["plan", str(spec), "--rates", str(rates), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {cell["hours_from"] for cell in plan["cells"]} == {"measured"}
    for cell in plan["cells"]:
        assert any(cell["hours"] == pytest.approx(640 / rate / 3600) for rate in measured.values())


def test_the_probe_stops_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run("cells_per_step = 32")
    made = bench.made_updates

    def small(run, members, device):  # type: ignore[no-untyped-def]
        if run.micro_batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(run, members, device)

    monkeypatch.setattr(bench, "made_updates", small)
    assert bench.probe_micro_batch(run, 0.02) in (1, 2, 4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_probes_once_and_keeps_to_it(tiny_shards: Path, tmp_path: Path) -> None:
    from scaling_ray.sweep.run import run_sweep

    spec, lines = tmp_path / "spec.toml", []
    text = TINY_SWEEP.replace('"choose"', '"fixed"').replace("[3e-3, 1e-2]", "[3e-3]")
    spec.write_text(text.replace("[train]", '[train]\nmicro_batch = "probe"'))
    run_sweep(spec, tiny_shards, tmp_path / "sweep", lines.append)
    assert any(line.startswith("measuring micro-batches of") for line in lines)
    plan = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    assert sorted(plan["probed"]) == sorted(cell["run_id"] for cell in plan["cells"])
    for cell in plan["cells"]:
        result = json.loads((tmp_path / "sweep" / "runs" / cell["run_id"] / "result.json").read_text())
        assert result["micro_batch"] == cell["micro_batch"]
    first = plan["cells"][0]["run_id"]
    (tmp_path / "sweep" / "runs" / first / "result.json").unlink()
    lines.clear()
    run_sweep(spec, tiny_shards, tmp_path / "sweep", lines.append)
    assert not any(line.startswith("measuring") for line in lines)
    assert json.loads((tmp_path / "sweep" / "plan.json").read_text())["cells"] == plan["cells"]
