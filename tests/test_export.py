"""An exported model: the same validation loss in a plain process, and one line for whatever is not one."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import small_run, synthetic_cells, write_cells_as_shards

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.model.exported import load_model
from scaling_ray.records import ModelRecord, RunResult, ShardManifest
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import write_table
from scaling_ray.storage import open_place, sealed_json, unseal
from scaling_ray.sweep.export import keep_genes
from scaling_ray.train.attempt import publish_winner
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result

REPOSITORY = Path(__file__).resolve().parents[1]
STORED_GENES, GENES = 64, 50
BUDGET = "max_cells_seen = 640\nevaluations = 4\ncurve_cells = 64"
RUNS = {
    "corrected": small_run(BUDGET, size="WIDE", genes=GENES),
    "published": small_run(BUDGET + '\nrecipe = "published"\nmask_fraction = 0.3', size="TINY", genes=GENES),
    "width 1": small_run(BUDGET, size="XXS", genes=GENES),
}


def make_shards(directory: Path, data_hash: str = "synthetic") -> ShardManifest:
    """Three splits over 64 genes in an odd order; the second data set lacks 20 of them, six among the first 50."""
    directory.mkdir()
    splits = {
        name: synthetic_cells(cells, STORED_GENES, first_id=first, unmeasured=20)
        for name, cells, first in (("train", 200, 0), ("val", 120, 10_000), ("test", 60, 20_000))
    }
    manifest = write_cells_as_shards(directory, splits)
    number = np.random.default_rng(3).permutation(STORED_GENES)
    ids = [f"ENSG{n:011d}" for n in number]
    table = pa.table({"rank": np.arange(STORED_GENES), "feature_id": ids, "feature_name": [f"GENE{n}" for n in number]})
    entry = write_table(open_place(directory), "genes.parquet", table)
    manifest = manifest.model_copy(update={"tables": [*manifest.tables, entry], "data_hash": data_hash})
    (directory / "manifest.json").write_text(manifest.to_json())
    return manifest


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "shards"
    make_shards(directory)
    return directory


@pytest.fixture(scope="module")
def trained(shards: Path) -> Path:
    """What a sweep leaves of three finished runs and one that waits."""
    from scaling_ray.shards.read import read_split

    torch.set_num_threads(1)
    sweep = shards.parent / "sweep"
    manifest = ShardManifest.read(shards / "manifest.json")
    train, val, test = (read_split(shards, manifest, split, GENES) for split in ("train", "val", "test"))
    for run in RUNS.values():
        files = SweepFiles.at(sweep).run(run.run_id)
        files.prepare(run)
        data = RunData(train, val, test, manifest.data_hash)
        assert run_to_result(run, data, PlainEngine(run, torch.device("cpu")), files)
        publish_winner(files)
    (sweep / "shards_manifest.json").write_text(manifest.to_json())
    keep_genes(open_place(sweep), manifest, open_place(shards))
    waiting = small_run(BUDGET, size="XS", genes=GENES)
    (sweep / "plan.json").write_text(
        sealed_json({"settings": [{"run_id": run.run_id} for run in [*RUNS.values(), waiting]]})
    )
    return sweep


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


def export(sweep: Path, run_id: str, out: Path, *options: str) -> int:
    return main(["export", str(sweep), run_id, "--out", str(out), *options])


def refusal(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("scaling-ray: "), (code, lines)
    return lines[0]


PLAIN_PROCESS = """
import json, sys
from pathlib import Path
import torch
from scaling_ray.model.exported import load_model
from scaling_ray.model.masking import EVALUATION_MASK_SEED, draw_masks, log_normalise
from scaling_ray.shards.format import read_manifest
from scaling_ray.shards.read import read_split

found = []
for model in sys.argv[2:]:
    network, record = load_model(Path(model))
    assert not network.training
    cells = read_split(sys.argv[1], read_manifest(sys.argv[1]), "val", len(record.feature_ids))
    counts = torch.from_numpy(cells.counts.astype("int32"))
    values = log_normalise(counts, torch.from_numpy(cells.raw_sum), record.recipe)
    ids = torch.from_numpy(cells.cell)
    measured = torch.from_numpy(cells.measured[cells.dataset])
    masks = draw_masks(record.recipe, record.mask_fraction, EVALUATION_MASK_SEED, torch.zeros_like(ids), ids, measured)
    with torch.no_grad():
        predictions = network(values, masks.hidden, masks.positions)[..., 0]
    errors = (predictions - values.gather(1, masks.positions)).double() ** 2 * masks.weights
    found.append(float(errors.sum() / masks.weights.sum().double()))
