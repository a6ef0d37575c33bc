"""Every engine, precision, dropout and objective that a plan may choose trains: two updates and one evaluation each.

Moments of AdamW say what the gradients were: after its first update the first moment is a tenth of the clipped
gradient, in every engine and under one name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_run, synthetic_cells
from process_groups import RANKS, run_in_a_group
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaling_ray.cli import main
from scaling_ray.runs import RunSpec
from scaling_ray.train.batches import evaluation_batches
from scaling_ray.train.choice import build_engine
from scaling_ray.train.engine import Engine
from scaling_ray.train.evaluation import evaluate
from scaling_ray.train.loop import RunData, TrainingLoop
from scaling_ray.train.stack_loop import StackedLoop
from scaling_ray.train.zero import DeepSpeedEngine

OBJECTIVES = ["mse"]
PRECISIONS = ["fp32", "bf16"]
DROPOUTS = [0.0, 0.1]
CPU = torch.device("cpu")
WHOLE_PARAMETER_ELEMENTS = 100
"""ZeRO 3 shares out this model's matrices and leaves its vectors whole."""
SAME_GRADIENTS = 1e-5
"""Relative to the gradient of all parameters: float32 sums in another order."""
BF16_GRADIENTS = 0.03
"""The same for products in bfloat16, of which each is off by up to 2^-8."""


@dataclass(frozen=True)
class Combination:
    """One choice of a plan; ``engine`` is "plain", "stack", "ddp", or "deepspeed" with its stage."""

    objective: str
    engine: str
    precision: str
    dropout: float
    zero_stage: int = 0
    offload: bool = False

    @property
    def name(self) -> str:
        engine = self.engine + (f"-{self.zero_stage}" if self.engine == "deepspeed" else "")
        return f"{engine}{'-offload' * self.offload}-{self.precision}-dropout{self.dropout}-{self.objective}"


def combinations(engine: str, zero_stage: int = 0, offload: bool = False) -> list[Combination]:
    choices = product(OBJECTIVES, PRECISIONS, DROPOUTS)
    return [Combination(o, engine, precision, rate, zero_stage, offload) for o, precision, rate in choices]


ALONE = combinations("plain") + combinations("stack")
DDP = combinations("ddp")
ZERO = [c for stage in range(4) for c in combinations("deepspeed", stage)]
ZERO += [c for stage in (1, 2, 3) for c in combinations("deepspeed", stage, offload=True)]


def run_of(combination: Combination) -> RunSpec:
    """Updates of 32 cells; one process takes them in micro-batches of 6, two take 6, 6 and 4 each."""
    run = small_run(
        f'objective = "{combination.objective}"\nprecision = "{combination.precision}"\n'
        f"dropout = {combination.dropout}\nmax_cells_seen = 640\nmicro_batch = 6\ncurve_cells = 32",
        size="WIDE",
    )
    if combination.engine in ("plain", "stack"):
        return run
    execution = {"workers": RANKS, "engine": combination.engine, "zero_stage": combination.zero_stage}
    return run.carried_out(**execution, offload_optimizer=combination.offload)


def data() -> RunData:
    train, val, test = (synthetic_cells(n, unmeasured=9, first_id=1000 * i) for i, n in enumerate((100, 45, 51)))
    return RunData(train, val, test, data_hash="synthetic")


@dataclass(frozen=True)
class Seen:
    """Training losses of two updates, the validation loss after them, what moved, and the weights and moments."""

    train_losses: list[float]
    val_loss: float
    unmoved: list[str]
    after_one: dict[str, Tensor]
    """Weights and moments by name after the first update."""

    def write(self, directory: Path, name: str) -> None:
        told = {"train_losses": self.train_losses, "val_loss": self.val_loss, "unmoved": self.unmoved}
        (directory / f"{name}.json").write_text(json.dumps(told))
        save_file({key: t.contiguous() for key, t in self.after_one.items()}, directory / f"{name}.safetensors")

    @classmethod
    def read(cls, directory: Path, name: str) -> Seen:
        told = json.loads((directory / f"{name}.json").read_text())
        return cls(**told, after_one=load_file(directory / f"{name}.safetensors"))

    @property
    def first_moment(self) -> Tensor:
        """Of all parameters, after the first update."""
        names = sorted(name for name in self.after_one if name.startswith("optimizer.exp_avg."))
        return torch.cat([self.after_one[name].flatten() for name in names])


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def unmoved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return sorted(name for name in before if name.startswith("model.") and torch.equal(before[name], after[name]))


def engine_of(combination: Combination, run: RunSpec, rank: int) -> Engine:
    if combination.engine == "deepspeed":
        return DeepSpeedEngine(run, CPU, rank, RANKS, WHOLE_PARAMETER_ELEMENTS)
    return build_engine(run, CPU, rank, RANKS if combination.engine == "ddp" else 1)


