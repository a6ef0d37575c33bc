"""The report from outside: a sweep's directory in, a page that stands alone out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scaling_ray.errors import BadInput
from scaling_ray.report import figures, svg
from scaling_ray.report.build import build_report
from scaling_ray.results.cohorts import fit_place
from scaling_ray.results.columns import SCHEMA, Row
from scaling_ray.results.read import read_rows
from scaling_ray.storage import open_place, sealed_json

T = TypeVar("T")
SIZES = {
    "XXS": (1, 533),
    "W8": (8, 4_600),
    "TINY": (16, 9_953),
    "W32": (32, 36_000),
    "XS": (64, 132_993),
    "S": (128, 859_137),
}
RATES = (3e-4, 1e-3, 3e-3)
START_MS = 1_790_000_000_000


SPEC = """
name = "demo-sweep"
[data]
genes = 512
[grid]
sizes = ["XXS", "TINY", "XS", "S"]
genes = [512]
cells = [500, "all"]
seeds = [0, 1]
[lr]
rule = "choose"
rates = [3e-4, 1e-3, 3e-3]
"""


def row(
    number: int, role: Literal["law", "rate"], size: str, cells: int, seed: int, lr: float, loss: float, planted: bool
) -> Row:
    """A finished run as the driver writes it."""
    width, params = SIZES[size]
    return Row(
        run_id=f"{role}-{size}-v512-d{cells}-s{seed}-lr{lr:g}",
        role=role,
        status="done",
        size=size,
        width=width,
        layers=1,
        heads=1,
        feedforward=1,
        params=params,
        params_without_embedding=params - 512 * width if width > 1 else 21,
        genes=512,
        cells=cells,
        cells_requested=str(cells),
        seed=seed,
        lr=lr,
        lr_at_edge=False if role == "law" else None,
        recipe="corrected",
        umi_fraction=1.0,
        objective="mse",
        schedule="cosine",
        max_cells_seen=60_000 if params < 1e5 else 120_000,
        cells_seen=48_000,
        masked_genes_seen=48_000 * 77,
        optimizer_steps=1_500,
        flops=6.0 * params * 48_000 * 512,
        wall_seconds=12.5,
        loss_unit="mse",
        val_loss=loss - 0.004,
        final_val_loss=loss - 0.003,
        test_loss=loss if role == "law" else None,
        best_cells_seen=44_000,
        stop_reason="early_stop",
        undertrained=False,
        baseline_loss=0.335,
        gaussian_loss=0.197 + 0.4 * cells**-0.5,
        attainable_loss=0.16 if planted else None,
        bound_loss=0.148 if planted else None,
        attainable_bits=1.91 if planted else None,
        bound_bits=1.87 if planted else None,
        bound_z=12.0 + 0.01 * number if planted else None,
        precision="fp32",
        stacked=1,
        attempts=1,
        mlflow_run_id=f"{number:032x}",
        data_hash="3f" * 32,
        workers=1,
        engine="plain",
    )


def write_rows(sweep: Path, rows: list[Row]) -> None:
    """results.parquet by the one schema there is."""
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), sweep / "results.parquet")


def rows_of(sweep: Path) -> list[Row]:
    return read_rows(open_place(sweep))


def known(value: T | None) -> T:
    """A value of a row that must be there."""
    assert value is not None
    return value


def curve(loss: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    seen = np.linspace(2_400, 48_000, 20)
    losses = loss + 0.1 * np.exp(-seen / 9_000) + rng.normal(0, 0.002, seen.size)
    return [
        {"kind": "eval", "cells_seen": int(x), "val_loss": y, "val_loss_smoothed": y, "timestamp_ms": START_MS + i}
        for i, (x, y) in enumerate(zip(seen, losses, strict=True))
    ]


def manifest() -> dict[str, Any]:
    splits = {
        "train": (10_000, [f"AML{i}" for i in range(12)]),
        "val": (1_300, ["AML20", "BM1"]),
        "test": (1_500, ["<b>BM5</b>"]),
    }
    return {
        "version": 3,
        "name": "demo",
        "data_hash": "3f" * 32,
        "genes": 512,
        "block_genes": 256,
        "row_group_cells": 16_384,
        "split_by": "donor_id",
        "data": {},
        "census": {"uri": "planted", "version": "2025-11-08"},
        "planted": False,
        "dropped": {"is_primary_data": 120, "duplicate_cells": 3},
        "splits": {
            name: {
                "cells": cells,
                "fraction": cells / 12_800,
                "groups": groups,
                "donor_cells": [1] * len(groups),
                "content_sha256": "00" * 32,
                "files": [],
            }
            for name, (cells, groups) in splits.items()
        },
        "tables": [],
        "codes": {},
        "made_with": {"pyarrow": "25"},
    }


def write_sweep(
    out: Path,
    *,
    sizes: tuple[str, ...] = tuple(SIZES),
    cells: tuple[int, ...] = (500, 2_000, 8_000),
    seeds: tuple[int, ...] = (0, 1),
    noise: float = 0.002,
    planted: bool = True,
    unfinished: int = 0,
) -> Path:
    """A sweep's directory as the driver leaves it, around a known law."""
    rng = np.random.default_rng(7)
    rows: list[Row] = []
    runs: list[tuple[Literal["law", "rate"], str, int, int, float]]
    runs = [("law", s, d, seed, 1e-3) for s in sizes for d in cells for seed in seeds]
    runs += [("rate", s, cells[-1], 101, lr) for s in sizes for lr in RATES]
    for role, size, count, seed, lr in runs:
        width, params = SIZES[size]
        loss = 0.15 + 2.4 * params**-0.4 + 1.5 * count**-0.5 + rng.normal(0, noise)
        loss = 0.336 + rng.normal(0, noise / 4) if width == 1 else loss + 0.01 * abs(np.log10(lr) + 3)
        rows.append(row(len(rows), role, size, count, seed, lr, float(loss), planted))
        folder = out / "runs" / rows[-1].run_id
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in [{"kind": "train", "cells_seen": 1}, *curve(loss, rng)])
        (folder / "metrics.jsonl").write_text(text + '{"kind": "ev')
    blank: dict[str, Any] = {"val_loss": None, "test_loss": None, "final_val_loss": None, "cells_seen": None}
    waiting = {one.run_id for one in [one for one in rows if one.role == "law"][:unfinished]}
    write_rows(out, [replace(one, status="waiting", **blank) if one.run_id in waiting else one for one in rows])
    (out / "shards_manifest.json").write_text(sealed_json(manifest()))
    (out / "spec.toml").write_text(SPEC)
    return out


