"""What befalls a run: memory that does not suffice, classes of errors, and what is written down of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import files_at, rows_at, small_run, synthetic_cells
from torch import Tensor

from scaling_ray.errors import Preempted
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.runs import RunSpec
from scaling_ray.sweep.failures import guarded, within_memory
from scaling_ray.train.driver import Signals
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (synthetic_cells(n, first_id=1000 * n) for n in (100, 40, 30))
DATA = RunData(TRAIN, VAL, TEST, data_hash="synthetic")


class SmallMemory(PlainEngine):
    """A device on which no more than ``fits`` cells of a micro-batch have room, from some update on."""

    fits, begins = 4, 0

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """As the plain engine, or what CUDA raises where memory ends."""
        self.begins -= 1
        if self.begins < 0 and len(values_BG) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(values_BG, hidden_BG, positions_BK, last)


def sweep_at(directory: Path) -> SweepFiles:
    return SweepFiles.at(directory)


def own(directory: Path, run: RunSpec) -> Path:
    """The directory of a run."""
    return directory / "runs" / run.run_id


def train(run: RunSpec, directory: Path, fits: int, begins: int = 0) -> list[int]:
    """The micro-batches that were tried."""
    tried: list[int] = []
    files = sweep_at(directory).run(run.run_id)

    def work(runs: list[RunSpec]) -> None:
        tried.append(runs[0].execution.micro_batch)
        engine = SmallMemory(runs[0], CPU)
        engine.fits, engine.begins = fits, begins
        run_to_result(runs[0], DATA, engine, files)

    guarded(sweep_at(directory), [run], lambda: within_memory([run], files.place, work))
    return tried


def test_micro_batches_are_halved_at_the_same_effective_batch(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32\nevaluations = 4")
    assert train(run, tmp_path, fits=4) == [32, 16, 8, 4]
    result = files_at(own(tmp_path, run)).result()
    assert result is not None
    assert (result.micro_batch, result.optimizer_steps, result.cells_seen) == (4, 20, 640)
    record = json.loads((own(tmp_path, run) / "memory.json").read_text())
    assert (record["micro_batch"], record["planned"]) == (4, 32) and "CUDA out of memory" in record["error"]
    # the same update, but for the order of float32 sums
    planned = small_run("max_cells_seen = 640\nmicro_batch = 4\nevaluations = 4")
    run_to_result(planned, DATA, PlainEngine(planned, CPU), files_at(tmp_path / "planned"))
    expected = files_at(tmp_path / "planned").result()
    assert expected is not None and result.test_loss == expected.test_loss


def test_a_later_call_begins_with_what_fitted(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32")
    train(run, tmp_path, fits=8)
    (own(tmp_path, run) / "result.json").unlink()
    assert train(run, tmp_path, fits=8) == [8]


def test_what_was_saved_before_memory_ended_is_not_trained_again(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32\ncheckpoint_seconds = 1e-6\nevaluations = 4")
    assert train(run, tmp_path, fits=16, begins=10) == [32, 16]
    result = files_at(own(tmp_path, run)).result()
    assert result is not None and result.attempts == 2
    rows = rows_at(own(tmp_path, run) / "attempts" / result.attempt)
    assert [row["optimizer_steps"] for row in rows if row["kind"] == "eval"] == [5, 10, 15, 20]
    ended = (own(tmp_path, run) / "memory.json").stat().st_mtime * 1000
    before = [row["optimizer_steps"] for row in rows if row["timestamp_ms"] < ended and row["kind"] == "train"]
    assert before == list(range(1, 11))


def test_one_cell_that_does_not_fit_is_the_end(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 4")
    assert train(run, tmp_path, fits=0) == [4, 2, 1]
    failure = files_at(own(tmp_path, run)).failure()
    assert failure is not None and failure.failure == "out_of_memory"
    assert files_at(own(tmp_path, run)).result() is None


def test_being_stopped_is_no_failure(tmp_path: Path) -> None:
    run = small_run()

    def stopped() -> None:
        raise Preempted("M000", "stopped")

    with pytest.raises(Preempted):
        guarded(sweep_at(tmp_path), [run], stopped)
    assert files_at(own(tmp_path, run)).failure() is None


def test_a_stack_that_fails_fails_for_each_without_a_result(tmp_path: Path) -> None:
    runs = [small_run("max_cells_seen = 32").model_copy(update={"run_id": name}) for name in "abc"]
    run_to_result(runs[1], DATA, PlainEngine(runs[1], CPU), files_at(own(tmp_path, runs[1])))

    def broken() -> None:
        raise RuntimeError("a bug")

    assert not guarded(sweep_at(tmp_path), runs, broken)
    failures = [files_at(own(tmp_path, run)).failure() for run in runs]
    assert [found.failure if found else None for found in failures] == ["bug", None, "bug"]


def test_a_run_asked_to_stop_saves_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 1280\ndropout = 0.1\nevaluations = 4")
    answers = iter([False] * 16 + [True])
    with pytest.raises(Preempted, match="saved at update 17"):
        asking = Signals(asked_to_stop=lambda: next(answers), ask_seconds=0.0)
        run_to_result(run, DATA, PlainEngine(run, CPU), files_at(tmp_path / "cut"), asking)
    run_to_result(run, DATA, PlainEngine(run, CPU), files_at(tmp_path / "cut"))
    run_to_result(run, DATA, PlainEngine(run, CPU), files_at(tmp_path / "whole"))
    cut, whole = files_at(tmp_path / "cut").result(), files_at(tmp_path / "whole").result()
    assert cut is not None and whole is not None and cut.attempts == 2
    for field in ("val_loss", "test_loss", "final_val_loss", "masked_genes_seen"):
        assert getattr(cut, field) == getattr(whole, field)


def test_a_notice_saves_and_training_goes_on(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\ncheckpoint_seconds = 3600\nevaluations = 2")
    answers = iter([False] * 6 + [True])
    saved: list[bool] = []

    def report(progress: object) -> None:
        saved.append(bool(list((tmp_path / "run").glob("attempts/*/checkpoints/last-*/progress.json"))))

    signals = Signals(asked_to_save=lambda: next(answers, False), report=report, ask_seconds=0.0)
    run_to_result(run, DATA, PlainEngine(run, CPU), files_at(tmp_path / "run"), signals)
    assert saved[0] and files_at(tmp_path / "run").result() is not None