def trained(combination: Combination, rank: int = 0) -> Seen:
    """Two updates and an evaluation of one run; every rank."""
    run = run_of(combination)
    loop = TrainingLoop(run, data(), engine_of(combination, run, rank))
    states, losses = [copied(loop.engine.state())], []
    for _ in range(2):
        losses.append(loop.train_one_update()[0].mean)
        states.append(copied(loop.engine.state()))
    val_loss = evaluate(loop.engine, loop.data.val, run).sums.mean
    return Seen(losses, val_loss, unmoved(states[0], states[2]), states[1])


def trained_as_a_stack(combination: Combination) -> Seen:
    """The same of the first of two members; the second has another seed."""
    run, cells = run_of(combination), data()
    runs = [run, run.model_copy(update={"seed": run.seed + 1})]
    loop = StackedLoop(runs, [cells.feed(one) for one in runs], cells.val, cells.test, CPU)

    def state() -> dict[str, Tensor]:
        parts = {"model.": loop.model.flat, "optimizer.exp_avg.": loop.optimizer.first}
        return {prefix + name: t for prefix, flat in parts.items() for name, t in loop.model.named(flat, 0).items()}

    states, losses = [copied(state())], []
    for _ in range(2):
        losses.append(loop.train_one_update()[0].mean)
        states.append(copied(state()))
    batches = evaluation_batches(cells.val, run.train, run.execution.micro_batch, CPU)
    return Seen(losses, loop.evaluate(batches)[0].sums.mean, unmoved(states[0], states[2]), states[1])


def train_in_a_group(rank: int, chosen: list[Combination], directory: Path) -> None:
    """What each of the processes does; rank 0 leaves what it saw."""
    for combination in chosen:
        seen = trained(combination, rank)
        if rank == 0:
            seen.write(directory, combination.name)


def group(chosen: list[Combination], directory: Path) -> dict[str, Seen]:
    run_in_a_group(train_in_a_group, chosen, directory, directory=directory)
    return {combination.name: Seen.read(directory, combination.name) for combination in chosen}


@pytest.fixture(scope="module")
def plain() -> dict[str, Seen]:
    """The plain engine by objective, in fp32 and without dropout."""
    torch.set_num_threads(1)
    return {objective: trained(Combination(objective, "plain", "fp32", 0.0)) for objective in OBJECTIVES}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    return group(DDP, tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    return group(ZERO, tmp_path_factory.mktemp("zero"))


def check(seen: Seen, combination: Combination, plain: dict[str, Seen]) -> None:
    reference = plain[combination.objective]
    assert all(math.isfinite(loss) for loss in (*seen.train_losses, seen.val_loss))
    assert seen.unmoved == []
    assert {tensor.dtype for tensor in seen.after_one.values()} == {torch.float32}
    assert len(seen.first_moment) == run_of(combination).params
    difference = float((seen.first_moment - reference.first_moment).norm() / reference.first_moment.norm())
    if combination.dropout > 0.0:
        assert difference > BF16_GRADIENTS, "no unit was dropped"
        return
    tolerance = SAME_GRADIENTS if combination.precision == "fp32" else BF16_GRADIENTS
    assert difference <= tolerance
    assert seen.train_losses == pytest.approx(reference.train_losses, rel=tolerance)
    assert seen.val_loss == pytest.approx(reference.val_loss, rel=tolerance)
    if combination.precision == "bf16":
        assert difference > SAME_GRADIENTS, "no product was made in bfloat16"


def named(combination: Combination) -> str:
    return combination.name


@pytest.mark.parametrize("combination", ALONE, ids=named)
def test_one_process_trains(combination: Combination, plain: dict[str, Seen]) -> None:
    seen = trained_as_a_stack(combination) if combination.engine == "stack" else trained(combination)
    check(seen, combination, plain)


@pytest.mark.parametrize("combination", DDP, ids=named)
def test_ddp_trains(combination: Combination, ddp: dict[str, Seen], plain: dict[str, Seen]) -> None:
    check(ddp[combination.name], combination, plain)


@pytest.mark.slow
@pytest.mark.parametrize("combination", ZERO, ids=named)
def test_zero_trains(combination: Combination, zero: dict[str, Seen], plain: dict[str, Seen]) -> None:
    check(zero[combination.name], combination, plain)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_published_recipe_trains_a_large_size(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"bench train --size S --genes 64 --dropout 0.1 --precision {precision} --seconds 0.1 --json"
    assert main(line.split()) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["size"], found["precision"], found["dropout"]) == ("S", precision, 0.1)
    assert found["cells_per_second"] > 0
