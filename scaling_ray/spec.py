"""The language of a sweep: a TOML file in, frozen models out.

Every default stands once: here, in ``rules`` and in ``resources``. Unknown keys and wrong types are errors that name
field, value and way out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from scaling_ray.errors import BadInput
from scaling_ray.execution import Precision
from scaling_ray.resources import BudgetSpec, PricesSpec, ResourceSpec
from scaling_ray.rules import Frozen, PositiveInt, Share, TrainingRules
from scaling_ray.sizes import LADDER, Shape

KeptColumn = Literal["tissue_general", "tissue", "assay", "disease", "cell_type", "dataset_id", "donor_id", "sex"]
_PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Fractions(Frozen):
    """Shares of the cells per split."""

    train: Share = 0.8
    val: Share = 0.1
    test: Share = 0.1

    @model_validator(mode="after")
    def _sum_to_one(self) -> Fractions:
        if abs(self.train + self.val + self.test - 1) > 1e-9:
            raise BadInput(
                "S003", "data.fractions", [self.train, self.val, self.test], "must add up to 1; change one of them"
            )
        return self


class DataSpec(Frozen):
    """What goes into the shards: which cells, how they are split, which genes.

    Cells pass, in this order, ``value_filter`` (a condition in SOMA's language), ``keep`` (for an obs column, the
    values one of which a cell must have; ``disease`` may hold several), ``cap_cells`` (most cells per value of
    ``cap_by``), ``drop_duplicates`` (of cells with the same counts in every gene, that of lowest soma_joinid stays)
    and ``min_counts`` (over the chosen genes). Groups in the older manifest.json that ``split_from`` names keep their
    split. ``batch_key`` ranks genes within each data set and takes the median rank. ``gene_list`` holds feature_ids,
    for ``gene_rule = "list"``.

    ``title`` and ``source`` (a citation or an address) are what a report calls the data; they change no cell.
    """

    title: str | None = None
    source: str | None = None
    value_filter: str | None = "is_primary_data == True"
    keep: dict[KeptColumn, Annotated[list[str], Field(min_length=1)]] = {}
    cap_by: KeptColumn = "tissue_general"
    cap_cells: PositiveInt | dict[str, PositiveInt] | None = None
    drop_duplicates: bool = True
    min_counts: Annotated[int, Field(ge=0, strict=True)] = 0
    split_by: Literal["donor_id", "dataset_id", "cell"] = "donor_id"
    split_from: str | None = None
    fractions: Fractions = Fractions()
    salt: str = "scaling_ray"
    genes: PositiveInt = 512
    gene_rule: Literal["seurat_v3", "by_mean", "first_n", "list"] = "seurat_v3"
    batch_key: Literal["dataset_id"] | None = None
    gene_list: list[str] = []

    @property
    def rules(self) -> dict[str, Any]:
        """What decides the cells, splits and genes, as plain values: all but the names that reports give the data."""
        return self.model_dump(mode="json", exclude={"title", "source"})

    @model_validator(mode="after")
    def _rules_agree(self) -> DataSpec:
        if (self.gene_rule == "list") != bool(self.gene_list):
            raise BadInput("S004", "data.gene_list", self.gene_list, "goes with gene_rule = 'list', and only with it")
        if len(set(self.gene_list)) != len(self.gene_list):
            raise BadInput("S005", "data.gene_list", self.gene_list, "holds a feature_id twice; remove it")
        if self.gene_list and self.genes != len(self.gene_list):
            raise BadInput(
                "S006", "data.genes", self.genes, f"data.gene_list holds {len(self.gene_list)}; make them agree"
            )
        if self.batch_key and self.gene_rule != "seurat_v3":
            raise BadInput(
                "S007", "data.batch_key", self.batch_key, "goes with gene_rule = 'seurat_v3'; remove one of them"
            )
        if self.split_from is not None and self.split_by == "cell":
            raise BadInput(
                "S008",
                "data.split_from",
                self.split_from,
                "carries over donors or data sets; cells have no name to know them by",
            )
        return self


class GridSpec(Frozen):
    """The axes. ``cells`` are unique training cells, ``donors`` how many donors they come from; "all" is every one."""

    sizes: Annotated[list[str], Field(min_length=1)]
    genes: Annotated[list[PositiveInt], Field(min_length=1)]
    cells: Annotated[list[PositiveInt | Literal["all"]], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
    donors: Annotated[list[PositiveInt | Literal["all"]], Field(min_length=1)] = ["all"]

    @model_validator(mode="after")
    def _no_repeats(self) -> GridSpec:
        for name in ("sizes", "genes", "cells", "seeds", "donors"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise BadInput("S009", f"grid.{name}", values, "holds a value twice; remove it")
        return self


class LearningRateSpec(Frozen):
    """Learning rates: one, an axis of the grid, or a choice made per size on validation with seeds outside the fit.

    With ``rule = "choose"`` every size runs each of its rates on ``choose_seed`` and ``choose_cells`` for
    ``choose_fraction`` of its budget (the schedule fitted to that shorter run); the lowest point of a parabola through
    the best and its neighbours wins, or the best itself where it has not two.
    Rates without a line in ``per_size`` are those of ``reference_width``: another width D takes them times
    (D / reference_width) ^ width_exponent, 0 for the same at every width.
    With ``rule = "transfer"`` only ``tune_size`` chooses like this, and every other size takes its rate over by that
    power of the widths. ``check_size`` tries its own rates too, to say how far its best is from the one taken over.
    """

    rule: Literal["fixed", "grid", "choose", "transfer"] = "fixed"
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    per_size: dict[str, Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]] = {}
    choose_seed: int = 101
    choose_cells: PositiveInt | Literal["all"] = "all"
    choose_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    width_exponent: Annotated[float, Field(ge=-2, le=2)] = 0.0
    reference_width: PositiveInt = 16
    tune_size: str | None = None
    check_size: str | None = None

    @model_validator(mode="after")
    def _enough_rates(self) -> LearningRateSpec:
        per_size = {f"lr.per_size.{size}": rates for size, rates in self.per_size.items()}
        for field, rates in {"lr.rates": self.rates, **per_size}.items():
            if len(set(rates)) != len(rates):
                raise BadInput("S010", field, rates, "holds a rate twice; remove it")
            if self.rule == "fixed" and len(rates) != 1:
                raise BadInput(
                    "S011", field, rates, "holds several rates; with rule = 'fixed' give one, or name another rule"
                )
            if self.compares and len(rates) < 2:
                raise BadInput("S012", field, rates, f"holds one rate; with rule = {self.rule!r} give at least 2")
        if self.rule == "transfer":
            if self.per_size:
                raise BadInput(
                    "S013", "lr.per_size", sorted(self.per_size), "does not go with rule = 'transfer'; remove it"
                )
            for name in ("tune_size", "check_size"):
                if getattr(self, name) is None:
                    raise BadInput("S014", f"lr.{name}", None, "goes with rule = 'transfer'; name a size of the grid")
            if self.tune_size == self.check_size:
                raise BadInput(
                    "S015", "lr.check_size", self.check_size, "is lr.tune_size as well; name another, far larger"
                )
        return self

    @property
    def compares(self) -> bool:
        """Whether some runs try rates before the others train."""
        return self.rule in ("choose", "transfer")

    def tunes(self, size: str) -> bool:
        """Whether runs of a size try rates."""
        return self.rule == "choose" or (self.rule == "transfer" and size in (self.tune_size, self.check_size))

    def transferred(self, width: int, tuned_width: int) -> float:
        """What the rate chosen at one width is multiplied by at another."""
        return float((width / tuned_width) ** self.width_exponent) if self.rule == "transfer" else 1.0

    def of(self, size: str, width: int) -> list[float]:
        """The rates to try for ``size``, rising, to three digits where the rule makes them."""
        if size in self.per_size or self.width_exponent == 0.0:
            return sorted(self.per_size.get(size, self.rates))
        factor = (width / self.reference_width) ** self.width_exponent
        return sorted(float(f"{rate * factor:.3g}") for rate in self.rates)


class TrainSpec(TrainingRules):
    """The table ``[train]`` of a spec: the rules, and how they are carried out where the spec says so.

    ``micro_batch`` and ``precision`` follow size and device where they are "auto"; "probe" measures micro-batches
    before the first run. Either way an update is ``cells_per_step`` cells.
    """

    micro_batch: PositiveInt | Literal["auto", "probe"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    threads: PositiveInt = 1

    @field_validator("micro_batch")
    @classmethod
    def _micro_batch_fits(cls, value: int | str, info: Any) -> int | str:
        whole = info.data.get("cells_per_step")
        if whole is not None and isinstance(value, int) and value > whole:
            raise ValueError(f"is larger than cells_per_step = {whole}; make it at most that")
        return value

    def rules(self, size: str, fraction: float = 1.0, *, branches: bool = True) -> TrainingRules:
        """The rules of one size: ``max_cells_seen`` as one number, times ``fraction``, in whole updates.

        Without ``branches`` a trunk has none.
        """
        budget = self.max_cells_seen
        if isinstance(budget, dict):
            if size not in budget and "default" not in budget:
                raise BadInput(
                    "S018", "train.max_cells_seen", sorted(budget), f"add a line for {size}, or `default = N`"
                )
            budget = budget[size] if size in budget else budget["default"]
        steps = max(1, round(budget * fraction / self.cells_per_step))
        given = {name: getattr(self, name) for name in TrainingRules.model_fields}
        if not branches:
            given["trunk"] = self.trunk.model_copy(update={"branches": []})
        return TrainingRules(**given | {"max_cells_seen": steps * self.cells_per_step})


class SweepSpec(Frozen):
    """A whole sweep."""

    name: Annotated[str, Field(pattern=f"^{_PLAIN_NAME}$")]
    data: DataSpec = DataSpec()
    grid: GridSpec
    sizes: dict[str, dict[str, Any]] = {}
    train: TrainSpec = TrainSpec()
    lr: LearningRateSpec
    resources: ResourceSpec = ResourceSpec()
    budget: BudgetSpec = BudgetSpec()
    prices: PricesSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SweepSpec:
        if self.train.threads > self.resources.cpus:
            raise BadInput(
                "S021",
                "train.threads",
                self.train.threads,
                f"is more than resources.cpus = {self.resources.cpus}; a run would never start",
            )
        budgets = self.train.max_cells_seen if isinstance(self.train.max_cells_seen, dict) else {}
        named = {
            "sizes": self.sizes,
            "grid.sizes": self.grid.sizes,
            "lr.per_size": self.lr.per_size,
            "resources.workers": self.resources.workers,
            "train.max_cells_seen": set(budgets) - {"default"},
        }
        for field, names in named.items():
            for name in sorted(names):
                self.shape(name, field)
        for name in self.grid.sizes:
            self.train.rules(name)
        if max(self.grid.genes) > self.data.genes:
            raise BadInput(
                "S022",
                "grid.genes",
                max(self.grid.genes),
                f"is more than data.genes = {self.data.genes}; raise that, or lower this",
            )
        for name in ("tune_size", "check_size"):
            size = getattr(self.lr, name)
            if self.lr.rule == "transfer" and size not in self.grid.sizes:
                raise BadInput("S023", f"lr.{name}", size, f"is no size of the grid; use {', '.join(self.grid.sizes)}")
        if self.lr.compares and self.lr.choose_seed in self.grid.seeds:
            raise BadInput(
                "S024", "lr.choose_seed", self.lr.choose_seed, "is also in grid.seeds; a choice needs a seed of its own"
            )
        for name, given in self.resources.workers.items():
            field, ends = f"resources.workers.{name}", given if isinstance(given, list) else [given]
            if isinstance(given, list) and (len(given) != 2 or given[0] >= given[1]):
                raise BadInput(
                    "S036", field, given, "is no range; give one number, or the fewest and the most as [4, 8]"
                )
            if min(ends) < 1:
                raise BadInput("S037", field, given, "must be greater than 0")
            if any(self.train.cells_per_step % workers for workers in ends):
                raise BadInput("S025", field, given, f"must divide train.cells_per_step = {self.train.cells_per_step}")
        return self

    def shape(self, size: str, field: str = "grid.sizes") -> Shape:
        """The shape of a named size: the spec's own first, then the ladder's. ``field`` is where the name stands."""
        if size in self.sizes:
            if not re.fullmatch(_PLAIN_NAME, size):
                raise BadInput(
                    "S026", "sizes", size, "becomes part of file names; use letters, digits, dot, dash and underscore"
                )
            wanted = {"width", "layers", "heads", "feedforward"}
            given = self.sizes[size]
            if set(given) != wanted:
                odd = sorted(wanted.symmetric_difference(given))
                raise BadInput("S027", f"sizes.{size}", odd, "give exactly width, layers, heads and feedforward")
            try:
                return Shape(**given)
            except BadInput as error:
                raise BadInput(
                    error.code, error.field.replace("sizes", f"sizes.{size}", 1), error.value, error.remedy
                ) from error
        if size not in LADDER:
            raise BadInput(
                "S028", field, size, f"is no known size; use {', '.join(LADDER)}, or add a table [sizes.{size}]"
            )
        return LADDER[size]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without spaces: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def text_hash(text: str) -> str:
    """sha256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of ``value`` as canonical JSON."""
    return text_hash(canonical_json(value))


def parse_spec(text: str, source: str = "spec") -> SweepSpec:
    """A spec from TOML text; BadInput with one line for anything that is not one."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput("S029", source, str(error), "is not TOML; mend that place") from error
    return spec_of(table, source)