def build(sweep: Path | str, out: Path | str, **options: Any) -> Path:
    """The page of a report on a disk."""
    return Path(build_report(sweep, out, **options))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    sweep = write_sweep(tmp_path_factory.mktemp("sweep"))
    return sweep, build(sweep, sweep.parent / f"{sweep.name}-report")


def test_it_writes_page_numbers_fit_and_figures(built: tuple[Path, Path]) -> None:
    _, page = built
    out = page.parent
    assert page.name == "report.html"
    assert sorted(p.name for p in out.iterdir()) == ["figures", "fit.json", "report.html", "report.json"]
    for figure in ("loss-by-size", "loss-by-cells", "learning-curves"):
        root = ElementTree.parse(out / "figures" / f"{figure}.svg").getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) >= 3


def test_the_page_asks_nobody_for_anything(built: tuple[Path, Path]) -> None:
    text = built[1].read_text()
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)
    assert "&lt;b&gt;BM5" in text and "<b>BM5" not in text


def test_the_verdict_comes_before_any_figure_of_the_fit(built: tuple[Path, Path]) -> None:
    report = json.loads((built[1].parent / "report.json").read_text())
    text = built[1].read_text()
    assert report["verdict"] != "refused", report["headline"]["reasons"]
    assert report["headline"]["form"] == "params_cells"
    assert text.index(report["sentence"]) < text.index("The law</h2>") < text.index("Best model</h2>")
    assert "conditional on this split" in text


