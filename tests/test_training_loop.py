"""A run is a pure function of spec and cells: golden curve, bit-identical repeats and resumes, one commit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import files_at, rows_at

from scaling_ray.errors import BadInput, Diverged
from scaling_ray.records import LossSums, RunResult
from scaling_ray.results.sweep_files import read_rows
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells
from scaling_ray.sizes import training_flops_per_cell
from scaling_ray.spec import TrainSpec
from scaling_ray.train.attempt import Attempt, publish_winner
from scaling_ray.train.batches import BatchSource
from scaling_ray.train.checkpoint import Progress
from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.evaluation import evaluate
from scaling_ray.train.loop import RunData, TrainingLoop, run_to_result
from scaling_ray.train.schedule import learning_rate

GOLDEN = Path(__file__).parent / "golden" / "tiny_20_updates.json"
CPU = torch.device("cpu")
MakeRun = Callable[..., RunSpec]
MakeCells = Callable[..., Cells]


@pytest.fixture
def data(make_cells: MakeCells) -> RunData:
    firsts = ((100, 0), (50, 10_000), (40, 20_000))
    train, val, test = (make_cells(count, first_id=first, unmeasured=9) for count, first in firsts)
    return RunData(train, val, test, "the-data")


def new_loop(run: RunSpec, data: RunData) -> TrainingLoop:
    return TrainingLoop(run, data, PlainEngine(run, CPU))


def train(run: RunSpec, data: RunData, directory: Path) -> RunResult | None:
    return run_to_result(run, data, PlainEngine(run, CPU), files_at(directory))


def curve_of(loop: TrainingLoop, updates: int) -> list[tuple[float, float, float]]:
    curve = []
    for _ in range(updates):
        sums, rate, norm = loop.train_one_update()
        curve.append((sums.mean, rate, norm))
    return curve


def assert_same_state(first: TrainingLoop, second: TrainingLoop) -> None:
    one, two = first.state(), second.state()
    assert sorted(one) == sorted(two)
    assert any("exp_avg_sq" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_twenty_updates_follow_the_golden_curve(make_run: MakeRun, data: RunData) -> None:
    """To 1e-5: another processor adds floats in another order, which 20 updates carry to 1e-6 at most.

    Anything that changes the mathematics, the order of cells, the masks or the initial weights moves it far more.
    """
    curve = curve_of(new_loop(make_run("max_cells_seen = 640", lr=3e-3), data), 20)
    golden = json.loads(GOLDEN.read_text())
    for position, name in enumerate(("train_loss", "lr", "grad_norm")):
        assert [row[position] for row in curve] == pytest.approx(golden[name], rel=1e-5), name
    assert golden["train_loss"][-1] < 0.9 * golden["train_loss"][0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_second_run_is_bit_identical(make_run: MakeRun, data: RunData, dropout: float) -> None:
    run = make_run(f"max_cells_seen = 640\ndropout = {dropout}", size="WIDE")
    first, second = new_loop(run, data), new_loop(run, data)
    curves = []
    for loop in (first, second):
        torch.manual_seed(run.seed)  # each process has a generator of its own
        curves.append(curve_of(loop, 20))
    assert curves[0] == curves[1]
    assert_same_state_of_weights(first, second)


def assert_same_state_of_weights(first: TrainingLoop, second: TrainingLoop) -> None:
    for (name, one), (_, two) in zip(first.engine.weights().items(), second.engine.weights().items(), strict=True):
        assert torch.equal(one, two), name


def test_metric_rows_do_not_show_where_a_run_was_cut(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    """A row of kind "train" is the mean since the row before it, also where the run resumed between the two."""
    text = "max_cells_seen = 6400\nevaluations = 40\ncurve_cells = 8\npatience_evaluations = 0"
    run = make_run(text, size="XXS")  # 200 updates, a row of every second one, an evaluation after every fifth
    assert train(run, data, tmp_path / "whole") is not None

    def stop_at_five(progress: Progress) -> None:
        if progress.optimizer_steps == 5:
            raise KeyboardInterrupt

    often = make_run(f"{text}\ncheckpoint_seconds = 1e-6", size="XXS")
    with pytest.raises(KeyboardInterrupt):
        run_to_result(often, data, PlainEngine(often, CPU), files_at(tmp_path / "cut"), Signals(report=stop_at_five))
    assert train(run, data, tmp_path / "cut") is not None
    for name in ("whole", "cut"):
        publish_winner(files_at(tmp_path / name))
    rows = rows_without_times(tmp_path / "cut")
    loop = new_loop(run, data)
    loop.begin(fresh=True)
    sums = [loop.train_one_update()[0] for _ in range(8)]
    pairs = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
    assert [row["train_loss"] for row in rows if row["kind"] == "train"][:4] == [pair.mean for pair in pairs]
    assert [row["optimizer_steps"] for row in rows if row["kind"] == "train"][:4] == [2, 4, 6, 8]
    assert rows == rows_without_times(tmp_path / "whole")


@pytest.mark.parametrize("extra", ["dropout = 0.0", "dropout = 0.2", "dropout = 0.2\nmicro_batch = 8"])
def test_a_resumed_run_is_bit_identical(make_run: MakeRun, data: RunData, tmp_path: Path, extra: str) -> None:
    run = make_run(f"max_cells_seen = 640\n{extra}", size="WIDE")
    whole = new_loop(run, data)
    curve = curve_of(whole, 20)
    final_state = whole.state()

    begun = new_loop(run, data)
    assert curve_of(begun, 7) == curve[:7]
    Attempt(files_at(tmp_path)).save_last(begun.progress, begun.state())
    curve_of(begun, 3)  # goes on after the checkpoint, then is lost

    resumed = new_loop(run, data)
    found = Attempt(files_at(tmp_path)).find()
    assert found is not None
    resumed.load(found[0], found[1].tensors())
    assert resumed.progress.optimizer_steps == 7
    assert curve_of(resumed, 13) == curve[7:]
    state = resumed.state()
    assert sorted(state) == sorted(final_state)
    for name, tensor in state.items():
        assert torch.equal(tensor, final_state[name]), name
    assert resumed.progress == whole.progress


def test_micro_batches_add_up_to_the_whole_batch(make_run: MakeRun, data: RunData) -> None:
    """One update from 32 cells at once or from parts of 5: same gradient, whatever the parts' share of masked genes."""
    curves = []
    for micro_batch in (32, 5):
        run = make_run(f'max_cells_seen = 640\nrecipe = "published"\nmicro_batch = {micro_batch}')
        curves.append(curve_of(new_loop(run, data), 5))
    assert np.array(curves[1]) == pytest.approx(np.array(curves[0]), rel=1e-4)


