"""A plan says what may move a digit, which runs train as one, and what it all takes; an earlier plan is repeated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scaling_ray.errors import BadInput
from scaling_ray.execution import Execution, choose_micro_batch, choose_precision, choose_stack
from scaling_ray.runs import RunSpec, runs_of, stack_mates
from scaling_ray.sizes import LADDER, Shape
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.sweep.cost import RatesFile, rate_name
from scaling_ray.sweep.plan import as_planned, make_plan, run_cost
from scaling_ray.sweep.plan_text import format_plan

SPEC = """
name = "plan"
[grid]
sizes = ["XXS", "TINY", "S"]
genes = [512]
cells = [1000, "all"]
seeds = [1, 2, 3]
[train]
cells_per_step = 16
[lr]
rates = [1e-3]
[resources]
device = "cpu"
"""


def spec(**changes: str) -> SweepSpec:
    """SPEC with lines added to tables."""
    text = SPEC
    for table, lines in changes.items():
        text = (
            text.replace(f"[{table}]", f"[{table}]\n{lines}") if f"[{table}]" in text else f"{text}[{table}]\n{lines}\n"
        )
    return parse_spec(text)


@pytest.mark.parametrize("device", ["cpu", "cpu_bf16", "cuda"])
@pytest.mark.parametrize("size", LADDER)
def test_choices_fit_any_size_and_device(size: str, device: str) -> None:
    for cells_per_step in (1, 7, 16, 32, 4096):
        micro_batch = choose_micro_batch(LADDER[size], 512, cells_per_step, 0.1, device)  # type: ignore[arg-type]
        assert 1 <= micro_batch <= cells_per_step
    assert choose_precision(LADDER[size], device) in ("fp32", "bf16")  # type: ignore[arg-type]


def test_narrow_models_and_old_cpus_stay_in_float32() -> None:
    assert choose_precision(Shape(64, 2, 4, 4), "cpu_bf16") == "fp32"
    assert choose_precision(LADDER["L"], "cpu") == "fp32"


def test_only_tiny_models_train_as_one() -> None:
    for name in ("XS", "S", "M", "L", "XL"):
        assert choose_stack(LADDER[name], 4, "cpu") == 1


def plan_of(spec: SweepSpec, **arguments: Any) -> dict[str, Any]:
    """The plan alone."""
    return make_plan(spec, **arguments)[0]


def test_stacks_hold_runs_alike_and_leave_no_process_idle() -> None:
    plan = plan_of(spec())
    by_id = {setting["run_id"]: setting for setting in plan["settings"]}
    assert [len(stack) for stack in plan["stacks"]] == [3, 3, 3, 3]
    for stack in plan["stacks"]:
        assert len({by_id[name]["size"] for name in stack}) == 1
    assert not any(by_id[name]["size"] == "S" for stack in plan["stacks"] for name in stack)
    assert plan_of(spec(resources="stack = 1"))["stacks"] == []
    assert {len(stack) for stack in plan_of(spec(resources="stack = 2"))["stacks"]} == {2}
    assert len(plan_of(spec(resources="stack = 6\ncpus = 1"))["stacks"][-1]) == 6


def test_workers_never_stack() -> None:
    plan = plan_of(spec(resources="workers = { TINY = 2 }"))
    assert not any("TINY" in name for stack in plan["stacks"] for name in stack)


def test_an_earlier_plan_is_repeated() -> None:
    first = plan_of(spec())
    again = plan_of(spec(resources="stack = 1").model_copy(), earlier=first)
    assert again["stacks"] == first["stacks"]
    on_gpu = parse_spec(SPEC.replace('"cpu"', '"cuda"').replace("seeds = [1, 2, 3]", "seeds = [1, 2, 3, 4]"))
    moved = plan_of(on_gpu, earlier=first)
    known = {setting["run_id"]: setting for setting in first["settings"]}
    for setting in moved["settings"]:
        if setting["run_id"] in known:
            free = set(Execution.FOLLOWS_SPEC)
            before, now = (one["execution"] for one in (known[setting["run_id"]], setting))
            assert {k: v for k, v in now.items() if k not in free} == {k: v for k, v in before.items() if k not in free}
    assert moved["stacks"][: len(first["stacks"])] == first["stacks"]


def test_run_ids_do_not_follow_the_device_or_the_stack() -> None:
    ids = {setting["run_id"] for setting in plan_of(spec())["settings"]}
    other = SPEC.replace('"cpu"', '"cuda"') + "stack = 4\ncompile = true\ndisk_gib = 100\n"
    assert ids == {setting["run_id"] for setting in plan_of(parse_spec(other))["settings"]}


def test_checkpoints_beyond_the_disk_are_refused_before_the_first_step() -> None:
    small = spec(resources="disk_gib = 0.01")
    with pytest.raises(BadInput, match=r"resources.disk_gib: 0.01: is less than the 0.\d+ GiB"):
        plan_of(small)
    assert plan_of(spec(resources="disk_gib = 1"))["totals"]["disk_bytes"] == 4 * sum(
        setting["params"] for setting in plan_of(spec())["settings"]
    )


def test_measured_rates_make_the_hours() -> None:
    rates = RatesFile(None, {rate_name(run, 3): 1000.0 for run in runs_of(spec()) if run.size == "XXS"})
    plan = plan_of(spec(train="max_cells_seen = 3_600_000"), rates=[rates])
    settings = {setting["size"]: setting for setting in plan["settings"]}
    tiny, small = settings["XXS"], settings["S"]
    assert (tiny["hours"], tiny["hours_from"]) == (pytest.approx(1.0, rel=0.01), "measured")
    assert small["hours_from"] == "model"
    assert tiny["hours_high"] / tiny["hours"] < 1.15 < small["hours_high"] / small["hours"]
    assert "6 runs at measured rates, the others by a model of this device's speed" in format_plan(plan)
    assert "by a model of CPUs of 30 GFLOP/s" in format_plan(plan_of(spec(resources="gflops_per_cpu = 30")))


def test_a_rule_of_width_makes_rates() -> None:
    ruled = spec(lr="width_exponent = -0.5")
    rates = {run.size: run.lr for run in runs_of(ruled)}
    assert rates == {"XXS": 4e-3, "TINY": 1e-3, "S": pytest.approx(1e-3 / 8**0.5, rel=5e-3)}
    own = spec(lr="width_exponent = -0.5\nper_size = { S = [7e-4] }")
    assert {run.lr for run in runs_of(own) if run.size == "S"} == {7e-4}


def test_a_field_added_to_execution_changes_no_id_and_is_repeated_by_the_plan() -> None:
    class Wider(Execution):
        pages: int = 4

    def widened(pages: int) -> list[RunSpec]:
        return [
            run.model_copy(update={"execution": Wider(**run.execution.model_dump(), pages=pages)})
            for run in runs_of(spec())
        ]

    assert [run.identity for run in widened(8)] == [run.identity for run in runs_of(spec())]
    assert len({stack_mates(run) for run in widened(8)}) == len({stack_mates(run) for run in runs_of(spec())})
    assert "pages" in json.loads(widened(8)[0].model_dump_json())["execution"]
    plan = {"settings": [run_cost(run, 30.0) for run in widened(8)]}
    again = as_planned(widened(16), json.loads(json.dumps(plan)))
    assert {run.execution.pages for run in again} == {8}  # type: ignore[attr-defined]
    free = [run.carried_out(workers=3, engine="ddp", checkpoint_seconds=1.0) for run in widened(16)]
    assert {(run.execution.workers, run.execution.engine) for run in as_planned(free, plan)} == {(3, "ddp")}
