"""What a sweep found, as one small sealed file: a reference to repeat, or a repetition to hold beside one.

Losses by setting and seed come first; contrasts, laws, predictions and baselines follow from them and from the fit.
Whatever tells where the figures come from (spec, data, numerics version, commit, versions) stands in ``Origin``.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from scaling_ray.errors import BadInput
from scaling_ray.laws.verdict import REFUSED
from scaling_ray.records import Record, ShardManifest
from scaling_ray.results.cohorts import columns_of, fit_cohorts, fit_columns
from scaling_ray.results.delimited import read_fields
from scaling_ray.results.foreign import read_table
from scaling_ray.results.read import read_rows
from scaling_ray.results.sweep_files import SPEC, SweepFiles
from scaling_ray.runs import NUMERICS_VERSION, runs_of
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.storage import Place, open_place

LossColumn = Literal["test_loss", "val_loss", "loss"]
_PACKAGES = ("scaling-ray", "torch", "numpy", "scipy", "ray", "deepspeed", "pyarrow")
_PROTOCOL = ("recipe", "objective", "loss_unit", "schedule", "data_hash")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Part):
    """The losses of one setting, by seed.

    ``cells`` is what the grid asked for, "all" included; ``lr`` is part of it only where the grid holds several rates.
    """

    size: str
    params: float
    genes: int | None
    cells: str
    cells_resolved: float | None
    lr: float | None
    losses: dict[str, float]

    @property
    def name(self) -> str:
        """The setting in words: "W8, 500 cells"."""
        words = [self.size] + ([f"{self.cells} cells"] if self.cells != "" else [])
        words += [f"{self.genes} genes"] if self.genes is not None else []
        return ", ".join(words + ([f"rate {self.lr:g}"] if self.lr is not None else []))


class Baseline(_Part):
    """Closed forms on the test cells, of one panel and number of training cells; ``seed`` is None where none counts."""

    genes: int | None
    cells: str
    seed: str | None
    gene_mean: float | None
    gaussian: float | None


class Estimate(_Part):
    """A value with the 95% interval that a fit shows."""

    value: float
    low: float
    high: float


class Prediction(Estimate):
    """A predicted mean loss, and where."""

    what: str
    params: float | None
    cells: float | None


class Law(_Part):
    """The headline of one fit; a refused law has no parameters, and an open interval is left out."""

    genes: int | None
    form: str | None
    size: str
    data: str
    prediction: str
    parameters: dict[str, Estimate]
    predictions: list[Prediction]


class Contrast(_Part):
    """What a step along one axis bought, with its 95% interval (all steps at once) where noise is known."""

    genes: int | None
    axis: str
    step: str
    gain: float
    low: float | None
    high: float | None


class Origin(_Part):
    """Where the figures come from; what is not known is None or empty.

    ``numerics_version`` is known where the ids of the runs are those that this version gives the spec. ``machines``
    counts runs by engine and precision. ``waiting`` names runs of the grid without a result, with the reason.
    """

    spec: str | None
    data_hash: str | None
    census: str | None
    recipe: str | None
    objective: str | None
    loss_unit: str | None
    schedule: str | None
    loss: LossColumn
    numerics_version: int | None
    commit: str | None
    versions: dict[str, str]
    processor: str | None
    machines: dict[str, int]
    source: str | None


class SweepRecord(Record):
    """What a sweep found."""

    version: Literal[1] = 1
    name: str
    origin: Origin
    settings: list[Setting]
    unfinished: list[str]
    baselines: list[Baseline]
    contrasts: list[Contrast]
    laws: list[Law]

    def drop(self) -> float:
        """From the gene mean to the best setting: all that was learned. Without a baseline, from the worst setting."""
        means = [sum(s.losses.values()) / len(s.losses) for s in self.settings if s.losses]
        if not means:
            raise BadInput(
                "R011",
                "settings",
                self.name,
                "has no finished run, so there is nothing to compare; make it of a sweep with some",
            )
        tops = [each.gene_mean for each in self.baselines if each.gene_mean is not None] or means
        return max(max(tops) - min(means), 1e-9 * max(means))


def record_sweep(where: str | Path | Place, loss: LossColumn = "test_loss", name: str | None = None) -> SweepRecord:
    """The record of a sweep (a directory or ``s3://`` prefix); its runs need not all be done.

    Raises:
        BadInput: no sweep, or none of its runs is finished.
    """
    place = open_place(where, "sweep")
    files, rows = SweepFiles(place), read_rows(place)
    spec = files.spec() if place.exists(SPEC) else None
    text = files.spec_text() if spec is not None else None
    law_rows = [row for row in rows if row.role == "law"]
    columns = columns_of(law_rows) | {"loss": [getattr(row, loss) for row in law_rows]}
    fits: list[Mapping[str, Any]] = []
    if loss == "test_loss":
        fits = list(fit_cohorts(rows).values())
    return _record(
        name or (spec.name if spec is not None else place.uri.rstrip("/").rsplit("/", 1)[-1]),
        columns,
        fits,
        loss,
        spec_text=text,
        manifest=files.manifest(),
        numerics=_numerics(spec, [row.run_id for row in rows]),
        made_here=True,
        source=None,
    )


def record_table(
    path: str | Path,
    *,
    name: str,
    spec: str | Path | None = None,
    manifest: str | Path | None = None,
    loss: LossColumn = "test_loss",
    same: Sequence[str] = (),
    source: str | None = None,
) -> SweepRecord:
    """The record of a table of runs: a kept results.csv, or someone else's.

    Args:
        path: the table, as ``scaling-ray fit`` reads it.
        name: of the record.
        spec: the TOML file whose grid the table holds, where one is known.
        manifest: the shards' manifest kept beside it.
        loss: the column of a sweep that the table's loss is to be compared with.
        same: columns that may differ between repeats, for the fit.
        source: where the figures come from, in words.
    """
    fields = read_fields(Path(path))
    table = dict(read_table(fields, same=list(same), loss=loss if loss in fields.columns else None))
    fits: list[Mapping[str, Any]] = [fit_columns(table)]
    text = Path(spec).read_text(encoding="utf-8") if spec is not None else None
    ids = [str(run_id) for run_id in table["run_id"]] if "run_id" in table else []
    return _record(
        name,
        table,
        fits,
        loss,
        spec_text=text,
        manifest=None if manifest is None else ShardManifest.read(Path(manifest)),
        numerics=_numerics(parse_spec(text), ids) if text is not None else None,
        made_here=False,
        source=source,
    )


def _record(
    name: str,
    columns: Mapping[str, Any],
    fits: Sequence[Mapping[str, Any]],
    loss: LossColumn,
    *,
    spec_text: str | None,
    manifest: ShardManifest | None,
    numerics: int | None,
    made_here: bool,
    source: str | None,
) -> SweepRecord:
    rows = _rows(columns)
    settings, unfinished = _settings(rows)
    if not settings:
        raise BadInput(
            "R012",
            "sweep",
            name,
            "has no finished run of its grid, so there is nothing to keep or compare; finish some runs",
        )
    told: dict[str, Any] = {column: _the_one([row[column] for row in rows]) for column in _PROTOCOL}
    census = None if manifest is None else manifest.census
    origin = Origin(
        spec=spec_text,
        census=None if census is None else str(census.get("census_version") or "") or None,
        loss=loss,
        numerics_version=numerics,
        commit=commit_here() if made_here else None,
        versions=versions_here() if made_here else {},
        processor=processor_here() if made_here else None,
        machines=dict(sorted(Counter(_machine(row) for row in rows if row["engine"]).items())),
        source=source,
        **told,
    )
    return SweepRecord(
        name=name,
        origin=origin,
        settings=settings,
        unfinished=unfinished,
        baselines=_baselines(rows),
        contrasts=[contrast for fit in fits for contrast in _contrasts(fit, _genes_of(fit, rows))],
        laws=[_law(fit, _genes_of(fit, rows)) for fit in fits],
    )


_READ = (
    *("role", "status", "failure", "run_id", "size", "params", "genes", "cells", "cells_requested", "seed", "lr"),
    *("loss", "baseline_loss", "gaussian_loss", "engine", "precision", "workers", *_PROTOCOL),
)


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of the grid, each with every column of ``_READ``, None where the table has none."""
    count = len(columns["loss"])
    rows = [{name: columns[name][i] if name in columns else None for name in _READ} for i in range(count)]
    return [row for row in rows if row["role"] in (None, "", "law")]


def _settings(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Setting], list[str]]:
    """Settings in the table's order, and the runs without a result, each with its reason."""
    rates: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        rates.setdefault((*_key(row), row["seed"]), set()).add(row["lr"])
    several = any(len(each) > 1 for each in rates.values())
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    unfinished = []
    for number, row in enumerate(rows):
        key = (*_key(row), row["lr"] if several else None)
        size, params, genes, cells, lr = key
        resolved = None if row["cells"] is None else float(row["cells"])
        setting = found.setdefault(
            key,
            {"size": size, "params": params, "genes": genes, "cells": cells, "cells_resolved": resolved, "lr": lr}
            | {"losses": {}},
        )
        seed = str(row["seed"]) if row["seed"] is not None else f"run {number + 1}"
        if row["status"] in (None, "", "done") and row["loss"] is not None:
            setting["cells_resolved"] = resolved
            setting["losses"][seed] = float(row["loss"])
        else:
            named = Setting(**setting | {"losses": {}}).name
            unfinished.append(f"{named}, seed {seed} ({row['failure'] or row['status']})")
    return [Setting(**each) for each in found.values() if each["losses"]], unfinished


