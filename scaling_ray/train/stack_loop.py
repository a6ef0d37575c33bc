"""A stack: runs of one shape that train as one, and are scheduled, saved and retried together.

Its members share schedule, budget and recipe; each has its own seed, learning rate and cells. The plan names the
members and they never change: one that diverged is masked out, one that stopped early is ignored from then on, and one
that already has its result trains again, so that the others stay bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from scaling_ray.errors import BadInput, Diverged
from scaling_ray.model.objectives import objective_named
from scaling_ray.records import LossSums
from scaling_ray.results.sweep_files import ATTEMPTS, AttemptName, RunFiles
from scaling_ray.runs import MEMBERS_OWN, RunSpec
from scaling_ray.shards.read import Cells, Feed
from scaling_ray.storage import Place
from scaling_ray.train.attempt import LAST, Attempt
from scaling_ray.train.batches import Batch, evaluation_batches
from scaling_ray.train.checkpoint import KEPT, Checkpoints, Progress, copied, newest
from scaling_ray.train.driver import Signals, finish, train
from scaling_ray.train.evaluation import Evaluation, add_by_gene, autocast
from scaling_ray.train.first_cells import constant_loss, first_cells, is_judged, worse_than_constants
from scaling_ray.train.schedule import learning_rate
from scaling_ray.train.sharded import generator_name
from scaling_ray.train.stack import StackedAdamW, StackedTransformer
from scaling_ray.train.stack_batches import StackSource, columns, repeated


def check_stack(runs: list[RunSpec]) -> None:
    """Raise BadInput unless the runs may train as one: alike except for seed, rate and cells, one process each."""
    first = runs[0].model_dump(exclude=set(MEMBERS_OWN))
    for run in runs[1:]:
        for name, value in run.model_dump(exclude=set(MEMBERS_OWN)).items():
            if value != first[name]:
                line = f"differs from {first[name]!r} of {runs[0].run_id}; stack like runs"
                raise BadInput("M043", f"stack.{name}", value, line)
    workers = runs[0].execution.workers
    if workers != 1:
        raise BadInput("M044", "stack.workers", workers, "trains in several processes; stack runs of one")


class StackedLoop:
    """The Trainee of R runs at once: like TrainingLoop, with all measurements kept by member.

    Args:
        runs: R members.
        feeds: their batches.
        val: validation cells.
        test: test cells; members that choose a rate never see them.
        device: to train on.
        attempts: the members', where their rows and results go; None: nothing is written.
        own: the stack's own checkpoints.
        beat: called whenever something was done.
    """

    def __init__(
        self,
        runs: list[RunSpec],
        feeds: list[Feed],
        val: Cells,
        test: Cells,
        device: torch.device,
        attempts: list[Attempt] | None = None,
        own: Checkpoints | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        check_stack(runs)
        for run in runs:
            if run.lr is None:
                raise BadInput(
                    "M045", "lr", None, f"of {run.run_id} has not been chosen yet; sweep the rate runs first"
                )
        self.runs, self.run, self.device, self.feeds = runs, runs[0], device, feeds
        self.val, self.test, self.attempts, self.beat = val, test, attempts, beat
        self._own = own
        seeds = [run.seed for run in runs]
        outputs = self.run.outputs_per_gene
        self.model = StackedTransformer(self.run.shape, self.run.genes, self.run.train.dropout, seeds, device, outputs)
        self.optimizer = StackedAdamW(self.model.flat, self.run.train)
        self.objective = objective_named(self.run.train.objective)
        self.best = self.model.flat.clone()
        self.source = StackSource(runs, feeds, device)
        self.total_steps, self.steps = self.run.train.total_steps, 0
        self.members = [Progress() for _ in runs]
        self.failures: dict[int, str] = {}
        self.alive = torch.ones(len(runs), dtype=torch.bool, device=device)
        self._peaks = torch.tensor([run.lr for run in runs], device=device)
        self._unsettled: list[Tensor] = []
        self._curve: list[Batch] | None = None
        self._constants: list[Tensor] | None = None
        torch.manual_seed(sum(seeds))

    def lr(self, member: int, step: int) -> float:
        """See Trainee."""
        return learning_rate(self.run.train, float(self.runs[member].lr or 0.0), step, self.members[member].decay_from)

    def running(self) -> list[int]:
        """See Trainee."""
        train, members = self.run.train, enumerate(self.members)
        return [r for r, member in members if r not in self.failures and member.is_running(train)]

    def agreed(self, *flags: bool) -> list[bool]:
        """See Trainee."""
        return list(flags)

    def forward(self, batch: Batch, cells: int) -> Tensor:
        """(R, B, K) losses of R x B cells."""
        models = len(self.runs)
        shaped = (part.view(models, cells, -1) for part in (batch.values, batch.masks.hidden, batch.masks.positions))
        with autocast(self.run.execution, self.device):
            outputs = self.model.forward(*shaped)
            found = self.objective.losses(outputs.flatten(0, 1), batch.targets, batch.masks.weights)
            return found.view(models, cells, -1)

    def update(self) -> None:
        """One optimizer step of every member."""
        run, models, step = self.run, len(self.runs), self.steps
        cells, micro_batch = run.train.cells_per_step, run.execution.micro_batch
        batch = self.source.batch(step)
        masked = batch.masks.weights.view(models, -1).sum(1).double()
        share = masked.clamp(min=1.0).float()
        summed = torch.zeros(models, dtype=torch.float64, device=self.device)
        for start in range(0, cells, micro_batch):
            stop = min(start + micro_batch, cells)
            part = batch if stop - start == cells else columns(batch, models, start, stop)
            loss = self.forward(part, stop - start).sum((1, 2))
            (loss / share).sum().backward()
            summed += loss.detach().double()
            self.beat()
        norms = self.optimizer.step(self.model.flat, self.model.gradients(), self._rates(step), self.alive)
        self._unsettled.append(torch.stack([summed, masked, norms.double()]))
        self.steps += 1
        for r in self.running():
            member = self.members[r]
            member.optimizer_steps, member.cells_seen = step + 1, member.cells_seen + cells

    def _rates(self, step: int) -> Tensor:
        """(R,) rates of the members at an update; trunks may have begun to decay at different ones."""
        if all(member.decay_from is None for member in self.members):
            return self._peaks * (self.lr(0, step) / float(self.runs[0].lr or 1.0))
        return torch.tensor([self.lr(r, step) for r in range(len(self.runs))], device=self.device)

    def settle(self) -> list[float]:
        """See Trainee. A member whose loss or gradient is not finite is masked out; its failure names the update."""
        table = torch.stack(self._unsettled).cpu()  # (updates, 3, R)
        first = self.steps - len(self._unsettled) + 1
        self._unsettled = []
        for r in self.running():
            member, rows = self.members[r], table[:, :, r]
            bad = (~rows.isfinite().all(1)).nonzero()
            if len(bad):
                loss, norm = float(rows[bad[0, 0], 0] / rows[bad[0, 0], 1]), float(rows[bad[0, 0], 2])
                self.fail(r, f"update {first + int(bad[0, 0])}: loss {loss}, gradient norm {norm}; lower the rate")
                continue
            member.masked_genes_seen += int(rows[:, 1].sum())
            member.row_loss += float(rows[:, 0].sum())
            member.row_masked_genes += float(rows[:, 1].sum())
        return [float(norm) for norm in table[-1, 2]]

    def fail(self, member: int, message: str) -> None:
        """Mask a member out: it keeps its place, with weights of zero that never change."""
        self.failures[member] = message
        self.alive[member] = False
        self.model.flat[member] = 0.0
        self.optimizer.first[member] = self.optimizer.second[member] = 0.0

    def train_one_update(self) -> list[LossSums]:
        """One optimizer step, waited for: the sums of each member's global batch."""
        before = [(m.row_loss, m.row_masked_genes) for m in self.members]
        self.update()
        self.settle()
        after = [(m.row_loss, m.row_masked_genes) for m in self.members]
        return [LossSums(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]

    def evaluate(self, batches: list[Batch], weights: Tensor | None = None) -> list[Evaluation]:
        """Losses under the fixed evaluation masks, by member; ``weights`` (R, P) stand in for the present ones."""
        models, own = len(self.runs), None
        if weights is not None:
            own = self.model.flat.clone()
            self.model.flat.copy_(weights)
        self.model.training = False
        losses, counts = [], []
        of_genes = torch.zeros(models, 2, self.run.genes, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in batches:
                masks, targets = batch.masks.repeated(models), repeated(batch.targets, models)
                found = self.forward(Batch(batch.values.repeat(models, 1), masks, targets), len(batch.values))
                losses.append(found.sum(2).double())
                counts.append(batch.masks.weights.sum(1).double())
                for r in range(models):
                    add_by_gene(of_genes[r], found[r], batch)
                self.beat()
        self.model.training = True
        if own is not None:
            self.model.flat.copy_(own)
        by_member, count = torch.cat(losses, dim=1).cpu(), torch.cat(counts).cpu()
        return [Evaluation(by_member[r], count, *of_genes[r].cpu()) for r in range(models)]

    def evaluate_curve(self, members: list[int]) -> dict[int, tuple[float, float, bool]]:
        """See Trainee."""
        if not members:
            return {}
        if self._curve is None:
            cells = self.val.rows(slice(0, self.run.train.curve_cells))
            self._curve = self._batches(cells)
        values = [found.sums.mean for found in self.evaluate(self._curve)]
        found = {}
        for r in members:
            if not math.isfinite(values[r]):
                self.fail(r, f"update {self.steps}: validation loss {values[r]}; lower the rate")
                continue
            smoothed, best = self.members[r].add_evaluation(values[r], self.run.train.smoothing_evaluations)
            self.members[r].follow(self.run.train)
            if (said := self._worse_than_nothing(r, smoothed)) is not None:
                self.fail(r, said)
                continue
            found[r] = values[r], smoothed, best
        return found

    def begin(self, fresh: bool) -> None:
        """What ``TrainingLoop.begin`` does, for each member."""
        looks = [first_cells(feed, run) for feed, run in zip(self.feeds, self.runs, strict=True)]
        self._constants = [look.constants.to(self.device) for look in looks]
        if not (fresh and self.run.train.starts_from_cells):
            return
        for r, look in enumerate(looks):
            started = look.starting_weights(self.model.named(self.model.flat, r), self.runs[r])
            with torch.no_grad():
                for name, tensor in started.items():
                    self.model.parts[name][r].copy_(tensor)
        self.best.copy_(self.model.flat)

    def _worse_than_nothing(self, member: int, loss: float) -> str | None:
        over = self.steps < self.total_steps and not self.members[member].is_running(self.run.train)
        if self._constants is None or self._curve is None or not is_judged(self.run, self.steps, over):
            return None
        constants = constant_loss(self._curve, self._constants[member], self.objective)
        return worse_than_constants(loss, constants, self.steps)

    def _batches(self, cells: Cells) -> list[Batch]:
        return evaluation_batches(cells, self.run.train, self.run.execution.micro_batch, self.device)

    def keep_best(self, members: list[int]) -> None:
        """See Trainee. The weights stay in memory and go into the stack's own checkpoints."""
        for r in members:
            self.best[r] = self.model.flat[r]

    def evaluate_chosen(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """See Trainee; publishes each member's chosen weights too."""
        alive = [r for r in range(len(self.runs)) if r not in self.failures]
        if not alive:
            return {}
        found = self._evaluate_held_out(alive, self.best)
        if self.attempts is not None:
            for r in alive:
                weights = self.model.named(self.best, r)
                tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
                self.attempts[r].save_best(self.members[r], tensors)
        return found

    def evaluate_present(self) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        """See Trainee."""
        return self._evaluate_held_out([r for r in range(len(self.runs)) if r not in self.failures], None)

    def _evaluate_held_out(
        self, members: list[int], weights: Tensor | None
    ) -> dict[int, tuple[Evaluation, Evaluation | None]]:
        val, test = self.evaluate(self._batches(self.val), weights), None
        if self.run.role == "law":
            test = self.evaluate(self._batches(self.test), weights)
        return {r: (val[r], test[r] if test is not None else None) for r in members}

    def save_trunk(self, members: list[int]) -> None:
        """See Trainee. A member leaves what it would alone, and goes on alone or in another stack."""
        if self.attempts is None:
            return
        kinds = {"model": self.model.flat, "optimizer.exp_avg": self.optimizer.first}
        kinds["optimizer.exp_avg_sq"] = self.optimizer.second
        for r in members:
            state = {
                f"{kind}.{name}": tensor
                for kind, flat in kinds.items()
                for name, tensor in self.model.named(flat, r).items()
            }
            state |= {f"optimizer.step.{name}": torch.tensor(float(self.steps)) for name in self.model.shapes}
            state[generator_name(0)] = torch.get_rng_state()
            best = {f"model.{name}": tensor for name, tensor in self.model.named(self.best, r).items()}
            self.attempts[r].save_trunk(self.members[r], state, best)

    def start_from_trunks(self) -> None:
        """Go on from trunks of smaller budgets, where every member has one and they all end at the same update."""
        found = [attempt.find_trunk() for attempt in self.attempts or []]
        there = [one for one in found if one is not None]
        if not there:
            return
        if len(there) < len(found) or len({progress.optimizer_steps for progress, _ in there}) > 1:
            for attempt in self.attempts or []:
                attempt.begin_anew()
            return
        tensors = self.state() | {"generator": torch.get_rng_state()}
        kinds = {"weights": "model", "exp_avg": "optimizer.exp_avg", "exp_avg_sq": "optimizer.exp_avg_sq"}
        for r, (progress, checkpoint) in enumerate(there):
            saved = checkpoint.tensors()
            for name, kind in kinds.items():
                tensors[name][r] = self.model.flattened(saved, kind)
            best = self.attempts[r].load_best(progress) if self.attempts and progress.best_step else saved
            tensors["best"][r] = self.model.flattened(best, "model")
        self.load(there[0][0].optimizer_steps, [progress for progress, _ in there], {}, tensors)

    def keep(self) -> tuple[int, list[Progress], dict[int, str], dict[str, Tensor]]:
        """See Trainee."""
        tensors = {name: tensor.clone() for name, tensor in self.state().items()}
        return self.steps, [copied(member) for member in self.members], dict(self.failures), tensors

    def go_back(self, kept: tuple[int, list[Progress], dict[int, str], dict[str, Tensor]]) -> None:
        """See Trainee."""
        steps, members, failures, tensors = kept
        self.alive.fill_(True)
        self._unsettled = []
        self.load(steps, [copied(member) for member in members], dict(failures), tensors)

    def state(self) -> dict[str, Tensor]:
        """All that exact resuming needs besides the members' progress."""
        return {
            "weights": self.model.flat,
            "exp_avg": self.optimizer.first,
            "exp_avg_sq": self.optimizer.second,
            "best": self.best,
            "generator": torch.get_rng_state(),
        }

    def load(self, steps: int, members: list[Progress], failures: dict[int, str], tensors: dict[str, Tensor]) -> None:
        """Go back to where ``state`` was taken."""
        self.steps = self.optimizer.steps = steps
        self.members, self.failures = members, failures
        targets = (self.model.flat, self.optimizer.first, self.optimizer.second, self.best)
        with torch.no_grad():
            for target, name in zip(targets, ("weights", "exp_avg", "exp_avg_sq", "best"), strict=True):
                target.copy_(tensors[name])
        for r in failures:
            self.alive[r] = False
        torch.set_rng_state(tensors["generator"])

    def save(self) -> None:
        """See Trainee. One checkpoint holds all members' state and names the attempts that hold their rows."""
        if self._own is None or self.attempts is None:
            return
        for attempt in self.attempts:
            attempt.metrics.flush()
        facts = {
            "steps": self.steps,
            "members": [asdict(member) for member in self.members],
            "failures": {str(r): message for r, message in self.failures.items()},
            "tokens": [attempt.token for attempt in self.attempts],
        }
        self._own.save(LAST, self.steps, facts, self.state())
        self._own.drop(LAST, set(self._own.steps_of(LAST)[:KEPT]))

    def resume(self, earlier: list[Checkpoints]) -> None:
        """Go on from the newest whole checkpoint of earlier attempts (the latest first); else from the beginning."""
        notes: list[str] = []
        for checkpoints in earlier:
            found = newest(checkpoints, LAST, notes)
            if found is None or len(found.facts["members"]) != len(self.runs):
                continue
            facts = found.facts
            members = [Progress(**one) for one in facts["members"]]
            failures = {int(r): message for r, message in facts["failures"].items()}
            self.load(facts["steps"], members, failures, found.tensors())
            for attempt, token in zip(self.attempts or [], facts["tokens"], strict=True):
                attempt.take_over_rows(attempt.files.place.below(f"{ATTEMPTS}/{token}"), self.steps)
            break
        for attempt in self.attempts or []:
            attempt.note(notes, self.steps)


def stack_to_results(
    runs: list[RunSpec],
    feeds: list[Feed],
    val: Cells,
    test: Cells,
    data_hash: str,
    device: torch.device,
    place: Place,
    files: list[RunFiles],
    diverged: Callable[[RunSpec, str], None],
    signals: Signals | None = None,
) -> None:
    """Train a stack, resume where an earlier attempt stopped, commit a result for each member that did not diverge.

    Args:
        runs: R members.
        feeds: their batches.
        val: validation cells.
        test: test cells; members that choose a rate never see them.
        data_hash: of the shards.
        device: to train on.
        place: of the stack.
        files: of the members.
        diverged: called with each member whose loss became NaN or infinite, and a message.
        signals: Preempted rises where they ask to stop.
    """
    began, signals = time.monotonic(), signals or Signals()
    earlier = [_checkpoints(place, name) for name in AttemptName.all_of(place)]
    own = _checkpoints(place, AttemptName.next_of(place))
    attempts = [Attempt(one, run) for one, run in zip(files, runs, strict=True)]
    loop = StackedLoop(runs, feeds, val, test, device, attempts, own, signals.beat)
    loop.resume(earlier)
    if loop.steps == 0:
        loop.start_from_trunks()
    loop.begin(fresh=loop.steps == 0)
    train(loop, signals)
    for r, message in loop.failures.items():
        diverged(runs[r], str(Diverged("M046", message)))
    finish(loop, data_hash, test, [len(feed.order.rows) for feed in feeds], began)
    place.remove(f"{ATTEMPTS}/")


def _checkpoints(place: Place, name: AttemptName) -> Checkpoints:
    return Checkpoints(place.below(f"{ATTEMPTS}/{name.token}"))
