"""Several ranks do what one process does: losses, checkpoints, resuming, and the Ray Train group around them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_at, rows_at, small_run, synthetic_cells, write_cells_as_shards
from process_groups import RANKS, join_group, run_in_a_group
from safetensors.torch import load_file

from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult
from scaling_ray.results.sweep_files import SweepFiles, read_rows
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import SPLITS, read_manifest
from scaling_ray.shards.read import read_split
from scaling_ray.storage import Place, open_place
from scaling_ray.train import saving
from scaling_ray.train.attempt import LAST, Attempt, publish_winner
from scaling_ray.train.choice import build_engine
from scaling_ray.train.driver import Signals, train
from scaling_ray.train.engine import Engine, PlainEngine, device_of, load_weights, model_tensors
from scaling_ray.train.evaluation import evaluate
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.loop import run_to_result as run_in_files
from scaling_ray.train.saving import restore, save_last
from scaling_ray.train.sharded import Shard, read_state, write_shard
from scaling_ray.train.zero import DeepSpeedEngine

UPDATES = 20
CURVE_TOLERANCE = 1e-5
"""Relative, on the training loss of each of the first 20 updates: only the order of float32 sums differs."""

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("planned", "a_gpu_is_there", "wanted"),
    [("cpu", True, "cpu"), ("cpu_bf16", True, "cpu"), ("cuda", True, "cuda"), ("cuda", False, "cpu")],
)
def test_a_run_computes_where_it_was_planned(
    planned: str, a_gpu_is_there: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that asked Ray for no GPU must not train on one that happens to be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: a_gpu_is_there)
    assert device_of(small_run().carried_out(device=planned).execution) == torch.device(wanted)


@dataclass(frozen=True)
class Variant:
    """An engine of several ranks; ``whole`` is the size below which ZeRO 3 leaves a parameter whole."""

    engine: str
    zero_stage: int = 0
    whole: int = 0
    offload: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.zero_stage}-{self.whole}" + ("-offload" if self.offload else "")

    @property
    def shares_out(self) -> bool:
        return self.zero_stage > 0

    def of(self, run: RunSpec) -> RunSpec:
        resources = {"workers": RANKS, "engine": self.engine, "zero_stage": self.zero_stage}
        return run.carried_out(**resources, offload_optimizer=self.offload)

    def build(self, run: RunSpec, rank: int) -> Engine:
        if self.engine == "deepspeed":
            return DeepSpeedEngine(self.of(run), CPU, rank, RANKS, self.whole)
        return build_engine(self.of(run), CPU, rank, RANKS)


DDP = Variant("ddp")
ZERO = [Variant("deepspeed", 0), Variant("deepspeed", 1), Variant("deepspeed", 2), Variant("deepspeed", 3)]
ZERO_WITH_WHOLE_PARAMETERS = Variant("deepspeed", 3, 100_000)
OFFLOADED = [Variant("deepspeed", stage, offload=True) for stage in (1, 2, 3)]
SHARED_OUT = [*ZERO[1:], ZERO_WITH_WHOLE_PARAMETERS, *OFFLOADED]


def spec(extra: str = "") -> RunSpec:
    """20 updates of 32 cells; a rank takes its 16 in micro-batches of 6, 6 and 4."""
    train = f"max_cells_seen = {32 * UPDATES}\nmicro_batch = 6\nevaluations = 4\ncurve_cells = 32\n{extra}"
    return small_run(train, size="WIDE")


def data() -> RunData:
    # 45 validation cells make 8 micro-batches, 51 test cells 9: the ranks' shares are equal once, and once not
    train, val, test = (synthetic_cells(n, unmeasured=9, first_id=1000 * i) for i, n in enumerate((100, 45, 51)))
    return RunData(train, val, test, data_hash="synthetic")


def run_to_result(
    run: RunSpec, data: RunData, engine: Engine, directory: Path, report: Callable[[Any], None] | None = None
) -> RunResult | None:
    """The package's own, with a directory for the run's files."""
    signals = Signals(report=report) if report is not None else None
    return run_in_files(run, data, engine, files_at(directory), signals)


def read_result(directory: Path) -> RunResult | None:
    return files_at(directory).result()


def curve(engine: Engine, run: RunSpec) -> dict[str, list[float]]:
    loop = TrainingLoop(run, data(), engine)
    rows = [loop.train_one_update() for _ in range(UPDATES)]
    return {"mse": [sums.mean for sums, _, _ in rows], "norm": [norm for _, _, norm in rows]}


class Crash(Exception):
    pass


def crash(progress: Any) -> None:
    if progress.optimizer_steps == UPDATES // 2:
        raise Crash


def exercise(rank: int, variants: list[Variant], directory: Path) -> None:
    """What each of the two processes does; rank 0 leaves what it saw as JSON."""
    for variant in variants:
        engine = variant.build(spec(), rank)
        seen: dict[str, Any] = {"curve": curve(engine, variant.of(spec()))}
        seen["bytes"] = engine.resident_bytes()
        seen["sum"] = engine.sum_over_ranks(torch.tensor([rank + 1, 10 * rank])).tolist()
        if variant.shares_out:
            seen |= exercise_shards(variant, rank, directory / f"shards-{variant.name}")
        if not variant.whole and not variant.offload:
            seen |= exercise_rewind(variant, rank)
            seen |= exercise_branch(variant.of, lambda run: variant.build(run, rank), rank == 0)  # noqa: B023
            exercise_resumes(variant, rank, directory / variant.name)
        if rank == 0:
            (directory / f"{variant.name}.json").write_text(json.dumps(seen))


OFTEN = "checkpoint_seconds = 1e-6"


def exercise_resumes(variant: Variant, rank: int, directory: Path) -> None:
    """Whole; cut and resumed at the same number of ranks; cut in one process and resumed here; cut for others."""
    run = variant.of(spec())
    run_to_result(run, data(), variant.build(run, rank), directory / "whole")
    run = variant.of(spec(OFTEN))
    with pytest.raises(Crash):
        run_to_result(run, data(), variant.build(run, rank), directory / "cut", crash)
    if rank == 0:
        for name in ("of-another-spec", "to-plain", "to-another-stage", "damaged"):
            shutil.copytree(directory / "cut", directory / name)
        with pytest.raises(Crash):
            run_to_result(spec(OFTEN), data(), PlainEngine(spec(OFTEN), CPU), directory / "from-plain", crash)
    torch.distributed.barrier()
    other = run.model_copy(update={"seed": 7})
    with pytest.raises(BadInput, match=r"checkpoint\.seed: 1: .*7"):
        run_to_result(other, data(), variant.build(other, rank), directory / "of-another-spec")
    for name in ("cut", "from-plain"):
        run_to_result(run, data(), variant.build(run, rank), directory / name)
    if variant.shares_out:
        another = Variant("deepspeed", variant.zero_stage % 3 + 1)
        run = another.of(spec(OFTEN))
        run_to_result(run, data(), another.build(run, rank), directory / "to-another-stage")


def exercise_shards(variant: Variant, rank: int, directory: Path) -> dict[str, Any]:
    """Three updates after the fifth; the same again, and by a new engine, from the shards written there."""
    run = variant.of(spec("dropout = 0.1"))
    loop = TrainingLoop(run, data(), variant.build(run, rank))
    for _ in range(5):
        loop.train_one_update()
    attempt = Attempt(files_at(directory)) if rank == 0 else None
    save_last(attempt, loop.engine, loop.progress, loop.state)
    state = {name: tensor.clone() for name, tensor in loop.state().items()}
    seen: dict[str, Any] = {"first": [loop.train_one_update()[0].loss for _ in range(3)]}
    later = loop.state()
    anew = TrainingLoop(run, data(), variant.build(run, rank))
    for name, one in (("again", loop), ("anew", anew)):
        start, tensors = restore(Attempt(files_at(directory)) if rank == 0 else None, one.engine)
        assert start is not None and isinstance(tensors, Shard)
        one.load(start, tensors)
        seen[f"shard_{name}"] = [one.train_one_update()[0].loss for _ in range(3)]
        ended = one.state()
        seen[f"same_state_{name}"] = rank != 0 or all(torch.equal(ended[key], later[key]) for key in later)
    seen["shard_first"] = seen.pop("first")
    if attempt is not None:
        folder = attempt.checkpoints.folder(LAST, 5)
        consolidated = read_state(folder)
        seen["consolidated"] = sorted(consolidated) == sorted(state)
        seen["consolidated"] &= all(torch.equal(consolidated[key], state[key]) for key in state)
        seen["files"] = list(folder.names())
        shards = [load_file(Path(folder.uri) / f"state-rank{r}of2.safetensors") for r in range(RANKS)]
        seen["elements"] = [sum(t.numel() for name, t in s.items() if name.startswith("model.")) for s in shards]
    return seen


def killed_while_saving(rank: int, run: RunSpec, variant: Variant, directory: Path) -> None:
    """Rank 1 dies with its fourth shard half written."""
    join_group(rank, directory)
    written = 0

    def write_half_the_fourth(place: Place, shard: Shard) -> None:
        nonlocal written
        written += 1
        write_shard(place, shard)
        if rank == 1 and written == 4:
            file = Path(place.uri) / "state-rank1of2.safetensors"
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    saving.write_shard = write_half_the_fourth
    run_to_result(run, data(), variant.build(run, rank), directory / "run")


def resumed_after_the_kill(rank: int, run: RunSpec, variant: Variant, directory: Path) -> None:
    run_to_result(run, data(), variant.build(run, rank), directory / "run")


def exercise_rewind(variant: Variant, rank: int) -> dict[str, Any]:
    """Under dropout: three updates after the fifth, and the same again from the state that was taken there."""
    run = variant.of(spec("dropout = 0.1"))
    loop = TrainingLoop(run, data(), variant.build(run, rank))
    for _ in range(5):
        loop.train_one_update()
    progress, state = replace(loop.progress), {name: t.clone() for name, t in loop.state().items()}
    progress, state = loop.engine.share(progress, state)
    seen: dict[str, Any] = {"state_names": sorted(state)}
    seen["generators_differ"] = not torch.equal(state["generator"], state["generator.1"])
    seen["first"] = [loop.train_one_update()[0].loss for _ in range(3)]
    loop.load(progress, state)
    seen["again"] = [loop.train_one_update()[0].loss for _ in range(3)]
    return seen


def exercise_branch(
    of: Callable[[RunSpec], RunSpec], build: Callable[[RunSpec], Engine], first: bool
) -> dict[str, Any]:
    """A trunk with a branch at half its budget, and one without: what the branch reached, whether it left a trace."""
    ended: list[TrainingLoop] = []
    for branches in ("[0.5]", "[]"):
        trunk = f"[train.trunk]\nwarmup_cells = 64\nevaluation_cells = 160\nbranches = {branches}"
        run = of(spec(f'schedule = "wsd"\npatience_evaluations = 0\ndropout = 0.1\n{trunk}'))
        torch.manual_seed(3)
        loop = TrainingLoop(run, data(), build(run))
        loop.begin(fresh=True)
        train(loop, Signals())
        ended.append(loop)
    (branch,) = ended[0].progress.branches
    one, other = (loop.state() for loop in ended)
    same = not first or all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return {"branch": branch, "trunk_is_unmoved": same and ended[1].progress.branches == []}


def run_two_processes(variants: list[Variant], directory: Path) -> dict[str, dict[str, Any]]:
    run_in_a_group(exercise, variants, directory, directory=directory)
    return {variant.name: json.loads((directory / f"{variant.name}.json").read_text()) for variant in variants}


@pytest.fixture(scope="module")
def plain_curve() -> dict[str, list[float]]:
    torch.set_num_threads(1)
    return curve(PlainEngine(spec(), CPU), spec())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("ddp")
    return run_two_processes([DDP], directory)[DDP.name], directory / DDP.name


@pytest.fixture(scope="module")
def all_zero(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    directory = tmp_path_factory.mktemp("zero")
    return run_two_processes([*ZERO, ZERO_WITH_WHOLE_PARAMETERS, *OFFLOADED], directory), directory


def check_curve(seen: dict[str, Any], plain: dict[str, list[float]]) -> None:
    assert seen["curve"]["mse"] == pytest.approx(plain["mse"], rel=CURVE_TOLERANCE)
    assert seen["curve"]["norm"] == pytest.approx(plain["norm"], rel=10 * CURVE_TOLERANCE)
    # one and the same update, shared out differently: sums in fp32 differ by their rounding only
    assert seen["curve"]["mse"][0] == pytest.approx(plain["mse"][0], rel=1e-6)
    assert seen["curve"]["norm"][0] == pytest.approx(plain["norm"][0], rel=1e-6)
    assert plain["mse"][-1] < 0.9 * plain["mse"][0]
    assert seen["sum"] == [3, 10]


def check_rewind(seen: dict[str, Any]) -> None:
    assert seen["again"] == seen["first"]
    assert seen["generators_differ"]
    assert seen["trunk_is_unmoved"]
    branch = exercise_branch(lambda run: run, lambda run: PlainEngine(run, CPU), True)["branch"]
    assert {name: seen["branch"][name] for name in ("share", "optimizer_steps", "cells_seen")} == {
        name: branch[name] for name in ("share", "optimizer_steps", "cells_seen")
    }
    # each rank drops other units, so that ranks together are near one process and not the same
    for name in ("val_loss", "test_loss"):
        assert seen["branch"][name] == pytest.approx(branch[name], rel=0.02)
    loop = TrainingLoop(spec(), data(), PlainEngine(spec(), CPU))
    loop.train_one_update()
    assert seen["state_names"] == sorted([*loop.state(), "generator.1"])


def check_run(directory: Path, variant: Variant, tmp_path: Path) -> None:
    """The committed results: near those of one process, the same bits with a crash between, of loadable weights."""
    whole, cut = read_result(directory / "whole"), read_result(directory / "cut")
    alone = run_to_result(spec(), data(), PlainEngine(spec(), CPU), tmp_path / "alone")
    assert whole is not None and cut is not None and alone is not None
    assert (whole.workers, whole.engine, whole.attempts, cut.attempts) == (RANKS, variant.engine, 1, 2)
    for field in ("val_loss", "test_loss", "final_val_loss"):
        assert getattr(whole, field) == pytest.approx(getattr(alone, field), rel=CURVE_TOLERANCE)
        assert getattr(cut, field) == getattr(whole, field)
    for field in ("cells_seen", "masked_genes_seen", "optimizer_steps", "flops", "test_masked_genes"):
        assert getattr(whole, field) == getattr(alone, field) == getattr(cut, field)
    publish_winner(files_at(directory / "cut"))
    rows = rows_at(directory / "cut")
    assert [row["optimizer_steps"] for row in rows if row["kind"] == "eval"] == [5, 10, 15, 20]
    engine = PlainEngine(spec(), CPU)
    publish_winner(files_at(directory / "whole"))
    chosen = load_file(directory / "whole" / "checkpoints" / "best" / "state.safetensors")
    load_weights(engine.model, model_tensors(chosen))
    assert evaluate(engine, data().test, spec()).sums.mean == pytest.approx(whole.test_loss, rel=1e-6)


def test_ddp_follows_one_process(ddp: tuple[dict[str, Any], Path], plain_curve: dict[str, list[float]]) -> None:
    check_curve(ddp[0], plain_curve)


def test_ddp_goes_back_to_the_same_bits(ddp: tuple[dict[str, Any], Path]) -> None:
    check_rewind(ddp[0])


def test_ddp_commits_what_one_process_does(ddp: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    check_run(ddp[1], DDP, tmp_path)


@pytest.mark.slow
class TestZero:
    @pytest.mark.parametrize("variant", [ZERO[0], *SHARED_OUT], ids=lambda variant: variant.name)
    def test_follows_one_process(self, all_zero: Any, variant: Variant, plain_curve: dict[str, list[float]]) -> None:
        check_curve(all_zero[0][variant.name], plain_curve)

    @pytest.mark.parametrize("variant", ZERO, ids=lambda variant: variant.name)
    def test_goes_back_to_the_same_bits(self, all_zero: Any, variant: Variant) -> None:
        check_rewind(all_zero[0][variant.name])

    @pytest.mark.parametrize("variant", ZERO, ids=lambda variant: variant.name)
    def test_commits_what_one_process_does(self, all_zero: Any, variant: Variant, tmp_path: Path) -> None:
        check_run(all_zero[1] / variant.name, variant, tmp_path)

    @pytest.mark.parametrize("variant", [ZERO[0], *SHARED_OUT], ids=lambda variant: variant.name)
    def test_shares_out_what_its_stage_says(self, all_zero: Any, variant: Variant) -> None:
        """Stage 1: the optimizer; 2: gradients too; 3: parameters too. A share may be larger by one parameter."""
        held, stage = all_zero[0][variant.name]["bytes"], variant.zero_stage
        whole = 4 * spec().params
        largest = 4 * max(parameter.numel() for parameter in PlainEngine(spec(), CPU).model.parameters())
        share = whole / RANKS
        steps = 1024  # and AdamW's count of them, with each tensor it steps on
        moments = 2 * (share if stage >= 1 else whole)
        assert moments <= held["optimizer"] <= moments + steps
        if stage < 2:
            assert held["gradients"] >= whole - 16
        elif not variant.offload:
            assert share - 16 <= held["gradients"] <= share + largest
        if variant.whole:
            assert held["parameters"] >= whole + share
        else:
            assert held["parameters"] == pytest.approx(share if stage == 3 else whole, rel=0.02)
        assert held["master"] == pytest.approx(share if stage >= 1 else 0, rel=0.02)

    @pytest.mark.parametrize("variant", SHARED_OUT, ids=lambda variant: variant.name)
    def test_saves_from_all_ranks_and_goes_on_with_the_same_bits(self, all_zero: Any, variant: Variant) -> None:
        seen = all_zero[0][variant.name]
        kinds = ("json", "safetensors", "safetensors.sha256.json")
        files = [f"state-rank{rank}of{RANKS}.{kind}" for rank in range(RANKS) for kind in kinds]
        assert seen["files"] == ["progress.json", *files]
        assert sum(seen["elements"]) == spec().params
        assert max(seen["elements"]) <= 0.55 * spec().params
        assert seen["consolidated"]
        assert seen["shard_again"] == seen["shard_anew"] == seen["shard_first"]
        assert seen["same_state_again"] and seen["same_state_anew"]

    @pytest.mark.parametrize("variant", OFFLOADED, ids=lambda variant: variant.name)
    def test_offloading_the_optimizer_changes_no_loss(self, all_zero: Any, variant: Variant) -> None:
        there = all_zero[0][replace(variant, offload=False).name]
        assert all_zero[0][variant.name]["curve"]["mse"] == pytest.approx(there["curve"]["mse"], rel=1e-6)

    @pytest.mark.parametrize("variant", ZERO[1:], ids=lambda variant: variant.name)
    def test_resumes_at_another_number_of_ranks_or_stage(self, all_zero: Any, variant: Variant) -> None:
        directory = all_zero[1] / variant.name
        run_to_result(spec(OFTEN), data(), PlainEngine(spec(OFTEN), CPU), directory / "to-plain")
        whole = read_result(directory / "whole")
        for name in ("to-plain", "from-plain", "to-another-stage"):
            result = read_result(directory / name)
            assert whole is not None and result is not None
            assert result.attempts == 2
            assert result.workers == (1 if name == "to-plain" else RANKS)
            assert result.optimizer_steps == whole.optimizer_steps
            for field in ("val_loss", "test_loss", "final_val_loss"):
                assert getattr(result, field) == pytest.approx(getattr(whole, field), rel=CURVE_TOLERANCE), name

    @pytest.mark.parametrize("variant", ZERO[1:], ids=lambda variant: variant.name)
    def test_a_damaged_shard_gives_way_to_the_checkpoint_before(self, all_zero: Any, variant: Variant) -> None:
        directory = all_zero[1] / variant.name / "damaged"
        (first,) = (directory / "attempts").iterdir()
        last = Attempt(files_at(directory)).find()
        assert last is not None
        name = f"last-{last[0].optimizer_steps:012d}"
        shard = first / "checkpoints" / name / f"state-rank1of{RANKS}.safetensors"
        os.truncate(shard, shard.stat().st_size - 1)
        attempt = Attempt(files_at(directory))
        before = attempt.find()
        assert before is not None and before[0].optimizer_steps == last[0].optimizer_steps - 1
        (note,) = [row for row in read_rows(attempt.place) if row["kind"] == "note"]
        assert f"{first.name}/checkpoints/{name}" in note["note"] and shard.name in note["note"]

    def test_a_rank_killed_while_saving_costs_that_checkpoint_only(self, all_zero: Any, tmp_path: Path) -> None:
        variant = ZERO[2]
        run = variant.of(spec(OFTEN))
        context = torch.multiprocessing.get_context("spawn")
        arguments = (run, variant, tmp_path)
        processes = [context.Process(target=killed_while_saving, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in reversed(processes):
            process.join(180)
        killed = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert killed[1] == -signal.SIGKILL and killed[0] not in (0, None)
        (first,) = (tmp_path / "run" / "attempts").iterdir()
        unfinished = first / "checkpoints" / "last-000000000004"
        there = {path.name for path in unfinished.iterdir()}
        assert {f"state-rank{rank}of2.safetensors" for rank in range(RANKS)} <= there and "progress.json" not in there
        found = Attempt(files_at(tmp_path / "run"), run).find()
        assert found is not None and found[0].optimizer_steps == 3
        (tmp_path / "rendezvous").unlink()
        run_in_a_group(resumed_after_the_kill, *arguments, directory=tmp_path)
        result, whole = read_result(tmp_path / "run"), read_result(all_zero[1] / variant.name / "whole")
        assert result is not None and whole is not None
        assert result.attempts == 3
        assert (result.val_loss, result.test_loss) == (whole.val_loss, whole.test_loss)
        newest = max((tmp_path / "run" / "attempts").iterdir())
        assert "note" not in [row["kind"] for row in rows_at(newest)]


def test_a_wrong_number_of_processes_is_refused() -> None:
    with pytest.raises(BadInput, match="resources.workers"):
        build_engine(DDP.of(spec()), CPU)


def write_shards(directory: Path) -> None:
    """Shards of the synthetic cells, by the project's own writers."""
    write_cells_as_shards(directory, {split: getattr(data(), split) for split in SPLITS})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from scaling_ray.cluster import ray_session

    with ray_session(RANKS):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("group") / "shards"
    write_shards(directory)
    read = read_split(directory, read_manifest(directory), "val", 64)
    assert (read.counts == data().val.counts).all() and (read.measured == data().val.measured).all()
    return directory


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestWorkerGroup:
    @pytest.mark.parametrize("variant", [DDP, Variant("deepspeed", 1)], ids=lambda variant: variant.name)
    def test_commits_what_one_process_does(self, shards: Path, tmp_path: Path, variant: Variant) -> None:
        from scaling_ray.train.worker import train_in_worker_group

        run, sweep = variant.of(spec()), SweepFiles.at(tmp_path / "sweep")
        train_in_worker_group(run, open_place(shards), sweep, str(tmp_path / "ray"), 2**30)
        result = sweep.run(run.run_id).result()
        alone = run_to_result(spec(), data(), PlainEngine(spec(), CPU), tmp_path / "alone")
        assert result is not None and alone is not None
        assert (result.workers, result.engine) == (RANKS, variant.engine)
        assert result.val_loss == pytest.approx(alone.val_loss, rel=CURVE_TOLERANCE)
        assert result.test_loss == pytest.approx(alone.test_loss, rel=CURVE_TOLERANCE)
        publish_winner(sweep.run(run.run_id))
        assert sweep.run(run.run_id).place.exists("checkpoints/best/state.safetensors")

    def test_an_error_rises_as_itself_and_at_once(self, shards: Path, tmp_path: Path) -> None:
        from scaling_ray.train.worker import train_in_worker_group

        run = DDP.of(spec()).model_copy(update={"cells": 10_000})
        sweep = SweepFiles.at(tmp_path / "sweep")
        with pytest.raises(BadInput, match=r"grid\.cells: 10000"):
            train_in_worker_group(run, open_place(shards), sweep, str(tmp_path / "ray"), 2**30)
        assert sweep.run_ids() == set()


