"""The whole path as one call: Census -> shards -> sweep -> report, below one directory or ``s3://`` folder.

Each step leaves its results in a folder of its own and is skipped where they are whole, so the same call goes on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scaling_ray.errors import BadInput, RunsFailed
from scaling_ray.report.build import build_report
from scaling_ray.shards.format import MANIFEST
from scaling_ray.spec import SweepSpec, load_spec
from scaling_ray.storage import LocalPlace, Place, open_place
from scaling_ray.sweep.run import run_sweep

Progress = Callable[[str], None]


def run_pipeline(
    spec_path: str | Path,
    out: str | Path,
    *,
    census: str | Path | None = None,
    shards: str | Path | None = None,
    progress: Progress = lambda line: None,
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

    Returns:
        where the report's page is.

    Raises:
        BadInput: a spec, Census or shards that do not go together, or a place that cannot be used.
        RunsFailed: some runs have no result; raised after the report of those that have.
        Preempted: stopped on the way; the same call goes on.
    """
    spec = load_spec(spec_path)
    place = open_place(out)
    if shards is not None and census is not None:
        raise BadInput("--census", str(census), "is not read where --shards are given; name one of them")
    source = place.below("shards").uri if shards is None else str(shards)
    if shards is None:
        make_shards(source, place, spec, census, progress)
    sweep = place.below("sweep").uri
    failed: RunsFailed | None = None
    try:
        run_sweep(Path(spec_path), source, sweep, progress)
    except RunsFailed as error:
        # The runs that finished are worth their report; the call fails after it.
        failed = error
    progress("writing the report")
    page = str(build_report(sweep, place.below("report").uri))
    if failed:
        progress(page)
        raise failed
    return page


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
            "--census",
            None,
            f"with --out {place} on a cluster, cells cannot be planted where every node reads them; plant them in a "
            "directory that every node mounts (scaling-ray census plant --out DIR) and name it",
        )
    with tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
        yield plant(Path(folder) / "census", progress=progress)