def test_numbers_are_those_of_the_results(built: tuple[Path, Path]) -> None:
    sweep, page = built
    report = json.loads((page.parent / "report.json").read_text())
    fit = json.loads((page.parent / "fit.json").read_text())
    rows = [one for one in rows_of(sweep) if one.role == "law"]
    best = min(rows, key=lambda one: known(one.val_loss))
    best_loss = known(best.test_loss)
    assert report["best"]["run_id"] == best.run_id
    assert report["best"]["share_of_gap"]["attainable_floor"] == pytest.approx((0.335 - best_loss) / (0.335 - 0.16))
    assert report["best"]["gain_bits"]["over_gene_mean"] == pytest.approx(0.5 * np.log2(0.335 / best_loss))
    assert report["headline"] == fit["headline"]
    assert report["date"] == "2026-09-21"
    setting = next(c for c in report["settings"] if (c["size"], c["cells"]) == ("TINY", 2_000))
    two = [known(one.test_loss) for one in rows if (one.size, one.cells) == ("TINY", 2_000)]
    assert setting["test_loss"] == pytest.approx(np.mean(two)) and setting["done"] == 2
    assert report["leak_test"]["passed"] and report["leak_test"]["runs"] == len(rows)
    tried = {row["size"]: [t["lr"] for t in row["tried"]] for row in report["learning_rates"]}
    assert tried["XS"] == list(RATES)


def test_a_rebuild_is_the_same_to_the_byte(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "W8", "TINY", "XS"), cells=(2_000,))
    page = build(sweep, tmp_path / "once")
    again = build(sweep, tmp_path / "twice")
    for name in ("report.html", "report.json", "fit.json", "figures/loss-by-size.svg", "figures/loss-by-size.png"):
        assert (again.parent / name).read_bytes() == (page.parent / name).read_bytes()


