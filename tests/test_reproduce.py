"""A sweep repeated for real: new seeds agree, another recipe drifts, half of one cannot tell, of two one is skipped."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import S3Server

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.reproduce import LEASE, with_seeds
from scaling_ray.reproduction.compare import Reproduction, compare
from scaling_ray.reproduction.history import read_history, read_skips
from scaling_ray.reproduction.record import SweepRecord
from scaling_ray.reproduction.ticks import missed, parse_tick
from scaling_ray.reproduction.webhook import SECRET, SIGNATURE, TIMESTAMP, Webhook
from scaling_ray.storage import open_place

# Two sizes that learn within a thousand updates, so that new seeds scatter over less than what is learned.
SPEC = """
name = "tiny"
[data]
genes = 64
[grid]
sizes = ["W8", "W16"]
genes = [64]
cells = [100, "all"]
seeds = [1, 2, 3]
[sizes.W8]
width = 8
layers = 1
heads = 2
feedforward = 1
[sizes.W16]
width = 16
layers = 1
heads = 4
feedforward = 1
[train]
max_cells_seen = 16_000
cells_per_step = 16
adam_beta2 = 0.95
evaluations = 4
[lr]
rates = [1e-2]
"""


@pytest.fixture(scope="module")
def done(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep, its spec and its reference."""
    from scaling_ray.sweep.run import run_sweep

    place = tmp_path_factory.mktemp("reference")
    (place / "spec.toml").write_text(SPEC)
    run_sweep(place / "spec.toml", tiny_shards, place / "sweep")
    assert main(["reference", str(place / "sweep"), "--out", str(place / "reference.json")]) == 0
    return place


def call(done: Path, shards: Path, out: Path | str, *more: str, spec: str = "spec.toml") -> int:
    return main(
        ["reproduce", str(done / spec), "--against", str(done / "reference.json"), "--shards", str(shards)]
        + ["--out", str(out), *more]
    )


def verdict_at(out: Path, name: str = "reproduction.json") -> Reproduction:
    return Reproduction.read(out / name)


