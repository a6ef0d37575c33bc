"""A sweep's tracking URI and a record of what has been logged there; needs no MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from scaling_ray.results.sweep_files import TRACKED, SweepFiles, read_sealed, write_sealed
from scaling_ray.storage import Place


def tracking_uri(sweep: SweepFiles) -> str | None:
    """MLFLOW_TRACKING_URI, or a sqlite file beside the sweep; None for a sweep that lies on S3 where none is named."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    folder = local_folder(sweep.place)
    return f"sqlite:///{(folder.parent / 'mlruns.db').resolve()}" if folder is not None else None


def local_folder(place: Place) -> Path | None:
    """The directory of a place on a disk of this machine; None for one that lies elsewhere."""
    return None if "://" in place.uri else Path(place.uri)


def record_tracked(sweep: SweepFiles, finished: Iterable[str]) -> None:
    """Record the ids of runs whose end has been logged to the present tracking URI."""
    write_sealed(sweep.place, TRACKED, {"uri": tracking_uri(sweep), "finished": sorted(finished)})


def is_tracked(sweep: SweepFiles, run_ids: Iterable[str]) -> bool:
    """Whether the end of every one of these runs has been logged to the present tracking URI."""
    found = read_sealed(sweep.place, TRACKED)
    return found is not None and found["uri"] == tracking_uri(sweep) and set(found["finished"]) >= set(run_ids)