def _key(row: Mapping[str, Any]) -> tuple[str, float, int | None, str]:
    cells = row["cells_requested"]
    if cells in (None, ""):
        cells = "" if row["cells"] is None else f"{float(row['cells']):.0f}"
    size = row["size"] or f"{float(row['params']):,.0f} parameters"
    return str(size), float(row["params"]), None if row["genes"] is None else int(row["genes"]), str(cells)


def _baselines(rows: Sequence[Mapping[str, Any]]) -> list[Baseline]:
    found: dict[tuple[Any, ...], Baseline] = {}
    for row in rows:
        if row["baseline_loss"] is None and row["gaussian_loss"] is None:
            continue
        _, _, genes, cells = _key(row)
        seed = None if cells == "all" or row["seed"] is None else str(row["seed"])
        made = Baseline(
            genes=genes, cells=cells, seed=seed, gene_mean=row["baseline_loss"], gaussian=row["gaussian_loss"]
        )
        found.setdefault((genes, cells, seed), made)
    return list(found.values())


def _contrasts(fit: Mapping[str, Any], genes: int | None) -> list[Contrast]:
    found = []
    for each in fit["contrasts"].values():
        for step in each["neighbours"]:
            ends = [step[f"{end}_name"] or f"{step[end]:,.0f}" for end in ("from", "to")]
            found.append(
                Contrast(
                    genes=genes,
                    axis=each["axis"],
                    step=" to ".join(ends),
                    gain=step["gain"],
                    low=step["low"],
                    high=step["high"],
                )
            )
    return found