@contextmanager
def listener(statuses: list[int]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A web address that answers with these statuses in turn, and what it was told."""
    told: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.append((dict(self.headers.items()), body))
            self.send_response(statuses[min(len(told), len(statuses)) - 1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/told", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.ray
def test_a_reference_holds_every_run_and_where_it_comes_from(done: Path) -> None:
    record = SweepRecord.read(done / "reference.json")
    assert {setting.name for setting in record.settings} == {
        f"{size}, {cells} cells, 64 genes" for size in ("W8", "W16") for cells in ("100", "all")
    }
    assert all(setting.losses.keys() == {"1", "2", "3"} for setting in record.settings)
    assert record.origin.spec == SPEC and record.origin.recipe == "corrected"
    assert record.origin.data_hash and record.origin.versions["torch"] and record.origin.numerics_version
    assert record.drop() > 0 and {each.seed for each in record.baselines if each.cells == "all"} == {None}
    text = (done / "reference.json").read_text()
    assert len(text) < 20_000 and str(done) not in text
    (done / "changed.json").write_text(text.replace('"name": "tiny"', '"name": "other"'))
    with pytest.raises(BadInput, match="was changed since it was written"):
        SweepRecord.read(done / "changed.json")


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_seeds_are_identical_and_new_ones_agree(
    done: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call(done, tiny_shards, out, "--tick", "2026-11-02", "--every", "604800") == 0
    assert capsys.readouterr().out == "tiny: agrees; 4 of 4 losses agree, 4 to the last digit\n"
    same = verdict_at(out, "reproduction-20261102T000000Z.json")
    assert same.identical == 4 and {each.reason for each in same.of_kind("loss")} == {"identical"}
    assert call(done, tiny_shards, out, "--seeds", "11,12,13", "--tick", "2026-11-23", "--every", "604800") == 0
    new = verdict_at(out, "reproduction-20261123T000000Z.json")
    assert new.verdict == "agrees" and new.identical == 0 and not new.paired
    assert any(change == "spec grid.seeds: [1, 2, 3] -> [11, 12, 13]" for change in new.changed)
    assert all(each.reason == "identical" for each in new.of_kind("baseline")), "closed forms of all cells know no seed"

    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) == 24
    assert call(done, tiny_shards, out, "--seeds", "11,12,13", "--tick", "2026-11-23", "--every", "604800") == 0
    assert results == {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}

    entries = read_history(open_place(out))
    assert [entry.verdict for entry in entries] == ["agrees", "agrees"]
    page = (out / "history.html").read_text()
    assert "2 made, 0 skipped, 2 missed" in page and "<td>2026-11-09 00:00<td>missed" in page
    assert page.count("<svg") == len([q for q in new.quantities if q.kind in ("loss", "contrast")])
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    _check_mlflow(out)


def _check_mlflow(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("scaling_ray/reproduce/tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["20261102T000000Z", "20261123T000000Z", "history"]
    lines = next(run for run in runs if run.info.run_name == "history")
    for name in ("loss/W8 all cells 64 genes", "loss low/W8 all cells 64 genes", "loss high/W8 all cells 64 genes"):
        points = sorted(client.get_metric_history(lines.info.run_id, name), key=lambda point: point.step)
        assert [point.timestamp // 86_400_000 for point in points] == [20759, 20780], "one point a tick, at its time"
    one = next(run for run in runs if run.info.run_name == "20261123T000000Z")
    assert one.data.tags["verdict"] == "agrees" and one.data.metrics["drifted"] == 0
    assert one.info.end_time >= one.info.start_time
    assert {file.path for file in client.list_artifacts(one.info.run_id)} == {"history.html", "reproduction.json"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("another recipe", "max_cells_seen", 'recipe = "published"\nmax_cells_seen'),
        ("a broken mask", "max_cells_seen", "mask_fraction = 0.6\nmax_cells_seen"),
    ],
)
def test_what_is_broken_drifts_and_is_named(
    done: Path, tiny_shards: Path, tmp_path: Path, name: str, before: str, after: str
) -> None:
    (done / "broken.toml").write_text(SPEC.replace(before, after, 1))
    assert call(done, tiny_shards, tmp_path / "out", spec="broken.toml") == 3, name
    made = verdict_at(tmp_path / "out")
    assert made.verdict == "drifted" and "quantities drifted, most" in made.summary
    assert any(change.startswith("spec ") for change in made.changed)
    assert made.hint is not None and "spec" in made.hint


@pytest.mark.slow
@pytest.mark.ray
def test_other_cells_drift_and_the_hint_says_so(
    done: Path, planted_census: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    from scaling_ray.planted.plant import plant

    census = plant(tmp_path / "census", n_cells=900, n_genes=200, seed=2)
    against, out = str(done / "reference.json"), str(tmp_path / "out")
    arguments = ["reproduce", str(done / "spec.toml"), "--against", against, "--census", str(census), "--out", out]
    assert main(arguments) == 3
    made = verdict_at(tmp_path / "out")
    assert any(change.startswith("data_hash: ") for change in made.changed)
    assert made.hint is not None and "the closed-form baselines moved with them" in made.hint
    shard = next((tmp_path / "out" / "shards").glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(arguments) == 2, "shards are verified before they are used again"


@pytest.mark.slow
@pytest.mark.ray
def test_five_of_a_hundred_cells_swapped_between_donors_are_a_drift(
    done: Path, planted_census: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (done / "two.toml").write_text(SPEC.replace('cells = [100, "all"]', 'cells = ["all"]'))
    for name, share in (("before", 0.0), ("after", 0.05)):
        census = study(planted_census, tmp_path / f"{name}.h5ad", share, tmp_path / f"{name}-census")
        against = tmp_path / "reference.json"
        if name == "before":
            assert call_on(done, census, tmp_path / "first", done / "reference.json", "two.toml") == 3
            assert main(["reference", str(tmp_path / "first" / "sweep"), "--out", str(against)]) == 0
            assert call_on(done, census, tmp_path / "again", against, "two.toml") == 0, "imported once more: the same"
        else:
            assert call_on(done, census, tmp_path / "swapped", against, "two.toml") == 3
    made = verdict_at(tmp_path / "swapped")
    (cells,) = made.of_kind("cells")
    assert cells.verdict == "drifted" and made.hint is not None and made.hint.startswith("the cells differ")
    assert "the cells are not the reference's" in made.summary
    assert not any(each.verdict == "drifted" for each in made.of_kind("loss")), "the noise between seeds hides it"
    assert call_on(done, census, tmp_path / "swapped", against, "two.toml", "--other-cells") == 0
    assert not verdict_at(tmp_path / "swapped").of_kind("cells")


def call_on(done: Path, census: Path, out: Path, against: Path, spec: str, *more: str) -> int:
    return main(
        ["reproduce", str(done / spec), "--against", str(against), "--census", str(census), "--out", str(out), *more]
    )


def study(planted: Path, file: Path, share: float, out: Path) -> Path:
    """A Census imported from a file of planted cells, a share of whose donors' labels were swapped in pairs."""
    import anndata

    from scaling_ray.census.source import Census

    with Census.open(str(planted)) as census:
        counts, obs, var = census.counts(0, census.n_cells), census.obs(), census.var()
    donors = obs["donor_id"].astype(str).to_numpy().copy()
    random = np.random.default_rng(5)
    order = random.permutation(len(donors))
    pairs = [(one, two) for one, two in zip(order[::2], order[1::2], strict=False) if donors[one] != donors[two]]
    for one, two in pairs[: round(share * len(donors) / 2)]:
        donors[one], donors[two] = donors[two], donors[one]
    table = pd.DataFrame({"donor_id": donors}, index=[f"cell{i}" for i in range(len(donors))])
    made = anndata.AnnData(sp.csr_matrix(counts), obs=table, var=pd.DataFrame(index=var["feature_id"].astype(str)))
    made.write_h5ad(file)
    assert main(["census", "import", str(file), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.ray
def test_half_a_sweep_cannot_tell_and_names_what_is_missing(
    done: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate of 1e30 diverges at the first update: the runs of W16 have no result, and never will.
    spec = SPEC.replace("rates = [1e-2]", "rates = [1e-2]\n[lr.per_size]\nW16 = [1e30]")
    (done / "half.toml").write_text(spec)
    assert call(done, tiny_shards, tmp_path / "out", spec="half.toml") == 6
    made = verdict_at(tmp_path / "out")
    assert made.verdict == "cannot tell" and len(made.missing) == 6
    assert made.missing[0] == "W16, 100 cells, 64 genes, seed 1 (diverged)"
    untold = [each for each in made.of_kind("loss") if each.verdict == "cannot tell"]
    assert {each.name.split(",")[0] for each in untold} == {"W16"}
    assert "missing W16, 100 cells, 64 genes, seed 1 (diverged) and 5 more" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_of_two_at_once_one_is_skipped(
    done: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open_place(out).lease(LEASE):
        assert call(done, tiny_shards, out, "--tick", "2026-11-23") == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: skipped; ") and "another driver" in said
    assert not (out / "history.jsonl").exists() and not list(out.glob("sweep*"))
    assert [skip.reason for skip in read_skips(open_place(out))] == ["another driver"]


def test_a_tick_too_old_is_skipped_and_said(done_record: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    arguments = ["reproduce", str(done_record.parent / "spec.toml"), "--against", str(done_record), "--out", str(out)]
    assert main([*arguments, "--tick", "2020-01-06T03:17Z", "--max-age", "3600"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: skipped; the tick of 2020-01-06 03:17 UTC is ") and "--max-age is 3,600 s" in said
    assert [skip.reason for skip in read_skips(open_place(out))] == ["too old"]
    assert not list(out.glob("sweep*"))


@pytest.fixture
def done_record(tmp_path: Path) -> Path:
    """A small reference that no sweep is needed for, and its spec."""
    table = tmp_path / "runs.csv"
    rows = [
        f"{size},{params},64,{cells},{seed},{loss + 0.01 * seed + (0.1 if cells == 100 else 0.0)},done,mse,{loss + 1}"
        for size, params, loss in (("W4", 400, 0.9), ("W8", 900, 0.8), ("W16", 2000, 0.7))
        for cells in (100, 200)
        for seed in (1, 2)
    ]
    table.write_text("size,params,genes,cells,seed,loss,status,loss_unit,baseline_loss\n" + "\n".join(rows) + "\n")
    (tmp_path / "spec.toml").write_text(SPEC)
    out = tmp_path / "reference.json"
    assert main(["reference", str(table), "--name", "tiny", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--tolerance", "2"], "--tolerance: 2.0: must be a share of the drop"),
        (["--tick", "yesterday"], "--tick: 'yesterday': is no time"),
        (["--tick", "2026-11-23T03:17"], "--tick: '2026-11-23T03:17': has no zone"),
        (["--max-age", "60"], "--max-age: 60.0: belongs to a --tick"),
        (["--seeds", "1,1"], "seeds"),
        (["--webhook", "http://example.org/secret"], "--webhook: 'http://example.org/...': must begin with https://"),
        (["--webhook", "https://example.org/secret"], f"{SECRET}: None: is not set"),
        (["--shards", "a", "--census", "b"], "--census: 'b': is not read where --shards are given"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    done_record: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, more: list[str], line: str
) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    out = tmp_path / "out"
    arguments = ["reproduce", str(tmp_path / "spec.toml"), "--against", str(done_record), "--out", str(out), *more]
    capsys.readouterr()
    assert main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said and "secret" not in said and not out.exists()


def test_losses_of_another_unit_are_refused(done_record: Path) -> None:
    record = SweepRecord.read(done_record)
    other = record.model_copy(update={"origin": record.origin.model_copy(update={"loss_unit": "bits"})})
    with pytest.raises(BadInput, match="loss_unit: 'mse': the repetition's is 'bits'"):
        compare(record, other)


def test_a_commit_that_changed_is_a_range_to_bisect(done_record: Path) -> None:
    record = SweepRecord.read(done_record)
    at = lambda commit: record.origin.model_copy(update={"commit": commit, "data_hash": "d" * 64})  # noqa: E731
    settings = [
        each.model_copy(update={"losses": {seed: loss + 0.5 for seed, loss in each.losses.items()}})
        for each in record.settings
    ]
    before = record.model_copy(update={"origin": at("a" * 40)})
    after = record.model_copy(update={"origin": at("b" * 40), "settings": settings})
    made = compare(before, after)
    assert made.verdict == "drifted" and made.hint is not None
    assert f"git bisect start {'b' * 12} {'a' * 12}" in made.hint


def test_every_reference_of_the_project_agrees_with_itself_and_not_with_another() -> None:
    paths = sorted((Path(__file__).resolve().parents[1] / "reports").glob("*/reference.json"))
    assert [path.parent.name for path in paths] == [
        "demo",
        "planted",
        "planted-law",
        "published",
        "real-bone-marrow",
        "real-bone-marrow-512",
    ]
    for path in paths:
        record = SweepRecord.read(path)
        assert compare(record, record).verdict == "agrees"
        worse = [
            each.model_copy(update={"losses": {seed: loss + 3 * record.drop() for seed, loss in each.losses.items()}})
            for each in record.settings
        ]
        assert compare(record, record.model_copy(update={"settings": worse})).verdict == "drifted"


def test_a_table_with_both_losses_is_read_at_the_one_that_is_asked_for(tmp_path: Path) -> None:
    """A kept results.csv has both; the record of one must not hold the other."""
    kept = Path(__file__).resolve().parents[1] / "reports" / "planted" / "results.csv"
    found = {}
    for loss in ("test_loss", "val_loss"):
        out = tmp_path / f"{loss}.json"
        assert main(["reference", str(kept), "--loss", loss, "--out", str(out)]) == 0
        found[loss] = SweepRecord.read(out)
    table = pd.read_csv(kept)
    table = table[table["role"] == "law"]
    for loss, record in found.items():
        assert record.origin.loss == loss
        told = sorted(value for setting in record.settings for value in setting.losses.values())
        assert told == pytest.approx(sorted(table[loss]))


def test_seeds_are_replaced_and_nothing_else() -> None:
    assert with_seeds(SPEC, [11, 12]) == SPEC.replace("seeds = [1, 2, 3]", "seeds = [11, 12]")
    with pytest.raises(BadInput, match="--seeds"):
        with_seeds(SPEC.replace("\nseeds = [1, 2, 3]", "").replace("[grid]", "[grid]\n seeds = [1]"), [11])


def test_ticks_and_those_that_were_missed() -> None:
    assert parse_tick("2026-11-23T04:17+01:00") == parse_tick("2026-11-23T03:17Z")
    week = 7 * 86_400_000
    assert missed([0, week, 4 * week + 60_000], week) == [2 * week, 3 * week]


def test_a_webhook_is_signed_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "a secret of the test")
    waits: list[float] = []
    with listener([503, 500, 200]) as (url, told):
        assert Webhook(url).send({"verdict": "drifted"}, waits.append) is None
    assert len(told) == 3 and waits == [1.0, 2.0]
    headers, body = told[-1]
    assert json.loads(body) == {"verdict": "drifted"}
    expected = hmac.new(b"a secret of the test", headers[TIMESTAMP].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers[SIGNATURE] == f"sha256={expected}"


@pytest.mark.parametrize(("status", "calls"), [(403, 1), (302, 1), (500, 5)])
def test_a_webhook_that_refuses_costs_a_line(monkeypatch: pytest.MonkeyPatch, status: int, calls: int) -> None:
    monkeypatch.setenv(SECRET, "a secret of the test")
    with listener([status]) as (url, told):
        why = Webhook(url).send({}, lambda seconds: None)
    assert why == f"the webhook at 127.0.0.1 was not told (status {status})" and len(told) == calls


@pytest.mark.slow
@pytest.mark.ray
def test_on_s3_and_told_to_a_webhook(
    done: Path, tiny_shards: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As its own process: workers of the Ray that other tests share were started without this server's address."""
    monkeypatch.setenv(SECRET, "a secret of the test")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with listener([200]) as (url, told):
        line = ["reproduce", str(done / "spec.toml"), "--against", str(done / "reference.json")]
        line += ["--shards", str(tiny_shards), "--out", "s3://shards/repro", "--webhook", url]
        command = [sys.executable, "-m", "scaling_ray.cli", *line]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stderr[-3000:]
    message = json.loads(told[0][1])
    assert message["verdict"] == "agrees" and message["where"] == "s3://shards/repro"
    there = s3.objects("shards", "repro/")
    assert {"reproduction.json", "history.jsonl", "history.html", "sweep/results.csv"} <= there.keys()
    assert "not tracked" in made.stderr


def test_a_newer_release_is_reported_and_never_taken(
    done_record: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cellxgene_census._release_directory as directory

    release = {"release_date": "2026-11-20", "release_build": "2026-11-08", "soma": {}, "flags": {"lts": True}}
    release |= {"soma": {"uri": "s3://nowhere/soma/", "s3_region": "us-west-2"}}
    release |= {"h5ads": {"uri": "s3://nowhere/h5ads/", "s3_region": "us-west-2"}}
    (tmp_path / "release.json").write_text(json.dumps({"stable": "2026-11-08", "2026-11-08": release}))
    with serving_folder(tmp_path) as url:
        monkeypatch.setattr(directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", f"{url}/release.json")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        out = tmp_path / "out"
        arguments = ["reproduce", str(tmp_path / "spec.toml"), "--against", str(done_record), "--out", str(out)]
        capsys.readouterr()
        assert main([*arguments, "--census", "latest"]) == 0
    said = capsys.readouterr().out
    assert "the newest is 2026-11-08, of 2026-11-20" in said
    assert "take it by --census 2026-11-08 and a new reference" in said and not out.exists()


@contextmanager
def serving_folder(folder: Path) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.strip("/").split("?")[0]
            body = path.read_bytes() if path.is_file() else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