def test_a_small_grid_is_refused_without_an_exponent_but_with_its_losses(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "TINY", "XS"), cells=(2_000,), planted=False, unfinished=1)
    shutil.rmtree(sweep / "runs")
    (sweep / "spec.toml").unlink()
    page = build(sweep, tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    text = page.read_text()
    assert report["verdict"] == "refused" and "parameters" not in report["headline"]
    assert "Refused: these runs do not determine a scaling exponent, because only 2 sizes" in text
    assert report["best"]["share_of_gap"]["attainable_floor"] is None
    assert report["best"]["share_of_gap"]["shrunk_gaussian"] is not None
    assert any("still waiting" in need for need in report["needs"])
    assert "The law</h2>" not in text and "Training</h2>" not in text and report["date"] is None


def test_a_sweep_without_a_finished_run_still_has_a_page(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("TINY",), cells=(500,), unfinished=2)
    report = json.loads((build(sweep, tmp_path / "r").parent / "report.json").read_text())
    assert report["verdict"] == "refused" and report["best"] is None
    assert "nothing to fit" in report["sentence"]


def test_two_gene_panels_are_never_pooled(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", cells=(2_000,), sizes=("W8", "TINY", "XS", "S"))
    rows = rows_of(sweep)
    more = [replace(one, run_id=one.run_id + "-w", genes=1024, bound_z=-5.0) for one in rows if one.size != "S"]
    write_rows(sweep, rows + more)
    out = build(sweep, tmp_path / "r").parent
    fit = json.loads((out / "fit.json").read_text())
    assert set(fit["cohorts"]) == {"genes=512", "genes=1024"}
    assert {f["n_sizes"] for f in fit["fits"] if f["form"] == "power_floor"} == {4}
    assert (out / "figures" / "loss-by-size-1024-genes.svg").exists()
    leak = json.loads((out / "report.json").read_text())["leak_test"]
    assert not leak["passed"] and leak["run_id"].endswith("-w") and leak["runs"] == 8 + 6


@pytest.mark.parametrize("gone", ["results.parquet", "shards_manifest.json"])
def test_a_missing_file_is_bad_input_and_leaves_nothing(tmp_path: Path, gone: str) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("TINY",), cells=(500,))
    (sweep / gone).unlink()
    with pytest.raises(BadInput, match=gone):
        build(sweep, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_missing_key_of_the_manifest_is_named(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("TINY",), cells=(500,))
    there = manifest()
    del there["splits"]["val"]
    (sweep / "shards_manifest.json").write_text(sealed_json(there))
    with pytest.raises(BadInput, match="splits.val"):
        build(sweep, tmp_path / "r")


def test_building_needs_neither_ray_nor_torch_nor_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; import scaling_ray.report.build; "
        "print([m for m in ('ray', 'torch', 'mlflow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def text_of(page: Path) -> str:
    """What a reader sees: the page without markup and style."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", text)))


def test_the_first_screen_has_what_a_sceptic_asks_for(built: tuple[Path, Path]) -> None:
    report = json.loads((built[1].parent / "report.json").read_text())
    seen = text_of(built[1])
    first = seen[: seen.index("Best model")]
    alpha = report["headline"]["parameters"]["alpha"]
    assert f"{alpha['value']:.3f}" in first and f"{alpha['low']:.3f} to {alpha['high']:.3f}" in first
    assert f"{alpha['profile_low']:.3f} to {alpha['profile_high']:.3f}: from the noise of seeds alone" in first
    for words in (
        "from the noise of seeds alone",
        "all trainable parameters",
        "unique training cells",
        "whole library",
        "cosine schedule",
        "predicted it before it was fitted",
        "12 / 2 / 1 donors",
        "6.0 to 96 epochs",
        "Leak test passed",
        "scaling-ray sweep",
        "without the smallest size",
    ):
        assert words in first, words
    picture = built[1].read_text().split("</svg>")[0]
    assert all(f">{name}<" in picture for name in ("gene mean", "Gaussian, 500", "planted floor", "D = 500"))


def test_size_data_and_predictions_have_a_card_each(built: tuple[Path, Path]) -> None:
    head = json.loads((built[1].parent / "report.json").read_text())["headline"]
    seen = text_of(built[1])
    for title, part in (("Size", "size"), ("Data", "data"), ("Predictions", "predictions")):
        assert f"{title} {head[part]['verdict']}" in seen
    for entry in head["predictions"]["entries"]:
        assert f"{entry['what']} {entry['params']:,.0f} {entry['cells']:,.0f} {entry['value']:.4f}" in seen
    first, second = head["sentences"]
    assert seen.index(first) < seen.index(second) < seen.index("Size ")


def test_every_word_that_is_linked_is_explained(built: tuple[Path, Path]) -> None:
    text = built[1].read_text()
    links, ids = set(re.findall(r'href="#([^"]+)"', text)), set(re.findall(r'id="([^"]+)"', text))
    assert links <= ids and len({link for link in links if link.startswith("word-")}) > 20
    assert len(re.findall(r'id="word-', text)) == len({i for i in ids if i.startswith("word-")})


def test_a_prediction_stands_at_the_size_it_predicts() -> None:
    here = figures.Series(
        "D", [(1e3, 2.0), (1e5, 1.5)], "d0", bars=[(1e5, 1.4, 1.3, 1.6)], forecasts=[(1e7, 1.1, 1.0, 1.2)]
    )
    drawn = figures.draw(figures.Chart("t", "P", "loss", [here]), 700, 400)
    points = [float(x) for x in re.findall(r'<circle class="pd0"[^>]* cx="([\d.]+)"', drawn)]
    held, ahead = (float(x) for x in re.findall(r'<path class="od0" d="M([\d.]+) ', drawn))
    assert held == points[1]
    # Two decades to the right on an axis where two decades are as far as between the points.
    assert ahead - points[1] == pytest.approx(points[1] - points[0], abs=0.2)


def test_a_colour_means_one_thing() -> None:
    """Cells, sizes and budgets share no colour with each other or with a verdict, in light and in dark."""
    style = (Path(figures.__file__).parent / "style.html").read_text()
    for scheme, line in zip(("light", "dark"), style.splitlines()[:2], strict=True):
        verdicts = {found for name in ("good", "bad", "near") for found in re.findall(rf"--{name}:(#\w+)", line)}
        names = re.findall(r"--([dsb]\d+):(#\w+)", svg.STYLE.split("@media")[0 if scheme == "light" else 1])
        colours = [colour for _, colour in names]
        assert len(names) == len(set(colours)) == 3 * svg.SHADES
        assert len(verdicts) == 3 and not verdicts & set(colours)
    # Up to as many values as there are shades each has its own, and the same on every chart.
    many = svg.shades(svg.SIZES, [float(i) for i in range(svg.SHADES)])
    assert len(set(many.values())) == svg.SHADES and svg.shades(svg.SIZES, [1.0, 9.0])[9.0] == many[svg.SHADES - 1.0]


def test_every_run_is_on_the_page_and_every_setting_leads_to_its_runs(built: tuple[Path, Path]) -> None:
    sweep, page = built
    text = page.read_text()
    for one in rows_of(sweep):
        assert one.run_id in text and known(one.mlflow_run_id) in text
    targets = set(re.findall(r'href="#(run-\d+)"', text))
    assert len(targets) >= 36 and targets <= set(re.findall(r'id="(run-\d+)"', text))


def test_the_later_sections_are_filled(built: tuple[Path, Path]) -> None:
    seen = text_of(built[1])
    report = json.loads((built[1].parent / "report.json").read_text())
    for title in ("Done of planned", "Compute-optimal", "In bits", "Plan against actual", "Data card", "Checklist"):
        assert title in seen
    assert "is_primary_data – 120" in seen and report["provenance"]["spec_sha256"] in seen
    assert report["next_steps"] and report["next_steps"][0]["sentence"] in seen
    answers = {entry["question"]: entry["answer"] for entry in report["checklist"]["entries"]}
    assert answers["What form is fitted?"] == report["headline"]["formula"] and len(answers) >= 25
    assert answers["Which data, is it public?"] == "CELLxGENE Census layout, version 2025-11-08"
    fitted = [run["run_id"] for run in report["residuals"]]
    assert len(fitted) == 30 and abs(sum(run["residual"] for run in report["residuals"])) < 1e-3


def test_figures_are_also_png_of_twice_the_size(built: tuple[Path, Path]) -> None:
    folder = built[1].parent / "figures"
    pictures = sorted(folder.glob("*.svg"))
    assert len(pictures) >= 8
    for picture in pictures:
        data = picture.with_suffix(".png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
        width = int(ElementTree.parse(picture).getroot().attrib["width"])
        assert int.from_bytes(data[16:20], "big") == 2 * width
        with Image.open(picture.with_suffix(".png")) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 50, "letters and lines leave many shades"


def test_the_page_is_for_desks_phones_dark_rooms_and_paper(built: tuple[Path, Path]) -> None:
    text = built[1].read_text()
    for rule in ("max-width:700px", "prefers-color-scheme:dark", "@media print", "overflow-x:auto"):
        assert rule in text
    assert text.count('<div class="wide">') == text.count('<div class="narrow">') >= 8
    assert text.count("<table>") == text.count('<div class="scroll"><table>')


def test_a_refused_sweep_shows_no_exponent_of_the_headline(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", cells=(2_000,), noise=0.03)
    page = build(sweep, tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    seen = text_of(page)
    assert report["verdict"] == "refused" and "parameters" not in report["headline"]
    assert "No exponent, no floor" in seen and report["headline"]["settles"][0] in seen
    assert all(reason in seen for reason in report["headline"]["reasons"])
    assert "alpha is" not in report["second_sentence"]
    assert "all runs" not in (page.parent / "figures" / "leave-one-out-alpha.svg").read_text()
    assert report["next_steps"] == [] and report["compute_optimal"]["budgets"] == []


def test_a_loss_below_zero_is_nothing_to_fit_and_the_leak_test_stays(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("W8", "TINY", "XS", "S"), cells=(2_000,))
    first, *others = rows_of(sweep)
    write_rows(sweep, [replace(first, test_loss=-0.1, bound_z=-30.0), *others])
    page = build(sweep, tmp_path / "r")
    assert "must be a positive finite number" in text_of(page) and "Leak test FAILED" in text_of(page)
    assert json.loads((page.parent / "report.json").read_text())["leak_test"]["run_id"] == first.run_id


def test_one_size_alone_is_a_page_with_its_losses(tmp_path: Path) -> None:
    page = build(write_sweep(tmp_path / "s", sizes=("TINY",), cells=(2_000,)), tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    assert report["verdict"] == "refused" and report["best"]["size"] == "TINY"
    assert "TINY" in text_of(page)


def test_the_plan_stands_against_what_was_done(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("TINY",), cells=(500,), unfinished=1)
    rows = [replace(one, stacked=3 if one.role == "rate" else 1) for one in rows_of(sweep)]
    write_rows(sweep, rows)
    planned = {"hours": 0.01, "hours_from": "assumed", "execution": {"workers": 1}}
    settings = [{"run_id": one.run_id, "flops": 2 * known(one.flops), **planned} for one in rows]
    (sweep / "plan.json").write_text(sealed_json({"version": 3, "settings": settings}))
    report = json.loads((build(sweep, tmp_path / "r").parent / "report.json").read_text())
    law, rate, whole = report["plan_against_actual"]
    assert (law["runs"], rate["runs"], whole["runs"]) == (1, 3, 4)
    assert whole["planned_hours"] == pytest.approx(0.04) and whole["planned_hours_low"] is None
    assert whole["actual_hours"] == pytest.approx(law["actual_hours"] + rate["actual_hours"])
    assert law["actual_hours"] == pytest.approx(12.5 / 3600) and law["flops_ratio"] == pytest.approx(0.5)
    assert rate["actual_hours"] == pytest.approx(12.5 / 3600), "three that trained as one took the time once"
    assert report["completeness"][0]["rows"][0]["settings"] == [{"done": 1, "planned": 2, "failed": 0}]
    (setting,) = report["plan_by_setting"]
    assert (setting["size"], setting["cells"], setting["runs"]) == ("TINY", 500, 1)
    write_rows(sweep, [replace(one, max_cells_seen=4 * (one.cells_seen or 0)) for one in rows])
    wide = [one | {"hours_low": 0.005, "hours_high": 0.02} for one in settings]
    (sweep / "plan.json").write_text(sealed_json({"version": 4, "settings": wide}))
    page = build(sweep, tmp_path / "r")
    (setting,) = json.loads((page.parent / "report.json").read_text())["plan_by_setting"]
    assert setting["hours_ratio_by_cells"] == pytest.approx(4 * setting["hours_ratio"]), "a quarter of its budget"
    assert (setting["planned_hours_low"], setting["planned_hours_high"]) == (0.005, 0.02)
    assert "0.00500 to 0.0200" in text_of(page)
    (sweep / "plan.json").write_text(sealed_json({"version": 2, "cells": settings}))
    with pytest.raises(BadInput, match="plan.json"):
        build(sweep, tmp_path / "r")


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("https://mlflow.example/base/", "https://mlflow.example/base/#/runs/abc123"),
        ("sqlite:////tmp/mlruns.db", None),
        ("https://user:secret@mlflow.example", None),
    ],
)
def test_runs_link_to_a_tracking_server_and_never_with_a_password(tmp_path: Path, uri: str, link: str | None) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("TINY",), cells=(500,))
    run_id = rows_of(sweep)[0].run_id
    (sweep / "runs" / run_id / "mlflow.json").write_text(sealed_json({"mlflow_run_id": "abc123", "uri": uri}))
    page = build(sweep, tmp_path / "r").read_text()
    assert (f'href="{link}"' in page) if link else "#/runs/abc123" not in page
    assert "secret" not in page


def test_two_recipes_stand_side_by_side(tmp_path: Path) -> None:
    corrected = write_sweep(tmp_path / "c", sizes=("TINY", "XS"), cells=(2_000,))
    published = write_sweep(tmp_path / "p", sizes=("TINY", "XS"), cells=(2_000,), planted=False)
    write_rows(published, [replace(one, recipe="published") for one in rows_of(published)])
    page = build(corrected, tmp_path / "r", beside=published)
    beside = json.loads((page.parent / "report.json").read_text())["beside"]
    assert [side["recipe"] for side in beside["sides"]] == [["published"], ["corrected"]]
    assert [row["size"] for row in beside["sizes"]] == ["TINY", "XS"]
    assert "As published against corrected" in text_of(page) and "never one loss with the other" in text_of(page)


def test_sweep_and_report_may_both_lie_on_s3(tmp_path: Path, s3: Any) -> None:
    sweep = write_sweep(tmp_path / "sweep", sizes=("XXS", "W8", "TINY", "XS"), cells=(2_000,))
    prefix = uuid.uuid4().hex
    place = open_place(f"s3://shards/{prefix}/sweep")
    for path in sorted(path for path in sweep.rglob("*") if path.is_file()):
        place.write(path.relative_to(sweep).as_posix(), path.read_bytes())
    page = build_report(str(place), f"s3://shards/{prefix}/report")
    assert page == f"s3://shards/{prefix}/report/report.html"
    local, there = build(sweep, tmp_path / "report").parent, s3.objects("shards", f"{prefix}/report/")
    here = {path.relative_to(local).as_posix(): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    assert there.keys() == here.keys() and len(here) >= 15
    # Commands name the sweep where it lies; all else is the same.
    for name, data in there.items():
        assert data.replace(str(place).encode(), b"sweep") == here[name], name
    puts = [path for method, path, *_ in s3.requests() if method == "PUT" and f"{prefix}/report/" in path]
    assert puts[-1].endswith("report.html") and len(puts) == len(there)
    assert fit_place(str(place)) == json.loads(there["fit.json"]) and read_rows(place) == rows_of(sweep)


def test_losses_are_named_by_their_unit_and_only_an_mse_has_gaussian_bits(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "W8", "TINY", "XS"), cells=(2_000,))
    write_rows(sweep, [replace(one, loss_unit="nats", objective="poisson") for one in rows_of(sweep)])
    page = build(sweep, tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    assert report["best"]["entropy_bits"] is report["best"]["gain_bits"]["over_gene_mean"] is None
    assert report["best"]["share_of_gap"]["shrunk_gaussian"] is not None
    assert all(setting["shared_gaussian_bits"] is None for setting in report["bits"]["by_setting"])
    assert "test nats per masked gene" in (page.parent / "figures" / "loss-by-size.svg").read_text()
    seen = text_of(page)
    assert "loss in nats per masked gene" in seen and "MSE" not in seen and "shared Gaussian" not in seen
    assert json.loads((page.parent / "fit.json").read_text())["loss_unit"] == "nats"


def test_a_split_by_cell_is_told_in_cells(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "TINY", "XS"), cells=(2_000,))
    changed = manifest() | {"split_by": "cell"}
    changed["splits"] = {name: part | {"groups": []} for name, part in changed["splits"].items()}
    (sweep / "shards_manifest.json").write_text(sealed_json(changed))
    page = build(sweep, tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    assert report["counts"]["groups"] == {"train": 10_000, "val": 1_300, "test": 1_500}
    text = page.read_text()
    assert "held out one by one: others of the same donors are in training" in text and "of held-out cells" not in text


def test_where_no_model_beats_a_linear_one_the_first_lines_say_so(tmp_path: Path, built: tuple[Path, Path]) -> None:
    sweep = write_sweep(tmp_path / "s", sizes=("XXS", "TINY", "XS"), cells=(2_000,))
    write_rows(sweep, [replace(one, gaussian_loss=0.12) for one in rows_of(sweep)])
    page = build(sweep, tmp_path / "r")
    report = json.loads((page.parent / "report.json").read_text())
    said, text = report["linear_sentence"], page.read_text()
    assert said.startswith("With 2,000 cells no model here predicts better than a linear one")
    lowest = min(known(one.test_loss) for one in rows_of(sweep) if one.role == "law")
    assert f"{lowest:.4g}) has {lowest / 0.12:.3g} times" in said
    assert text.index(report["sentence"]) < text.index(said) < text.index("What each step bought")
    better = json.loads((built[1].parent / "report.json").read_text())
    assert better["best"]["test_loss"] < better["best"]["gaussian_loss"] and better["linear_sentence"] is None
