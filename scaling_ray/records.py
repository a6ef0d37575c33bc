"""What crosses a boundary as a file: typed, versioned, to and from JSON. Sums travel, ratios are taken at the end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from scaling_ray.errors import BadInput
from scaling_ray.recipe import OBJECTIVES
from scaling_ray.sizes import Shape, parameters
from scaling_ray.storage import sealed_json, unseal

StopReason = Literal["budget", "early_stop"]
FailureClass = Literal["bug", "diverged", "out_of_memory", "lost", "stuck", "bad_input"]


@dataclass(frozen=True)
class LossSums:
    """A sum of losses and the number of masked genes it runs over; added over batches and ranks."""

    loss: float = 0.0
    masked_genes: float = 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.loss + other.loss, self.masked_genes + other.masked_genes)

    @property
    def mean(self) -> float:
        """Mean loss per masked gene (NaN of nothing)."""
        return self.loss / self.masked_genes if self.masked_genes else math.nan


class Record(BaseModel):
    """A frozen record with a version; unknown fields are refused, and so is text that changed since it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """JSON text with a hash of itself (``storage.sealed``), indented, ending in a newline."""
        return sealed_json(json.loads(self.model_dump_json()))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in ``path``; BadInput if it is absent, damaged or not such a record."""
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise BadInput(
                "W006", path.name, str(path.parent), f"cannot be read ({error.strerror}); mend that, or make it anew"
            ) from error

    @classmethod
    def parse(cls, text: bytes | str, source: str) -> Self:
        """The record in ``text``; BadInput naming ``source`` if it is damaged or not such a record."""
        fields = unseal(text, source)
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            first = str(error).splitlines()[0]
            raise BadInput("W007", source, first, f"is not a {cls.__name__} of this version; make it anew") from error


class FileEntry(Record):
    """One file of a shard directory; shard files also say what they hold, whatever the compression."""

    path: str
    rows: int
    bytes: int
    sha256: str
    content_sha256: str | None = None


class SplitEntry(Record):
    """One split: its cells, their share of all, the groups (donors, datasets) that make it up, its files.

    ``donor_cells`` counts cells by donor, in the order of the donors' codes.
    """

    cells: int
    fraction: float
    groups: list[str]
    donor_cells: list[int]
    content_sha256: str
    files: list[FileEntry]


class ShardManifest(Record):
    """What a shard directory holds. ``data_hash`` covers contents and rules only, nothing of the machine or code.

    ``dropped`` counts the cells each rule took, in the order of the rules; ``batches_left_out`` names data sets too
    small to rank genes in; ``split_from`` is the data_hash of the older shards whose split was carried over.
    """

    version: Literal[3] = 3
    name: str
    data_hash: str
    genes: int
    block_genes: int
    row_group_cells: int
    split_by: str
    data: dict[str, Any]
    census: dict[str, Any]
    planted: bool
    dropped: dict[str, int]
    batches_left_out: list[str] = []
    split_from: str | None = None
    splits: dict[str, SplitEntry]
    tables: list[FileEntry]
    codes: dict[str, list[str]]
    made_with: dict[str, str]


class Branch(BaseModel):
    """What a run of a smaller budget reaches: a decay from the trunk, evaluated on all held-out cells.

    ``share`` is that budget over the run's own; losses are means per masked gene, ``test_loss`` of law runs only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float
    optimizer_steps: int
    cells_seen: int
    val_loss: float
    test_loss: float | None


class RunResult(Record):
    """What one finished run commits, once.

    ``val_loss`` and ``test_loss`` are those of the chosen checkpoint, in ``loss_unit`` per masked gene; a run that
    chooses a rate has no test loss. ``stacked`` models trained as one; ``micro_batch`` is what the run
    ended with (memory may have halved it); ``workers`` are those of its end, ``worker_counts`` those of its groups from
    the first on (empty for a run of one process); ``branches`` are the smaller budgets that its trunk was decayed for;
    ``ended_ms`` is the time of the commit, in milliseconds since 1970.
    """

    version: Literal[3] = 3
    run_id: str
    attempt: str
    attempts: int
    data_hash: str
    lr: float
    cells_resolved: int
    cells_seen: int
    masked_genes_seen: int
    optimizer_steps: int
    flops: float
    loss_unit: str
    val_loss: float
    final_val_loss: float
    best_curve_loss: float
    best_cells_seen: int
    test_loss: float | None
    test_loss_sum: float | None
    test_masked_genes: int | None
    stop_reason: StopReason
    wall_seconds: float
    train_seconds: float
    workers: int
    engine: str
    micro_batch: int
    precision: str
    stacked: int
    host: str
    ended_ms: int
    branches: list[Branch] = []
    worker_counts: list[int] = []


class ModelRecord(Record):
    """What an exported model is: all that using its weights on other cells takes, and where it came from.

    ``feature_ids`` and ``feature_names`` are in the order of the model's genes. ``val_loss`` and ``test_loss`` are the
    run's own, in ``loss_unit`` per masked gene; a run that chose a rate has no test loss. ``umi_fraction`` is the share
    of a cell's molecules that the network saw in training. ``census`` says which Census the training cells are from.
    ``library_median``: counts of a training cell over all genes; None in a model whose sweep did not keep it.
    """

    version: Literal[2] = 2
    library_median: float | None = None
    run_id: str
    size: str
    width: int
    layers: int
    heads: int
    feedforward: int
    params: int
    feature_ids: list[str]
    feature_names: list[str]
    recipe: Literal["corrected", "published"]
    mask_fraction: float
    umi_fraction: float
    precision: Literal["fp32", "bf16"]
    seed: int
    lr: float
    objective: str
    loss_unit: str
    val_loss: float
    test_loss: float | None
    data_hash: str
    census: dict[str, Any]
    scaling_ray_version: str
    weights_sha256: str

    @property
    def shape(self) -> Shape:
        """The model's shape."""
        return Shape(self.width, self.layers, self.heads, self.feedforward)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        genes = len(self.feature_ids)
        if len(self.feature_names) != genes or len(set(self.feature_ids)) != genes:
            raise ValueError(f"{genes} feature_ids need as many names, and none may repeat")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is not known here; use {', '.join(OBJECTIVES)}")
        if parameters(self.shape, genes, OBJECTIVES[self.objective].outputs_per_gene) != self.params:
            raise ValueError(f"params {self.params} are not those of this shape and {genes} genes")
        return self


class RunFailure(Record):
    """Why a run has no result: its class, the message, the attempt, and when, in milliseconds since 1970."""

    version: Literal[2] = 2
    run_id: str
    failure: FailureClass
    message: str
    attempts: int
    ended_ms: int | None = None
