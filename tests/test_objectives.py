"""A loss is chosen by its name: another one than the package's own goes the whole way without a line changed there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_SWEEP, small_run, synthetic_cells
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.model.objectives import SquaredError, objective_named, register
from scaling_ray.recipe import OBJECTIVES, ObjectiveFacts
from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.results.write import ResultsTable
from scaling_ray.runs import RunSpec
from scaling_ray.shards.read import ResidentFeed, run_order
from scaling_ray.spec import parse_spec
from scaling_ray.sweep.export import _chosen_weights
from scaling_ray.train.attempt import Attempt, publish_winner
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop, run_to_result
from scaling_ray.train.stack_loop import stack_to_results

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (synthetic_cells(n, first_id=1000 * i) for i, n in enumerate((120, 40, 30)))
DATA = RunData(TRAIN, VAL, TEST, "synthetic")


class Poisson:
    """Negative log-likelihood, in nats, of raw counts under a Poisson law with rate exp(output) x library / 10,000.

    Its second output is a log-scale that only widens the loss, so that more than one output per gene is tried.
    """

    facts = ObjectiveFacts("poisson_of_a_test", "nats", outputs_per_gene=2)

    def targets(self, values_BV: Tensor, counts_BV: Tensor, raw_sum_B: Tensor, positions_BK: Tensor) -> Tensor:
        counts = counts_BV.gather(1, positions_BK).float()
        library = (raw_sum_B.float() / 1e4)[:, None].expand_as(counts)
        return torch.stack([counts, library], -1)

    def losses(self, outputs_BKO: Tensor, targets: Tensor, weights_BK: Tensor) -> Tensor:
        counts, library = targets.unbind(-1)
        log_rate = outputs_BKO[..., 0].float() + library.log()
        nats = log_rate.exp() - counts * log_rate + torch.lgamma(counts + 1)
        return (nats + 1e-3 * outputs_BKO[..., 1].float().square()) * weights_BK

    def constants(self, values_NV: Tensor, counts_NV: Tensor, raw_sum_N: Tensor, measured_NV: Tensor) -> Tensor:
        library = torch.where(measured_NV, raw_sum_N[:, None] / 1e4, 0.0).sum(0)
        rate = (torch.where(measured_NV, counts_NV, 0).sum(0) + 0.5) / (library + 0.5)
        return torch.stack([rate.log(), torch.zeros_like(rate)], -1)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Poisson())
    yield
    OBJECTIVES.pop(Poisson.facts.name)


def poisson_run(seed: int = 1, updates: int = 2) -> RunSpec:
    extra = f'objective = "{Poisson.facts.name}"\nmax_cells_seen = {32 * updates}\nevaluations = 2\ncurve_cells = 16'
    return small_run(f"{extra}\ncheckpoint_seconds = 1e-6", lr=1e-3).model_copy(
        update={"seed": seed, "run_id": f"poisson-{seed}"}
    )


def by_hand(run: RunSpec, weights: dict[str, Tensor]) -> float:
    """The test loss of some weights, from the formula alone."""
    engine = PlainEngine(run, CPU)
    engine.load_weights(weights)
    loop = TrainingLoop(run, DATA, engine)
    from scaling_ray.train.batches import evaluation_batches

    (batch,) = evaluation_batches(TEST, run.train, len(TEST), CPU)
    with torch.no_grad():
        outputs = loop.engine.model(batch.values, batch.masks.hidden, batch.masks.positions)
    counts = torch.from_numpy(TEST.counts.astype("int64")).gather(1, batch.masks.positions).double()
    rate = outputs[..., 0].double().exp() * torch.from_numpy(TEST.raw_sum).double()[:, None] / 1e4
    nats = -torch.distributions.Poisson(rate).log_prob(counts) + 1e-3 * outputs[..., 1].double().square()
    return float((nats * batch.masks.weights).sum() / batch.masks.weights.sum())


def check_result(sweep: SweepFiles, run: RunSpec, stacked: int) -> None:
    files = sweep.run(run.run_id)
    result = files.result()
    assert result is not None and result.loss_unit == "nats" and result.stacked == stacked
    assert result.test_loss is not None and math.isfinite(result.test_loss)
    assert result.optimizer_steps == 2
    weights = _chosen_weights(files, run, result)
    assert weights["head.weight"].shape == (2, run.width) and run.params == sum(t.numel() for t in weights.values())
    assert result.test_loss == pytest.approx(by_hand(run, weights), rel=1e-5)


def test_two_updates_alone_and_stacked_go_from_spec_to_row_and_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sweep = SweepFiles.at(tmp_path / "sweep")
    runs = [poisson_run(seed) for seed in (1, 2, 3)]
    for run in runs:
        sweep.run(run.run_id).prepare(run)
    run_to_result(runs[0], DATA, PlainEngine(runs[0], CPU), sweep.run(runs[0].run_id))
    pair = runs[1:]
    stack_to_results(
        pair,
        [ResidentFeed(TRAIN, run_order(run, len(TRAIN), donor=TRAIN.donor)) for run in pair],
        VAL,
        TEST,
        "synthetic",
        CPU,
        sweep.stack("pair"),
        [sweep.run(run.run_id) for run in pair],
        lambda run, message: pytest.fail(message),
    )
    for run, stacked in zip(runs, (1, 2, 2), strict=True):
        publish_winner(sweep.run(run.run_id))
        check_result(sweep, run, stacked)

    rows = ResultsTable(sweep, runs, len(TRAIN)).write()
    assert {(row.objective, row.loss_unit, row.status) for row in rows} == {(Poisson.facts.name, "nats", "done")}
    assert all(row.test_loss == sweep.run(row.run_id).result().test_loss for row in rows)  # type: ignore[union-attr]
    assert {row.baseline_loss for row in rows} == {None}, "no baseline in nats is known"

    from mlflow.tracking import MlflowClient

    from scaling_ray.tracking.ledger import tracking_uri
    from scaling_ray.tracking.tracker import Tracker

    train = SplitEntry(
        cells=len(TRAIN), fraction=1.0, groups=["a"], donor_cells=[len(TRAIN)], content_sha256="0" * 64, files=[]
    )
    manifest = ShardManifest(
        name="tiny",
        data_hash="d" * 64,
        genes=64,
        block_genes=256,
        row_group_cells=16_384,
        split_by="donor_id",
        data={},
        census={},
        planted=False,
        dropped={},
        splits={"train": train},
        tables=[],
        codes={},
        made_with={},
    )
    Tracker(sweep, parse_spec(TINY_SWEEP), manifest).sync(runs)
    client = MlflowClient(tracking_uri(sweep))
    for row in rows:
        recorded = sweep.run(row.run_id).mlflow_run_id()
        assert recorded is not None
        told = client.get_run(recorded).data
        assert told.metrics["test_loss"] == row.test_loss
        assert (told.tags["objective"], told.tags["loss_unit"]) == (Poisson.facts.name, "nats")


def test_a_checkpoint_of_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    run = poisson_run(updates=4)
    whole = TrainingLoop(run, DATA, PlainEngine(run, CPU))
    curve = [whole.train_one_update()[0].loss for _ in range(4)]
    assert curve[-1] != curve[0]
    cut = TrainingLoop(run, DATA, PlainEngine(run, CPU))
    assert [cut.train_one_update()[0].loss for _ in range(2)] == curve[:2]
    files = SweepFiles.at(tmp_path).run(run.run_id)
    Attempt(files, run).save_last(cut.progress, cut.state())
    found = Attempt(files, run).find()
    assert found is not None
    resumed = TrainingLoop(run, DATA, PlainEngine(run, CPU))
    resumed.load(found[0], found[1].tensors())
    assert [resumed.train_one_update()[0].loss for _ in range(2)] == curve[2:]


def test_names_are_refused_and_kept_apart() -> None:
    with pytest.raises(BadInput, match="train.objective: 'hinge': is no known objective; use mse"):
        parse_spec(TINY_SWEEP.replace("[train]", '[train]\nobjective = "hinge"'))
    with pytest.raises(BadInput, match="is not registered here"):
        objective_named("hinge")

    class Other(SquaredError):
        facts = ObjectiveFacts("mse", "mse")

    with pytest.raises(BadInput, match="is the name of another objective"):
        register(Other())
