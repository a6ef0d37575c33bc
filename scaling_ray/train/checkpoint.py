"""Checkpoints: a folder of tensors and, written last, the ``progress.json`` that names and seals them.

``<name>-<updates>/`` holds safetensors and their marker. A folder without its marker is unfinished and is never read.
A folder is damaged where a file does not have the hash that the marker gives for it, or where the marker does not have
its own; it is passed over for the previous one. So a checkpoint is whole or absent, on a disk and on S3, whenever a
process is killed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.rules import TrainingRules
from scaling_ray.storage import Place, sealed_json, unseal
from scaling_ray.train.schedule import decay_start, end_of
from scaling_ray.train.sharded import UNREADABLE, WHOLE, check_files, listed_files, read_state, write_tensors

MARKER = "progress.json"
KEPT = 2
"""Number of checkpoints kept under one name: the newest, and the previous one in case the newest is damaged."""

_FOLDER = re.compile(r"(?P<name>[a-z]+)-(?P<steps>\d{12})/" + re.escape(MARKER))


@dataclass
class Progress:
    """How far a run has come; with weights, optimizer and generator state it is all that resuming needs.

    ``row_loss`` and ``row_masked_genes`` are the sums since the last row of kind "train". Of a trunk: ``decay_from`` is
    the update after which validation made it decay, ``ended`` says that its decay has come to its end, and ``branches``
    holds what each decayed branch reached (fields of ``records.Branch``). ``worker_counts`` are the sizes of the groups
    that trained it, in order, where it was a group.
    """

    optimizer_steps: int = 0
    cells_seen: int = 0
    masked_genes_seen: int = 0
    train_seconds: float = 0.0
    curve_loss: list[float] = field(default_factory=list)
    best_smoothed_loss: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    row_loss: float = 0.0
    row_masked_genes: float = 0.0
    decay_from: int | None = None
    ended: bool = False
    branches: list[dict[str, Any]] = field(default_factory=list)
    worker_counts: list[int] = field(default_factory=list)

    def add_evaluation(self, val_loss: float, smoothing_evaluations: int) -> tuple[float, bool]:
        """Add a value to the validation curve; returns (the smoothed loss, whether it is the lowest so far)."""
        self.curve_loss.append(val_loss)
        recent = self.curve_loss[-smoothing_evaluations:]
        smoothed = sum(recent) / len(recent)
        best = self.best_smoothed_loss is None or smoothed < self.best_smoothed_loss
        if best:
            self.best_smoothed_loss, self.best_step, self.evaluations_without_gain = smoothed, self.optimizer_steps, 0
        else:
            self.evaluations_without_gain += 1
        return smoothed, best

    def is_running(self, train: TrainingRules) -> bool:
        """Whether validation lets the run go on; its budget is another matter."""
        return not self.ended if train.wsd is not None else not self.has_stalled(train.patience_evaluations)

    def is_trunk(self, train: TrainingRules) -> bool:
        """Whether the run stands on its trunk: at a rate that has not begun to fall."""
        return train.wsd is not None and self.decay_from is None and self.optimizer_steps <= decay_start(train)

    def follow(self, train: TrainingRules) -> None:
        """After an evaluation: a trunk that has stalled decays from here, and one that has decayed has ended."""
        if train.wsd is None:
            return
        if self.optimizer_steps >= end_of(train, self.decay_from):
            self.ended = True
        elif self.is_trunk(train) and self.has_stalled(train.patience_evaluations):
            self.decay_from = self.optimizer_steps

    def has_stalled(self, patience_evaluations: int) -> bool:
        """Whether the smoothed loss has not fallen for ``patience_evaluations`` evaluations; never where that is 0."""
        return 0 < patience_evaluations <= self.evaluations_without_gain


def copied(progress: Progress) -> Progress:
    """The same progress, which goes its own way from here."""
    return Progress(**asdict(progress))


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and the facts in its marker."""

    folder: Place
    facts: dict[str, Any]

    def copy_to(self, target: Place) -> None:
        """Make ``target`` a folder of the same checkpoint, its marker last."""
        names = [name for name in self.folder.names() if name != MARKER]
        for name in [*names, MARKER]:
            self.folder.copy(name, target, name)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, assembled from all ranks' pieces where ranks wrote it in parts."""
        return read_state(self.folder)


def read_checkpoint(folder: Place) -> Checkpoint:
    """The checkpoint in a folder, checked against its marker; raises one of UNREADABLE if it is absent or damaged."""
    marker = unseal(folder.read(MARKER), f"{folder}/{MARKER}")
    check_files(folder, marker["files"])
    return Checkpoint(folder, marker["facts"])


class Checkpoints:
    """The checkpoints of one attempt, by name and number of updates."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def folder(self, name: str, steps: int) -> Place:
        """The folder of a checkpoint's files; ``publish`` makes them a checkpoint."""
        return self.place.below(f"{name}-{steps:012d}")

    def save(self, name: str, steps: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write and publish a state that one process holds."""
        self._mark(name, steps, facts, {WHOLE: write_tensors(self.folder(name, steps), WHOLE, tensors)})

    def publish(self, name: str, steps: int, facts: dict[str, Any]) -> None:
        """Make a checkpoint of the files that all ranks have written into its folder."""
        self._mark(name, steps, facts, listed_files(self.folder(name, steps)))

    def _mark(self, name: str, steps: int, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        self.folder(name, steps).write(MARKER, sealed_json({"facts": facts, "files": files}).encode())

    def steps_of(self, name: str) -> list[int]:
        """Updates at which checkpoints of a name were published, damaged ones included, the newest first."""
        found = (_FOLDER.fullmatch(path) for path in self.place.names(f"{name}-"))
        return sorted((int(match["steps"]) for match in found if match), reverse=True)

    def read(self, name: str, steps: int) -> Checkpoint:
        """Read one of these checkpoints, as ``read_checkpoint`` does."""
        return read_checkpoint(self.folder(name, steps))

    def drop(self, name: str, keep: set[int]) -> None:
        """Remove the checkpoints of a name except those at ``keep``; markers go first."""
        for steps in self.steps_of(name):
            if steps not in keep:
                self.folder(name, steps).remove(MARKER)
                self.place.remove(f"{name}-{steps:012d}/")


def newest(checkpoints: Checkpoints, name: str, notes: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint of a name; ``notes`` gets a sentence about each damaged one that is passed over."""
    for steps in checkpoints.steps_of(name):
        try:
            return checkpoints.read(name, steps)
        except UNREADABLE as error:
            where = f"{checkpoints.folder(name, steps)}"
            notes.append(f"passed over {where}, which is damaged: {' '.join(str(error).split())}")
    return None


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any], differing: list[str]) -> None:
    """Raise BadInput naming the first field in which a checkpoint's run differs from ``identity``."""
    if not differing:
        return
    # The run id differs whenever any field does, so it is named only where no other field differs.
    name = next((name for name in differing if name != "run_id"), "run_id")
    here: Any = identity
    there: Any = checkpoint.facts["identity"]
    for part in name.split("."):
        here, there = (side[part] if isinstance(side, dict) and part in side else None for side in (here, there))
    remedy = f"the run has {here!r}, {checkpoint.folder} is of another spec; remove it or sweep into a new directory"
    raise BadInput("M034", f"checkpoint.{name}", there, remedy)


def progress_facts(progress: Progress) -> dict[str, Any]:
    """A Progress as the fields of a marker."""
    return asdict(progress)
