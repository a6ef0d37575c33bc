"""A plan says what may move a digit, which runs train as one, and what it all takes; an earlier plan is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.execution import Execution, choose_micro_batch, choose_precision, choose_stack
from scaling_ray.runs import RunSpec, runs_of, stack_mates
from scaling_ray.sizes import LADDER, Shape
from scaling_ray.spec import LearningRateSpec, SweepSpec, parse_spec
from scaling_ray.sweep.capacity import Capacity, NodeType
from scaling_ray.sweep.cost import TRIAL_SECONDS, RatesFile, rate_name
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


PRICES = """
[prices]
as_of = "2026-11-01"
[prices.nodes.cpu_spot]
cpus = 16
memory_gib = 64
per_hour = 0.8
spot_per_hour = 0.32
max_nodes = 4
[prices.nodes.gpu_spot]
cpus = 8
gpus = 1
gpu = "L4"
memory_gib = 32
per_hour = 1.0
spot_per_hour = 0.5
max_nodes = 8
[prices.nodes.gpu_large]
cpus = 96
gpus = 8
gpu = "H100"
memory_gib = 1024
per_hour = 60
max_nodes = 1
"""
ON_GPUS = SPEC.replace('device = "cpu"', 'device = "cuda"').replace('"S"]', '"S", "L"]') + PRICES
CLUSTER = Capacity((NodeType("cpu", {"CPU": 16.0}, 4), NodeType("gpu", {"CPU": 8.0, "GPU": 1.0}, 2)))


def test_a_plan_of_version_3_is_read_and_repeated() -> None:
    """As a sweep wrote it before: settings with hours and execution, stacks, no sizes."""
    now = plan_of(spec(train="micro_batch = 2"))
    kept = ("run_id", "execution", "hours", "hours_from", "flops")
    old = {
        "version": 3,
        "settings": [{name: setting[name] for name in kept} for setting in now["settings"]],
        "stacks": now["stacks"][:1],
        "probed": [now["settings"][0]["run_id"]],
    }
    again = plan_of(spec(train="micro_batch = 4"), earlier=json.loads(json.dumps(old)))
    assert {setting["execution"]["micro_batch"] for setting in again["settings"]} == {2}
    assert again["stacks"][0] == old["stacks"][0] and again["probed"] == old["probed"] and again["version"] == 4


def test_json_keeps_its_contract() -> None:
    plan = json.loads(json.dumps(plan_of(spec())))
    fields = {"run_id", "size", "params", "genes", "cells", "seed", "lr", "flops", "bytes", "workers", "hours"}
    for setting in plan["settings"]:
        assert fields <= setting.keys()
        assert 0 < setting["hours_low"] < setting["hours"] < setting["hours_high"]
    assert {"runs", "flops", "largest_bytes", "disk_bytes", "cpu_hours", "hours"} <= plan["totals"].keys()


def test_totals_and_sizes_are_sums_of_settings() -> None:
    plan = plan_of(parse_spec(ON_GPUS))
    for name in ("flops", "hours", "hours_low", "hours_high", "gpu_hours", "cpu_hours", "cost"):
        whole = sum(setting[name] for setting in plan["settings"])
        assert sum(size[name] for size in plan["sizes"]) == pytest.approx(whole)
        if not name.startswith("hours"):
            assert plan["totals"][name] == pytest.approx(whole)
    assert [size["size"] for size in plan["sizes"]] == ["XXS", "TINY", "S", "L"]
    totals = plan["totals"]
    assert totals["hours_low"] < totals["hours"] < totals["hours_high"]
    assert totals["cost_low"] < totals["cost"] < totals["cost_high"]


def test_without_prices_there_is_no_money() -> None:
    plan = plan_of(spec())
    assert plan["totals"]["cost"] is None and "USD" not in format_plan(plan)
    with pytest.raises(BadInput, match=r"budget.max_cost: 3.0: needs prices; add a table \[prices\]"):
        plan_of(spec(budget="max_cost = 3.0"))


def test_each_size_goes_to_the_kind_of_node_where_it_costs_least() -> None:
    plan = plan_of(parse_spec(ON_GPUS))
    assert {size["size"]: size["node"] for size in plan["sizes"]} == dict.fromkeys(
        ("XXS", "TINY", "S", "L"), "gpu_spot"
    )
    dear = plan_of(parse_spec(ON_GPUS.replace("spot_per_hour = 0.5", "spot_per_hour = 50")))
    assert {size["node"] for size in dear["sizes"] if size["size"] in ("S", "L")} == {"gpu_large"}
    on_cpus = plan_of(parse_spec(SPEC + PRICES))
    assert {size["node"] for size in on_cpus["sizes"]} == {"cpu_spot"}
    (small,) = [size for size in on_cpus["sizes"] if size["size"] == "S"]
    # a run holds one of 16 CPUs of a spot node, from the start of its process on
    assert small["cost"] == pytest.approx(0.32 / 16 * (small["hours"] + small["runs"] * TRIAL_SECONDS / 3600))
    assert "USD" in format_plan(on_cpus) and "prices of 2026-11-01" in format_plan(on_cpus)


def test_tiny_models_share_a_gpu_large_ones_and_groups_hold_whole_ones() -> None:
    grouped = ON_GPUS.replace("[resources]", "[resources]\nworkers = { TINY = 2 }")
    plan = plan_of(parse_spec(grouped))
    shares = {setting["size"]: setting["execution"]["gpus"] for setting in plan["settings"]}
    assert shares["XXS"] <= 0.5 and 1 / shares["XXS"] == round(1 / shares["XXS"])
    assert (shares["TINY"], shares["L"]) == (1.0, 1.0)
    assert "2 workers of 1 GPU, 1 CPU" in format_plan(plan) and f"1/{round(1 / shares['XXS'])} GPU" in format_plan(plan)


def test_a_shape_that_no_node_can_hold_is_refused() -> None:
    assert plan_of(spec(resources="workers = { S = 8 }"), capacity=CLUSTER)
    for lines, complaint in (
        ("workers = { S = 16 }\ncpus = 64", r"resources.workers.S: 16: each asks for 8 CPUs on one node, and the clus"),
        ("cpus = 64", r"train.threads: 32: a run of XXS asks for 32 CPUs on one node.*at most 4 cpu \(CPU 16\)"),
    ):
        threads = 8 if "workers" in lines else 32
        with pytest.raises(BadInput, match=complaint):
            plan_of(spec(resources=lines, train=f"threads = {threads}"), capacity=CLUSTER)
    with pytest.raises(BadInput, match=r"resources.device: 'cuda': asks for 1 CPUs and 0.\d+ GPU.*name a cpu"):
        plan_of(parse_spec(SPEC.replace('"cpu"', '"cuda"')), capacity=Capacity.local(4))


def test_a_group_of_a_range_is_planned_as_far_as_it_fits() -> None:
    ranged = spec(resources="workers = { S = [2, 8] }\ncpus = 16", train="threads = 16")
    for nodes, workers in ((2, 2), (4, 4), (7, 4), (8, 8), (20, 8)):
        plan = plan_of(ranged, capacity=Capacity((NodeType("cpu", {"CPU": 16.0}, nodes),)))
        assert {setting["workers"] for setting in plan["settings"] if setting["size"] == "S"} == {workers}, nodes
    with pytest.raises(BadInput, match=r"resources.workers.S: 2: each asks for 16 CPUs on one node"):
        plan_of(ranged, capacity=Capacity((NodeType("cpu", {"CPU": 16.0}, 1),)))
    assert next(run for run in runs_of(ranged) if run.size == "S").worker_counts == [8, 4, 2], (
        "a number between them that does not divide an update's cells is none"
    )


def test_a_model_too_large_for_every_priced_node_is_refused() -> None:
    without_large = ON_GPUS.split("[prices.nodes.gpu_large]")[0].replace('"L"]', '"XL"]')
    with pytest.raises(BadInput, match=r"prices.nodes, for XL: \['cpu_spot', 'gpu_spot'\]: no kind of node holds one"):
        plan_of(parse_spec(without_large.replace("cells_per_step = 16", "cells_per_step = 32\nmicro_batch = 32")))


def test_a_cluster_cuts_stacks_only_until_it_is_full() -> None:
    tiny = SPEC.replace('["XXS", "TINY", "S"]', '["XXS"]').replace("seeds = [1, 2, 3]", f"seeds = {list(range(16))}")
    for nodes, sizes in ((1, [8] * 4), (6, [5, 5, 5, 5, 6, 6]), (32, [])):
        capacity = Capacity((NodeType("cpu", {"CPU": 1.0}, nodes),))
        stacks = plan_of(parse_spec(tiny), capacity=capacity)["stacks"]
        assert sorted(len(stack) for stack in stacks) == sizes
    unbounded = parse_spec(tiny + PRICES.replace("max_nodes = 4", ""))
    assert [len(stack) for stack in plan_of(unbounded)["stacks"]] == [8] * 4, "no bound, nothing to fill"
    mixed = plan_of(spec(), capacity=Capacity((NodeType("cpu", {"CPU": 1.0}, 9),)))
    assert [len(stack) for stack in mixed["stacks"]] == [6, 3, 3], "six runs of S keep the others busy"


def test_a_cluster_shortens_the_whole_and_not_the_runs() -> None:
    one, many = (plan_of(spec(), capacity=Capacity((NodeType("cpu", {"CPU": 2.0}, nodes),))) for nodes in (1, 8))
    assert one["totals"]["hours"] > 2 * many["totals"]["hours"]
    hours = [sum(size["hours"] for size in plan["sizes"] if size["size"] == "S") for plan in (one, many)]
    assert hours[0] == pytest.approx(hours[1])


def test_a_size_waits_for_its_rates() -> None:
    chosen = spec().model_copy(update={"lr": LearningRateSpec(rule="choose", rates=[1e-3, 1e-2], choose_fraction=1.0)})
    wide = Capacity((NodeType("cpu", {"CPU": 1.0}, 1000),))
    free, waiting = (plan_of(each, capacity=wide)["totals"]["hours"] for each in (spec(), chosen))
    assert waiting == pytest.approx(2 * free, rel=0.05)


def test_a_budget_names_what_it_leaves_undone() -> None:
    whole = plan_of(parse_spec(ON_GPUS))
    assert whole["budget"] is None
    for limit, spent in (("max_cost", "cost"), ("max_gpu_hours", "gpu_hours"), ("max_cpu_hours", "cpu_hours")):
        half = 0.5 * whole["totals"][spent]
        plan = plan_of(parse_spec(f"{ON_GPUS}[budget]\n{limit} = {half}\n"))
        budget, settings = plan["budget"], {setting["run_id"]: setting for setting in plan["settings"]}
        assert budget["stopped_by"] == limit and budget["done"] == len(settings) - len(budget["left"]) > 0
        done = sum(setting[spent] for name, setting in settings.items() if name not in budget["left"])
        assert done <= half < whole["totals"][spent]
        assert budget["left_cost"] == pytest.approx(sum(settings[name]["cost"] for name in budget["left"]))
        # the longest of what is ready starts first, so what is left is what is short
        longest = max(settings.values(), key=lambda setting: setting["hours"])
        assert longest["run_id"] not in budget["left"]
        assert f"ends at {limit} after {budget['done']} runs" in format_plan(plan)
        enough = plan_of(parse_spec(f"{ON_GPUS}[budget]\n{limit} = {10 * half}\n"))
        assert enough["budget"]["left"] == [] and "suffices for all runs" in format_plan(enough)
    wall = plan_of(parse_spec(f"{ON_GPUS}[budget]\nmax_wall_hours = {whole['totals']['hours'] / 2}\n"))["budget"]
    assert wall["stopped_by"] == "max_wall_hours" and wall["left"]


def test_many_settings_are_listed_by_size_alone() -> None:
    many = spec(grid="donors = [10, 20, 30, 40, 50, 60, 70, 80]")
    text = format_plan(plan_of(many))
    assert len(text.splitlines()) == 6 and "144 runs" in text
    assert len(format_plan(plan_of(spec())).splitlines()) == 6 + 18 + 2


def test_the_command_takes_limits_rates_and_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cluster = tmp_path / "spec.toml", tmp_path / "cluster.yaml"
    path.write_text(SPEC + PRICES)
    small = "small: {resources: {CPU: 2}, max_workers: 1}"
    cluster.write_text(f"available_node_types: {{cpu_spot: {{max_workers: 3}}, {small}}}")
    assert main(["plan", str(path), "--cluster", str(cluster), "--max-cost", "0.01", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"]["stopped_by"] == "max_cost"
    path.write_text(SPEC.replace("[train]", "[train]\nthreads = 3").replace("[resources]", "[resources]\ncpus = 4"))
    cluster.write_text(f"available_node_types: {{{small}}}")
    for arguments, complaint in (
        (["--cluster", str(cluster)], "train.threads: 3: a run of XXS asks for 3 CPUs on one node"),
        (["--max-gpu-hours", "-1"], "--max-gpu-hours: -1.0: must be more than 0"),
        (["--max-cost", "1"], "budget.max_cost: 1.0: needs prices"),
    ):
        assert main(["plan", str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
