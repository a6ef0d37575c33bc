"""The spec's language: what is refused and how, the grid it spans, and the identity of each run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from scaling_ray.errors import BadInput, DamagedFiles, LeaseHeld, Lost
from scaling_ray.rules import TrainingRules
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.spec import SweepSpec, TrainSpec, load_spec, parse_spec

GOLDEN = Path(__file__).parent / "golden" / "run_ids.json"

BASE = """
name = "base"
[data]
genes = 128
[grid]
sizes = ["TINY", "HALF"]
genes = [64, 128]
cells = [500, "all"]
seeds = [1, 2]
[sizes.HALF]
width = 8
layers = 1
heads = 2
feedforward = 2
[lr]
rule = "choose"
rates = [1e-3, 1e-2]
[lr.per_size]
HALF = [3e-3, 3e-2, 1e-1]
[train]
max_cells_seen = { TINY = 6400, default = 3200 }
cells_per_step = 32
[resources]
cpus = 2
"""


PRICES = """
[prices]
as_of = "2026-11-01"
[prices.nodes.gpu_spot]
cpus = 8
gpus = 1
gpu = "L4"
memory_gib = 32
per_hour = 0.98
spot_per_hour = 0.4
max_nodes = 8
"""


def changed(*pairs: tuple[str, str]) -> str:
    text = BASE
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def ids(text: str) -> list[str]:
    return [run.run_id for run in runs_of(parse_spec(text))]


REFUSED = [
    # what is wrong, (old, new) in BASE, field, value shown, a word of the way out
    ("unknown key", ("cells_per_step", "cells_per_stop"), "train.cells_per_stop", "32", "cells_per_step?"),
    ("unknown table", ("[resources]", "[resource]"), "resource", "cpus", "resources?"),
    ("missing key", ("seeds = [1, 2]", ""), "grid.seeds", "None", "add it"),
    ("text for a number", ("cpus = 2", 'cpus = "2"'), "resources.cpus", "'2'", "valid integer"),
    ("number for a list", ("genes = [64, 128]", "genes = 64"), "grid.genes", "64", "valid list"),
    ("true for a number", ("seeds = [1, 2]", "seeds = [true]"), "grid.seeds.0", "True", "valid integer"),
    ("fraction of a cell", ("cells = [500,", "cells = [500.5,"), "grid.cells.0", "500.5", "or input should be 'all'"),
    (
        "budget as text",
        ("{ TINY = 6400, default = 3200 }", '"many"'),
        "train.max_cells_seen",
        "'many'",
        "valid integer",
    ),
    ("budget of an unknown size", ("{ TINY", "{ TINI"), "train.max_cells_seen", "TINI", "[sizes.TINI]"),
    ("budget that leaves a size out", (", default = 3200", ""), "train.max_cells_seen", "TINY", "line for HALF"),
    ("no such size", ('"TINY", "HALF"]', '"TINY", "HUGE"]'), "grid.sizes", "HUGE", "XXS"),
    ("rates of an unknown size", ("HALF = [3e-3", "HAVE = [3e-3"), "lr.per_size", "HAVE", "[sizes.HAVE]"),
    ("heads do not divide", ("heads = 2", "heads = 3"), "sizes.HALF.width", "8", "divisible by heads = 3"),
    ("width as a fraction", ("width = 8", "width = 8.5"), "sizes.HALF.width", "8.5", "whole number"),
    ("size without layers", ("layers = 1\n", ""), "sizes.HALF", "layers", "exactly width"),
    ("more genes than the shards", ("genes = [64, 128]", "genes = [64, 129]"), "grid.genes", "129", "data.genes = 128"),
    ("a seed twice", ("seeds = [1, 2]", "seeds = [1, 1]"), "grid.seeds", "[1, 1]", "remove"),
    ("a size twice", ('["TINY", "HALF"]', '["TINY", "TINY"]'), "grid.sizes", "TINY", "remove"),
    ("a rate twice", ("rates = [1e-3, 1e-2]", "rates = [1e-2, 1e-2]"), "lr.rates", "0.01", "remove"),
    (
        "one rate to choose from",
        ("HALF = [3e-3, 3e-2, 1e-1]", "HALF = [3e-3]"),
        "lr.per_size.HALF",
        "0.003",
        "at least 2",
    ),
    ("several rates, none to choose", ('rule = "choose"', 'rule = "fixed"'), "lr.rates", "0.001", "another rule"),
    ("a rate of zero", ("rates = [1e-3,", "rates = [0.0,"), "lr.rates.0", "0.0", "greater than 0"),
    ("a rate that is no number", ("rates = [1e-3,", "rates = [nan,"), "lr.rates.0", "nan", "finite"),
    ("choice on a seed of the fit", ("seeds = [1, 2]", "seeds = [1, 101]"), "lr.choose_seed", "101", "of its own"),
    (
        "micro-batch above the batch",
        ("cells_per_step = 32", "cells_per_step = 32\nmicro_batch = 33"),
        "train.micro_batch",
        "33",
        "at most",
    ),
    ("workers that do not divide", ("cpus = 2", "workers = { TINY = 3 }"), "resources.workers.TINY", "3", "divide"),
    ("a range upside down", ("cpus = 2", "workers = { TINY = [8, 4] }"), "resources.workers.TINY", "[8, 4]", "[4, 8]"),
    (
        "a range of one",
        ("cpus = 2", "workers = { TINY = [4] }"),
        "resources.workers.TINY",
        "[4]",
        "fewest and the most",
    ),
    ("an uneven range", ("cpus = 2", "workers = { TINY = [2, 3] }"), "resources.workers.TINY", "[2, 3]", "divide"),
    (
        "a range from nothing",
        ("cpus = 2", "workers = { TINY = [0, 2] }"),
        "resources.workers.TINY",
        "0",
        "greater than 0",
    ),
    (
        "offload without DeepSpeed",
        ("cpus = 2", "cpus = 2\noffload_optimizer = true"),
        "resources.offload_optimizer",
        "True",
        "engine = 'deepspeed'",
    ),
    (
        "offload of what is not shared out",
        ("cpus = 2", "engine = 'deepspeed'\nzero_stage = 0\noffload_optimizer = true"),
        "resources.offload_optimizer",
        "True",
        "zero_stage >= 1",
    ),
    (
        "fractions that do not add up",
        ("[data]", "[data]\nfractions = { train = 0.5 }"),
        "data.fractions",
        "0.5",
        "add up to 1",
    ),
    ("a name with a slash", ('"base"', '"a/b"'), "name", "'a/b'", "pattern"),
    ("no TOML", ("[grid]", "[grid"), "spec", "line", "TOML"),
]


@pytest.mark.parametrize(
    ("edit", "field", "value", "way_out"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_bad_specs_are_refused_in_one_line(edit: tuple[str, str], field: str, value: str, way_out: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_spec(changed(edit))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert caught.value.field == field
    assert message.startswith(f"{field}: ")
    assert value in message
    assert way_out in caught.value.remedy


def test_a_size_name_cannot_leave_the_sweep_directory() -> None:
    with pytest.raises(BadInput, match="file names"):
        parse_spec(
            changed(('"HALF"]', '"../HALF"]'), ("[sizes.HALF]", '[sizes."../HALF"]'), ("HALF = [3e-3, 3e-2, 1e-1]", ""))
        )


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name a TOML file"):
        load_spec(tmp_path / "absent.toml")
    (tmp_path / "spec.toml").write_text(BASE)
    assert load_spec(tmp_path / "spec.toml") == parse_spec(BASE)


def test_errors_survive_the_way_between_processes() -> None:
    bad = pickle.loads(pickle.dumps(BadInput("S000", "field", 3, "the way out")))
    assert (str(bad), bad.field, bad.value, bad.remedy) == ("field: 3: the way out [S000]", "field", 3, "the way out")
    damaged = pickle.loads(pickle.dumps(DamagedFiles("D000", ["a: gone", "b: cut"])))
    assert (str(damaged), damaged.problems) == ("a: gone; b: cut [D000]", ["a: gone", "b: cut"])
    lost = pickle.loads(pickle.dumps(Lost("M000", "a node is gone", node_gone=True)))
    assert (str(lost), lost.said, lost.node_gone) == ("a node is gone [M000]", "a node is gone", True)
    held = pickle.loads(pickle.dumps(LeaseHeld("P000", "another works here")))
    assert (type(held), str(held), held.code) == (LeaseHeld, "another works here [P000]", "P000")


def test_grid_is_the_product_with_rate_trials_first() -> None:
    runs = runs_of(parse_spec(BASE))
    rates = [run for run in runs if run.role == "rate"]
    assert runs[: len(rates)] == rates
    assert [(run.size, run.genes, run.lr) for run in rates] == [
        (size, genes, lr)
        for size, lrs in (("TINY", (1e-3, 1e-2)), ("HALF", (3e-3, 3e-2, 1e-1)))
        for genes in (64, 128)
        for lr in lrs
    ]
    assert all(run.seed == 101 and run.cells is None for run in rates)
    law = runs[len(rates) :]
    assert len({(run.size, run.genes, run.cells, run.seed) for run in law}) == len(law) == 2 * 2 * 2 * 2
    for run in law:
        assert run.lr is None
        expected = [rate.run_id for rate in rates if (rate.size, rate.genes) == (run.size, run.genes)]
        assert run.lr_candidates == expected
    assert len({run.run_id for run in runs}) == len(runs)


def test_rate_axis_and_fixed_rate() -> None:
    grid = runs_of(parse_spec(changed(('rule = "choose"', 'rule = "grid"'))))
    assert len(grid) == 2 * 2 * 2 * (2 + 3)
    assert {run.lr for run in grid if run.size == "HALF"} == {3e-3, 3e-2, 1e-1}
    assert {run.lr for run in grid if run.size == "TINY"} == {1e-3, 1e-2}
    text = changed(('rule = "choose"', ""), ("[1e-3, 1e-2]", "[1e-3]"), ("[3e-3, 3e-2, 1e-1]", "[3e-3]"))
    fixed = runs_of(parse_spec(text))
    assert [run.role for run in fixed] == ["law"] * 16
    assert {(run.size, run.lr) for run in fixed} == {("TINY", 1e-3), ("HALF", 3e-3)}


def test_budgets_per_size_come_in_whole_updates() -> None:
    text = changed(("default = 3200", "default = 3210"), ("[lr]", "[lr]\nchoose_fraction = 0.25"))
    budgets = {(run.role, run.size): run.train.max_cells_seen for run in runs_of(parse_spec(text))}
    assert budgets == {("law", "TINY"): 6400, ("law", "HALF"): 3200, ("rate", "TINY"): 1600, ("rate", "HALF"): 800}
    assert TrainSpec(max_cells_seen=1).rules("TINY").max_cells_seen == 32


def test_run_ids_are_the_golden_ones() -> None:
    """They name directories and MLflow runs of sweeps that exist: a change orphans all of those."""
    assert ids(BASE) == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    "pair",
    [
        ('"base"', '"another"'),
        ("cpus = 2", "cpus = 4\nmax_failures = 9\nworkers = { TINY = 2 }\nengine = 'deepspeed'\nzero_stage = 2"),
        ("cpus = 2", "workers = { TINY = 2 }\nengine = 'deepspeed'\noffload_optimizer = true"),
        ("cpus = 2", "workers = { TINY = [4, 8] }"),
        ("[train]", "[train]\ncheckpoint_seconds = 1.0"),
        ("[train]", "[train]\nmicro_batch = 4\nprecision = 'bf16'\nthreads = 2"),
        ("[train]", "[train]\ndropout = 0.0"),
        ("default = 3200", "default = 3200, XL = 10"),
        ("[data]", '[data]\ntitle = "Bone marrow"\nsource = "GEO"'),
        ("[resources]", f"[budget]\nmax_cost = 10.0\nmax_gpu_hours = 1.5\n{PRICES}\n[resources]"),
    ],
    ids=[
        "name",
        "resources",
        "offload",
        "a range of workers",
        "checkpoint_seconds",
        "execution",
        "a default written out",
        "budget of a size not in the grid",
        "what reports call the data",
        "budget and prices",
    ],
)
def test_run_ids_do_not_depend_on(pair: tuple[str, str]) -> None:
    assert ids(changed(pair)) == ids(BASE)


def test_only_runs_of_several_workers_offload() -> None:
    text = changed(("cpus = 2", "workers = { TINY = 2 }\nengine = 'deepspeed'\noffload_optimizer = true"))
    assert {(run.size, run.execution.engine, run.execution.offload_optimizer) for run in runs_of(parse_spec(text))} == {
        ("TINY", "deepspeed", True),
        ("HALF", "plain", False),
    }


def test_the_budget_of_another_size_leaves_a_run_alone() -> None:
    before, after = ids(BASE), ids(changed(("TINY = 6400", "TINY = 12800")))
    assert [a == b for a, b in zip(before, after, strict=True)] == ["HALF" in a for a in before]


OTHER_TRAIN_VALUES = {
    "recipe": '"published"',
    "start": '"drawn"',
    "mask_fraction": "0.2",
    "umi_fraction": "0.5",
    "held_out_in_training": "true",
    "max_cells_seen": "64000",
    "cells_per_step": "64",
    "schedule": '"linear"',
    "warmup_fraction": "0.1",
    "final_lr_fraction": "0.1",
    "weight_decay": "0.0",
    "adam_beta2": "0.95",
    "grad_clip": "2.0",
    "dropout": "0.1",
    "evaluations": "10",
    "curve_cells": "256",
    "smoothing_evaluations": "1",
    "patience_evaluations": "0",
}


def test_every_training_field_is_covered() -> None:
    execution = {"checkpoint_seconds", "micro_batch", "precision", "threads"}
    assert execution == set(TrainSpec.model_fields) - set(TrainingRules.model_fields)
    # objective has one value so far; a trunk is what another schedule has, and is tested with its own fields
    assert set(OTHER_TRAIN_VALUES) | {"objective", "trunk"} == set(TrainingRules.model_fields)


@pytest.mark.parametrize("field", OTHER_TRAIN_VALUES)
def test_run_ids_change_with_every_training_field(field: str) -> None:
    base = changed(("{ TINY = 6400, default = 3200 }", "6400"))
    lines = [line for line in base.splitlines() if not line.startswith(f"{field} =")]
    other = "\n".join(lines).replace("[train]", f"[train]\n{field} = {OTHER_TRAIN_VALUES[field]}")
    assert not set(ids(base)) & set(ids(other))


@pytest.mark.parametrize(
    "pair",
    [
        ("genes = 128\n", "genes = 256\n"),
        ("[data]", '[data]\nsalt = "other"'),
        ("[data]", "[data]\nfractions = { train = 0.7, val = 0.2, test = 0.1 }"),
        ("[lr]", "[lr]\nchoose_seed = 102"),
    ],
)
def test_run_ids_change_with_the_data_and_the_choice(pair: tuple[str, str]) -> None:
    assert not set(ids(changed(pair))) & set(ids(BASE))


def test_a_custom_size_counts_by_its_shape() -> None:
    assert not {i for i in ids(changed(("width = 8", "width = 16"))) if "HALF" in i} & set(ids(BASE))


def test_a_run_survives_json() -> None:
    for run in runs_of(parse_spec(BASE)):
        again = RunSpec.model_validate_json(run.model_dump_json())
        assert again == run
        assert again.params == run.params


def test_specs_are_frozen_and_closed() -> None:
    spec = parse_spec(BASE)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    again = SweepSpec.model_validate_json(spec.model_dump_json())
    assert again == spec


def test_budget_and_prices_are_read() -> None:
    spec = parse_spec(BASE + "[budget]\nmax_cost = 25\nmax_wall_hours = 8.5\n" + PRICES)
    assert (spec.budget.max_cost, spec.budget.max_wall_hours, spec.budget.max_gpu_hours) == (25, 8.5, None)
    assert spec.budget.is_limited and not parse_spec(BASE).budget.is_limited
    assert spec.prices is not None and parse_spec(BASE).prices is None
    node = spec.prices.nodes["gpu_spot"]
    assert (spec.prices.currency, node.gpus, node.lowest_per_hour, node.max_nodes) == ("USD", 1, 0.4, 8)
    assert node.model_copy(update={"spot_per_hour": None}).lowest_per_hour == 0.98


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[budget]\nmax_gpu_hours = 0\n", r"budget.max_gpu_hours: 0"),
        (PRICES.replace("2026-11-01", "2026-13-01"), r"prices.as_of: '2026-13-01': is no day; write it as YYYY-MM-DD"),
        (PRICES.replace("2026-11-01", "last week"), r"prices.as_of: 'last week'"),
        (PRICES.replace("gpus = 1", "gpus = 0"), r"prices.nodes.gpu_spot.gpu: 'L4': names a GPU of a node without"),
        (PRICES.replace("per_hour = 0.98", "per_hour = -1"), r"prices.nodes.gpu_spot.per_hour: -1"),
        (PRICES.split("[prices.nodes")[0], r"prices.nodes: None: is missing"),
    ],
)
def test_budgets_and_prices_that_are_none_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        parse_spec(BASE + text)