@pytest.mark.parametrize(
    ("gpus", "resources", "answer"),
    [
        (0.0, {"CPU": 2.0}, None),
        (0.0, {"CPU": 1.0, "memory": 1e9}, r"needs 2 CPUs, the cluster can have 1"),
        (0.0, {"CPU": 8.0, "GPU": 1.0}, None),
        (1.0, {"CPU": 8.0, "GPU": 1.0}, r"needs 2 GPUs, the cluster can have 1"),
        (1.0, {"CPU": 8.0}, r"needs 2 GPUs, the cluster can have 0"),
        (0.5, {"CPU": 8.0, "GPU": 1.0}, None),
        (1.0, {"CPU": 8.0, "GPU": 2.0}, None),
        (0.0, {}, r"the cluster can have 0"),
    ],
)
def test_a_group_that_could_never_start_is_named(gpus: float, resources: dict[str, float], answer: str | None) -> None:
    import re

    from scaling_ray.sweep.capacity import Capacity, NodeType
    from scaling_ray.sweep.desk import never_fits
    from scaling_ray.sweep.units import Unit

    unit = Unit((DDP.of(spec()).carried_out(gpus=gpus),))
    sentence = never_fits(unit, Capacity((NodeType("one", resources, 1),)))
    assert sentence is None if answer is None else sentence is not None and re.search(answer, sentence)
