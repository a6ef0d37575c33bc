"""Tables as people have them: separators, numbers, names of columns, losses, states; and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling_ray.errors import BadInput
from scaling_ray.results.foreign import Table, read_table

SIZES = (200_000, 700_000, 2_500_000, 9_000_000, 31_000_000)
RUNS = tuple((params, seed) for params in SIZES for seed in (4, 5))
PARAMS = [params for params, _ in RUNS]
LOSSES = [round(1.1 + (params / 2e5) ** -0.3 + seed * 0.00131, 6) for params, seed in RUNS]


def lines(names: str, row: Callable[[int, int, float], str], *, end: str = "\n") -> str:
    """A table with a line per run."""
    rows = [row(params, seed, loss) for (params, seed), loss in zip(RUNS, LOSSES, strict=True)]
    return end.join([names, *rows]) + end


def read(tmp_path: Path, text: str, encoding: str = "utf-8", **options: Any) -> Table:
    path = tmp_path / "runs.csv"
    path.write_bytes(text.encode(encoding))
    return read_table(path, **options)


def comma(value: float) -> str:
    return f"{value:.6f}".replace(".", ",")


def apart(value: int, between: str) -> str:
    return f"{value:,}".replace(",", between)


PLAIN = lines("params,seed,loss", lambda p, s, v: f"{p},{s},{v}")
SAME_TABLE = {
    "commas": PLAIN,
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace(",", "|"),
    "spaces": PLAIN.replace(",", "  "),
    "lines of Windows": PLAIN.replace("\n", "\r\n"),
    "a line that says the separator": "sep=;\n" + PLAIN.replace(",", ";"),
    "a title above the names": "runs of this winter\n\n" + PLAIN,
    "a comment above the names": "# exported\n" + PLAIN,
    "decimal commas": lines("params;seed;loss", lambda p, s, v: f"{p};{s};{comma(v)}"),
    "decimal commas, quoted": lines("params,seed,loss", lambda p, s, v: f'{p},{s},"{comma(v)}"'),
    "points between thousands": lines("params;seed;loss", lambda p, s, v: f"{apart(p, '.')};{s};{comma(v)}"),
    "commas between thousands": lines("params,seed,loss", lambda p, s, v: f'"{p:,}",{s},{v}'),
    "blanks between thousands": lines("params,seed,loss", lambda p, s, v: f"{apart(p, ' ')},{s},{v}"),
    "M": lines("params,seed,loss", lambda p, s, v: f"{p / 1e6}M,{s},{v}"),
    "B and M and k": lines(
        "params,seed,loss", lambda p, s, v: f"{p // 1000}k,{s},{v}" if p < 1e6 else f"{p / 1e9} B,{s},{v}"
    ),
    "words": lines("params,seed,loss", lambda p, s, v: f"{p / 1e6} million,{s},{v}"),
    "powers of ten": lines("params,seed,loss", lambda p, s, v: f"{p:.1e},{s},{v}"),
    "params (M)": lines("params (M),seed,loss", lambda p, s, v: f"{p / 1e6},{s},{v}"),
    "params (M), said again": lines("params (M),seed,loss", lambda p, s, v: f"{p / 1e6}M,{s},{v}"),
    "N [billions]": lines("N [billions],seed,loss", lambda p, s, v: f"{p / 1e9},{s},{v}"),
    "params_in_millions": lines("params_in_millions,seed,loss", lambda p, s, v: f"{p / 1e6},{s},{v}"),
    "camels": lines("numParams,seed,valLoss", lambda p, s, v: f"{p},{s},{v}"),
    "W&B": lines("Name,State,num_parameters,seed,eval/loss", lambda p, s, v: f"r{p}-{s},finished,{p},{s},{v}"),
    "MLflow": lines(
        "Run ID,Name,Status,params.n_params,params.seed,metrics.val_bpb",
        lambda p, s, v: f"x{p}{s},bold-{p}-{s},FINISHED,{p},{s},{v}",
    ),
    "percent": lines("params,seed,loss", lambda p, s, v: f"{p},{s},{100 * v:.4f}%"),
    "an index": lines(",params,seed,loss", lambda p, s, v: f"{RUNS.index((p, s))},{p},{s},{v}"),
    "an index by pandas": lines("Unnamed: 0,params,seed,loss", lambda p, s, v: f"{RUNS.index((p, s))},{p},{s},{v}"),
    "spaces and an index by R": lines("params seed loss", lambda p, s, v: f'"{RUNS.index((p, s)) + 1}" {p} {s} {v}'),
    "an index by R": lines("params,seed,loss", lambda p, s, v: f'"{RUNS.index((p, s)) + 1}",{p},{s},{v}'),
    "blank rows and columns": lines("params,seed,loss,,", lambda p, s, v: f"{p},{s},{v},,") + ",,,,\n\n,,,,\n",
    "a name for each size": lines("Name,params,seed,loss", lambda p, s, v: f"M-{p},{p},{s},{v}"),
    "the size's own name": lines("model,params,seed,loss", lambda p, s, v: f"M-{p},{p},{s},{v}"),
    "only the size's name": lines("size,seed,loss", lambda p, s, v: f"{p / 1e6}M,{s},{v}"),
    "one column twice": lines("params,seed,loss,loss", lambda p, s, v: f"{p},{s},{v},{v}"),
}


@pytest.mark.parametrize("kind", SAME_TABLE)
def test_one_table_is_read_alike_however_it_is_written(kind: str, tmp_path: Path) -> None:
    table = read(tmp_path, SAME_TABLE[kind])
    assert table["params"] == pytest.approx(PARAMS, rel=1e-12)
    assert table["loss"] == pytest.approx(LOSSES, rel=1e-12)
    assert [int(seed) for seed in table["seed"]] == [seed for _, seed in RUNS]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_byte_order_are_no_part_of_a_name(encoding: str, tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN, encoding)["columns_used"]["params"] == "params"


def test_an_index_of_pandas_in_parquet_is_no_column(tmp_path: Path) -> None:
    columns = {"params": PARAMS, "loss": LOSSES, "__index_level_0__": list(range(len(RUNS)))}
    pq.write_table(pa.table(columns), tmp_path / "runs.parquet")
    assert read_table(tmp_path / "runs.parquet")["params"] == PARAMS


SAID = {
    "fields are separated by tabs": SAME_TABLE["tabs"],
    "decimal comma": SAME_TABLE["decimal commas"],
    "params (M) is read times 1,000,000": SAME_TABLE["params (M)"],
    "params is read with M": SAME_TABLE["M"],
    "3 blank rows left out": SAME_TABLE["blank rows and columns"],
    "'Unnamed: 0' numbers the rows": SAME_TABLE["an index"],
    "columns not read: accuracy": lines("params,seed,loss,accuracy", lambda p, s, v: f"{p},{s},{v},{s}"),
    "1 rows (11) equal an earlier one": PLAIN + PLAIN.splitlines()[3] + "\n",
    "tokens is 20 x params": lines("params,tokens,seed,loss", lambda p, s, v: f"{p},{20 * p},{s},{v}"),
    "looks like a perplexity": lines("params,seed,loss", lambda p, s, v: f"{p},{s},{100 * v}"),
    "natural logarithm of val_ppl": lines("params,seed,val_ppl", lambda p, s, v: f"{p},{s},{100 * v}"),
    "without the embedding": lines("non_embedding_params,seed,loss", lambda p, s, v: f"{p},{s},{v}"),
    "tokens = C / (6 params)": lines("N,C,loss", lambda p, s, v: f"{p},{p * 10**s},{v}"),
}


@pytest.mark.parametrize("sentence", SAID)
def test_what_was_read_as_what_is_said(sentence: str, tmp_path: Path) -> None:
    assert any(sentence in note for note in read(tmp_path, SAID[sentence]).notes)


def test_a_plain_table_has_nothing_to_be_said_of_it(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN).notes == ()


REFUSED = {
    "below one": (lines("params,loss", lambda p, s, v: f"{p / 1e6},{v}"), "params: '0.2': below one.*params (M)"),
    "small fractions": (lines("N,loss", lambda p, s, v: f"{p / 1e5 + 0.1},{v}"), "fractions.*N (B)"),
    "a unit said twice": (lines("params (M),loss", lambda p, s, v: f"{p},{v}"), "unit is said twice"),
    "tokens in billions": (lines("params,tokens,loss", lambda p, s, v: f"{p},2.5,{v}"), "tokens: .*fractions"),
    "M beside ones": (
        lines("params,loss", lambda p, s, v: f"{p / 1e6}{'M' if p > 3e5 else ''},{v}"),
        "beside numbers in M; write all",
    ),
    "two signs": (lines("params;seed;loss", lambda p, s, v: f"{p:,};{s};{comma(v)}"), "comma and a decimal point"),
    "a loss of two thousand": (
        lines("params,loss", lambda p, s, v: f'{p},"{f"{v + 1:.3f}".replace(".", ",")}"'),
        "may have a decimal sign or thousands",
    ),
    "two losses": (lines("params,loss,val_loss", lambda p, s, v: f"{p},{v},{v + 0.1}"), "--loss val_loss takes"),
    "two evaluations": (lines("params,eval/a/loss,eval/b/loss", lambda p, s, v: f"{p},{v},{v + 1}"), "--loss eval/b"),
    "training only": (lines("params,train/loss", lambda p, s, v: f"{p},{v}"), "only loss is that of training"),
    "losses of one name": (lines("params,loss,loss", lambda p, s, v: f"{p},{v},{v + 1}"), "two columns of one name"),
    "sizes in logarithms": (lines("log10(params),loss", lambda p, s, v: f"5.1,{v}"), "params.*near: log10"),
    "no names": ("1000,2.0\n2000,1.5\n", "first line should name the columns"),
    "names alone": ("params,loss\n", "has no rows"),
    "Latin letters of one byte": ("", "UTF-8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_may_mean_two_things_is_one_line_with_the_way_out(kind: str, tmp_path: Path) -> None:
    text, pattern = REFUSED[kind]
    data = ("params,größe,loss\n1,1,1\n", "latin-1") if not text else (text, "utf-8")
    with pytest.raises(BadInput) as caught:
        read(tmp_path, *data)
    first, _, second = pattern.partition(".*")
    assert first in str(caught.value) and second in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_held_out_loss_is_taken_beside_that_of_training_and_said(tmp_path: Path) -> None:
    text = lines("params,train_loss,val_loss,loss", lambda p, s, v: f"{p},{v / 2},{v},{v / 2}")
    table = read(tmp_path, text)
    assert table["loss"] == LOSSES and table["columns_used"]["loss"] == "val_loss"
    assert any("loss is the loss of training" in note for note in table.notes)
    assert read(tmp_path, text, loss="train_loss")["loss"] == [loss / 2 for loss in LOSSES]


def test_a_loss_that_was_asked_for_has_no_other_loss_beside_it(tmp_path: Path) -> None:
    text = lines("params,loss,val_loss,final_val_loss", lambda p, s, v: f"{p},{v},{v + 1},{v + 2}")
    table = read(tmp_path, text, loss="Val-Loss")
    assert table["loss"] == [pytest.approx(loss + 1) for loss in LOSSES]
    assert "val_loss" not in table and "final_val_loss" not in table


def test_a_perplexity_is_read_by_its_logarithm(tmp_path: Path) -> None:
    named = read(tmp_path, lines("params,perplexity", lambda p, s, v: f"{p},{exp(v)!r}"))
    asked = read(tmp_path, lines("params,loss", lambda p, s, v: f"{p},{exp(v)!r}"), log_loss=True)
    assert named["loss"] == asked["loss"] == pytest.approx(LOSSES, rel=1e-12)


@pytest.mark.parametrize("word", ["NaN", "nan", "None", "", "n/a", "NULL"])
def test_a_seed_that_is_not_known_is_none(word: str, tmp_path: Path) -> None:
    text = lines("params,seed,loss", lambda p, s, v: f"{p},{word if s == 5 else s},{v}")
    assert read(tmp_path, text)["seed"][:2] == [4, None]


def test_states_of_others_are_those_of_this_project(tmp_path: Path) -> None:
    words = ["finished", "FINISHED", "crashed", "killed", "Running", "diverged"]
    rows = [f"1000,{word},{'' if i > 1 else 2.0 - i}" for i, word in enumerate(words)]
    table = read(tmp_path, "\n".join(["params,State,val_loss", *rows]))
    assert table["status"] == ["done", "done", "failed", "failed", "running", "failed"]
    assert table["failure"] == [None] * 5 + ["diverged"]


def test_flags_are_read_by_any_word(tmp_path: Path) -> None:
    text = lines("params,seed,loss,undertrained", lambda p, s, v: f"{p},{s},{v},{'yes' if s == 5 else 'FALSE'}")
    assert read(tmp_path, text)["undertrained"][:2] == [False, True]


def test_rows_are_named_by_their_number_in_the_table(tmp_path: Path) -> None:
    text = PLAIN.splitlines()
    text[7] = text[7].rpartition(",")[0] + ",low"
    with pytest.raises(BadInput, match="loss: 'low': row 7: not a number"):
        read(tmp_path, "\n".join([text[0], ",,", *text[1:]]))