print(json.dumps([found, sorted({name.split(".")[0] for name in sys.modules} & {"ray", "mlflow", "tiledbsoma"})]))
"""


def test_a_plain_process_gets_the_validation_loss_of_the_run(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = []
    for name, run in RUNS.items():
        models.append(str(tmp_path / name))
        assert export(trained, run.run_id, Path(models[-1])) == 0
        assert capsys.readouterr().out.strip() == models[-1]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESS, str(shards), *models], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses, heavy = json.loads(done.stdout)
    assert heavy == []
    for run, loss in zip(RUNS.values(), losses, strict=True):
        result = RunResult.read(trained / "runs" / run.run_id / "result.json")
        assert loss == pytest.approx(result.val_loss, rel=1e-6), run.run_id


def test_the_record_says_what_the_model_is(trained: Path, shards: Path, tmp_path: Path) -> None:
    run = RUNS["published"]
    assert export(trained, run.run_id, tmp_path / "deep" / "model") == 0
    network, record = load_model(tmp_path / "deep" / "model")
    result = RunResult.read(trained / "runs" / run.run_id / "result.json")
    number = np.random.default_rng(3).permutation(STORED_GENES)[:GENES]
    assert record.feature_ids == [f"ENSG{n:011d}" for n in number]
    assert record.feature_names == [f"GENE{n}" for n in number]
    assert (record.run_id, record.size, record.shape) == (run.run_id, "TINY", run.shape)
    assert (record.recipe, record.mask_fraction, record.params) == ("published", 0.3, run.params)
    assert (record.val_loss, record.test_loss, record.data_hash) == (result.val_loss, result.test_loss, "synthetic")
    assert not any(parameter.dtype != torch.float32 for parameter in network.parameters())
    assert {path.name for path in (tmp_path / "deep").rglob("*")} == {"model", "model.json", "model.safetensors"}


def without_result(sweep: Path, run: RunSpec) -> None:
    (sweep / "runs" / run.run_id / "result.json").unlink()


def without_checkpoint(sweep: Path, run: RunSpec) -> None:
    shutil.rmtree(sweep / "runs" / run.run_id / "checkpoints")


def checkpoint_cut_short(sweep: Path, run: RunSpec) -> None:
    path = sweep / "runs" / run.run_id / "checkpoints" / "best" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def checkpoint_of_another(sweep: Path, run: RunSpec) -> None:
    best = Path("checkpoints") / "best"
    shutil.rmtree(sweep / "runs" / run.run_id / best)
    shutil.copytree(sweep / "runs" / RUNS["published"].run_id / best, sweep / "runs" / run.run_id / best)


def checkpoint_with_a_flipped_bit(sweep: Path, run: RunSpec) -> None:
    path = sweep / "runs" / run.run_id / "checkpoints" / "best" / "state.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def genes_damaged(sweep: Path, run: RunSpec) -> None:
    (sweep / "genes.parquet").write_bytes(b"no genes")


def without_genes(sweep: Path, run: RunSpec) -> None:
    (sweep / "genes.parquet").unlink()


def without_manifest(sweep: Path, run: RunSpec) -> None:
    (sweep / "shards_manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_result, "has no result yet"),
        (without_checkpoint, "checkpoint: "),
        (checkpoint_cut_short, "is damaged"),
        (checkpoint_with_a_flipped_bit, "is damaged"),
        (checkpoint_of_another, "is of another run"),
        (genes_damaged, "genes.parquet"),
        (without_genes, "--shards"),
        (without_manifest, "holds no shards_manifest.json"),
    ],
)
def test_a_damaged_sweep_is_one_line_and_leaves_nothing(
    damage: Callable[[Path, RunSpec], None],
    expected: str,
    sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RUNS["corrected"]
    damage(sweep, run)
    assert expected in refusal(export(sweep, run.run_id, tmp_path / "model"), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_runs_that_are_not_there_are_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = RUNS["corrected"].run_id
    assert run_id in refusal(export(trained, run_id[:-2], tmp_path / "model"), capsys)
    waiting = small_run(BUDGET, size="XS", genes=GENES).run_id
    assert "has no result yet" in refusal(export(trained, waiting, tmp_path / "model"), capsys)
    for odd in ("", "..", "../runs"):
        assert "is no run of" in refusal(export(trained, odd, tmp_path / "model"), capsys)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_still_with_its_attempt_is_found(sweep: Path, tmp_path: Path) -> None:
    run = RUNS["corrected"]
    directory = sweep / "runs" / run.run_id
    attempt = directory / "attempts" / RunResult.read(directory / "result.json").attempt
    (attempt / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints" / "best").rename(attempt / "checkpoints" / "best-000000000020")
    assert export(sweep, run.run_id, tmp_path / "model") == 0
    load_model(tmp_path / "model")


def test_an_older_sweep_takes_its_genes_from_its_shards(
    sweep: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "genes.parquet").unlink()
    run_id = RUNS["width 1"].run_id
    make_shards(tmp_path / "others", data_hash="others")
    assert "are not the shards of this sweep" in refusal(
        export(sweep, run_id, tmp_path / "model", "--shards", str(tmp_path / "others")), capsys
    )
    assert export(sweep, run_id, tmp_path / "model", "--shards", str(shards)) == 0
    assert len(load_model(tmp_path / "model")[1].feature_ids) == GENES


def test_only_the_same_model_is_replaced(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = RUNS["corrected"].run_id, RUNS["published"].run_id
    out = tmp_path / "model"
    assert export(trained, first, out) == 0
    weights = (out / "model.safetensors").read_bytes()
    assert first in refusal(export(trained, second, out), capsys)
    (out / "model.safetensors").write_bytes(weights[:-1])
    assert export(trained, first, out) == 0
    assert (out / "model.safetensors").read_bytes() == weights
    for other in ("folder", "file"):
        place_there = tmp_path / other
        if other == "folder":
            place_there.mkdir()
            (place_there / "mine.txt").write_text("keep")
        else:
            place_there.write_text("keep")
        assert "is no model" in refusal(export(trained, first, place_there), capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "folder", "file"}
    assert refusal(export(trained, first, tmp_path / "file" / "model"), capsys)


def test_what_is_no_whole_model_is_refused(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert export(trained, RUNS["corrected"].run_id, out) == 0
    weights, text = (out / "model.safetensors").read_bytes(), (out / "model.json").read_text()
    record = ModelRecord.parse(text, "model.json")
    header = 8 + int.from_bytes(weights[:8], "little")
    flipped = [
        weights[:at] + bytes([weights[at] ^ 1]) + weights[at + 1 :]
        for at in (0, 7, 8, header // 2, header - 1, header, (header + len(weights)) // 2, len(weights) - 1)
    ]
    cut = [weights[:length] for length in (0, 4, 8, header, len(weights) - 100, len(weights) - 1)]
    for damaged in (*flipped, *cut, weights + b"x"):
        (out / "model.safetensors").write_bytes(damaged)
        with pytest.raises(BadInput, match="model.safetensors.*export the model again"):
            load_model(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="is missing"):
        load_model(out)
    (out / "model.safetensors").write_bytes(weights)
    fields = unseal(text, "model.json")
    for odd, complaint in (
        (sealed_json(fields | {"version": 1_000}), "version: 1000: is not known"),
        (sealed_json(fields | {"feature_ids": fields["feature_ids"][:1] * GENES}), "is not a ModelRecord"),
        (sealed_json(fields | {"params": 7}), "is not a ModelRecord"),
        (text.replace(record.feature_ids[0], record.feature_ids[1]), "was changed"),
        (text.replace(record.weights_sha256, hashlib.sha256(b"other").hexdigest()), "was changed"),
        (text[:-10], "cut short or damaged; export the model again"),
        ("{}", "written by another version"),
        ("no json", "is no JSON"),
    ):
        (out / "model.json").write_text(odd)
        with pytest.raises(BadInput, match=complaint) as found:
            load_model(out)
        assert "\n" not in str(found.value)
    (out / "model.json").write_text(text)
    load_model(out)
    with pytest.raises(BadInput, match="scaling-ray export"):
        load_model(tmp_path / "nowhere")


def test_the_files_of_a_model_have_the_mode_of_any_other_file(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert export(sweep, RUNS["corrected"].run_id, out) == 0
    plain = tmp_path / "plain"
    plain.write_text("")
    assert {file.stat().st_mode for file in out.iterdir()} == {plain.stat().st_mode}


def test_a_model_knows_the_library_of_its_training_cells(sweep: Path, shards: Path, tmp_path: Path) -> None:
    median = float(np.median(synthetic_cells(200, STORED_GENES, unmeasured=20).raw_sum))
    run_id = RUNS["corrected"].run_id
    assert export(sweep, run_id, tmp_path / "kept") == 0
    assert load_model(tmp_path / "kept")[1].library_median == median
    (sweep / "libraries.json").unlink()
    assert export(sweep, run_id, tmp_path / "shards", "--shards", str(shards)) == 0
    assert load_model(tmp_path / "shards")[1].library_median == median
    assert export(sweep, run_id, tmp_path / "neither") == 0
    assert load_model(tmp_path / "neither")[1].library_median is None