def spec_of(table: Mapping[str, Any], source: str = "spec") -> SweepSpec:
    """A spec from its tables; BadInput with one line for anything that is not one."""
    try:
        return SweepSpec.model_validate(dict(table))
    except ValidationError as error:
        raise _first_problem(error, source) from error


def load_spec(path: str | Path) -> SweepSpec:
    """A spec from a TOML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("S030", "spec", str(path), "cannot be read as a text file; name a TOML file") from error
    return parse_spec(text, str(path))


def _first_problem(error: ValidationError, source: str) -> BadInput:
    problems = error.errors(include_url=False)
    # a misspelt key is what its own table misses, so it comes first
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, BadInput):
        return cause
    where = _place(problem["loc"]) or source
    if problem["type"] == "extra_forbidden":
        return BadInput("S031", where, problem["input"], f"is no known key; {_meant(str(problem['loc'][-1]))}")
    if problem["type"] == "missing":
        return BadInput("S032", where, None, "is missing; add it")
    # A field of several types yields one problem per type: the way out names them all.
    messages = [one["msg"].removeprefix("Value error, ") for one in problems if _place(one["loc"]) == where]
    return BadInput(
        "S033", where, problem["input"], ", or ".join(message[0].lower() + message[1:] for message in messages)
    )


def _meant(key: str) -> str:
    """The way out for a key that its table does not know: the table that has it, or the nearest name."""
    there = [name for name, _ in _tables() if key in name.rpartition(".")[2:]]
    if there:
        return f"did you mean {' or '.join(there[:2])}?"
    near = difflib.get_close_matches(key, sorted({name.rpartition(".")[2] for name, _ in _tables()}), n=1)
    return f"did you mean {near[0]}?" if near else "remove it or correct its spelling"


def _tables(model: type[BaseModel] | None = None, above: str = "") -> Iterator[tuple[str, type[BaseModel] | None]]:
    """Every key of a spec with its tables before it, and the model of its value where it is a table."""
    for name, field in (model or SweepSpec).model_fields.items():
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        below = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        yield above + name, below
        if below is not None:
            yield from _tables(below, f"{above}{name}.")


def _place(location: tuple[int | str, ...]) -> str:
    """A dotted field, without the type tags that pydantic adds for fields of several types."""
    tag = re.compile(r"(constrained-|literal\[|dict\[).*")
    return ".".join(str(part) for part in location if not tag.fullmatch(str(part)))
