"""What befalls a run: memory that does not suffice, classes of errors, and what is written down of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import small_run, synthetic_cells
from torch import Tensor

from scaling_ray.errors import Preempted
from scaling_ray.spec import RunSpec
from scaling_ray.sweep.failures import guarded, recorded_failure, within_memory
from scaling_ray.train.checkpoint import read_metrics, read_result
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, run_to_result

CPU = torch.device("cpu")
DATA = RunData(*(synthetic_cells(n, first_id=1000 * n) for n in (100, 40, 30)), data_hash="synthetic")


class SmallMemory(PlainEngine):
    """A device on which no more than ``fits`` cells of a micro-batch have room, from some update on."""

    fits, begins = 4, 0

    def forward(self, values_BG: Tensor, hidden_BG: Tensor, positions_BK: Tensor, last: bool) -> Tensor:
        """As the plain engine, or what CUDA raises where memory ends."""
        self.begins -= 1
        if self.begins < 0 and len(values_BG) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(values_BG, hidden_BG, positions_BK, last)


def train(run: RunSpec, place: Path, fits: int, begins: int = 0) -> list[int]:
    """The micro-batches that were tried."""
    tried: list[int] = []

    def work(runs: list[RunSpec]) -> None:
        tried.append(runs[0].micro_batch)
        engine = SmallMemory(runs[0], CPU)
        engine.fits, engine.begins = fits, begins
        run_to_result(runs[0], DATA, engine, place)

    guarded({place: run}, lambda: within_memory([run], place, work))
    return tried


def test_micro_batches_are_halved_at_the_same_effective_batch(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32\nevaluations = 4")
    assert train(run, tmp_path / "run", fits=4) == [32, 16, 8, 4]
    result = read_result(tmp_path / "run")
    assert result is not None
    assert (result.micro_batch, result.optimizer_steps, result.cells_seen) == (4, 20, 640)
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (record["micro_batch"], record["planned"]) == (4, 32) and "CUDA out of memory" in record["error"]
    # the same update, but for the order of float32 sums
    planned = small_run("max_cells_seen = 640\nmicro_batch = 4\nevaluations = 4")
    run_to_result(planned, DATA, PlainEngine(planned, CPU), tmp_path / "planned")
    expected = read_result(tmp_path / "planned")
    assert expected is not None and result.test_mse == expected.test_mse


def test_a_later_call_begins_with_what_fitted(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32")
    train(run, tmp_path / "run", fits=8)
    (tmp_path / "run" / "result.json").unlink()
    assert train(run, tmp_path / "run", fits=8) == [8]


def test_what_was_saved_before_memory_ended_is_not_trained_again(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 32\ncheckpoint_seconds = 1e-6\nevaluations = 4")
    assert train(run, tmp_path / "run", fits=16, begins=10) == [32, 16]
    result = read_result(tmp_path / "run")
    assert result is not None and result.attempts == 2
    rows = read_metrics(tmp_path / "run" / "attempts" / result.attempt / "metrics.jsonl")
    assert [row["optimizer_steps"] for row in rows if row["kind"] == "eval"] == [5, 10, 15, 20]
    ended = (tmp_path / "run" / "memory.json").stat().st_mtime * 1000
    before = [row["optimizer_steps"] for row in rows if row["timestamp_ms"] < ended and row["kind"] == "train"]
    assert before == list(range(1, 11))


def test_one_cell_that_does_not_fit_is_the_end(tmp_path: Path) -> None:
    run = small_run("max_cells_seen = 640\nmicro_batch = 4")
    assert train(run, tmp_path / "run", fits=0) == [4, 2, 1]
    assert recorded_failure(tmp_path / "run") == "out_of_memory" and read_result(tmp_path / "run") is None


def test_being_stopped_is_no_failure(tmp_path: Path) -> None:
    run = small_run()

    def stopped() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        guarded({tmp_path: run}, stopped)
    assert recorded_failure(tmp_path) is None


def test_a_stack_that_fails_fails_for_each_without_a_result(tmp_path: Path) -> None:
    places = {tmp_path / name: small_run() for name in "abc"}
    for place in places:
        place.mkdir()
    (tmp_path / "b" / "result.json").write_text("{}")

    def broken() -> None:
        raise RuntimeError("a bug")

    assert not guarded(places, broken)
    assert [recorded_failure(tmp_path / name) for name in "abc"] == ["bug", None, "bug"]


def test_a_run_asked_to_stop_saves_and_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling_ray.train.loop.ASK_SECONDS", 0.0)
    run = small_run("max_cells_seen = 1280\ndropout = 0.1\nevaluations = 4")
    answers = iter([False] * 16 + [True])
    with pytest.raises(Preempted, match="saved at update 17"):
        run_to_result(run, DATA, PlainEngine(run, CPU), tmp_path / "cut", asked_to_stop=lambda: next(answers))
    run_to_result(run, DATA, PlainEngine(run, CPU), tmp_path / "cut")
    run_to_result(run, DATA, PlainEngine(run, CPU), tmp_path / "whole")
    cut, whole = read_result(tmp_path / "cut"), read_result(tmp_path / "whole")
    assert cut is not None and whole is not None and cut.attempts == 2
    for field in ("val_mse", "test_mse", "final_val_mse", "masked_genes_seen"):
        assert getattr(cut, field) == getattr(whole, field)


def test_a_notice_saves_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_ray.train.loop.ASK_SECONDS", 0.0)
    run = small_run("max_cells_seen = 640\ncheckpoint_seconds = 3600\nevaluations = 2")
    answers = iter([False] * 6 + [True])
    saved: list[bool] = []

    def report(progress: object) -> None:
        saved.append(bool(list((tmp_path / "run").glob("attempts/*/checkpoints/last/state.safetensors"))))

    run_to_result(
        run, DATA, PlainEngine(run, CPU), tmp_path / "run", report, asked_to_save=lambda: next(answers, False)
    )
    assert saved[0] and read_result(tmp_path / "run") is not None