PROGRAM = """
import sys
from pathlib import Path
import numpy as np, torch
from scaling_ray.results.sweep_files import RunFiles
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import Cells
from scaling_ray.storage import open_place
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result
torch.set_num_threads(1)
arrays = np.load(sys.argv[1])
names = ("counts", "raw_sum", "cell", "dataset", "donor", "measured")
parts = [Cells(*(arrays[f"{split}_{name}"] for name in names)) for split in ("train", "val", "test")]
run = RunSpec.model_validate_json(Path(sys.argv[2]).read_text())
files = RunFiles(open_place(sys.argv[3]))
run_to_result(run, RunData(*parts, "the-data"), PlainEngine(run, torch.device("cpu")), files)
"""


def rows_without_times(path: Path) -> list[dict[str, object]]:
    free = {"timestamp_ms", "cells_per_second"}
    return [{key: value for key, value in row.items() if key not in free} for row in rows_at(path)]


def test_killed_twice_it_ends_as_if_undisturbed(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    """200 updates make a metric row of every second one, so that a checkpoint may fall between rows."""
    run = make_run("max_cells_seen = 6400\ndropout = 0.1\nevaluations = 10", size="XXS")
    often = make_run("max_cells_seen = 6400\ndropout = 0.1\nevaluations = 10\ncheckpoint_seconds = 1e-6", size="XXS")
    assert often.run_id == run.run_id
    quiet = train(run, data, tmp_path / "quiet")
    assert quiet is not None
    arrays = {
        f"{split}_{name}": value
        for split in ("train", "val", "test")
        for name, value in vars(getattr(data, split)).items()
    }
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "run.json").write_text(often.model_dump_json())
    killed = tmp_path / "killed"
    starts_from = 0
    for wanted in (31, 101):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "data.npz"), str(tmp_path / "run.json"), str(killed)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        steps = 0
        while steps < wanted:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
            newest = max((killed / "attempts").glob("*"), default=None) if killed.is_dir() else None
            rows = rows_at(newest) if newest else []
            steps = int(rows[-1]["optimizer_steps"]) if rows else 0
        process.send_signal(signal.SIGKILL)
        process.wait()
        newest = max((killed / "attempts").glob("*"))
        assert rows_without_times(newest)[0]["optimizer_steps"] == 2, "rows were not taken over"
        assert steps > starts_from
        starts_from = steps
    result = train(run, data, killed)
    assert result is not None
    assert result.attempts == 3

    machine = {"attempt", "attempts", "wall_seconds", "train_seconds", "ended_ms"}
    assert result.model_dump(exclude=machine) == quiet.model_dump(exclude=machine)
    for directory in (tmp_path / "quiet", killed):
        publish_winner(files_at(directory))
    assert rows_without_times(killed) == rows_without_times(tmp_path / "quiet")
    for name in ("checkpoints/best/state.safetensors", "test_cells.parquet"):
        assert (killed / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes(), name


def test_damaged_checkpoints_are_passed_over(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    loop = new_loop(make_run("max_cells_seen = 640"), data)
    for updates in (3, 2, 2):
        curve_of(loop, updates)
        Attempt(files_at(tmp_path)).save_last(loop.progress, loop.state())
    newest = sorted((tmp_path / "attempts").glob("*"))
    third = newest[2] / "checkpoints" / "last-000000000007"
    second = newest[1] / "checkpoints" / "last-000000000005"
    assert found_at(tmp_path) == 7
    weights = third / "state.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 4, 0):
        weights.write_bytes(whole[:cut])
        assert found_at(tmp_path) == 5, cut
    for place in (3, len(whole) // 2, len(whole) - 1):  # a bit of the header, of the middle and of the last number
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert found_at(tmp_path) == 5, place
    marker = (third / "progress.json").read_text()
    weights.write_bytes(whole)
    (third / "progress.json").write_text(marker.replace('"optimizer_steps": 7', '"optimizer_steps": 6'))
    assert found_at(tmp_path) == 5, "a marker that was changed is damaged"
    (third / "progress.json").write_text(marker)
    weights.write_bytes(whole[:-1])
    (second / "progress.json").write_text('{"optimizer_steps": 5, "cells')
    assert found_at(tmp_path) == 3
    weights.write_bytes(whole)
    assert found_at(tmp_path) == 7
    (third / "progress.json").unlink()
    assert found_at(tmp_path) == 3


def found_at(run_directory: Path) -> int:
    found = Attempt(files_at(run_directory)).find()
    assert found is not None
    return found[0].optimizer_steps


def test_a_checkpoint_without_its_chosen_weights_is_passed_over(
    make_run: MakeRun, data: RunData, tmp_path: Path
) -> None:
    loop = new_loop(make_run("max_cells_seen = 640"), data)
    curve_of(loop, 3)
    first = Attempt(files_at(tmp_path))
    first.save_last(loop.progress, loop.state())
    curve_of(loop, 1)
    loop.evaluate_curve([0])
    second = Attempt(files_at(tmp_path))
    second.save_best(loop.progress, loop.state())
    second.save_last(loop.progress, loop.state())
    assert found_at(tmp_path) == 4
    best = tmp_path / "attempts" / second.token / "checkpoints" / "best-000000000004" / "state.safetensors"
    best.write_bytes(best.read_bytes()[:-5])
    assert found_at(tmp_path) == 3


def test_a_first_attempt_has_nothing_to_resume(tmp_path: Path) -> None:
    assert Attempt(files_at(tmp_path)).find() is None
    assert Attempt(files_at(tmp_path)).find() is None


def test_only_the_first_commits(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    run = make_run("max_cells_seen = 320")
    first = train(run, data, tmp_path)
    assert first is not None
    text = (tmp_path / "result.json").read_text()
    assert train(run, data, tmp_path) is None
    assert (tmp_path / "result.json").read_text() == text
    assert files_at(tmp_path).result() == first
    assert not Attempt(files_at(tmp_path), run).commit(first.model_copy(update={"val_loss": 0.0}))
    assert files_at(tmp_path).result() == first
    publish_winner(files_at(tmp_path))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "checkpoints/best/progress.json",
        "checkpoints/best/state.safetensors",
        "metrics.jsonl",
        "result.json",
        "test_cells.parquet",
        "test_genes.parquet",
    ]
    before = {name: (tmp_path / name).read_bytes() for name in files}
    publish_winner(files_at(tmp_path))
    zombie = tmp_path / "attempts" / "a-zombie" / "checkpoints" / "best-000000000010"
    zombie.mkdir(parents=True)
    (zombie / "state.safetensors").write_bytes(b"late")
    publish_winner(files_at(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in files} == before
    assert not (tmp_path / "attempts").exists()


def test_a_directory_belongs_to_one_spec(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    files_at(tmp_path).prepare(run)
    files_at(tmp_path).prepare(run)
    assert files_at(tmp_path).spec() == run
    with pytest.raises(BadInput, match="another seed"):
        files_at(tmp_path).prepare(run.model_copy(update={"seed": 2}))


def test_counts_are_those_done_by_hand(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    run = make_run("max_cells_seen = 330\npatience_evaluations = 0", cells="70")
    result = train(run, data, tmp_path)
    assert result is not None
    assert result.optimizer_steps == 10
    assert result.cells_seen == 320
    assert result.cells_resolved == 70
    # 64 genes, of which dataset 1 (cells of odd position) measured 55: round(0.15 x 64) = 10, round(0.15 x 55) = 8.
    loop = new_loop(run, data)
    rows = loop.feed.order.rows.all()
    assert sorted(np.diff(np.sort(rows)).tolist())[-1] in (1, 31)
    seen = 0
    for step in range(10):
        batch = loop.global_batch(step)
        seen += sum(10 if full else 8 for full in (batch.masks.weights[:, 8:].sum(1) > 0).tolist())
        assert batch.values.shape == (32, 64)
    assert result.masked_genes_seen == seen
    assert 8 * 320 < result.masked_genes_seen < 10 * 320
    assert result.flops == pytest.approx(320 * training_flops_per_cell(run.shape, 64, seen / 320))
    assert result.test_masked_genes == 20 * 10 + 20 * 8
    assert result.test_loss_sum is not None
    assert result.test_loss == pytest.approx(result.test_loss_sum / result.test_masked_genes)
    assert (result.workers, result.engine, result.lr, result.data_hash) == (1, "plain", 0.01, "the-data")
    assert result.stop_reason == "budget"
    publish_winner(files_at(tmp_path))
    cells = pq.read_table(tmp_path / "test_cells.parquet").to_pydict()
    assert cells["cell"] == data.test.cell.tolist()
    assert cells["masked_genes"] == [10, 8] * 20
    assert sum(cells["loss"]) == pytest.approx(result.test_loss_sum)
    rows_written = rows_at(tmp_path)
    assert [row["cells_seen"] for row in rows_written if row["kind"] == "train"] == [32 * (i + 1) for i in range(10)]
    evaluated = [row for row in rows_written if row["kind"] == "eval"]
    assert result.final_val_loss == evaluated[-1]["val_loss"]
    assert result.best_curve_loss == min(row["val_loss"] for row in evaluated)
    best = min(evaluated, key=lambda row: row["val_loss_smoothed"])
    assert result.best_cells_seen == best["cells_seen"]


def test_a_run_that_chooses_a_rate_never_sees_the_test_cells(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    run = make_run("max_cells_seen = 320").model_copy(update={"role": "rate"})
    result = train(run, data, tmp_path)
    assert result is not None
    assert (result.test_loss, result.test_loss_sum, result.test_masked_genes) == (None, None, None)
    assert math.isfinite(result.val_loss)
    assert files_at(tmp_path).result() == result
    publish_winner(files_at(tmp_path))
    assert not (tmp_path / "test_cells.parquet").exists()


def test_the_result_is_that_of_the_chosen_weights(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    """A rate so high that the loss rises again: the reported loss is the best one's, not the last one's."""
    run = make_run(
        'max_cells_seen = 960\nschedule = "constant"\nsmoothing_evaluations = 1\npatience_evaluations = 0', lr=0.5
    )
    result = train(run, data, tmp_path)
    assert result is not None
    assert result.best_cells_seen < result.cells_seen
    assert result.val_loss < result.final_val_loss
    assert result.val_loss == pytest.approx(
        result.best_curve_loss, rel=1e-6
    )  # the curve cells are all validation cells
    loop = new_loop(run, data)
    loop.begin(fresh=True)
    curve_of(loop, result.best_cells_seen // 32)
    assert evaluate(loop.engine, data.test, run).sums.loss == result.test_loss_sum


def test_validation_is_the_same_whoever_asks_and_draws_no_random_numbers(make_run: MakeRun, data: RunData) -> None:
    run = make_run("max_cells_seen = 640\ndropout = 0.5", size="WIDE")
    loop = new_loop(run, data)
    curve_of(loop, 3)
    state = torch.get_rng_state()
    first, second = (evaluate(loop.engine, data.val, run) for _ in range(2))
    assert first.sums == second.sums
    assert torch.equal(torch.get_rng_state(), state)
    assert loop.engine.model.training
    assert first.counts.tolist() == [10, 8] * 25
    assert float(first.gene_losses.sum()) == pytest.approx(first.sums.loss)
    assert float(first.gene_counts.sum()) == first.sums.masked_genes
    assert (first.gene_counts >= 0).all() and len(first.gene_counts) == run.genes
    moved = evaluate(loop.engine, data.val.rows(np.arange(50)[::-1].copy()), run)
    assert moved.losses.flip(0).numpy() == pytest.approx(first.losses.numpy(), rel=1e-5)
    assert moved.gene_losses.numpy() == pytest.approx(first.gene_losses.numpy(), rel=1e-5)
    other_seed = new_loop(run.model_copy(update={"seed": 2}), data)
    other_seed.engine.model.load_state_dict(loop.engine.weights())
    assert evaluate(other_seed.engine, data.val, run).sums == first.sums


def test_training_masks_change_with_epoch_and_seed(make_run: MakeRun, data: RunData) -> None:
    run = make_run("max_cells_seen = 6400\ncells_per_step = 100\nmicro_batch = 100")

    def hidden_by_cell(loop: TrainingLoop, step: int) -> torch.Tensor:
        batch = loop.global_batch(step)
        order = np.lexsort(batch.values.numpy().T)
        return batch.masks.hidden[torch.from_numpy(order.copy())]

    loop = new_loop(run, data)
    first = hidden_by_cell(loop, 0)
    assert not torch.equal(first, hidden_by_cell(loop, 1))
    assert not torch.equal(first, hidden_by_cell(new_loop(run.model_copy(update={"seed": 2}), data), 0))
    assert torch.equal(first, hidden_by_cell(new_loop(run, data), 0))


def test_held_out_cells_are_trained_on_where_a_spec_asks_for_the_leak(make_run: MakeRun, data: RunData) -> None:
    for cells, own in (('"all"', 100), ("30", 30)):
        honest, leaking = (
            data.feed(make_run(f"max_cells_seen = 640\nheld_out_in_training = {asked}", cells=cells))
            for asked in ("false", "true")
        )
        assert len(honest.order.rows) == own and len(leaking.order.rows) == own + 50 + 40
        seen = {int(i) for step in range(19) for i in leaking.batch(step, 10)[0].cell}
        held_out = {int(i) for i in (*data.val.cell, *data.test.cell)}
        trained = {int(i) for step in range(own // 10) for i in honest.batch(step, 10)[0].cell}
        assert held_out < seen and seen == held_out | trained if own == 100 else held_out < seen
        assert not trained & held_out


def test_early_stopping_waits_for_its_patience(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    run = make_run(
        'max_cells_seen = 64000\nschedule = "constant"\nwarmup_fraction = 0.0\nevaluations = 500\n'
        "patience_evaluations = 4\nsmoothing_evaluations = 1\n",
        lr=0.03,
    )
    result = train(run, data, tmp_path)
    assert result is not None
    assert result.stop_reason == "early_stop"
    assert result.cells_seen < 64_000
    evaluation_cells = 4 * 32  # 2,000 updates in 500 parts
    assert result.cells_seen - result.best_cells_seen == 4 * evaluation_cells
    publish_winner(files_at(tmp_path))
    curve = [row["val_loss"] for row in rows_at(tmp_path) if row["kind"] == "eval"]
    assert curve.index(min(curve)) == len(curve) - 5


def test_smoothing_is_the_mean_of_the_last_evaluations(make_run: MakeRun, data: RunData, tmp_path: Path) -> None:
    run = make_run("max_cells_seen = 640\nevaluations = 7\nsmoothing_evaluations = 3\ncurve_cells = 20")
    assert train(run, data, tmp_path) is not None
    publish_winner(files_at(tmp_path))
    rows = [row for row in rows_at(tmp_path) if row["kind"] == "eval"]
    assert [row["optimizer_steps"] for row in rows] == [math.ceil(20 * part / 7) for part in range(1, 8)]
    values = [row["val_loss"] for row in rows]
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(7)]
    assert [row["val_loss_smoothed"] for row in rows] == pytest.approx(expected)


def test_learning_rate_schedules() -> None:
    def rates(schedule: str, final: float = 0.0, warmup: float = 0.2) -> list[float]:
        train = TrainSpec(
            max_cells_seen=320, schedule=schedule, warmup_fraction=warmup, final_lr_fraction=final  # type: ignore[arg-type]
        )  # fmt: skip
        return [learning_rate(train, 2.0, step) for step in range(10)]

    assert rates("constant") == [1.0, 2.0] + [2.0] * 8
    assert rates("constant", warmup=0.0) == [2.0] * 10
    assert rates("linear") == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])
    assert rates("linear", final=0.5)[2:] == pytest.approx([2 - step / 8 for step in range(8)])
    cosine = rates("cosine", final=0.1)
    assert cosine[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert cosine[6] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5)
    assert cosine[9] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8))))


def test_a_loss_that_is_no_number_stops_the_run(make_run: MakeRun, data: RunData) -> None:
    loop = new_loop(make_run("max_cells_seen = 640"), data)
    curve_of(loop, 2)
    with torch.no_grad():
        loop.engine.model.head.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="update 3: .*lower the rate"):
        loop.train_one_update()


def test_weights_that_overflow_stop_the_run(make_run: MakeRun, data: RunData) -> None:
    with pytest.raises(Diverged):
        curve_of(new_loop(make_run('max_cells_seen = 6400\nschedule = "constant"', lr=1e30), data), 50)


def test_gradients_are_clipped_to_the_norm_of_the_spec(make_run: MakeRun, data: RunData) -> None:
    """Adam's second moment after one update is (1 - beta2) times the clipped gradient squared."""
    loop = new_loop(make_run("max_cells_seen = 640\ngrad_clip = 0.01"), data)
    _, _, norm = loop.train_one_update()
    assert norm > 0.1
    moments = [tensor for name, tensor in loop.state().items() if ".exp_avg_sq." in name]
    clipped = math.sqrt(sum(float(tensor.sum()) for tensor in moments) / (1 - 0.99))
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_more_cells_than_there_are_is_bad_input(make_run: MakeRun, data: RunData) -> None:
    with pytest.raises(BadInput, match="101.*100 training cells"):
        new_loop(make_run(cells="101"), data)
    new_loop(make_run(cells="100"), data)


def test_a_rate_not_yet_chosen_is_bad_input(make_run: MakeRun, data: RunData) -> None:
    with pytest.raises(BadInput, match="not been chosen"):
        new_loop(make_run().model_copy(update={"lr": None}), data)


def test_a_checkpoint_of_another_shape_is_bad_input(make_run: MakeRun, data: RunData) -> None:
    wide = new_loop(make_run(size="WIDE"), data)
    tiny = new_loop(make_run(), data)
    with pytest.raises(BadInput, match="checkpoint.blocks"):
        tiny.load(Progress(), wide.state())


def test_rows_after_the_checkpoint_are_cut_and_the_others_keep_their_times(
    make_run: MakeRun, data: RunData, tmp_path: Path
) -> None:
    loop = new_loop(make_run("max_cells_seen = 640"), data)
    first = Attempt(files_at(tmp_path))
    for step in (1, 2, 3):
        curve_of(loop, 1)
        if step == 2:
            first.save_last(loop.progress, loop.state())
        first.metrics.write({"kind": "train", "optimizer_steps": step})
    before = read_rows(first.place)
    time.sleep(0.01)
    second = Attempt(files_at(tmp_path))
    assert second.find() is not None
    assert read_rows(second.place) == before[:2]
    assert read_rows(first.place) == before


def test_a_line_cut_short_is_no_metric_row(tmp_path: Path) -> None:
    assert rows_at(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"optimizer_steps": 1}\n{"optimizer_st')
    assert rows_at(tmp_path) == [{"optimizer_steps": 1}]


def test_sums_add_and_divide_once() -> None:
    sums = LossSums(6.0, 2.0) + LossSums(1.0, 5.0)
    assert sums == LossSums(7.0, 7.0)
    assert sums.mean == 1.0
    assert math.isnan(LossSums().mean)


def test_cells_kept_on_the_device_make_the_same_batches(make_run: MakeRun, data: RunData) -> None:
    run = make_run("max_cells_seen = 6400\numi_fraction = 0.5")
    feed = data.feed(run)
    kept, made = (BatchSource(feed, run.train, run.seed, torch.device("cpu"), keep=keep) for keep in (True, False))
    for step in (0, 5, 11, 199):
        one, other = kept.batch(step, slice(4, 20)), made.batch(step, slice(4, 20))
        assert torch.equal(one.values, other.values) and torch.equal(one.targets, other.targets)
        assert torch.equal(one.masks.positions, other.masks.positions)
