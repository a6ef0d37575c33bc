"""What differs between runs that would count as repeats of one setting: named, and four ways out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling_ray import cli
from scaling_ray.errors import BadInput
from scaling_ray.results.foreign import Table, read_table

SIZES = (300_000, 1_000_000, 4_000_000, 15_000_000, 60_000_000)
SHARED = Path(os.environ.get("SCALING_RAY_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")


def law(params: float, nudge: float) -> float:
    return round(1.2 + (params / 3e5) ** -0.35 + 0.00137 * nudge, 6)


def table(names: str, row: Callable[[int, int], str], repeats: int = 3) -> str:
    return "\n".join([names, *(row(params, i) for params in SIZES for i in range(repeats))]) + "\n"


def read(tmp_path: Path, text: str, **options: Any) -> Table:
    (tmp_path / "runs.csv").write_text(text)
    return read_table(tmp_path / "runs.csv", **options)


VALUES: dict[str, Callable[[int], object]] = {
    "learning_rate": lambda i: 1e-3 * 2**i,
    "lr": lambda i: 1e-3 * 2**i,
    "step": lambda i: 500 * (i + 1),
    "_step": lambda i: 500 + i,
    "run": lambda i: i,
    "dataset": lambda i: "abc"[i],
    "tokens_per_param": lambda i: 20 * (i + 1),
    "batch size": lambda i: 64 << i,
    "optimizer": lambda i: ("adam", "muon", "adam")[i],
    "weight_decay": lambda i: (0, 0.1, 0.1)[i],
    "something": lambda i: i == 1,
    "genes": lambda i: 256 << i,
}


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_what_changes_between_repeats_stops_the_table_by_name(
    name: str, seeded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = (lambda i: f"{i},") if seeded else lambda i: ""
    text = table(f"params,{'seed,' * seeded}{name},loss", lambda p, i: f"{p},{seed(i)}{VALUES[name](i)},{law(p, i)}")
    (tmp_path / "runs.csv").write_text(text)
    assert cli.main(["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "fit.json")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"scaling-ray: {name}: ") and len(said.splitlines()) == 1
    shown = f"'{name}'" if " " in name else name
    assert f"--same {shown}" in said and f"--by {shown}" in said
    assert ("--last" in said) if "step" in name else ("--best" in said)
    assert not (tmp_path / "fit.json").exists()
    same = read_table(tmp_path / "runs.csv", same=[name])
    assert len(same["loss"]) == 15 and name not in same["columns_used"].values()


QUIET: dict[str, Callable[[int, int], object]] = {
    "follows the size": lambda p, i: 1e-3 / p,
    "one value": lambda p, i: 7,
    "train_loss": lambda p, i: law(p, i) - 0.1,
    "accuracy": lambda p, i: 0.5 + i / 100,
    "_runtime": lambda p, i: 1000.5 + i,
    "tokens_per_second": lambda p, i: 100 + i,
    "data_seed": lambda p, i: 10 + i,
    "run_id": lambda p, i: f"r{p}-{i}",
    "Name": lambda p, i: f"r{p}-{i}",
    "notes": lambda p, i: "again" * i,
    "best_step": lambda p, i: 900 + i,
    "params_without_embedding": lambda p, i: p - 1000,
}


@pytest.mark.parametrize("name", QUIET)
def test_what_follows_from_the_setting_or_came_out_of_a_run_does_not_stop_it(name: str, tmp_path: Path) -> None:
    text = table(f"params,seed,{name},loss", lambda p, i: f"{p},{i},{QUIET[name](p, i)},{law(p, i)}")
    assert len(read(tmp_path, text)["loss"]) == 15


def test_corpora_in_one_table_are_named_also_where_no_two_runs_share_a_setting(tmp_path: Path) -> None:
    text = table("params,tokens,corpus,loss", lambda p, i: f"{p},{30 * p + i},{'abc'[i]},{law(p, 9 * i)}")
    with pytest.raises(BadInput, match="corpus: 'a, b, c': changes between runs of one size"):
        read(tmp_path, text)
    parts = read(tmp_path, text, by="corpus").parts
    assert {name: len(part["loss"]) for name, part in parts.items()} == dict.fromkeys(
        ("corpus=a", "corpus=b", "corpus=c"), 5
    )
    assert parts["corpus=b"]["loss"] == [law(p, 9) for p in SIZES]


def test_compute_that_differs_within_a_size_is_read_as_data_where_there_is_none(tmp_path: Path) -> None:
    found = read(tmp_path, table("params,flops,loss", lambda p, i: f"{p},{6 * p * 1e6 * 3**i},{law(p, i)}"))
    assert found["cells"][:3] == pytest.approx([1e6, 3e6, 9e6])


def test_last_keeps_the_last_row_of_each_run(tmp_path: Path) -> None:
    bare = read(tmp_path, table("params,step,loss", lambda p, i: f"{p},{100 * i},{law(p, 9 - i)}"), last="step")
    assert bare["params"] == list(SIZES) and bare["loss"] == [law(p, 7) for p in SIZES]
    text = table("params,tokens,run,step,loss", lambda p, i: f"{p},{i // 2 + 1}000{i},r{p}{i % 2},{i},{law(p, -i)}", 6)
    with pytest.raises(BadInput, match="run: 'r3000000': stands in the table more than once.*--last step"):
        read(tmp_path, text)
    found = read(tmp_path, text, last="step")
    assert len(found["loss"]) == 10 and found["loss"][:2] == [law(SIZES[0], -4), law(SIZES[0], -5)]
    assert read(tmp_path, text, last="tokens")["loss"] == found["loss"]
    assert any("10 of 30 rows" in note for note in found.notes)


def test_last_passes_rows_without_a_loss_by(tmp_path: Path) -> None:
    text = table("run,params,step,loss", lambda p, i: f"r{p},{p},{i},{law(p, i) if i < 2 else ''}")
    assert read(tmp_path, text, last="step")["loss"] == [law(p, 1) for p in SIZES]


def test_last_needs_to_know_which_rows_are_one_run(tmp_path: Path) -> None:
    text = table("params,step,loss", lambda p, i: f"{p},{100 * (i % 2)},{law(p, i)}", 4)
    with pytest.raises(BadInput, match="needs a column run_id"):
        read(tmp_path, text, last="step")
    with pytest.raises(BadInput, match="is no number"):
        read(tmp_path, text.replace(",100,", ",late,"), last="step")
    with pytest.raises(BadInput, match="no run has two rows"):
        read(tmp_path, table("params,seed,loss", lambda p, i: f"{p},{i},{law(p, i)}"), last="seed")


def test_best_takes_the_value_of_the_lowest_mean_loss_and_says_so(tmp_path: Path) -> None:
    nudge = (5, 1, 3)  # the second rate is best in the mean; the third has the single lowest loss
    text = table(
        "params,lr,seed,loss",
        lambda p, i: f"{p},{1e-3 * 2 ** (i // 2)},{i % 2},{law(p, nudge[i // 2] + (i == 5) * 9 - (i == 4) * 5)}",
        6,
    )
    found = read(tmp_path, text, best="lr")
    assert found["lr"] == [0.002] * 10 and found["seed"][:2] == [0, 1]
    assert any("chosen on the same losses" in note for note in found.notes)


def test_best_over_two_columns_needs_both_named(tmp_path: Path) -> None:
    text = table(
        "params,lr,batch_size,updates,loss",
        lambda p, i: f"{p},{1e-3 * (i // 3 + 1)},{32 << i % 3},{10**6 >> i % 3},{law(p, abs(i - 4))}",
        9,
    )
    with pytest.raises(BadInput, match="lr: .*so do batch_size, updates"):
        read(tmp_path, text)
    with pytest.raises(BadInput, match="batch_size: "):
        read(tmp_path, text, best="lr")
    found = read(tmp_path, text, best=["lr", "batch_size"])
    assert found["lr"] == [0.002] * 5 and found["loss"] == [law(p, 0) for p in SIZES]


def test_copies_of_a_row_are_left_out_and_repeats_of_one_rounded_loss_are_not(tmp_path: Path) -> None:
    text = table("params,seed,loss", lambda p, i: f"{p},{i},{law(p, i)}")
    assert len(read(tmp_path, text + text.partition("\n")[2])["loss"]) == 15
    assert len(read(tmp_path, table("params,loss", lambda p, i: f"{p},2.1"))["loss"]) == 15


def test_a_column_that_is_not_there_is_named_with_those_that_are_near(tmp_path: Path) -> None:
    text = table("params,learning_rate,loss", lambda p, i: f"{p},{i},{law(p, i)}")
    for option in ("same", "best"):
        with pytest.raises(BadInput, match=f"--{option}: 'learningrate'.*learning_rate"):
            read(tmp_path, text, **{option: ["learningrate"]})
    with pytest.raises(BadInput, match="not two of these"):
        read(tmp_path, text, same=["learning_rate"], by="learning_rate")


def test_fit_prints_verdict_numbers_and_sizes_by_name_and_says_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(params: int, i: int) -> str:
        corpus, seed = divmod(i, 3)
        state = "crashed" if i == 5 and params < 1e6 else "finished"
        return f"m{params},{params / 1e6},{seed},{'xy'[corpus]},{state},{law(params, 3 * corpus + seed)}"

    text = table("model,params (M),seed,corpus,status,loss", row, 6)
    (tmp_path / "runs.csv").write_text(text)
    command = ["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "fit.json"), "--by", "corpus"]
    assert cli.main(command) == 0
    found, seen = json.loads((tmp_path / "fit.json").read_text()), capsys.readouterr()
    assert list(found["cohorts"]) == ["corpus=x", "corpus=y"]
    assert found["headline"] == found["cohorts"]["corpus=x"]["headline"]
    for part, fit in found["cohorts"].items():
        shown = seen.out.partition(f"{part}:\n")[2]
        assert shown.strip().startswith(fit["headline"]["verdict"])
        assert f"alpha = {fit['headline']['parameters']['alpha']['value']:.4g} (" in shown
        assert "m60000000: mean loss" in shown
    assert "corpus=y: 1 runs left out: failed" in seen.err and "params (M) is read times 1,000,000" in seen.err


def test_the_ways_out_are_for_tables_and_not_for_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", str(tmp_path), "--same", "lr", "--out", str(tmp_path / "fit.json")]) == 2
    assert "--same" in capsys.readouterr().err


CASES: dict[str, tuple[int | str, dict[str, Any]]] = {
    "01_M_suffix": (18, {}),
    "02_semicolon": (18, {}),
    "04_thousands": (18, {}),
    "08_perplexity_as_loss": (18, {"log_loss": True}),
    "13_units_millions": ("params: '0.1': below one", {}),
    "19_D_equals_20N": (18, {}),
    "22_checkpoints_step_only": ("step: .*--last step", {"last": "step"}),
    "23_learning_rate_col": ("learning_rate: .*--best learning_rate", {"best": "learning_rate"}),
    "26_num_parameters_eval": (18, {}),
    "29_train_and_val_loss": (18, {}),
    "30_bool_undertrained_one": (18, {}),
    "33_tab_sep": (18, {}),
    "35_trailing_blank": (18, {}),
    "38_one_seed_9sizes": (9, {}),
    "43_seed_nan_text": (18, {}),
    "gadre_c4_original_M1": (6, {}),
    "gadre_pooled": ("dataset: .*--by dataset", {"by": "dataset"}),
    "refused_though_widest_is_1.5": (234, {}),
    "supported_though_widest_is_6": (34, {}),
}


@pytest.mark.skipif(not (SHARED / "cases" / "tables").is_dir(), reason="without the tables of bug reports")
@pytest.mark.parametrize("name", CASES)
def test_tables_of_bug_reports_are_read_or_named(name: str) -> None:
    wanted, options = CASES[name]
    path = SHARED / "cases" / "tables" / f"{name}.csv"
    if isinstance(wanted, str):
        with pytest.raises(BadInput, match=wanted):
            read_table(path)
    else:
        assert len(read_table(path)["loss"]) == wanted
    if options:
        found = read_table(path, **options)
        assert found.notes and (len(found["loss"]) in (5, 6, 18) if not found.parts else len(found.parts) == 3)


PUBLIC: dict[str, tuple[int | str, dict[str, Any]]] = {
    "chin_epoch_240": (240, {}),
    "chin_epoch_245": (245, {}),
    "chin_epoch_native": (245, {}),
    "gadre_c4_original_c4val_nolr": (34, {}),
    "gadre_rpj_c4val_nolr": (35, {}),
    "gemstone_checkpoints_renamed": ("run: .*--last tokens", {"last": "tokens"}),
    "gemstone_final": (22, {}),
    "kyo_native": (234, {}),
    "marin_raw_native": (92, {}),
    "oac_marin_202603__comma__llama_2": (80, {}),
    "oac_misfitting__fineweb_c4__transformer": (106, {}),
    "oac_ml_scalefit__massivetext__chinchilla": (89, {}),
    "olmo_ckpt_small": ("run: .*--last step", {"last": "step"}),
    "olmo_ladder_final": (24, {}),
    "steplaw_best": (17, {}),
    "steplaw_native": ("lr: .*so do bs", {"best": ["lr", "bs"]}),
    "valtric_native": (4, {}),
}


@pytest.mark.skipif(not (SHARED / "tables").is_dir(), reason="without the public tables")
@pytest.mark.parametrize("name", PUBLIC)
def test_public_tables_are_read_or_named(name: str) -> None:
    wanted, options = PUBLIC[name]
    path = SHARED / "tables" / f"{name}.csv"
    if isinstance(wanted, str):
        with pytest.raises(BadInput, match=wanted):
            read_table(path)
        assert len(read_table(path, **options)["loss"]) in (17, 18, 22)
    else:
        found = read_table(path)
        assert len(found["loss"]) == wanted and ("cells" in found) == (name != "valtric_native")