def _law(fit: Mapping[str, Any], genes: int | None) -> Law:
    headline = fit["headline"]
    given = headline["parameters"] if "parameters" in headline and headline["verdict"] != REFUSED else {}
    entries = [e for e in headline["predictions"]["entries"] if e["low"] is not None and e["high"] is not None]
    return Law(
        genes=genes,
        form=headline["form"],
        size=headline["size"]["verdict"],
        data=headline["data"]["verdict"],
        prediction=headline["predictions"]["verdict"],
        parameters={
            name: Estimate(value=each["value"], low=each["low"], high=each["high"])
            for name, each in given.items()
            if each["low"] is not None and each["high"] is not None
        },
        predictions=[
            Prediction(**{name: e[name] for name in ("what", "params", "cells", "value", "low", "high")})
            for e in entries
            if e["verdict"] != REFUSED
        ],
    )


def _genes_of(fit: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The panel of a fit: that of the rows its points have by their parameters."""
    sizes = {float(size["params"]) for size in fit["points"]["sizes"]}
    panels = {row["genes"] for row in rows if float(row["params"]) in sizes}
    return int(next(iter(panels))) if len(panels) == 1 and None not in panels else None


def _the_one(values: Sequence[Any]) -> Any:
    known = {value for value in values if value not in (None, "")}
    return str(known.pop()) if len(known) == 1 else None


def _machine(row: Mapping[str, Any]) -> str:
    workers = int(row["workers"] or 1)
    return " ".join([str(row["engine"]), str(row["precision"]), *([f"x {workers}"] if workers > 1 else [])])


def _numerics(spec: SweepSpec | None, run_ids: Sequence[str]) -> int | None:
    """This version's number where it names the spec's runs as the table does; None otherwise."""
    if spec is None or not run_ids:
        return None
    return NUMERICS_VERSION if set(run_ids) <= {run.run_id for run in runs_of(spec)} else None


def versions_here() -> dict[str, str]:
    """Versions of Python and of the packages whose digits count, as installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit_here() -> str | None:
    """SCALING_RAY_COMMIT, or what git says of the checkout this package runs from ("+" where files differ), or None.

    It is that of a process's first call: a checkout may move on while its runs train.
    """
    named = os.environ.get("SCALING_RAY_COMMIT")
    folder = Path(__file__).resolve().parents[2]
    if named or not (folder / ".git").exists():
        return named or None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--", "scaling_ray") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def processor_here() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
