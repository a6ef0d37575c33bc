"""Hours of a plan: the model against measured rates, what shortens and lengthens a run, and which machine it is on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scaling_ray.errors import BadInput
from scaling_ray.execution import GPU_CONTEXT_BYTES, SHARES_OF_A_GPU, Device, choose_gpu_share
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.sizes import LADDER, Shape, parameters, training_bytes, training_memory
from scaling_ray.spec import parse_spec
from scaling_ray.sweep.cost import (
    EVALUATED_SHARE,
    LINEAR_START_SECONDS,
    MEASURED,
    RUN_SECONDS,
    SCATTER,
    Machine,
    RatesFile,
    Speeds,
    evaluated_cells,
    rate_name,
    read_rates,
    run_seconds,
)
from scaling_ray.sweep.speed import CPU, GPUS, gpu_named, gpu_terms, seconds_of, work_of_update

BENCHMARKS = Path(__file__).resolve().parents[1] / "reports" / "benchmarks"


def run_of(
    size: str = "TINY", train: str = "", device: Device = "cpu_bf16", resources: str = "", role: str = "law"
) -> RunSpec:
    """A run of a size over 512 genes, 32 cells an update, with lines of its own."""
    choice = 'rule = "choose"\nrates = [1e-3, 1e-2]' if role == "rate" else "rates = [1e-3]"
    spec = parse_spec(
        f'name = "cost"\n[grid]\nsizes = ["{size}"]\ngenes = [512]\ncells = ["all"]\nseeds = [1]\n'
        f"[lr]\n{choice}\n[train]\n{train}\n[resources]\ncpus = 64\n{resources}\n"
    )
    return next(run for run in runs_of(spec, device) if run.role == role)


def seconds(run: RunSpec, speeds: Speeds = Speeds(), members: int = 1, gpu: str | None = None) -> float:  # noqa: B008
    """Planned seconds of a run without evaluations of whole splits."""
    return run_seconds(run, members, speeds, gpu, 0, 0)[0]


def test_the_fitted_rows_scatter_as_the_interval_says() -> None:
    rows = json.loads((BENCHMARKS / "planning.json").read_text())["rows"]
    logs = []
    for row in rows:
        work = work_of_update(
            Shape(*row["shape"]),
            row["genes"],
            round(0.15 * row["genes"]),
            row["cells_per_step"],
            row["micro_batch"],
            row["stack"],
            row["dropout"],
            row["precision"],
        )
        logs.append(math.log(seconds_of(work, CPU) / row["update_cpu_seconds"]))
    assert len(rows) > 50
    assert abs(np.mean(logs)) < 0.02 and np.std(logs) < 0.1
    assert np.abs(logs).max() < math.log(SCATTER)


@pytest.mark.parametrize("size", ["XXS", "TINY", "XS", "S", "M"])
def test_rates_that_were_measured_for_something_else_are_met(size: str) -> None:
    """training.json was measured by another program, four days before the rows that the model was fitted to."""
    found = json.loads((BENCHMARKS / "training.json").read_text())
    for part, dropout in (("own_recipe", 0.0), ("same_recipe", 0.1)):
        if size not in found[part]:
            continue
        entry = found[part][size]
        precision = entry["precision"] if "precision" in entry else "fp32"
        train = f'dropout = {dropout}\nprecision = "{precision}"\nmicro_batch = {entry["micro_batch"]}'
        per_cell, factor, source = Speeds().cell_seconds(run_of(size, train), 1, None)
        measured = float(np.median(entry["cells_per_second"]["ours"]))
        assert source == "model" and 1 / factor < per_cell * measured < factor, (part, per_cell * measured)


def test_the_smallest_model_takes_the_time_of_its_steps() -> None:
    """Its FLOPs at a CPU's matrix rate would take a fiftieth: an update's fixed part is what it pays."""
    run = run_of("XXS", "max_cells_seen = 160_000")
    work = work_of_update(run.shape, 512, 77, 32, 32)
    fixed = work.updates * CPU.updates + work.layer_passes * CPU.layer_passes
    assert 0.2 < fixed / seconds_of(work, CPU) < 0.8
    assert seconds(run) > 40 * work.fp32_flops * CPU.fp32_flops * run.train.total_steps


def test_more_threads_and_workers_shorten_large_models_and_hardly_tiny_ones() -> None:
    for size, least in (("XXS", 1.0), ("M", 3.0)):
        one, eight = (seconds(run_of(size, f"threads = {threads}")) for threads in (1, 8))
        assert least <= one / eight < 8
    group = run_of("M", resources="workers = { M = 4 }")
    assert group.execution.workers == 4
    assert 2 < seconds(run_of("M")) / seconds(group) < 4


def test_a_gpu_shortens_what_is_large_and_a_faster_one_more() -> None:
    on_cpu = seconds(run_of("L"))
    slow, fast = (seconds(run_of("L", device="cuda"), gpu=gpu) for gpu in ("L4", "H100"))
    assert on_cpu > 50 * slow and slow > 2 * fast
    tiny = [seconds(run_of("XXS", device="cuda"), gpu=gpu) for gpu in ("L4", "H100")]
    assert tiny[0] < 1.3 * tiny[1], "a tiny model waits for its kernels to start"


def test_terms_of_gpus_fall_with_their_rates() -> None:
    for better, worse in (("H200", "H100"), ("H100", "A100"), ("L40S", "L4"), ("L4", "T4")):
        assert gpu_terms(better).bf16_flops <= gpu_terms(worse).bf16_flops
    assert set(GPUS) >= {"T4", "L4", "A10G", "A100", "H100"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("L4", "L4"),
    ],
)
def test_gpus_are_known_by_their_drivers_names(name: str, kind: str) -> None:
    assert gpu_named(name, "gpu") == kind


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(BadInput, match=r"prices.nodes.x.gpu: 'Voodoo 2': is no GPU that a plan knows; use T4"):
        gpu_named("Voodoo 2", "prices.nodes.x.gpu")


def test_evaluations_and_branches_count() -> None:
    run = run_of("TINY", "evaluations = 10\ncurve_cells = 500")
    assert evaluated_cells(run, 2000, 1000) == 10 * 500 + 3000
    assert evaluated_cells(run, 200, 1000) == 10 * 200 + 1200, "a curve has no more cells than its split"
    rate = run_of("TINY", "evaluations = 10\ncurve_cells = 500", role="rate")
    assert evaluated_cells(rate, 2000, 1000) == 10 * 500 + 2000, "a rate's run never sees a test cell"
    trunk = run_of("TINY", 'schedule = "wsd"\ncurve_cells = 500\nmax_cells_seen = 64_000')
    assert evaluated_cells(trunk, 2000, 1000) == 32 * 500 + 2 * 3000
    per_cell = Speeds().cell_seconds(trunk, 1, None)[0]
    trained = 64_000 * (1 + 0.5 * 0.3) + EVALUATED_SHARE * evaluated_cells(trunk, 2000, 1000)
    assert run_seconds(trunk, 1, Speeds(), None, 2000, 1000)[0] == pytest.approx(RUN_SECONDS + per_cell * trained)


@pytest.mark.parametrize(("fraction", "turns"), [(0.15, 1), (0.0125, 3)])
def test_a_linear_start_takes_its_time_in_each_member(fraction: float, turns: int) -> None:
    rules = f"mask_fraction = {fraction}"
    plain, linear = (run_of("TINY", f'start = "{start}"\n{rules}') for start in ("cells", "linear"))
    for members in (1, 4):
        before, after = (run_seconds(run, members, Speeds(), None, 0, 0)[0] for run in (plain, linear))
        assert after - before == pytest.approx(LINEAR_START_SECONDS * 4096 * linear.genes * 16 * turns)


def test_a_stack_shares_its_starts() -> None:
    run = run_of("XXS", "cells_per_step = 16")
    assert seconds(run, members=8) < 0.6 * seconds(run)


def rates_file(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_rates_serve_the_machines_that_they_were_measured_on(tmp_path: Path) -> None:
    cpu, gpu = run_of("TINY"), run_of("TINY", device="cuda")
    on_cpu = {
        "version": 2,
        "machine": {"cpu": "EPYC", "cores": 8, "gpu": None},
        "cells_per_second": {rate_name(cpu): 1000.0},
    }
    on_gpu = {
        "version": 2,
        "machine": {"cpu": "Xeon", "cores": 8, "gpu": "NVIDIA L4"},
        "cells_per_second": {rate_name(gpu): 8000.0},
    }
    files = read_rates([rates_file(tmp_path, "cpu.json", on_cpu), rates_file(tmp_path, "gpu.json", on_gpu)])
    assert files[1].machine == Machine("Xeon", 8, "NVIDIA L4")
    speeds = Speeds(tuple(files))
    assert speeds.cell_seconds(cpu, 1, None) == (pytest.approx(1e-3), pytest.approx(MEASURED), "measured")
    assert speeds.cell_seconds(gpu, 1, "L4")[::2] == (pytest.approx(1 / 8000), "measured")
    assert speeds.cell_seconds(gpu, 1, "H100")[2] == "model"
    two = Speeds((RatesFile(None, {rate_name(cpu): 500.0}), RatesFile(None, {rate_name(cpu): 2000.0})))
    value, factor, _ = two.cell_seconds(cpu, 1, None)
    assert value == pytest.approx(1e-3) and factor == pytest.approx(2 * MEASURED), "two machines span an interval"


def test_rates_of_version_1_are_read_and_others_refused(tmp_path: Path) -> None:
    old = rates_file(tmp_path, "old.json", {"version": 1, "cells_per_second": {"a": 3}})
    assert read_rates(old) == [RatesFile(None, {"a": 3.0})]
    others: list[object] = [{}, {"cells_per_second": {"a": 0}}, {"cells_per_second": {}, "machine": {"disk": 1}}, []]
    for content in others:
        with pytest.raises(BadInput, match="--rates"):
            read_rates(rates_file(tmp_path, "bad.json", content))


@pytest.mark.parametrize("size", LADDER)
def test_a_share_of_a_gpu_is_a_whole_fraction_that_memory_and_time_allow(size: str) -> None:
    for gpu in GPUS.values():
        for busy in (0.01, 0.13, 0.3, 0.5, 0.9, 1.0):
            device_bytes = training_bytes(LADDER[size], 512, 8)
            share = choose_gpu_share(device_bytes, busy, gpu.gib * 2**30)
            together = round(1 / share)
            assert together == pytest.approx(1 / share) and 1 <= together <= SHARES_OF_A_GPU
            if together > 1:
                assert together * (device_bytes + GPU_CONTEXT_BYTES) <= gpu.gib * 2**30
                assert together * busy <= 1
    assert choose_gpu_share(0, 0.01, 80 * 2**30) == 1 / SHARES_OF_A_GPU
    assert choose_gpu_share(45 * 2**30, 0.01, 80 * 2**30) == 1, "more than half of it is all of it"
    assert choose_gpu_share(0, 0.51, 80 * 2**30) == 1


def test_memory_follows_the_engine() -> None:
    shape, count = LADDER["M"], parameters(LADDER["M"], 512)
    plain = training_memory(shape, 512, 4)
    activations = plain.device_bytes - 16 * count
    assert plain.device_bytes == training_bytes(shape, 512, 4) and plain.host_bytes == 0
    assert training_memory(shape, 512, 4, workers=4) == plain, "a DDP worker holds everything"

    def zero(stage: int, offload: bool = False) -> tuple[int, int]:
        found = training_memory(shape, 512, 4, workers=4, zero_stage=stage, deepspeed=True, offload_optimizer=offload)
        return found.device_bytes - activations, found.host_bytes

    assert [zero(stage)[0] for stage in (0, 1, 2, 3)] == [20 * count, 11 * count, 8 * count, 5 * count]
    assert zero(2, offload=True) == (5 * count, 3 * count)
    stack = training_memory(LADDER["XXS"], 512, 16, members=6)
    assert stack.device_bytes == 6 * training_memory(LADDER["XXS"], 512, 16).device_bytes
    kept = training_memory(LADDER["XS"], 512, 4, dropout=0.1, on_cpu=True).device_bytes
    assert kept - training_memory(LADDER["XS"], 512, 4).device_bytes == 5 * 4 * 2 * 4 * 512 * 512
