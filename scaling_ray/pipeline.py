"""The whole path as one call: Census -> shards -> sweep -> report, below one directory or ``s3://`` folder.

Each step leaves its results in a folder of its own and is skipped where they are whole, so the same call goes on.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_ray.errors import BadInput, BudgetSpent, RunsFailed
from scaling_ray.report.build import build_report
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.shards.format import MANIFEST
from scaling_ray.spec import SweepSpec, load_spec, parse_spec
from scaling_ray.storage import LocalPlace, Place, open_place, output_directory, write_atomic
from scaling_ray.sweep.run import run_sweep
from scaling_ray.tracking.report import track_report

if TYPE_CHECKING:
    from scaling_ray.census.beliefs import Rules
    from scaling_ray.census.joining import Joined

Progress = Callable[[str], None]


def run_pipeline(
    spec_path: str | Path,
    out: str | Path,
    *,
    census: str | Path | None = None,
    shards: str | Path | None = None,
    progress: Progress = lambda line: None,
    cluster: Path | None = None,
) -> str:
    """Run a sweep from its cells to its report; results lie at ``out``/{census,shards,sweep,report}.

    Args:
        spec_path: the sweep's TOML file.
        out: a directory or an ``s3://`` URI.
        census: directory, URI or release of a Census. Without it, and without ``shards``, it is the one at
            ``out``/census, and cells are planted there where there is none. On S3 they are planted in a temporary
            folder: the same seed makes the same cells at the next call.
        shards: directory or ``s3://`` URI of shards that another call made; no Census is read then.
        progress: called with one line of text now and then.
        cluster: file that the cluster was started from, as for ``run_sweep``.

    Returns:
        where the report's page is.

    Raises:
        BadInput: a spec, Census or shards that do not go together, or a place that cannot be used.
        RunsFailed: some runs have no result; raised after the report of those that have.
        BudgetSpent: the budget ended before the grid; raised after the report of what there is.
        Preempted: stopped on the way; the same call goes on.
    """
    spec = load_spec(spec_path)
    place = open_place(out)
    if shards is not None and census is not None:
        raise BadInput("V002", "--census", str(census), "is not read where --shards are given; name one of them")
    source = place.below("shards").uri if shards is None else str(shards)
    if shards is None:
        make_shards(source, place, spec, census, progress)
    sweep = place.below("sweep").uri
    failed: RunsFailed | BudgetSpent | None = None
    try:
        run_sweep(Path(spec_path), source, sweep, progress, cluster)
    except (RunsFailed, BudgetSpent) as error:
        # The runs that finished are worth their report; the call fails after it.
        failed = error
    progress("writing the report")
    page = str(build_report(sweep, place.below("report").uri))
    where = track_report(SweepFiles.at(sweep), place.below("report").uri, progress)
    if where is not None:
        progress(f"verdict and report are in MLflow: {where}")
    if failed:
        progress(page)
        raise failed
    return page


def run_cells(
    files: Sequence[Path],
    spec_path: str | Path,
    out: str | Path,
    *,
    rules: Rules,
    split_by: str | None = None,
    cluster: Path | None = None,
    progress: Progress = lambda line: None,
) -> str:
    """Run a sweep on somebody's own cells: they are imported to ``out``/census, and the rest is ``run_pipeline``.

    Before the first run it says what the grid can answer on these cells, and how long it takes here, at rates measured
    for a moment. ``out``/cells.toml is the spec that is run: the given one with the title, source and split of this
    call.

    Args:
        files: of cells, in any format that ``census.readers`` names.
        spec_path: the sweep's TOML file.
        out: a directory.
        rules: how the files are read.
        split_by: donor_id, dataset_id or cell, in the place of the spec's own.
        cluster: the file that `ray up` started the cluster from.
        progress: called with one line of text now and then.

    Raises:
        BadInput, RunsFailed, Preempted: as ``run_pipeline`` and ``import_h5ad``.
    """
    from scaling_ray.census.importer import import_h5ad
    from scaling_ray.census.readers import cell_file_name

    place = open_place(out)
    if not isinstance(place, LocalPlace):
        raise BadInput("V003", "--out", str(out), "is no local directory; census import to one, then run --census")
    text = Path(spec_path).read_text(encoding="utf-8")
    given, files = load_spec(spec_path).data, [Path(file) for file in files]
    asked = {"title": rules.title, "source": rules.source, "split_by": split_by}
    names = {
        "title": None if given.title else ", ".join(cell_file_name(file) for file in files),
        "source": None if given.source else ", ".join(file.name for file in files),
    }
    try:
        text = with_data(text, {key: value or names.get(key) for key, value in asked.items()}, str(spec_path))
    except BadInput:  # a table [data] written in some other way: what nobody asked for may stay away
        text = with_data(text, asked, str(spec_path))
    own = output_directory(place.path) / "cells.toml"
    spec = parse_spec(text, str(own))
    census = import_h5ad(
        files,
        place.path / "census",
        rules=rules,
        progress=progress,
        before=lambda found: _donors_serve(found, spec),
    )
    write_atomic(own, text)
    # on a cluster other machines train, and what this one can do says nothing
    if place.below("shards").size(MANIFEST) is None and not os.environ.get("RAY_ADDRESS"):
        for line in _foretold(load_spec(own), str(census), progress):
            progress(line)
    return run_pipeline(own, out, census=str(census), cluster=cluster, progress=progress)


def with_data(text: str, values: Mapping[str, str | None], where: str) -> str:
    """A spec's text with some keys of its table [data] set; keys whose value is None stay as they are."""
    given = {key: value for key, value in values.items() if value is not None}
    lines = text.splitlines()
    if given:
        heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[\s*data\s*\]\s*(#.*)?$", line)]
        if not heads:
            heads = [len(lines) + 1]
            lines += ["", "[data]"]
        at = heads[0] + 1
        end = next((n for n in range(at, len(lines)) if lines[n].lstrip().startswith("[")), len(lines))
        kept = [line for line in lines[at:end] if line.partition("=")[0].strip() not in given]
        # json writes a text as TOML's basic strings do
        lines[at:end] = [*(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()), *kept]
    changed = "\n".join(lines) + "\n"
    found = parse_spec(changed, where).data
    for key, value in given.items():
        if getattr(found, key) != value:
            raise BadInput(
                "V037", f"{where}: data.{key}", getattr(found, key), f"write it as {key} = {json.dumps(value)}"
            )
    return changed


def _donors_serve(found: Joined, spec: SweepSpec) -> None:
    """BadInput where a split by donor has too few people, before an import of hours."""
    from scaling_ray.census.donors import LEAST_DONORS, is_nobody, serves_a_split

    if spec.data.split_by != "donor_id":
        return
    labels = {str(label) for frame in found.obs for label in frame["donor_id"].unique()}
    people = {label for label in labels if not is_nobody(label)}
    if not serves_a_split(labels):
        raise BadInput(
            "V035",
            "data.split_by",
            "donor_id",
            f"needs {LEAST_DONORS} donors and these cells have {len(people)} ({', '.join(sorted(people)) or 'none'}): "
            "--donor COLUMN names the column of donors, --split cell does without (its held-out cells are of the same "
            "people)",
        )


MEASURED_SECONDS = 1.5
"""For each kind of run, to foretell how long a sweep takes."""
START_SECONDS = 60.0
"""Of Ray, of the first process of each kind, of references and report: what a sweep takes whatever its runs are."""


def _foretold(spec: SweepSpec, census: str, progress: Progress) -> list[str]:
    """What a grid can answer on the cells of a Census, and how long it takes on this machine."""
    from scaling_ray.execution import device_here
    from scaling_ray.shards.estimate import estimate
    from scaling_ray.sweep.cost import RatesFile, rate_name
    from scaling_ray.sweep.plan import make_plan
    from scaling_ray.train.bench import bench_run

    try:
        data = estimate(spec, census)
    except BadInput as error:
        if error.field != "data.split_by":
            raise
        remedy = f"{error.remedy} (here: --donor COLUMN names the donors, --split cell does without)"
        raise BadInput(error.code, error.field, error.value, remedy) from error
    splits = data["splits"]
    train = splits["train"]
    few = [cells for cells in spec.grid.cells if cells != "all" and cells > train]
    if few:
        remedy = "write a spec with fewer (scaling-ray init cells --out MINE.toml) and name it before --cells"
        raise BadInput("V004", "grid.cells", few, f"is more than the {train:,} training cells; {remedy}")
    device = device_here() if spec.resources.device == "auto" else None
    _, runs = make_plan(spec, device)
    progress("measuring how fast this machine trains each size, a moment each")
    rates: dict[str, float] = {}
    for run in runs:
        name = rate_name(run, run.execution.stack)
        if name not in rates:
            rates[name] = bench_run(run, MEASURED_SECONDS, run.execution.stack)["cells_per_second"]
    plan, runs = make_plan(spec, device, rates=[RatesFile(None, rates)])
    params = sorted({run.params for run in runs})
    sizes = sorted({train if cells == "all" else cells for cells in spec.grid.cells})
    seconds = 3600 * (data["hours"] + plan["totals"]["hours"]) + START_SECONDS
    lines = [
        f"{data['cells']:,} cells: {train:,} to train on, {splits['val']:,} to choose by, {splits['test']:,} to test "
        f"on, split by {spec.data.split_by}",
        f"{len(runs)} runs: {len(spec.grid.sizes)} sizes from {params[0]:,} to {params[-1]:,} parameters, "
        f"{' and '.join(f'{cells:,}' for cells in sizes)} training cells, {len(spec.grid.seeds)} seeds",
        f"they can show what size buys over {params[-1] / params[0]:,.0f}-fold parameters"
        + (f" and what cells buy over {sizes[-1] / sizes[0]:,.1f}-fold data" if len(sizes) > 1 else "")
        + "; a law is refused where these do not determine it, and nothing is claimed far beyond them",
        f"about {max(1, round(seconds / 60)):,} minutes on {spec.resources.cpus} CPUs of this machine where nothing "
        "else runs on them; less where runs stop improving early",
    ]
    return lines


def make_shards(target: str, place: Place, spec: SweepSpec, census: str | Path | None, progress: Progress) -> None:
    """Shards at ``target``, from ``census``, from the one at ``place``/census, or from cells planted for them."""
    # What reads a Census is imported only here: a call with shards needs none of it installed.
    from scaling_ray.census.layout import existing
    from scaling_ray.shards.convert import build_shards

    if census is None and isinstance(place, LocalPlace) and existing(place.path / "census") is not None:
        census = place.path / "census"
    if census is not None:
        build_shards(spec, str(census), target, progress)
    elif open_place(target).size(MANIFEST) is None:
        progress("no --census given: planting cells whose best possible loss is known")
        with _planted(place, progress) as made:
            build_shards(spec, str(made), target, progress)


@contextmanager
def _planted(place: Place, progress: Progress) -> Iterator[Path]:
    """A planted Census, there for as long as the block runs; below ``place`` it stays."""
    from scaling_ray.planted.plant import plant

    if isinstance(place, LocalPlace):
        yield plant(place.path / "census", progress=progress)
        return
    if os.environ.get("RAY_ADDRESS"):
        raise BadInput(
            "V005",
            "--census",
            None,
            f"with --out {place} on a cluster, cells cannot be planted where every node reads them; plant them in a "
            "directory that every node mounts (scaling-ray census plant --out DIR) and name it",
        )
    with tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
        yield plant(Path(folder) / "census", progress=progress)
