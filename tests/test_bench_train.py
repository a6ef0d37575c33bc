"""What a machine trains at: measured, printed, and used by a plan."""

from __future__ import annotations

import json
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import TINY_SWEEP, small_run

from scaling_ray.cli import main
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.sweep.cost import RUN_SECONDS
from scaling_ray.train.bench import fastest_micro_batch, made_updates, probe_micro_batch
from scaling_ray.train.memory import is_out_of_memory


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
        ("bench train --seconds 0", "--seconds: '0' is no number above 0"),
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
    assert {cell["hours_from"] for cell in plan["settings"]} == {"measured"}
    for cell in plan["settings"]:
        # beside training, four curves and the last evaluation of few cells, and the run's start and end
        seconds = 3600 * cell["hours"] - RUN_SECONDS
        assert any(640 < seconds * rate < 1.2 * 640 for rate in measured.values())
    machine = json.loads(rates.read_text())["machine"]
    assert machine["cores"] == os.cpu_count() and machine["cpu"]


def memory_of_a_gpu_ends() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


MEMORY_ENDS = {
    "in Python": lambda: bytearray(1 << 60),
    "in torch": lambda: torch.empty(1 << 50),
    "on a GPU": memory_of_a_gpu_ends,
}


@pytest.mark.parametrize("where", MEMORY_ENDS)
@pytest.mark.parametrize(("most", "fastest"), [(0, 1), (1, 1), (2, 2), (4, 2), (32, 16)])
def test_the_fastest_micro_batch_that_fits_is_found(where: str, most: int, fastest: int) -> None:
    rates = {1: 10.0, 2: 30.0, 4: 20.0, 8: 20.0, 16: 31.0, 32: 30.0}
    asked = []

    def cells_per_second(micro_batch: int) -> float:
        asked.append(micro_batch)
        if micro_batch > most:
            MEMORY_ENDS[where]()
        return rates[micro_batch]

    assert fastest_micro_batch(32, cells_per_second) == fastest
    assert asked == [size for size in rates if size <= max(1, 2 * most)]


def test_an_error_of_another_kind_rises_from_the_probe() -> None:
    def broken(micro_batch: int) -> float:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fastest_micro_batch(32, broken)


ROOM_BYTES = 128 << 20


def probe_in_little_memory(answer: Connection) -> None:
    """Send what is found where this process may take ROOM_BYTES more than it has, and what a whole update meets."""
    run = small_run("cells_per_step = 64\nmicro_batch = 1\ndropout = 0.1", size="WIDE", genes=512)
    whole, device = run.carried_out(micro_batch=64), torch.device("cpu")
    made_updates(run, 1, device)[0]()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES,) * 2)
    found = probe_micro_batch(run, 0.01)
    with pytest.raises(RuntimeError) as met:
        made_updates(whole, 1, device)[0]()
    answer.send((found, is_out_of_memory(met.value)))


def test_the_probe_stops_where_memory_ends() -> None:
    """A cell's attention keeps 2.6 MB for the backward pass, 64 of them 168 MB: more than there is room for."""
    context = torch.multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=probe_in_little_memory, args=(send,))
    process.start()
    send.close()
    found, memory_ended = receive.recv()
    process.join()
    assert memory_ended and process.exitcode == 0
    assert found in (1, 2, 4, 8, 16, 32)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_probes_once_and_keeps_to_it(tiny_shards: Path, tmp_path: Path) -> None:
    from scaling_ray.sweep.run import run_sweep

    lines: list[str] = []
    spec = tmp_path / "spec.toml"
    text = TINY_SWEEP.replace('"choose"', '"fixed"').replace("[3e-3, 1e-2]", "[3e-3]")
    spec.write_text(text.replace("[train]", '[train]\nmicro_batch = "probe"'))
    run_sweep(spec, tiny_shards, tmp_path / "sweep", lines.append)
    assert any(line.startswith("measuring micro-batches of") for line in lines)
    plan = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    assert sorted(plan["probed"]) == sorted(setting["run_id"] for setting in plan["settings"])
    for setting in plan["settings"]:
        result = json.loads((tmp_path / "sweep" / "runs" / setting["run_id"] / "result.json").read_text())
        assert result["micro_batch"] == setting["execution"]["micro_batch"]
    first = plan["settings"][0]["run_id"]
    (tmp_path / "sweep" / "runs" / first / "result.json").unlink()
    lines.clear()
    run_sweep(spec, tiny_shards, tmp_path / "sweep", lines.append)
    assert not any(line.startswith("measuring") for line in lines)
    assert json.loads((tmp_path / "sweep" / "plan.json").read_text())["settings"] == plan["settings"]
