"""The shipped examples and the specs that ``init`` writes: each loads, plans, and says of every key what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.runs import runs_of
from scaling_ray.spec import load_spec, parse_spec
from scaling_ray.specs import about_example, example_names, example_path, spec_path
from scaling_ray.specs.annotated import ABOUT_KEYS, EXAMPLES, TABLES, annotated_spec

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE_NAMES = [
    "cells",
    "corrected",
    "demo",
    "first-look",
    "grid",
    "planted",
    "planted-law",
    "published",
    "real-bone-marrow",
    "real-bone-marrow-512",
]
COMMENTED_KEY = re.compile(r"^# (\w+) = ", re.MULTILINE)


def test_the_examples_are_these() -> None:
    assert example_names() == EXAMPLE_NAMES


def test_every_spec_of_the_repository_is_a_shipped_one() -> None:
    folder = REPOSITORY / "jobs"
    assert sorted(path.stem for path in folder.glob("*.toml")) == EXAMPLE_NAMES
    for name in EXAMPLE_NAMES:
        assert (folder / f"{name}.toml").read_bytes() == example_path(name).read_bytes()


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_every_example_loads_plans_and_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = load_spec(example_path(name))
    assert spec.name == name
    assert about_example(name).endswith(".") and not about_example(name).startswith("#")
    assert main(["plan", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["runs"] > 1


def test_the_published_spec_is_the_study_and_the_corrected_one_its_sizes() -> None:
    """Parameters and protocol as arXiv 2602.15253 and its released code give them."""
    runs = runs_of(load_spec(example_path("published")))
    reported = {
        512: [533, 9_953, 132_993, 859_137, 19_178_497, 100_510_801, 340_770_817],
        1024: [1_045, 18_145, 165_761, 924_673, 19_440_641, 101_033_041, 341_557_249],
    }
    for genes, params in reported.items():
        assert sorted({run.params for run in runs if run.genes == genes}) == params
    assert {(512, 200_000), (1024, 10_000)} <= {(run.genes, run.cells) for run in runs}
    for run in runs:
        train = run.train
        assert (run.lr, train.schedule, train.warmup_fraction, train.dropout) == (3.125e-5, "constant", 0.0, 0.1)
        assert (train.cells_per_step, train.total_steps, train.weight_decay) == (32, 7_500, 0.01)
        assert train.recipe == "published" and not train.starts_from_cells and train.held_out_in_training
    corrected = runs_of(load_spec(example_path("corrected")))
    assert {run.params for run in corrected} == {run.params for run in runs}
    assert {run.train.recipe for run in corrected} == {"corrected"}


def test_the_grid_has_a_thousand_settings_whose_rates_come_from_one_size() -> None:
    runs = runs_of(load_spec(example_path("grid")))
    settings = {(run.size, run.genes, run.cells, run.donors) for run in runs if run.role == "law"}
    assert len(settings) >= 1_000
    assert {run.size for run in runs if run.role == "rate"} == {"W16", "W128"}
    tuned = {run.run_id for run in runs if run.role == "rate" and run.size == "W16"}
    assert all(set(run.lr_candidates) <= tuned for run in runs)


def test_every_key_of_the_language_is_explained() -> None:
    assert {table: set(keys) for table, keys in ABOUT_KEYS.items()} == {
        table: set(model.model_fields) for table, model in TABLES.items()
    }


@pytest.mark.parametrize("name", [*EXAMPLE_NAMES, "my-sweep"])
def test_an_annotated_spec_is_the_example_with_every_key_in_it(name: str) -> None:
    text = annotated_spec(name)
    example = load_spec(example_path(name if name in EXAMPLE_NAMES else "cells"))
    assert parse_spec(text) == example.model_copy(update={"name": name})
    for table, keys in ABOUT_KEYS.items():
        # the prices to fill in stand behind the last table, indented
        lines = text.split(f"\n[{table}]\n")[1].split("\n[")[0].split("\n#    [prices]")[0].splitlines()
        stated = [line.removeprefix("# ").split(" = ")[0] for line in lines if " = " in line]
        assert stated == list(keys)
    assert max(len(line) for line in text.splitlines()) <= 140


def test_a_commented_line_shows_the_default() -> None:
    text = annotated_spec("demo")
    places = list(COMMENTED_KEY.finditer(text))
    assert len(places) > 30
    plain = parse_spec(text)
    for place in places:
        table = re.findall(r"^\[(\w+)\]$", text[: place.start()], re.MULTILINE)[-1]
        changed = parse_spec(text[: place.start()] + text[place.start() + 2 :])
        assert (changed != plain) == (f"{table}.{place[1]}" in EXAMPLES), place[0]


def test_the_commented_prices_are_a_table_to_fill_in() -> None:
    text = annotated_spec("demo")
    priced = parse_spec(re.sub(r"^#    ", "", text, flags=re.MULTILINE))
    assert priced.prices is not None and set(priced.prices.nodes) == {"cpu_spot", "gpu_spot"}
    assert priced.model_copy(update={"prices": None}) == parse_spec(text)


def test_a_spec_is_a_file_or_else_an_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert spec_path("demo") == example_path("demo")
    (tmp_path / "demo").write_text("mine")
    assert spec_path("demo") == Path("demo")
    with pytest.raises(BadInput, match="spec: 'dmeo': is no file and no example.*cells, corrected, demo"):
        spec_path("dmeo")


def test_init_writes_a_new_file_and_never_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "below" / "mine.toml"
    assert main(["init", "mine", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert load_spec(out).name == "mine"
    assert main(["plan", str(out)]) == 0
    out.write_text("changed")
    assert main(["init", "demo", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_text() == "changed"


def test_init_prints_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "demo"]) == 0
    assert parse_spec(capsys.readouterr().out) == load_spec(example_path("demo"))
    assert main(["init", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == EXAMPLE_NAMES
    assert main(["init"]) == 2
    assert "NAME" in capsys.readouterr().err
    assert main(["init", "no name"]) == 2
    assert "name: 'no name'" in capsys.readouterr().err
