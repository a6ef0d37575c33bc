"""Where a sweep is tracked, which MLflow runs are its own, and what has been logged there; needs no MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scaling_ray.errors import BadInput
from scaling_ray.results.sweep_files import MLFLOW, TRACKED, SweepFiles, read_sealed, write_sealed
from scaling_ray.spec import content_hash
from scaling_ray.storage import Place


@dataclass(frozen=True)
class Tracked:
    """An mlflow.json: the MLflow run of a sweep or of one of its runs.

    ``sweep`` is the key that all MLflow runs of one sweep have in common, ``experiment`` the id of their experiment,
    ``started_ms`` when the run began, in milliseconds since 1970. All are empty in a file of an earlier version, whose
    runs are logged anew.
    """

    mlflow_run_id: str
    uri: str
    sweep: str = ""
    experiment: str = ""
    started_ms: int = 0


def read_tracked(place: Place) -> Tracked | None:
    """The mlflow.json of a place, None where there is none; raises BadInput for one that was changed."""
    found = read_sealed(place, MLFLOW)
    return None if found is None else Tracked(**found)


def write_tracked(place: Place, tracked: Tracked) -> None:
    """Write the mlflow.json of a place."""
    write_sealed(place, MLFLOW, tracked.__dict__)


def sweep_key(sweep: SweepFiles) -> str:
    """The key of a sweep's MLflow runs: the one they have, or a hash of the place, which tells two sweeps apart."""
    known = read_tracked(sweep.place)
    return known.sweep if known is not None and known.sweep else content_hash(str(sweep))[:16]


def tracking_uri(sweep: SweepFiles) -> str | None:
    """MLFLOW_TRACKING_URI, else the server that the sweep is on, else a sqlite file beside the sweep.

    None for a sweep that lies on S3 where no server is named.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    known = read_tracked(sweep.place)
    if known is not None and known.uri.startswith(("http://", "https://")):
        return known.uri
    folder = local_folder(sweep.place)
    return f"sqlite:///{(folder.parent / 'mlruns.db').resolve()}" if folder is not None else None


def known_uri(sweep: SweepFiles) -> str:
    """The tracking URI of a sweep; raises BadInput where it has none."""
    uri = tracking_uri(sweep)
    if uri is None:
        remedy = "is not set, and a sweep on S3 has no database beside it; name a tracking server in it"
        raise BadInput("K006", "MLFLOW_TRACKING_URI", None, remedy)
    return uri


def shown_uri(uri: str) -> str:
    """A tracking URI for people: without the user and password that it may hold."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rsplit('@', 1)[-1]}{slash}{path}"


def local_folder(place: Place) -> Path | None:
    """The directory of a place on a disk of this machine; None for one that lies elsewhere."""
    return None if "://" in place.uri else Path(place.uri)


def record_tracked(sweep: SweepFiles, finished: Iterable[str], uri: str | None = None) -> None:
    """Record the ids of runs whose end has been logged to ``uri`` (the present one if left out)."""
    write_sealed(sweep.place, TRACKED, {"uri": uri or tracking_uri(sweep), "finished": sorted(finished)})


def is_tracked(sweep: SweepFiles, run_ids: Iterable[str]) -> bool:
    """Whether the end of every one of these runs has been logged to the present tracking URI."""
    found = read_sealed(sweep.place, TRACKED)
    return found is not None and found["uri"] == tracking_uri(sweep) and set(found["finished"]) >= set(run_ids)
